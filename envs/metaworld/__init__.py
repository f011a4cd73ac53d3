"""Meta-World: tasks, a fast version of the official environments, their models and rendering."""
