"""The privacy unit (a row, an item or a person), and how its rows become one clipped contribution."""
