"""Answers to instructions, from an OpenAI-compatible endpoint."""
