"""Put tokens before a text model's input; labels, positions and logits stay where they were."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from modgraft.anatomy import family_of
from modgraft.errors import ModgraftError

IGNORED = -100  # the label that transformers' losses leave out


@dataclass(frozen=True)
class Splice:
    """A call with tokens put into it.

    Attributes:
        kwargs: the arguments to call the model with.
        at: where the tokens begin.
        count: how many there are.
        length: how long the text is.
    """

    kwargs: dict[str, Any]
    at: int
    count: int
    length: int

    def trim(self, out: Any) -> Any:
        """The model's output without the positions of the tokens."""
        for key in ("logits", "last_hidden_state"):
            value = getattr(out, key, None)
            if isinstance(value, Tensor) and value.shape[1:2] == (self.count + self.length,):
                kept = torch.cat([value[:, : self.at], value[:, self.at + self.count :]], dim=1)
                out = replace(out, **{key: kept})
        return out


def splice(
    model: nn.Module,
    kwargs: dict[str, Any],
    tokens: Callable[[int], tuple[Tensor, Tensor]],
    generating: bool = False,
) -> Splice:
    """Rewrite the arguments of a text model's ``forward`` or ``generate``.

    Args:
        model: a Hugging Face text model.
        kwargs: its arguments by name, with ``input_ids`` or ``inputs_embeds`` ``[B, T(, d)]``.
        tokens: from the batch size, ``[B, k, d]`` embeddings and ``[B, k]`` bool, True where seen.
        generating: whether the arguments are those of ``generate``.

    Returns:
        The call with ``inputs_embeds`` ``[B, k + T, d]``, mask, labels and positions to match.

    Raises:
        ModgraftError: if there is no text to put the tokens before.
    """
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    ids = kwargs.pop("input_ids", None)
    embeds = kwargs.pop("inputs_embeds", None)
    encoder_decoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    if embeds is None:
        if ids is None:
            raise ModgraftError(
                "an input module puts tokens before input_ids or inputs_embeds, and this call has "
                f"neither (it has {', '.join(kwargs) or 'nothing'})"
            )
        embeds = model.get_input_embeddings()(ids)  # type: ignore[operator]
    if kwargs.get("past_key_values") is not None and not generating:
        raise ModgraftError(
            "with an input module, continue from a cache by host.generate(...): a single call with "
            "past_key_values cannot tell whether the cache holds the module's tokens"
        )
    batch, length = embeds.shape[:2]
    made, seen = tokens(batch)
    count = made.shape[1]
    family = family_of(model)
    at = 0 if family is None else family.prompt_at

    def insert(value: Tensor, new: Tensor) -> Tensor:  # [B, T, …] → [B, k + T, …]
        return torch.cat([value[:, :at], new.to(value.dtype), value[:, at:]], dim=1)

    mask = kwargs.get("attention_mask")
    if mask is None:
        mask = torch.ones(batch, length, dtype=torch.long, device=embeds.device)
    kwargs["inputs_embeds"] = insert(embeds, made)
    kwargs["attention_mask"] = insert(mask, seen)
    if "token_type_ids" in kwargs:
        kwargs["token_type_ids"] = insert(kwargs["token_type_ids"], torch.zeros_like(seen))
    labels = kwargs.get("labels")
    if labels is not None and not encoder_decoder and labels.shape == (batch, length):
        kwargs["labels"] = insert(labels, torch.full_like(seen, IGNORED, dtype=torch.long))
    if not generating and family is not None and family.counts_positions:
        parameters = inspect.signature(type(model).forward).parameters
        if "position_ids" in parameters and "position_ids" not in kwargs:
            # counted over what is seen, so that a text without an image keeps its own positions
            kwargs["position_ids"] = (kwargs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return Splice(kwargs, at, count, length)
