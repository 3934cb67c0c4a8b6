"""Put tokens before a host's input; labels, positions and logits stay where they were."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from modgraft.core.embeddings import Reading
from modgraft.core.errors import ModgraftError
from modgraft.engine.inputs.caches import check_whole
from modgraft.engine.inputs.packed import begins, insert_in_each
from modgraft.engine.inputs.relays import FIRST_ID, AroundImage, NewIds, Relay, Tokens
from modgraft.engine.inputs.rows import IGNORED, LABELED, LABELS, MASK, Rows, gather

IDS, EMBEDDINGS = "input_ids", "inputs_embeds"

_PLACES = {
    "start_positions", "end_positions",  # of an answer
    "question_positions",  # Splinter: where its answer is asked for
    "entity_position_ids", "entity_start_positions", "entity_end_positions",  # LUKE: of entities
    "region_to_phrase_position",  # VisualBERT: the word that each part of an image belongs to
    "mc_token_ids",  # GPT-2 with two heads: where a choice is read
}  # fmt: skip
"""Arguments that name places in the text."""

_LENGTHS = {
    "lengths",  # XLM, Flaubert: of each text
    "question_lengths",  # BigBird: of the question before each text
}  # fmt: skip
"""Arguments that say how many tokens something takes that begins where the text does."""

_PADDING = {"xpath_tags_seq": "tag_pad_id", "xpath_subs_seq": "subs_pad_id"}  # MarkupLM's
"""Arguments that have an id for none, by its name in the configuration, where others have 0."""

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
        wanted: which of the text's logits are.
        ends_unseen: ``[B]`` bool, whether what a decoder reads a class at is padding; None: it is
            known to be none.
        relay: acts at the layers inside the host where the tokens come in or leave.
        image_is: where outputs that are longer hold an image, "behind" or "before" the text.
        classes: how many the host tells apart: ``logits`` ``[B, n]`` of another number are of the
            positions, as where cells of a table are chosen.
    """

    kwargs: dict[str, Any]
    text: Tensor | None = None
    keep: Tensor | None = None
    total: int = 0
    wanted: Any = ...
    ends_unseen: Tensor | None = None
    relay: Relay | None = None
    image_is: str = ""
    classes: int | None = None

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
            ("language_output", 3), ("text_features", 3), ("start_logits", 2), ("end_logits", 2),
        ):  # fmt: skip
            value = getattr(out, key, None)
            if not isinstance(value, Tensor):
                continue
            if key == "logits" and self.classes not in (None, self.total):
                dims = min(dims, value.dim())
            own = bool(self.image_is) and dims == 3 and value.shape[1] > self.total
            if value.dim() == dims and (own or value.shape[1] == self.total):
                start = value.shape[1] - self.total if self.image_is == "before" else 0
                text, end = gather(value[:, start:], self.keep), value[:, start + self.total :]
                value = torch.cat([value[:, :start], text, end], dim=1)
                out = replace(out, **{key: value[:, self.wanted] if key == "logits" else value})
            elif dims == 2 and value.dim() == 3 and value.shape[2] == self.total:  # [B, Q, T]
                kept = self.keep[:, None].expand(-1, value.shape[1], -1)
                out = replace(out, **{key: value.gather(2, kept)})
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
    text, where they move none of it; where a decoder writes on there, to the front.

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
        return _into_image(model, reading, kwargs, source)
    what, text = _text(kwargs)
    batch, length = text.shape[:2]
    given = kwargs.get(MASK)
    if given is None and MASK in reading.arguments:
        given = _mask_in_other_words(kwargs, text)
    _check_ids(text)
    check_whole(model, kwargs, generating and what == IDS)
    _check_mask(given, text)
    decodes = _decodes(model, reading, kwargs, generating)
    groups = source(batch)
    _check_widths(groups, batch, reading.width if what == IDS else text.shape[-1])

    writes_on = generating and not decodes
    mask = _mask_of_padding(model, text) if given is None and writes_on else given
    others = reading.aligned.among(kwargs, (batch, length))
    rows = Rows.of(kwargs, what, text, mask, others)
    of_image = None
    if not decodes:
        rows.values |= _labels(model, kwargs, text, groups)
        of_image = _labels_behind(kwargs, text) if reading.image_is == "behind" else None
        if of_image is not None:
            rows.values[LABELS] = kwargs[LABELS][:, :length]
    new = [
        {what: value, **_padding(others, value, reading)}
        for value in _values_of(groups, what, reading)
    ]
    packed = begins(reading, rows, kwargs) if groups and given is None and not generating else None
    if packed is not None:
        insert_in_each(rows, groups, new, packed, reading)
        del rows.values[MASK]
    else:
        _insert(rows, groups, new, reading, given is not None, writes_on)
    kwargs |= rows.as_arguments()
    if of_image is not None:
        kwargs[LABELS] = torch.cat([kwargs[LABELS], of_image], dim=1)
    relay = _relay(reading, groups) if what == IDS and groups else None
    whole = Splice(kwargs, text, rows.keep, rows.values[what].shape[1], relay=relay)
    classes = getattr(getattr(model, "config", None), "num_labels", None)
    whole = replace(whole, image_is=reading.image_is, classes=classes)
    if decodes:
        return replace(whole, keep=None)
    count = sum(own.seen.shape[1] for own in groups)
    if writes_on:
        # of embeddings, transformers subtracts the length, and gives back what is new
        _keep_lengths(model, kwargs, count + length if what != IDS and IDS in kwargs else count)
        return whole if what == IDS else Splice(kwargs)
    kwargs.pop(IDS if what == EMBEDDINGS else EMBEDDINGS, None)
    _move_places(kwargs, rows.keep, count)
    ends = None if given is None or reading.first else _ends_unseen(reading, text, given)
    in_order = packed is None and not any(own.masked for own in groups)
    return replace(whole, wanted=_wanted(kwargs, length, in_order), ends_unseen=ends)


def _insert(
    rows: Rows,
    groups: Sequence[Tokens],
    new: Sequence[dict[str, Tensor]],
    reading: Reading,
    has_mask: bool,
    writes_on: bool,
) -> None:
    """Put each module's tokens before the text of each row.

    Args:
        rows: of the call.
        groups: what each module puts in, in order.
        new: what stands for these tokens.
        reading: what the host reads.
        has_mask: whether the call has a mask.
        writes_on: whether a decoder writes on after the text.
    """
    masked = any(own.masked for own in groups)
    padded = has_mask or writes_on or masked
    reading.check_room(sum(own.seen.shape[1] for own in groups), rows.keep.shape[1])
    for own, value in zip(reversed(groups), reversed(new), strict=True):
        rows.insert(own, value, padded)
    if masked:
        rows.move_unseen(front=writes_on)
        _check_masks(reading)
    if not padded or not (has_mask or MASK in reading.arguments):
        del rows.values[MASK]  # all of it is seen, which goes without saying


def _text(kwargs: dict[str, Any]) -> tuple[str, Tensor]:
    """Return the text of a call: embeddings ``[B, T, d]`` if there are some, else ids ``[B, T]``.

    Raises:
        ModgraftError: where there is no text, or more than that.
    """
    if "encoder_outputs" in kwargs:
        raise ModgraftError(
            "with an input module, give the encoder's text as input_ids: encoder_outputs do not "
            "tell whether they hold the module's tokens"
        )
    for name, dims in ((EMBEDDINGS, 3), (IDS, 2)):
        if name not in kwargs:
            continue
        if kwargs[name].dim() != dims:
            raise ModgraftError(
                f"an input module puts tokens before texts [batch, T], not before "
                f"{list(kwargs[name].shape)}, as the choices of a question are; implant a Prefix, "
                f"which takes no place in a text"
            )
        return name, kwargs[name]
    raise ModgraftError(
        "an input module puts tokens before input_ids or inputs_embeds, and this call has "
        f"neither (it has {', '.join(kwargs) or 'nothing'})"
    )


def _decodes(model: nn.Module, reading: Reading, kwargs: dict[str, Any], generating: bool) -> bool:
    """Return whether the outputs are those of a decoder with a text of its own.

    Raises:
        ModgraftError: where it was given none.
    """
    two = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if not (two and "decoder_input_ids" in reading.arguments):
        return False
    from_labels = LABELS in kwargs and _can_generate(model)
    if not (
        generating or from_labels or kwargs.keys() & {"decoder_input_ids", "decoder_inputs_embeds"}
    ):
        either = "pass decoder_input_ids, or " if _can_generate(model) else ""
        raise ModgraftError(
            f"an input module puts tokens before the encoder's text alone, and {reading.host} was "
            f"given none for its decoder; {either}implant a Prefix, which takes no place in a text"
        )
    return True


def _check_ids(text: Tensor) -> None:
    """Refuse ids that stand for tokens of modules, which begin beyond any vocabulary."""
    if torch.compiler.is_dynamo_compiling() or text.dim() != 2:
        return
    if bool((text >= FIRST_ID).any()):
        raise ModgraftError(f"an id of the text is {int(text.max())}, and no vocabulary has it")


def _can_generate(model: nn.Module) -> bool:
    can = getattr(model, "can_generate", None)
    return can is not None and can()


def _by_token(labels: Any, text: Tensor) -> bool:
    """Return whether there is one label for each token, not one for each class."""
    if not isinstance(labels, Tensor):
        return False
    return labels.shape == text.shape[:2] and not labels.is_floating_point()


def _labels(
    model: nn.Module, kwargs: dict[str, Any], text: Tensor, groups: Sequence[Tokens]
) -> dict[str, Tensor]:
    """Return the labels ``[B, T]`` of a call that has one for each token."""
    found = {key: kwargs[key] for key in LABELED if _by_token(kwargs.get(key), text)}
    if LABELS in found:
        counted = kwargs.get("num_items_in_batch") is not None
        found[LABELS] = _first_unpredicted(model, found[LABELS], groups, counted)
    return found


def _labels_behind(kwargs: dict[str, Any], text: Tensor) -> Tensor | None:
    """Return the labels ``[B, V]`` of the image behind a text, of labels ``[B, T + V]``."""
    labels, length = kwargs.get(LABELS), text.shape[1]
    if not isinstance(labels, Tensor) or labels.dim() != 2 or labels.shape[1] <= length:
        return None
    return labels[:, length:] if _by_token(labels[:, :length], text) else None


def _first_unpredicted(
    model: nn.Module, labels: Tensor, groups: Sequence[Tokens], counted: bool
) -> Tensor:
    """Return ``labels`` ``[B, T]`` for a batch with tokens before its texts.

    A model of the next token predicts a text's first one from a prompt. An example without a
    prompt, in a batch where others have one, has no such prediction: its first label is ignored. So
    are all, where whoever calls has ``counted`` what is predicted, as transformers' Trainer does:
    it knows of no prompt, and divides by that number.
    """
    if not _can_generate(model) or not groups:
        return labels
    if counted:
        return torch.cat([labels[:, :1].new_full((len(labels), 1), IGNORED), labels[:, 1:]], dim=1)
    if not any(own.masked for own in groups):
        return labels
    none = ~torch.cat([own.seen for own in groups], dim=1).any(1, keepdim=True)  # [B, 1]
    return torch.cat([labels[:, :1].masked_fill(none, IGNORED), labels[:, 1:]], dim=1)


def _values_of(groups: Sequence[Tokens], what: str, reading: Reading) -> list[Tensor]:
    """Return what stands for each module's tokens: ids ``[B, k]``, or embeddings ``[B, k, d]``."""
    if what == EMBEDDINGS:
        return [own.embeddings for own in groups]
    first, found = FIRST_ID, []
    for own in groups:
        found.append(_new_ids(first, own, reading.padding))
        first += own.seen.numel()
    return found


def _padding(others: Mapping[str, Tensor], made: Tensor, reading: Reading) -> dict[str, Tensor]:
    """Return the padding of those of ``others`` that have some, at tokens ``made`` ``[B, k]``."""
    return {
        key: value.new_full((*made.shape[:2], *value.shape[2:]), getattr(reading.config, name))
        for key, name in _PADDING.items()
        if (value := others.get(key)) is not None
    }


def _relay(reading: Reading, groups: Sequence[Tokens]) -> NewIds:
    """Return what serves the host's tables the tokens, which :func:`_values_of` has numbered."""
    embeddings = [own.embeddings.flatten(0, 1) for own in groups]  # [B, k, d] → [B·k, d]
    return NewIds(dict(reading.tables), torch.cat(embeddings), reading.padding or 0)


def _new_ids(first: int, own: Tokens, padding: int | None) -> Tensor:
    """Return ids ``[B, k]`` for tokens: of words their own, of others new ones from ``first`` on,
    and of those that are not seen the padding's.
    """
    ids = torch.arange(first, first + own.seen.numel(), device=own.seen.device)
    ids = ids.reshape(own.seen.shape)
    if own.words is not None:
        ids = torch.where(own.words < 0, ids, own.words)
    return ids if padding is None else torch.where(own.seen, ids, padding)


def _check_mask(given: Any, text: Tensor) -> None:
    """Refuse a mask that is not ``[B, T]``.

    Raises:
        ModgraftError: with the shape.
    """
    if given is not None and (not isinstance(given, Tensor) or given.shape != text.shape[:2]):
        found = list(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise ModgraftError(
            f"with an input module, attention_mask is {list(text.shape[:2])}, whether each token "
            f"of the text is seen, and this is {found}; give that, or implant a Prefix, which "
            f"takes no place in a text"
        )


def _mask_in_other_words(kwargs: dict[str, Any], text: Tensor) -> Tensor | None:
    """Return the mask ``[B, T]`` that XLNet's ``input_mask`` or XLM's ``lengths`` says."""
    if "input_mask" in kwargs:
        kwargs[MASK] = 1 - kwargs.pop("input_mask")
    elif "lengths" in kwargs:
        at = torch.arange(text.shape[1], device=text.device)
        kwargs[MASK] = (at < kwargs["lengths"][:, None]).long()
    return kwargs.get(MASK)


def _check_masks(reading: Reading) -> None:
    """Refuse tokens that may be unseen, where the host sees all that it is given.

    Raises:
        ModgraftError: with the remedy.
    """
    if MASK not in reading.arguments:
        raise ModgraftError(
            f"{reading.host} takes no attention_mask, so it would see tokens that are not there; "
            f"give each example as many, by a module without a side input"
        )


def _mask_of_padding(model: nn.Module, text: Tensor) -> Tensor | None:
    """Return the mask that ``generate`` infers for ids ``[B, T]`` without one, if it does."""
    settings = model.generation_config
    pad: Any = settings.pad_token_id  # type: ignore[union-attr]
    eos: Any = settings.eos_token_id  # type: ignore[union-attr]
    ends = eos if isinstance(eos, list) else [eos]
    return None if pad is None or pad in ends or text.dim() > 2 else text.ne(pad).long()


def _keep_lengths(model: nn.Module, kwargs: dict[str, Any], more: int) -> None:
    """Have ``generate`` count whole lengths as it does without the tokens."""
    sources = (kwargs.get("generation_config"), model.generation_config)

    def setting(name: str) -> Any:
        found = (kwargs.get(name), *(getattr(source, name, None) for source in sources))
        return next((value for value in found if value is not None), None)

    for bound in ("max", "min"):
        whole = setting(f"{bound}_length")
        if whole and setting(f"{bound}_new_tokens") is None:
            kwargs[f"{bound}_length"] = whole + more


def _move_places(kwargs: dict[str, Any], keep: Tensor, count: int) -> None:
    """Move the places in the text that a call names, or those past its end, by the tokens.

    A negative place is none, as of an entity with fewer words than another.
    """
    batch, length = keep.shape
    for key in _PLACES & kwargs.keys():
        at = kwargs[key].reshape(batch, -1)
        moved = keep.gather(1, at.clamp(0, length - 1))
        moved = torch.where(at < length, moved, at + count)
        kwargs[key] = torch.where(at < 0, at, moved).view(kwargs[key].shape)
    for key in _LENGTHS & kwargs.keys():
        size = kwargs[key].reshape(batch, -1)
        moved = keep.gather(1, (size - 1).clamp(0, length - 1)) + 1  # behind the last one
        moved = torch.where(size > length, size + count, moved)
        kwargs[key] = torch.where(size <= 0, size, moved).view(kwargs[key].shape)


def _wanted(kwargs: dict[str, Any], length: int, in_order: bool) -> Any:
    """Return which of the text's logits ``logits_to_keep`` names, of those that the host gives.

    Args:
        kwargs: the host is asked for as few as can be said without the text's own positions.
        length: of the text.
        in_order: whether the text's last positions are last with the tokens too.
    """
    wanted = kwargs.get("logits_to_keep", 0)
    if isinstance(wanted, int):
        last = min(wanted, length)
        wanted = slice(-last, None) if last else ...
        if in_order and last:
            kwargs["logits_to_keep"] = last
            return ...
    if "logits_to_keep" in kwargs:
        kwargs["logits_to_keep"] = 0  # all
    return wanted


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
    if not torch.compiler.is_dynamo_compiling() and bool(unseen.any()):
        raise ModgraftError(
            f"{type(out).__name__} is read at the last position that is not padding by its id, "
            f"which attention_mask hides in some texts of this batch; pad input_ids with the id "
            f"of padding, or pad on the left (padding_side='left')"
        )


def _into_image(
    model: nn.Module, reading: Reading, kwargs: dict[str, Any], source: Source
) -> Splice:
    pixels = kwargs.get("pixel_values")
    if pixels is None:
        raise ModgraftError(
            f"an input module puts tokens before the patches of pixel_values here, and this call "
            f"has none (it has {', '.join(kwargs) or 'nothing'})"
        )
    groups = source(pixels.shape[0])
    _check_widths(groups, len(pixels), reading.width)
    mask = kwargs.get(MASK)
    if mask is not None or any(own.masked for own in groups):
        if mask is None:
            size: Any = model.config.patch_size  # type: ignore[union-attr]
            rows, columns = (size, size) if isinstance(size, int) else size
            patches = (pixels.shape[-2] // rows) * (pixels.shape[-1] // columns)
            mask = pixels.new_ones(len(pixels), reading.first + patches, dtype=torch.bool)
        for own in reversed(groups):  # [B, N] → [B, k + N]
            seen = own.seen.to(mask.dtype)
            mask = torch.cat([mask[:, : own.after], seen, mask[:, own.after :]], dim=1)
        kwargs[MASK] = mask
    assert reading.inside is not None  # noqa: S101
    enter, leave = reading.inside
    return Splice(kwargs, relay=AroundImage(enter, leave, tuple(groups)))


def _check_widths(groups: Sequence[Tokens], batch: int, width: int) -> None:
    for own in groups:
        made = own.embeddings.shape
        if made[0] != batch or made[-1] != width or own.seen.shape != made[:2]:
            raise ModgraftError(
                f"{own.name!r} gave tokens {list(made)} and a mask {list(own.seen.shape)} where "
                f"this host reads [{batch}, k, {width}] and [{batch}, k]"
            )
