"""From files of text to tokens: formats, records, prompts, authors, splits."""
