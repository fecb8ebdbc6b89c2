"""The interface for Python: runs without a command line, and methods inside training loops of others."""
