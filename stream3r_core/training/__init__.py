"""Training: synthetic or recorded clips in, checkpoints out."""
