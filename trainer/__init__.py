"""A training run: options, log, checkpoints, processes, optimiser."""
