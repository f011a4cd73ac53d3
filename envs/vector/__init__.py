"""Vectorised environments: stepped in this process or in workers, for one stage or all."""
