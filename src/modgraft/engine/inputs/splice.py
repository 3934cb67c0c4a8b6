"""Put tokens before a host's input; labels, positions and logits stay where they were."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from modgraft.core.architectures import base_path, family_of
from modgraft.core.embeddings import check_room, token_positions
from modgraft.core.errors import ModgraftError
from modgraft.core.family import Family

IGNORED = -100
"""The label that transformers' losses leave out."""


@dataclass(frozen=True)
class Tokens:
    """The tokens that one module puts before the input.

    Attributes:
        name: the module's name.
        embeddings: ``[B, k, d]``.
        seen: ``[B, k]`` bool, True where a token is seen.
        after: how many of the input's own positions stay before them.
        masked: whether some of them may be unseen.
    """

    name: str
    embeddings: Tensor
    seen: Tensor
    after: int
    masked: bool = False


Source = Callable[[int], list[Tokens]]
"""The batch size → what each module puts before the input, in order."""


@dataclass(frozen=True)
class Splice:
    """A call with tokens put into it.

    Attributes:
        kwargs: the arguments to call the model with.
        keep: ``[B, T]``, the text's own positions among all; None: nothing is to be trimmed.
        total: how many positions there are with the tokens.
        relay: puts tokens in and takes them out inside a host that reads no text.
        last_unseen: ``[B]`` bool, for a decoder: whether its last position is padding.
    """

    kwargs: dict[str, Any]
    keep: Tensor | None = None
    total: int = 0
    relay: Relay | None = None
    last_unseen: Tensor | None = None

    def trim(self, out: Any) -> Any:
        """Return the model's output without the positions of the tokens."""
        if self.keep is None:
            return out
        if type(out) is tuple:
            raise ModgraftError("with an input module, call the host without return_dict=False")
        logits = getattr(out, "logits", None)
        if self.last_unseen is not None and isinstance(logits, Tensor) and logits.dim() == 2:
            _check_last(out, self.last_unseen)
        for key, dims in (
            ("logits", 3), ("last_hidden_state", 3), ("start_logits", 2), ("end_logits", 2)
        ):  # fmt: skip
            value = getattr(out, key, None)
            if isinstance(value, Tensor) and value.dim() == dims and value.shape[1] == self.total:
                out = replace(out, **{key: _gather(value, self.keep)})
        return out


@dataclass(frozen=True)
class Relay:
    """Puts tokens into a host's first sequence of tokens, and takes them out of its last.

    Attributes:
        enter: the layer whose output is the first sequence ``[B, N, d]``.
        leave: the layer whose output is the last.
        tokens: what the modules put in, in order.
    """

    enter: str
    leave: str
    tokens: tuple[Tokens, ...]

    def __call__(self, path: str, y: Tensor) -> Tensor:
        """Return the output y of the layer at ``path`` with the tokens, or without them again."""
        if path == self.enter:
            for own in reversed(self.tokens):
                _check_width(own, y)
                new = own.embeddings.to(y.dtype)
                y = torch.cat([y[:, : own.after], new, y[:, own.after :]], dim=1)  # [B, k + N, d]
        elif path == self.leave:
            for own in self.tokens:
                end = own.after + own.embeddings.shape[1]
                y = torch.cat([y[:, : own.after], y[:, end:]], dim=1)  # [B, k + N, d] → [B, N, d]
        return y


def splice(
    model: nn.Module, kwargs: dict[str, Any], source: Source, generating: bool = False
) -> Splice:
    """Rewrite the arguments of a model's ``forward`` or ``generate``.

    Tokens go right before the first one of the text that is seen (after it, where it is a class
    token): padding on the left stays on the left. Positions are the model's own, moved by the
    tokens that are seen.

    Args:
        model: a Hugging Face model.
        kwargs: its arguments by name, with ``input_ids`` or ``inputs_embeds`` ``[B, T(, d)]``, or
            ``pixel_values`` ``[B, C, H, W]`` for one that reads images.
        source: gives the tokens.
        generating: whether the arguments are those of ``generate``.

    Raises:
        ModgraftError: if there is no text to put the tokens before, or no positions for both.
    """
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    family = family_of(model)
    if family is not None and family.embedded is not None:
        return _into_images(model, family, kwargs, source)
    return _into_text(model, family, kwargs, source, generating)


def _into_text(
    model: nn.Module,
    family: Family | None,
    kwargs: dict[str, Any],
    source: Source,
    generating: bool,
) -> Splice:
    """Put tokens before the text of a call."""
    config = getattr(model, "config", None)
    encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
    ids, embeds = kwargs.pop("input_ids", None), kwargs.pop("inputs_embeds", None)
    embeds = _embedded(model, kwargs, ids, embeds)
    batch, length = embeds.shape[:2]
    groups = [_unseen_first(own) for own in source(batch)]
    count = sum(own.embeddings.shape[1] for own in groups)
    check_room(model, count, length)

    given = kwargs.get("attention_mask")
    mask = _text_mask(model, given, ids if generating else None, embeds)
    rows: dict[str, Tensor] = {"inputs_embeds": embeds, "attention_mask": mask}
    if "token_type_ids" in kwargs:
        rows["token_type_ids"] = kwargs["token_type_ids"]
    labels = kwargs.get("labels")
    if (
        isinstance(labels, Tensor)
        and labels.shape == (batch, length)
        and not labels.is_floating_point()  # one for each token, not one for each class
        and not encoder_decoder
    ):
        rows["labels"] = _first_unpredicted(model, labels, groups)
    if "position_ids" in kwargs:
        rows["position_ids"] = kwargs["position_ids"].expand(batch, length)
    elif not generating and family is not None and family.counts_positions:
        rows["position_ids"] = _own_positions(model, ids, embeds)

    padded = given is not None or generating or any(own.masked for own in groups)
    keep = torch.arange(length, device=embeds.device).expand(batch, length)
    for own in reversed(groups):
        _check_width(own, embeds)
        rows, moved = _insert(rows, own, padded)
        keep = moved.gather(1, keep)
    kwargs |= rows
    _move_spans(kwargs, keep, count)
    if generating and not encoder_decoder:
        _keep_lengths(model, kwargs, ids, count, length)
    else:
        _keep_logits(kwargs, length)
    reads_last = family is not None and not encoder_decoder and bool(family.decoder)
    unseen = (rows["attention_mask"][:, -1] == 0) if reads_last else None
    trimmed = None if encoder_decoder else keep
    return Splice(kwargs, trimmed, length + count, last_unseen=unseen)


def _text_mask(model: nn.Module, given: Any, ids: Tensor | None, embeds: Tensor) -> Tensor:
    """Return the text's mask ``[B, T]``: as given, or as ``generate`` infers it from ``ids``.

    Raises:
        ModgraftError: for a mask of another shape.
    """
    batch, length = embeds.shape[:2]
    if given is None:
        ones = torch.ones(batch, length, dtype=torch.long, device=embeds.device)
        return ones if ids is None else _mask_of_padding(model, ids, ones)
    if not isinstance(given, Tensor) or given.shape != (batch, length):
        raise ModgraftError(f"with an input module, attention_mask is [{batch}, {length}]")
    return given


def _move_spans(kwargs: dict[str, Any], keep: Tensor, count: int) -> None:
    """Move the positions of an answer in the text, or past its end, by the tokens."""
    batch, length = keep.shape
    for key in ("start_positions", "end_positions"):
        if key in kwargs:
            at = kwargs[key].reshape(batch)
            moved = keep.gather(1, at.clamp(0, length - 1)[:, None])[:, 0]
            kwargs[key] = torch.where(at < length, moved, at + count)


def _keep_logits(kwargs: dict[str, Any], length: int) -> None:
    """Bound ``logits_to_keep`` by the text's length.

    Raises:
        ModgraftError: where it names positions.
    """
    last = kwargs.get("logits_to_keep")
    if isinstance(last, int):
        kwargs["logits_to_keep"] = min(last, length)
    elif last is not None:
        raise ModgraftError(
            "with an input module, logits_to_keep is how many of the last, not which; pick from "
            "the logits of the whole text"
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


def _embedded(
    model: nn.Module, kwargs: dict[str, Any], ids: Tensor | None, embeds: Tensor | None
) -> Tensor:
    """Return the text's embeddings ``[B, T, d]``."""
    if kwargs.get("past_key_values") is not None or kwargs.get("encoder_outputs") is not None:
        raise ModgraftError(
            "with an input module, continue from a cache by host.generate(...): a single call with "
            "past_key_values or encoder_outputs cannot tell whether they hold the module's tokens"
        )
    if embeds is None:
        if ids is None:
            raise ModgraftError(
                "an input module puts tokens before input_ids or inputs_embeds, and this call has "
                f"neither (it has {', '.join(kwargs) or 'nothing'})"
            )
        embeds = model.get_input_embeddings()(ids)  # type: ignore[operator]
    assert isinstance(embeds, Tensor)  # noqa: S101
    if embeds.dim() != 3:
        raise ModgraftError(
            f"an input module puts tokens before texts [batch, T], not before {list(embeds.shape)}"
        )
    return embeds


def _unseen_first(own: Tokens) -> Tokens:
    """Move unseen tokens to the front, so that none lies between the seen ones and the text.

    Relative positions are counted from the text.
    """
    if not own.masked:
        return own
    order = own.seen.int().argsort(dim=1, stable=True)
    embeddings, seen = (_gather(value, order) for value in (own.embeddings, own.seen))
    return replace(own, embeddings=embeddings, seen=seen)


def _insert(rows: dict[str, Tensor], own: Tokens, padded: bool) -> tuple[dict[str, Tensor], Tensor]:
    """Insert tokens into every row; return also where the old positions are now, ``[B, T]``."""
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
            case "inputs_embeds":
                new = own.embeddings
            case "attention_mask":
                new = seen
            case "labels":
                new = torch.full_like(seen, IGNORED, dtype=torch.long)
            case "position_ids":  # the tokens take the place of the one they go before
                beyond = torch.cat([value, value[:, -1:] + 1], dim=1)
                shown = seen.long().cumsum(1)
                new = beyond.gather(1, start) + (shown - 1).clamp(min=0)
                after = torch.arange(length, device=mask.device)[None] >= start
                value = value + after * shown[:, -1:]
            case _:
                new = torch.zeros_like(seen)
        # [B, T, …], [B, k, …] → [B, T + k, …]
        out[key] = _gather(torch.cat([value, new.to(value.dtype)], dim=1), index)
    t = torch.arange(length, device=mask.device)[None]
    return out, torch.where(t < start, t, t + count)


def _gather(value: Tensor, index: Tensor) -> Tensor:
    """Return ``value`` ``[B, n, …]`` at ``index`` ``[B, m]``: ``[B, m, …]``."""
    index = index.reshape(*index.shape, *(1,) * (value.dim() - 2))
    return value.gather(1, index.expand(*index.shape[:2], *value.shape[2:]))


def _own_positions(model: nn.Module, ids: Tensor | None, embeds: Tensor) -> Tensor:
    """Return the positions ``[B, T]`` that the model gives a text by itself."""
    batch, length = embeds.shape[:2]
    positions = token_positions(model)
    first = 0 if positions is None else positions[0]
    if first and ids is not None:  # RoBERTa's: padding has a position of its own, the one before
        text = ids.ne(first - 1).long()
        return text.cumsum(1) * text + first - 1
    return torch.arange(first, first + length, device=embeds.device).expand(batch, length)


def _mask_of_padding(model: nn.Module, ids: Tensor, ones: Tensor) -> Tensor:
    """Return the mask that ``generate`` infers for a text without one."""
    settings = model.generation_config
    pad: Any = settings.pad_token_id  # type: ignore[union-attr]
    eos: Any = settings.eos_token_id  # type: ignore[union-attr]
    ends = eos if isinstance(eos, list) else [eos]
    return ones if pad is None or pad in ends else ids.ne(pad).long()


def _keep_lengths(
    model: nn.Module, kwargs: dict[str, Any], ids: Tensor | None, count: int, length: int
) -> None:
    """Have ``generate`` return the text itself, and count lengths as it does without tokens.

    It subtracts the length of ``inputs_embeds`` from the bounds of the whole length.
    """
    off = count if ids is None else count + length
    if ids is not None:
        kwargs["input_ids"] = ids
    sources = (kwargs.get("generation_config"), model.generation_config)

    def setting(name: str) -> Any:
        found = (kwargs.get(name), *(getattr(source, name, None) for source in sources))
        return next((value for value in found if value is not None), None)

    for bound in ("max", "min"):
        whole = setting(f"{bound}_length")
        if whole and setting(f"{bound}_new_tokens") is None:
            kwargs[f"{bound}_length"] = whole + off


def _into_images(
    model: nn.Module, family: Family, kwargs: dict[str, Any], source: Source
) -> Splice:
    pixels = kwargs.get("pixel_values")
    if pixels is None:
        raise ModgraftError(
            f"an input module puts tokens before the patches of pixel_values here, and this call "
            f"has none (it has {', '.join(kwargs) or 'nothing'})"
        )
    assert family.embedded is not None  # noqa: S101
    base = base_path(model)
    enter, leave = (f"{base}.{p}" if base else p for p in family.embedded)
    groups = source(pixels.shape[0])
    mask = kwargs.get("attention_mask")
    if mask is not None or any(own.masked for own in groups):
        if mask is None:
            size: Any = model.config.patch_size  # type: ignore[union-attr]
            rows, columns = (size, size) if isinstance(size, int) else size
            patches = (pixels.shape[-2] // rows) * (pixels.shape[-1] // columns)
            mask = pixels.new_ones(len(pixels), family.prompt_at + patches, dtype=torch.bool)
        for own in reversed(groups):  # [B, N] → [B, k + N]
            seen = own.seen.to(mask.dtype)
            mask = torch.cat([mask[:, : own.after], seen, mask[:, own.after :]], dim=1)
        kwargs["attention_mask"] = mask
    return Splice(kwargs, relay=Relay(enter, leave, tuple(groups)))


def _check_width(own: Tokens, embeds: Tensor) -> None:
    made, width = own.embeddings.shape, embeds.shape[-1]
    if made[0] != embeds.shape[0] or made[-1] != width or own.seen.shape != made[:2]:
        raise ModgraftError(
            f"{own.name!r} gave tokens {list(made)} and a mask {list(own.seen.shape)} where this "
            f"host reads [{embeds.shape[0]}, k, {width}] and [{embeds.shape[0]}, k]"
        )


def _check_last(out: Any, unseen: Tensor) -> None:
    """Refuse padding at the last position, where a decoder's class is read.

    The model finds that position from the ids, which it is not given here.

    Raises:
        ModgraftError: with the remedy.
    """
    if not torch.compiler.is_compiling() and bool(unseen.any()):
        raise ModgraftError(
            f"{type(out).__name__} is read at the last position, where some texts of this batch "
            f"have padding; with an input module, pad on the left (padding_side='left')"
        )
