"""Runs in processes of their own: on this machine, as an array of a cluster's queue, or on a Ray cluster."""
