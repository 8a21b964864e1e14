"""Classifiers: tasks, fine-tuning modes, losses, metrics, results."""
