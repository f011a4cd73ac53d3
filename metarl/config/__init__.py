"""The settings of a run: schema, YAML, flags, and readable errors."""
