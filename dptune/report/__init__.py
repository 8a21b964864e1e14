"""What a run guarantees: as a value, a report, a model card and plots."""
