"""Runs a copy of a host, without its modules, to see what the host does with an input.

The copy shares the host's weights; what the run writes to them is taken back, and neither the
random generators nor the modes of the caller know of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from itertools import islice
from types import GeneratorType
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _len_torch_function_stack
from torch.overrides import _pop_mode_temporarily

from modgraft.core.layers import STATE
from modgraft.engine.capturing import captures
from modgraft.engine.copies import copied
from modgraft.engine.writes import taken_back

REFUSALS = (Exception,)
"""What a host raises on an input that it cannot read: anything."""

SITE = "_modgraft_site"
"""The mark that a copied layer has where the host's has modules."""

STEPS = 64
"""How far a host is read that never ends."""


def twin_of(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` without modules, in evaluation mode, that shares its weights."""
    memo: dict[int, Any] = {id(p): p for p in model.parameters()}
    for layer in model.modules():
        states = [v for v in layer.__dict__.values() if isinstance(v, Tensor)]
        memo |= {id(v): v.detach().clone() for v in states}  # deepcopy refuses what has a graph
    twin = copied(model, memo)
    for path, layer in model.named_modules():
        if STATE in layer.__dict__:
            twin.get_submodule(path).__dict__[SITE] = True
    twin.__dict__[SITE] = True  # what comes out in the end tells most
    for layer in twin.modules():  # of hooks, only those that the host computes with
        for hooks in (layer._forward_pre_hooks, layer._forward_hooks):
            for key in [key for key, hook in hooks.items() if not _computes(hook)]:
                del hooks[key]
    return twin.eval()


def _computes(hook: Callable[..., Any]) -> bool:
    """Return whether torch computes weights by ``hook``, or transformers hidden states."""
    return type(hook).__module__.startswith("torch.") or captures(hook)


def run_twin(
    twin: nn.Module,
    args: tuple,
    kwargs: Mapping[str, Any],
    handles: list[Any],
    watched: AbstractContextManager[None] | None = None,
) -> None:
    """Run ``twin``, and take off the hooks that look at it.

    Modes of the caller, as one that takes losses apart, are none of a question's.

    Args:
        twin: what runs.
        args: what it is called with.
        kwargs: what it is called with by name.
        handles: of the hooks.
        watched: what it runs within.
    """
    try:
        devices = {p.device for p in twin.parameters() if p.device.type == "cuda"}
        with ExitStack() as stack:
            for _ in range(_len_torch_function_stack()):
                stack.enter_context(_pop_mode_temporarily())
            stack.enter_context(torch.random.fork_rng(sorted(devices, key=str)))
            stack.enter_context(torch.no_grad())
            stack.enter_context(taken_back(twin))
            stack.enter_context(watched or nullcontext())
            all_steps(twin(*args, **kwargs))
    finally:
        for handle in handles:
            handle.remove()


def all_steps(out: Any) -> Any:
    """Return the first steps of a generator, whose layers run when it is read; else ``out``."""
    return list(islice(out, STEPS)) if isinstance(out, GeneratorType) else out
