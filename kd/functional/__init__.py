"""Pure functions of tensors, layers and scores, without modules or configuration."""
