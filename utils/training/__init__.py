"""Training a model from the command line: flags, plan, loop, outputs, resume."""
