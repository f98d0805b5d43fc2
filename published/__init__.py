"""Published weights: loading, converting, checking, and the checkpoints that go over them."""
