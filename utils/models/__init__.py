"""Loads models, shards and quantises them, chooses the trained parameters, estimates memory."""
