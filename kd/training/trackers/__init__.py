"""Loggers beside the history: Weights & Biases, TensorBoard, trackio."""
