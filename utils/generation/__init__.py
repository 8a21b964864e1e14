"""Sampling texts from a model."""
