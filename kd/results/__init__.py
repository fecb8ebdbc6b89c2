"""The record, the exported model and the tables of a finished run."""
