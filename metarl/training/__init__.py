"""The training loop, how a run starts, and warm starts from other runs."""
