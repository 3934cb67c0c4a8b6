"""Effects that enter a layer's residual input: ``at="feedforward[residual]"``.

A post-norm block ends in one layer that sums and norms, as BERT's output layers do: f(h, r) =
norm(W h + r). A module that acts inside the norm changes r, not f's output:

    f'(…, r) = f(…, r + e),  e = 0 at first and e ← e + m(y, r) − y with y = f(…, r + e) for each m,

so that modules stack and add in the residual as they do in outputs, and one that starts as the
identity has e = 0. r is the last of the layer's arguments that has the shape of its output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from modgraft.core.errors import SiteError

Effect = Callable[[Tensor, Tensor], Tensor]  # m: y, r → the new y
Step = Callable[[Effect, Tensor], Tensor]  # m, e → the e after it


def shifted(
    f: Callable[[tuple, dict], Tensor],
    args: tuple,
    kwargs: dict,
    fold: Callable[[Step, Tensor], Tensor],
    path: str,
) -> tuple[tuple, dict]:
    """Return the arguments of ``f`` with r + e for r.

    Args:
        f: the layer itself: arguments → its output tensor.
        args: its arguments.
        kwargs: its arguments by name.
        fold: takes a step for each module, beginning at e = 0.
        path: the layer's path, for the error.

    Raises:
        SiteError: where no argument has the output's shape, or one of them is a cache, which each
            run of the layer writes to.
    """
    for value in (*args, *kwargs.values()):
        if not _is_data(value):
            raise SiteError(
                f"{path}[residual]: to add to its residual a layer is run more than once, and this "
                f"one is called with a {type(value).__name__}, which every run writes to; call the "
                f"host with use_cache=False, or leave out [residual]"
            )
    bare = f(args, kwargs)
    like = [k for k, v in enumerate(args) if _same(v, bare)]
    named = [k for k, v in kwargs.items() if _same(v, bare)]
    if not like and not named:
        raise SiteError(
            f"{path}[residual]: none of the tensors that this site takes has its output's shape "
            f"{list(bare.shape)}, so there is no residual to add to; leave out [residual]"
        )
    r = kwargs[named[-1]] if named else args[like[-1]]
    start = torch.zeros_like(r)

    def put(e: Tensor) -> tuple[tuple, dict]:
        if named:
            return args, {**kwargs, named[-1]: r + e}
        return (*args[: like[-1]], r + e, *args[like[-1] + 1 :]), kwargs

    def step(effect: Effect, e: Tensor) -> Tensor:
        y = bare if e is start else f(*put(e))
        return e + (effect(y, r) - y)

    return put(fold(step, start))


def _is_data(value: Any) -> bool:
    """Return whether running a layer with ``value`` leaves it as it is."""
    if isinstance(value, tuple):
        return all(map(_is_data, value))
    return value is None or isinstance(value, Tensor | bool | int | float | str)


def _same(value: Any, output: Tensor) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.shape == output.shape
