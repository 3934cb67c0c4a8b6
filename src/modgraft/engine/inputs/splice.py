"""Put tokens before a host's input; labels, positions and logits stay where they were."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from modgraft.core.embeddings import Reading
from modgraft.core.errors import ModgraftError
from modgraft.engine.inputs.relays import FIRST_ID, AroundImage, NewIds, Relay, Tokens

IGNORED = -100
"""The label that transformers' losses leave out."""

_NONE_AT_TOKENS = ("token_type_ids", "global_attention_mask", "bbox")  # ends of names; 0 at tokens

Source = Callable[[int], list[Tokens]]
"""The batch size → what each module puts before the input, in order."""


@dataclass(frozen=True)
class Splice:
    """A call with tokens put into it.

    Attributes:
        kwargs: the arguments to call the model with.
        text: the text as it was given, ids ``[B, T]`` or embeddings ``[B, T, d]``.
        keep: ``[B, T]``, the text's own positions among all; None: nothing is to be trimmed.
        total: how many positions there are with the tokens.
        last: how many of the last logits are wanted; 0: what the model gives.
        ends_unseen: ``[B]`` bool, whether what a decoder reads a class at is padding; None: it is
            known to be none.
        relay: acts at the layers inside the host where the tokens come in or leave.
    """

    kwargs: dict[str, Any]
    text: Tensor | None = None
    keep: Tensor | None = None
    total: int = 0
    last: int = 0
    ends_unseen: Tensor | None = None
    relay: Relay | None = None

    def trim(self, out: Any) -> Any:
        """Return the model's output without the positions of the tokens."""
        if self.keep is None:
            return out
        if type(out) is tuple:
            raise ModgraftError("with an input module, call the host without return_dict=False")
        logits = getattr(out, "logits", None)
        if self.ends_unseen is not None and isinstance(logits, Tensor) and logits.dim() == 2:
            _check_end(out, self.ends_unseen)
        for key, dims in (
            ("logits", 3), ("prediction_logits", 3), ("last_hidden_state", 3),
            ("start_logits", 2), ("end_logits", 2),
        ):  # fmt: skip
            value = getattr(out, key, None)
            if isinstance(value, Tensor) and value.dim() == dims and value.shape[1] == self.total:
                value = _gather(value, self.keep)
                out = replace(out, **{key: value[:, -self.last :] if key == "logits" else value})
        return out

    def without_tokens(self, ids: Tensor) -> Tensor:
        """Return ids ``[R, n]`` that a decoder has written on, beams of an example together."""
        if self.keep is None:
            return ids
        keep = self.keep.to(ids.device).repeat_interleave(len(ids) // len(self.keep), dim=0)
        return torch.cat([ids.gather(1, keep), ids[:, self.total :]], dim=1)


def splice(
    model: nn.Module,
    reading: Reading,
    kwargs: dict[str, Any],
    source: Source,
    generating: bool = False,
) -> Splice:
    """Rewrite the arguments of a model's ``forward`` or ``generate``.

    Tokens go right before the first one of the text that is seen (after it, where it is a class
    token): padding on the left stays on the left. Those that are not seen go to the end of the
    text, where they move none of it; for a decoder that writes on, to its front.

    Args:
        model: a Hugging Face model.
        reading: what it reads.
        kwargs: its arguments by name, with ``input_ids`` or ``inputs_embeds`` ``[B, T(, d)]``, or
            ``pixel_values`` ``[B, C, H, W]`` for one that reads images.
        source: gives the tokens.
        generating: whether the arguments are those of ``generate``.

    Raises:
        ModgraftError: if there is no text to put the tokens before, or no positions for both.
    """
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    if reading.inside:
        return _into_images(model, reading, kwargs, source)
    return _into_text(model, reading, kwargs, source, generating)


def _into_text(
    model: nn.Module,
    reading: Reading,
    kwargs: dict[str, Any],
    source: Source,
    generating: bool,
) -> Splice:
    """Put tokens before the text of a call."""
    what, text = _text(kwargs)
    if what == "inputs_embeds" and not generating:
        kwargs.pop("input_ids", None)
    batch, length = text.shape[:2]
    groups = source(batch)
    masked = any(own.masked for own in groups)
    count = sum(own.embeddings.shape[1] for own in groups)
    reading.check_room(count, length)
    width = reading.width if what == "input_ids" else text.shape[-1]
    for own in groups:
        _check_width(own, batch, width)

    given = kwargs.get("attention_mask")
    _check_mask(given, text)
    decodes = _decodes(model, reading, kwargs, generating)
    writes_on = generating and not decodes
    mask = _mask_of_padding(model, text) if writes_on and given is None else given
    if mask is None:
        mask = torch.ones(batch, length, dtype=torch.long, device=text.device)
    rows = {what: text, "attention_mask": mask} | {
        key: value
        for key, value in kwargs.items()
        if key.endswith(_NONE_AT_TOKENS) and value.shape[:2] == text.shape[:2]
    }
    labels = kwargs.get("labels")
    if (
        isinstance(labels, Tensor)
        and labels.shape == (batch, length)
        and not labels.is_floating_point()  # one for each token, not one for each class
        and not decodes
    ):
        rows["labels"] = _first_unpredicted(model, labels, groups)
    positions = kwargs.get("position_ids")
    if positions is not None:  # [B or 1, T], or in several dimensions [D, B, T]
        rows["position_ids"] = positions.reshape(-1, *positions.shape[-2:]).permute(1, 2, 0)
        rows["position_ids"] = rows["position_ids"].expand(batch, length, -1)  # [B, T, D]

    relay = NewIds.of(dict(reading.tables), groups) if what == "input_ids" and groups else None
    keep = torch.arange(length, device=text.device).expand(batch, length)
    unseen = torch.zeros(batch, length, dtype=torch.bool, device=text.device)
    padded = given is not None or writes_on or masked
    start = count * batch
    for own in reversed(groups):
        start -= own.seen.numel()
        ids = FIRST_ID + start + torch.arange(own.seen.numel(), device=text.device)
        ids = ids.reshape(own.seen.shape)
        if reading.padding is not None:  # which some hosts tell by its id
            ids = torch.where(own.seen, ids, reading.padding)
        new = {what: ids if what == "input_ids" else own.embeddings, "attention_mask": own.seen}
        rows, unseen, moved = _insert(rows, new, own, unseen, padded)
        keep = moved.gather(1, keep)
    if masked:
        order = (~unseen if writes_on else unseen).int().argsort(dim=1, stable=True)
        rows = {key: _gather(value, order) for key, value in rows.items()}
        keep = order.argsort(dim=1).gather(1, keep)
    if not padded or not ("attention_mask" in reading.arguments or given is not None):
        del rows["attention_mask"]  # it is what the model takes for granted
        if masked:
            raise ModgraftError(
                f"{reading.host} takes no attention_mask, so it would see tokens that are "
                f"not there; give each example as many, all of them seen"
            )
    if positions is not None:
        moved = rows["position_ids"].permute(2, 0, 1)  # [D, B, T + k]
        rows["position_ids"] = moved if positions.dim() == 3 else moved[0]
    kwargs |= rows
    if decodes:
        return Splice(kwargs, text, relay=relay)
    if writes_on:
        if what == "inputs_embeds":  # what is returned has no tokens, and its length is subtracted
            _keep_lengths(model, kwargs, count + length if "input_ids" in kwargs else count)
            return Splice(kwargs)
        _keep_lengths(model, kwargs, count)
        return Splice(kwargs, text, keep, length + count, relay=relay)
    _move_spans(kwargs, keep, count)
    last = _keep_logits(kwargs, length, masked)
    ends = None if given is None or reading.first else _ends_unseen(reading, text, given)
    return Splice(kwargs, text, keep, length + count, last, ends, relay)


def _text(kwargs: dict[str, Any]) -> tuple[str, Tensor]:
    """Take the text out of ``kwargs``, embeddings ``[B, T, d]`` if there are some, else ids.

    Raises:
        ModgraftError: where there is no text, or more than that.
    """
    if kwargs.get("past_key_values") is not None or kwargs.get("encoder_outputs") is not None:
        raise ModgraftError(
            "with an input module, continue from a cache by host.generate(...): a single call with "
            "past_key_values or encoder_outputs cannot tell whether they hold the module's tokens"
        )
    for name, dims in (("inputs_embeds", 3), ("input_ids", 2)):
        text = kwargs.get(name)
        if text is None:
            continue
        if text.dim() != dims:
            raise ModgraftError(
                f"an input module puts tokens before texts [batch, T], not before "
                f"{list(text.shape)}"
            )
        return name, text
    raise ModgraftError(
        "an input module puts tokens before input_ids or inputs_embeds, and this call has "
        f"neither (it has {', '.join(kwargs) or 'nothing'})"
    )


def _decodes(model: nn.Module, reading: Reading, kwargs: dict[str, Any], generating: bool) -> bool:
    """Return whether the outputs are those of a decoder with a text of its own.

    Raises:
        ModgraftError: where the model would make that text of the encoder's.
    """
    config = getattr(model, "config", None)
    two = getattr(config, "is_encoder_decoder", False)
    if not (two and "decoder_input_ids" in reading.arguments):
        return False
    can_generate = getattr(model, "can_generate", None)
    from_labels = can_generate is not None and can_generate() and "labels" in kwargs
    own = {"decoder_input_ids", "decoder_inputs_embeds"} & set(kwargs)
    if not (generating or own or from_labels):
        raise ModgraftError(
            f"an input module puts tokens before the encoder's text alone, and {reading.host} was "
            f"given none for its decoder; pass decoder_input_ids"
        )
    return True


def _check_mask(given: Any, text: Tensor) -> None:
    """Refuse a mask that is not ``[B, T]``.

    Raises:
        ModgraftError: with the shape.
    """
    if given is not None and (not isinstance(given, Tensor) or given.shape != text.shape[:2]):
        raise ModgraftError(f"with an input module, attention_mask is {list(text.shape[:2])}")


def _move_spans(kwargs: dict[str, Any], keep: Tensor, count: int) -> None:
    """Move the positions of an answer in the text, or past its end, by the tokens."""
    batch, length = keep.shape
    for key in ("start_positions", "end_positions"):
        if key in kwargs:
            at = kwargs[key].reshape(batch)
            moved = keep.gather(1, at.clamp(0, length - 1)[:, None])[:, 0]
            kwargs[key] = torch.where(at < length, moved, at + count)


def _keep_logits(kwargs: dict[str, Any], length: int, masked: bool) -> int:
    """Bound ``logits_to_keep`` by the text's length.

    Returns:
        How many of the last are to be picked from all logits: tokens that are not seen are behind
        the text.

    Raises:
        ModgraftError: where it names positions.
    """
    last = kwargs.get("logits_to_keep", 0)
    if not isinstance(last, int):
        raise ModgraftError(
            "with an input module, logits_to_keep is how many of the last, not which; pick from "
            "the logits of the whole text"
        )
    if not last:
        return 0
    last = kwargs["logits_to_keep"] = min(last, length)
    if not masked:
        return 0
    del kwargs["logits_to_keep"]
    return last


def _ends_unseen(reading: Reading, text: Tensor, mask: Tensor) -> Tensor:
    """Return ``[B]``, whether the position that a decoder reads a class at is masked.

    That is the last one that is not padding by its id; of embeddings, the last.
    """
    if text.dim() > 2 or reading.padding is None:
        return mask[:, -1] == 0
    at = torch.arange(text.shape[1], device=text.device) * (text != reading.padding)
    return mask.gather(1, at.argmax(1, keepdim=True))[:, 0] == 0


def _check_end(out: Any, unseen: Tensor) -> None:
    """Refuse padding where a decoder's class is read.

    Raises:
        ModgraftError: with the remedy.
    """
    if not torch.compiler.is_compiling() and bool(unseen.any()):
        raise ModgraftError(
            f"{type(out).__name__} is read at the last position that is not padding by its id, "
            f"which attention_mask hides in some texts of this batch; pad input_ids with the id "
            f"of padding, or pad on the left (padding_side='left')"
        )


def _first_unpredicted(model: nn.Module, labels: Tensor, groups: Sequence[Tokens]) -> Tensor:
    """Return ``labels`` ``[B, T]`` for a batch with tokens before its texts.

    A model of the next token predicts a text's first one from a prompt. An example without a
    prompt, in a batch where others have one, has no such prediction: its first label is ignored.
    """
    can = getattr(model, "can_generate", None)  # whose labels are those of the tokens before
    if not any(own.masked for own in groups) or can is None or not can():
        return labels
    none = ~torch.cat([own.seen for own in groups], dim=1).any(1, keepdim=True)  # [B, 1]
    return torch.cat([labels[:, :1].masked_fill(none, IGNORED), labels[:, 1:]], dim=1)


def _insert(
    rows: dict[str, Tensor], new: dict[str, Tensor], own: Tokens, unseen: Tensor, padded: bool
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Insert the tokens of one module into every row.

    Args:
        rows: what there is for each position, ``[B, T, …]``.
        new: what there is at the tokens, ``[B, k, …]``; for any other row, 0.
        own: the tokens.
        unseen: ``[B, T]`` bool, the tokens inserted before that are not seen.
        padded: whether texts may begin with padding.

    Returns:
        The rows, ``unseen``, and where the old positions are now, ``[B, T]``.
    """
    mask, seen = rows["attention_mask"], own.seen
    (batch, length), count = mask.shape, seen.shape[1]
    start = torch.full((batch, 1), own.after, device=mask.device)
    if padded:  # argmax: the first that is seen
        start = start + (mask != 0).int().argmax(dim=1, keepdim=True)
    start = start.clamp(max=length)
    j = torch.arange(length + count, device=mask.device)[None]  # [1, T + k]
    old = torch.where(j < start, j, j - count)
    index = torch.where((j >= start) & (j < start + count), length + j - start, old)
    out = {}
    for key, value in rows.items():
        match key:
            case "labels":
                there = torch.full_like(seen, IGNORED, dtype=torch.long)
            case "position_ids":  # the tokens take the place of the one they go before
                beyond = torch.cat([value, value[:, -1:] + 1], dim=1)  # [B, T + 1, D]
                shown = seen.long().cumsum(1)[..., None]
                there = _gather(beyond, start) + (shown - 1).clamp(min=0)
                after = torch.arange(length, device=mask.device)[None] >= start
                value = value + after[..., None] * shown[:, -1:]
            case _:
                none = value.new_zeros(batch, count, *value.shape[2:])
                there = new.get(key, none)
        # [B, T, …], [B, k, …] → [B, T + k, …]
        out[key] = _gather(torch.cat([value, there.to(value.dtype)], dim=1), index)
    unseen = _gather(torch.cat([unseen, ~seen], dim=1), index)
    t = torch.arange(length, device=mask.device)[None]
    return out, unseen, torch.where(t < start, t, t + count)


def _gather(value: Tensor, index: Tensor) -> Tensor:
    """Return ``value`` ``[B, n, …]`` at ``index`` ``[B, m]``: ``[B, m, …]``."""
    index = index.reshape(*index.shape, *(1,) * (value.dim() - 2))
    return value.gather(1, index.expand(*index.shape[:2], *value.shape[2:]))


def _mask_of_padding(model: nn.Module, text: Tensor) -> Tensor | None:
    """Return the mask that ``generate`` infers for ids ``[B, T]`` without one, if it does."""
    settings = model.generation_config
    pad: Any = settings.pad_token_id  # type: ignore[union-attr]
    eos: Any = settings.eos_token_id  # type: ignore[union-attr]
    ends = eos if isinstance(eos, list) else [eos]
    return None if pad is None or pad in ends or text.dim() > 2 else text.ne(pad).long()


def _keep_lengths(model: nn.Module, kwargs: dict[str, Any], count: int) -> None:
    """Have ``generate`` count whole lengths as it does without the tokens."""
    sources = (kwargs.get("generation_config"), model.generation_config)

    def setting(name: str) -> Any:
        found = (kwargs.get(name), *(getattr(source, name, None) for source in sources))
        return next((value for value in found if value is not None), None)

    for bound in ("max", "min"):
        whole = setting(f"{bound}_length")
        if whole and setting(f"{bound}_new_tokens") is None:
            kwargs[f"{bound}_length"] = whole + count


def _into_images(
    model: nn.Module, reading: Reading, kwargs: dict[str, Any], source: Source
) -> Splice:
    pixels = kwargs.get("pixel_values")
    if pixels is None:
        raise ModgraftError(
            f"an input module puts tokens before the patches of pixel_values here, and this call "
            f"has none (it has {', '.join(kwargs) or 'nothing'})"
        )
    groups = source(pixels.shape[0])
    for own in groups:
        _check_width(own, len(pixels), reading.width)
    mask = kwargs.get("attention_mask")
    if mask is not None or any(own.masked for own in groups):
        if mask is None:
            size: Any = model.config.patch_size  # type: ignore[union-attr]
            rows, columns = (size, size) if isinstance(size, int) else size
            patches = (pixels.shape[-2] // rows) * (pixels.shape[-1] // columns)
            mask = pixels.new_ones(len(pixels), reading.first + patches, dtype=torch.bool)
        for own in reversed(groups):  # [B, N] → [B, k + N]
            seen = own.seen.to(mask.dtype)
            mask = torch.cat([mask[:, : own.after], seen, mask[:, own.after :]], dim=1)
        kwargs["attention_mask"] = mask
    return Splice(kwargs, relay=AroundImage(*reading.inside, tuple(groups)))


def _check_width(own: Tokens, batch: int, width: int) -> None:
    made = own.embeddings.shape
    if made[0] != batch or made[-1] != width or own.seen.shape != made[:2]:
        raise ModgraftError(
            f"{own.name!r} gave tokens {list(made)} and a mask {list(own.seen.shape)} where this "
            f"host reads [{batch}, k, {width}] and [{batch}, k]"
        )
