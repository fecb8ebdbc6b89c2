"""Runs: their directories, digests and the runs that they need first."""
