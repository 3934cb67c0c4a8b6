"""Caches of keys and values that hold the tokens of prompts.

``generate`` goes on from the cache of an earlier call: it reads what of the text is not yet in it.
With a prompt, text and cache are counted with its tokens. So a cache that was written with tokens
is marked with them, and goes on with the same ones at the same places.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modgraft.core.errors import ModgraftError
from modgraft.core.expression import Expression
from modgraft.core.per_example import Each

_MARK = "_modgraft_tokens"
_NAMES = ("past_key_values", "cache_params")


@dataclass(frozen=True)
class Held:
    """The tokens in a cache.

    Attributes:
        modules: the names of the prompts, for each row of the batch or once for all.
        places: ``[B, T]``, where the text's own positions were among all.
    """

    modules: tuple[tuple[str, ...], ...]
    places: Tensor

    def goes_on_as(self, later: Held) -> bool:
        """Return whether a later text begins with these tokens at these places."""
        text = self.places.shape[1]
        rows, odd = divmod(len(later.places), len(self.places))  # as many texts of each come back
        if self.modules != later.modules or odd or later.places.shape[1] < text:
            return False
        return torch.equal(self.places.repeat_interleave(rows, dim=0), later.places[:, :text])


def modules_in(composition: Expression, tokens: Collection[str]) -> tuple[tuple[str, ...], ...]:
    """Return the names of those modules of a composition that put in tokens, by its rows."""
    rows = composition.rows if isinstance(composition, Each) else (composition,)
    return tuple(tuple(n for n in row.names() if n in tokens) if row else () for row in rows)


def filled(values: Any) -> Any | None:
    """Return the cache among the arguments of a call, if it holds something already."""
    cache = _cache(values)
    count = getattr(cache, "get_seq_length", None)
    return cache if cache is not None and (count is None or count()) else None


def mark(values: Any, held: Held | None) -> None:
    """Note on the cache among a call's arguments, or its outputs, which tokens are in it."""
    cache = _cache(values)
    if held is not None and hasattr(cache, "get_seq_length"):
        setattr(cache, _MARK, held)


def _cache(values: Any) -> Any | None:
    found = (values.get(name) for name in _NAMES) if isinstance(values, Mapping) else ()
    return next((cache for cache in found if cache is not None), None)


def check_whole(model: nn.Module, kwargs: Mapping[str, Any], generating: bool) -> None:
    """Refuse a cache where no whole text comes with it.

    Args:
        model: the host's model.
        kwargs: the arguments of the call.
        generating: whether they are those of ``generate``, with the text's ids.

    Raises:
        ModgraftError: with the remedy.
    """
    two = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if filled(kwargs) is not None and (two or not generating):
        raise ModgraftError(
            "with an input module, what goes on from a cache is host.generate(whole_text, "
            "past_key_values=cache), of ids and without an encoder; leave the cache out here, and "
            "give the whole text"
        )


def check_goes_on(kwargs: Mapping[str, Any], held: Held | None) -> None:
    """Refuse a cache that was written with other tokens than those of this call.

    Args:
        kwargs: the arguments of the call.
        held: the tokens of the call; None: it has none.

    Raises:
        ModgraftError: with the remedy.
    """
    if (cache := filled(kwargs)) is None:
        return
    before: Held | None = getattr(cache, _MARK, None)
    if before is held or (before is not None and held is not None and before.goes_on_as(held)):
        return
    has = "no tokens of prompts" if before is None else f"the tokens of {_said(before)}"
    wants = "none" if held is None else f"those of {_said(held)}"
    raise ModgraftError(
        f"the cache of this call was written with {has}, and the call has {wants}, or has them at "
        f"other places of the text; leave the cache out, so that the text is read anew, or go on "
        f"with the same prompts and the same padding"
    )


def _said(held: Held) -> str:
    return ", ".join(dict.fromkeys(repr(name) for row in held.modules for name in row)) or "none"
