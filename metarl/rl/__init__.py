"""Returns, surrogate losses and value functions: pure functions on tensors."""
