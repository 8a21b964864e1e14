"""The privacy unit (a row or a person), and how its rows become one clipped contribution."""
