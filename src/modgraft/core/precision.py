"""The precision of modules: float32 beside a host in half precision.

For a host in bfloat16 or float16 the rule is, everywhere:

- The parameters of its modules are float32. In bfloat16 an update of 1e-4 is lost in most sums, and
  a ``GradScaler`` refuses gradients in float16. They are saved as they are.
- A module computes as the layer does, in the type of the layer's activations, as under
  ``torch.autocast``; its effect is cast to that type where it meets the layer's output. Tokens,
  keys and values are computed in float32, and cast where they meet the host's. Routers choose in
  float32.
- θ + Δ is summed in float32 and rounded once to the host's type, in a merge and wherever a layer is
  run with changed weights.

Whoever wants a module in half precision writes ``host["qa"].to(torch.bfloat16)``.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)
_AS_IT_IS = nullcontext()


def parameter_type(host: torch.dtype) -> torch.dtype:
    """Return the type of a new module's parameters beside weights of the type ``host``."""
    return host if host.itemsize >= 4 else torch.float32


def wide(tensor: Tensor) -> Tensor:
    """Return ``tensor`` in a type that sums are exact enough in: half precision as float32."""
    return tensor.float() if tensor.dtype in HALF else tensor


def as_the_layer(y: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which float32 modules compute as a layer does that put out ``y``."""
    if y.dtype not in HALF or y.is_meta or torch.is_autocast_enabled(y.device.type):
        return _AS_IT_IS
    return torch.autocast(y.device.type, dtype=y.dtype)
