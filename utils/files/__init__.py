"""File formats: tables, JSON lines, journals."""
