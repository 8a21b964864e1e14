"""Answers to instructions from an endpoint."""
