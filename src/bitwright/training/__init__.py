"""Training with low-bit products."""
