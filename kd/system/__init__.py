"""Ranks, the machine, files and sources of models: what every other part stands on."""
