"""Classifiers: tasks, the modes of fine-tuning, losses, metrics, results."""
