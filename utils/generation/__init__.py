"""Sampling texts from a model in batches."""
