"""RL²: an agent that adapts in its memory."""
