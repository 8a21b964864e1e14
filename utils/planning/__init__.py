"""Proposes the settings of a training for a computing budget and an epsilon."""
