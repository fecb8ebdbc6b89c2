"""Knowledge distillation of BERT-style encoders: one paper, one file."""

__version__ = "0.1.0"
