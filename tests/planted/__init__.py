"""Faults that break privacy in silence, each of which some test must catch: `make mutants`."""
