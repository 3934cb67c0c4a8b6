"""Counts positions from where a text begins, where modules put keys and values before its own.

Keys before a text stand still. A model that is given no positions counts those of padding on the
left too, and so moves the text away from these keys. A model whose positions are rotations does not
notice where its counting begins, as long as it is alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from modgraft.core.compiled import switched
from modgraft.core.context import Context
from modgraft.core.embeddings import arguments_of, counts_from
from modgraft.core.expression import Expression
from modgraft.core.per_example import Each
from modgraft.engine.copies import OfHost
from modgraft.engine.inputs.expressions import fold
from modgraft.engine.inputs.rows import MASK, POSITIONS

_TEXTS = ("input_ids", "inputs_embeds")


class CountFromText(OfHost):
    """A forward pre-hook: gives a model the positions of a text that is padded on the left.

    Args:
        context: the host's.
        arguments: the names of the arguments that the model takes, in order.
        first: the position that the model gives a text's first token.
    """

    def __init__(self, context: Context, arguments: tuple[str, ...], first: int) -> None:
        self.context, self.arguments, self.first = context, arguments, first

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Return other arguments for the call, None where these will do."""
        composition = self.context.now().composition
        acting = [] if composition is None else self._acting(composition)
        if composition is None or not acting:
            return None
        given = {**dict(zip(self.arguments, args, strict=False)), **kwargs}
        mask = _seen(given.get(MASK))
        texts = [given[key] for key in _TEXTS if given.get(key) is not None]
        if given.get(POSITIONS) is not None or not texts or mask is None:
            return None
        if not torch.compiler.is_dynamo_compiling() and bool(mask[:, 0].all()):
            return None
        start = (mask != 0).int().argmax(1, keepdim=True)  # [B, 1]
        if switched(composition):  # weights say what acts
            weights: dict[str, Any] = composition.weights()
            start = start * torch.stack([weights[name] != 0 for name in acting]).any()
        if isinstance(composition, Each):  # the others count as the bare host does
            acts = torch.tensor([bool(row and self._acting(row)) for row in composition.rows])
            start = start * acts.to(mask.device).repeat_interleave(len(mask) // len(acts))[:, None]
        places = torch.arange(mask.shape[1], device=mask.device) - start  # [B, n], also of a cache
        places = places.clamp(min=0)[:, -texts[0].shape[1] :] + self.first
        return (), {**given, POSITIONS: places}

    def _acting(self, composition: Expression) -> list[str]:
        """Return the modules of ``composition`` that put in keys and values."""
        return [name for name in composition.names() if name in self.context.keys_values]


class CountFromPrefix(CountFromText):
    """A forward pre-hook: lets the positions of a text begin after the prefixes that count as some.

    Args:
        context: the host's.
        arguments: the names of the arguments that the model takes, in order.
        first: the position that the model gives a text's first token, where it is free to count
            from a text; None: it counts its padding too.
    """

    def __init__(self, context: Context, arguments: tuple[str, ...], first: int | None) -> None:
        super().__init__(context, arguments, first or 0)
        self.free = first is not None
        self.lengths: dict[str, int] = {}
        """How many positions each prefix takes up."""

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Return other arguments for the call, None where these will do."""
        composition = self.context.now().composition
        if composition is None or not self._acting(composition):
            return None
        padded = super().__call__(model, args, kwargs) if self.free else None
        given = {**dict(zip(self.arguments, args, strict=False)), **kwargs}
        given = given if padded is None else padded[1]
        texts = [given[key] for key in _TEXTS if given.get(key) is not None]
        if not texts:
            return None
        text, positions = texts[0], given.get(POSITIONS)
        if positions is None:
            cache = given.get("past_key_values")
            past = 0 if cache is None else cache.get_seq_length()
            positions = torch.arange(text.shape[1], device=text.device) + past + self.first
            positions = positions.expand(text.shape[0], -1)  # [B, n]
        if isinstance(composition, Each):
            counts = [0 if row is None else self._count(row) for row in composition.rows]
            shift = torch.tensor(counts, device=text.device)
            shift = shift.repeat_interleave(text.shape[0] // len(counts))[:, None]
        elif switched(composition):
            weights: dict[str, Any] = composition.weights()
            acts = [(weights[n] != 0) * k for n, k in self.lengths.items() if n in weights]
            shift = torch.stack(acts).sum()
        else:
            shift = self._count(composition)
        return (), {**given, POSITIONS: positions + shift}

    def _acting(self, composition: Expression) -> list[str]:
        return [name for name in super()._acting(composition) if self.lengths.get(name)]

    def _count(self, composition: Expression) -> int:
        """Return how many positions a composition takes up; a mean takes up as many as each."""

        def one(name: str) -> list[int]:
            return [self.lengths[name]] if name in self.lengths else []

        return sum(fold(composition, one, max))


def _seen(mask: Any) -> Tensor | None:
    """Return which tokens ``[B, n]`` a mask of a model shows, None where it says nothing of that.

    Of one ``[B, 1, n, n]``, bool or to be added to scores, or of one of these for each kind of
    attention, what the last token sees.
    """
    if isinstance(mask, Mapping):
        mask = mask.get("full_attention")
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        return None
    if mask.dim() == 2:
        return mask
    last = mask[:, 0, -1]
    return last >= 0 if last.is_floating_point() else last


def count_from_texts(model: nn.Module, context: Context) -> None:
    """Let each part of ``model`` that is free to count from its texts, unless it does."""
    for part in model.modules():
        counting = any(type(h) is CountFromText for h in part._forward_pre_hooks.values())
        if not counting and (first := counts_from(part)) is not None:
            hook = CountFromText(context, arguments_of(part), first)
            part.register_forward_pre_hook(hook, with_kwargs=True)


def count_prefix(model: nn.Module, context: Context, name: str, length: int) -> None:
    """Let the positions of ``model`` begin after a prefix that takes up ``length`` of them."""
    hooks = [h for h in model._forward_pre_hooks.values() if isinstance(h, CountFromPrefix)]
    if not hooks and length:
        hooks = [CountFromPrefix(context, arguments_of(model), counts_from(model))]
        model.register_forward_pre_hook(hooks[0], with_kwargs=True, prepend=True)
    for hook in hooks:
        hook.lengths[name] = length


def count_padding_too(model: nn.Module) -> None:
    """Undo :func:`count_from_texts` and :func:`count_prefix` everywhere in ``model``."""
    for part in model.modules():
        for key in _hooks(part):
            del part._forward_pre_hooks[key], part._forward_pre_hooks_with_kwargs[key]


def _hooks(part: nn.Module) -> list[int]:
    return [k for k, hook in part._forward_pre_hooks.items() if isinstance(hook, CountFromText)]
