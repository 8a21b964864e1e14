"""Comparing fine-tuning modes, with and without privacy."""
