"""Delta models: artifact, prompt, spelling, key-value cache and forward pass."""
