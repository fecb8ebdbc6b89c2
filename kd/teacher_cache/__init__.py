"""Outputs of frozen teachers, computed once and read by every student."""
