"""What a run leaves on disk: checkpoints, its directory, its lock, its logs."""
