"""A training run: its options, folder, log, checkpoints, signals and processes."""
