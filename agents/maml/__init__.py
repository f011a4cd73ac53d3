"""The MAML family: one file a method, on one agent, one inner loop and one outer objective."""
