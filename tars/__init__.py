"""Training data: tars of pairs, stories and dialogues to batches."""
