"""One engine for each shape of update."""
