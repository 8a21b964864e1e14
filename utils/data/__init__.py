"""Turns files of text into tokens: formats, records, prompts, authors, splits."""
