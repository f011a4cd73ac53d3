"""What metarl computes does not depend on torch settings of the process that calls it. Imports nothing of metarl."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def default_torch_settings() -> Iterator[None]:
    """Compute with gradients and in float32 by default, and leave the caller's settings as they were.

    Programs around a policy often run under `torch.no_grad()` or `torch.inference_mode()`, or set another default
    dtype. As a decorator, it does so in each call of a function.
    """
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        torch.set_default_dtype(dtype)
