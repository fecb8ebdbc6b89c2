"""From words on a command line to a typed, checked specification."""
