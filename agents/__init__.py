"""Agents, one file each; an algorithm is read top to bottom in its file."""
