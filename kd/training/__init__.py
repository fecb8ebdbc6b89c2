"""Training of one run, from the preflight checks to the last checkpoint."""
