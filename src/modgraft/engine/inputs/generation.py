"""Keeps the tokens of prompts from all that sees the ids while a host generates.

Processors of logits, stopping criteria, streamers and the caller are given the text and what is
written after it, as they are without the tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from modgraft.core.call import Call
from modgraft.engine.inputs.splice import Splice


class _OnText:
    """A processor of logits, or a stopping criterion, that is given the text without the tokens."""

    def __init__(self, plan: Splice, function: Callable[[Tensor, Tensor], Any]) -> None:
        self.plan, self.function = plan, function

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Any:
        """Call the function with ids ``[R, n]`` and the scores ``[R, V]`` of what comes next."""
        return self.function(self.plan.without_tokens(input_ids), scores)


class _TextStreamer:
    """A streamer that is given the text without the tokens, then each new token."""

    def __init__(self, plan: Splice, streamer: Any) -> None:
        self.plan, self.streamer, self.begun = plan, streamer, False

    def put(self, value: Tensor) -> None:
        """Hand on the text ``[B, T]`` first, and what comes after it as it is."""
        self.streamer.put(value if self.begun else self.plan.without_tokens(value))
        self.begun = True

    def end(self) -> None:
        """Hand on that nothing more comes."""
        self.streamer.end()


def on_text(plan: Splice) -> dict[str, Any]:
    """Return the arguments of ``generate``, with what the caller gave to see the text alone."""
    kwargs = dict(plan.kwargs)
    if plan.keep is None:
        return kwargs
    if criteria := kwargs.get("stopping_criteria"):
        kwargs["stopping_criteria"] = type(criteria)([_OnText(plan, one) for one in criteria])
    if streamer := kwargs.get("streamer"):
        kwargs["streamer"] = _TextStreamer(plan, streamer)
    return kwargs


def processors(
    host: nn.Module, call: Call, make: Callable[..., Any], kwargs: dict[str, Any]
) -> Any:
    """Return the processors that ``make`` gives for a ``generate``, which see the text alone.

    Args:
        host: the host.
        call: the call under way.
        make: the host's own ``_get_logits_processor``.
        kwargs: what transformers calls it with.
    """
    plan: Splice | None = call.spliced
    if plan is None or plan.text is None:
        return make(host, **kwargs)
    kwargs = {**kwargs, "encoder_input_ids": plan.text}
    if plan.keep is None:
        return make(host, **kwargs)
    count = plan.total - plan.text.shape[1]
    settings = kwargs["generation_config"] = copy.copy(kwargs["generation_config"])
    settings.min_length -= count
    settings.max_length -= count
    kwargs["input_ids_seq_length"] -= count
    made = make(host, **kwargs)
    return type(made)([_OnText(plan, made)] if made else [])


def text_alone(plan: Splice, out: Any) -> Any:
    """Return what ``generate`` gave, where it begins with the text and the tokens without these."""
    ids = out if isinstance(out, Tensor) else out.sequences
    given = plan.kwargs.get("input_ids")
    if plan.keep is None or given is None or ids.shape[1] < plan.total:
        return out
    given = given.repeat_interleave(len(ids) // len(given), dim=0)
    if not torch.equal(ids[:, : plan.total], given):  # some hosts return what is new
        return out
    ids = plan.without_tokens(ids)
    return ids if isinstance(out, Tensor) else replace(out, sequences=ids)
