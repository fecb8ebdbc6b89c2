"""Pure functions: tensors in, tensors out. No modules, no configuration."""
