"""Programs that print a ratio. Run them from the repository: `python -m benchmarks.step`."""
