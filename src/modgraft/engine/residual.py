"""Effects that enter a layer's residual input: ``at="feedforward[residual]"``.

A post-norm block ends in one layer that sums and norms, as BERT's output layers do: f(h, r) =
norm(W h + r). A module that acts inside the norm changes r, not f's output:

    f'(…, r) = f(…, r + e),  e = 0 at first and e ← e + m(y, r) − y with y = f(…, r + e) for each m,

so that modules stack and add in the residual as they do in outputs, and one that starts as the
identity has e = 0. r is the last of the layer's arguments that has the shape of its output. Each y
is a run of the layer, on copies of the caches that it writes to; the run on r + e writes to them.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from copy import copy
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
        SiteError: where no argument has the output's shape, or one of them is an object that a run
            of the layer may write to, and of which nobody knows how to make a copy.
    """
    for value in (*args, *kwargs.values()):
        if not _is_copied(value):
            raise SiteError(
                f"{path}[residual]: to add to its residual a layer is run more than once, and this "
                f"one is called with a {type(value).__name__}, which every run may write to; call "
                f"the host without it, or leave out [residual]"
            )

    def run(args: tuple, kwargs: dict) -> Tensor:
        return f(_copied(args), {name: _copied(value) for name, value in kwargs.items()})

    bare = run(args, kwargs)
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
        y = bare if e is start else run(*put(e))
        return e + (effect(y, r) - y)

    return put(fold(step, start))


def _is_copied(value: Any) -> bool:
    """Return whether :func:`_copied` gives all of ``value`` that a layer may write to."""
    if isinstance(value, tuple | list):
        return all(map(_is_copied, value))
    if isinstance(value, dict):
        return all(map(_is_copied, value.values()))
    return value is None or isinstance(value, Tensor | bool | int | float | str) or _caches(value)


def _copied(value: Any) -> Any:
    """Return ``value``, an argument of a layer, with copies of what it writes to.

    Those are caches, and what lists and dictionaries hold; gradients pass through the copies.
    """
    if type(value) is tuple:
        return tuple(map(_copied, value))
    return value if isinstance(value, Tensor) else _fork(value)


def _fork(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return type(value)((k, _fork(v)) for k, v in value.items())
    if type(value) in (tuple, list):
        return type(value)(map(_fork, value))
    if _caches(value):
        new = copy(value)
        new.__dict__ = {name: _fork(own) for name, own in value.__dict__.items()}
        return new
    return value


def _caches(value: Any) -> bool:
    """Return whether ``value`` is a cache of transformers, or a part of one."""
    kinds = type(value).__mro__
    return isinstance(value, UserDict) or any(
        "Cache" in kind.__name__ and kind.__module__.startswith("transformers.") for kind in kinds
    )


def _same(value: Any, output: Tensor) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.shape == output.shape
