"""Comparing the modes of fine-tuning, privately or not."""
