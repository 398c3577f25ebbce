"""PyTorch checkpoints in and out, and Orbax storage."""
