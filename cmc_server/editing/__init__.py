"""Published algorithms that edit the weights of checkpoints."""
