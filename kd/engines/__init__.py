"""Training engines: LightningModules, one for each form of training step."""
