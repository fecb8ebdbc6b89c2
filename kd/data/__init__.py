"""Tasks, their text and labels, and the loaders that turn them into batches."""
