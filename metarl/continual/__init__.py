"""Measures of continual learning: forgetting, transfer, the score table, the use of the network."""
