"""Distillation methods, one paper in each file."""
