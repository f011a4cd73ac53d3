"""MuJoCo families: tasks, bodies, environments, and names of observations and actions."""
