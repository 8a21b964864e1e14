"""Benchmarks of dptune. Run them from the repository's root, for example `python -m benchmarks.step`."""
