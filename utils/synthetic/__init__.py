"""Synthetic texts: resampling them, and judging them against real ones."""
