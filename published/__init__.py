"""Published weights: fetching, converting, checking and loading them, and our checkpoints."""
