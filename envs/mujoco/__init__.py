"""MuJoCo families: their tasks, bodies, and names of observations and actions."""
