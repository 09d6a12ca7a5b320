"""What a delta does, in figures."""
