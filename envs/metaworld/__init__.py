"""Meta-World: its tasks, its environments made fast, their models and scenes."""
