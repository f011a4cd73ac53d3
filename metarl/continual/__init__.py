"""Measures of continual learning: forgetting, transfer, the score table, use of the network."""
