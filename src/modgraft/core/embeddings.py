"""What a host reads, and where tokens can go before it.

All of it follows from what the host is: its modules, its configuration, the file that it is
written in.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from sys import modules as _files
from typing import Any

from torch import Tensor, nn

from modgraft.core.aligned import Aligned, aligned
from modgraft.core.errors import ModgraftError
from modgraft.core.patterns import joined

_READS_FIRST = re.compile(
    r"[\w\])]\[:, 0(, :)?\](?!\s*=[^=])"
)  # of code: position 0 of every example
_MASKED = re.compile(r"^class \w+ForMaskedLM\b", re.MULTILINE)
_WRITES = re.compile(
    r"^class \w+(CausalLM|(?<!M)LMHead\w*|ForConditionalGeneration)\b", re.MULTILINE
)
_MASKS_BY_POSITION = re.compile(
    r"mask(_function|_kwargs|s_for_generate)?( = {|\()(?:[^)}]|\(\))*"
    r"\bposition_ids\"?[=:] ?(text_)?position_ids\b"
)
_FROM_ONE = re.compile(r"position_ids\.unsqueeze\(0\) \+ 1\b")
_JOINS = re.compile(r"torch\.cat\([(\[](?!cls|class)(\w+), (\w+)[)\]], dim=1\)")
_SEEN = re.compile(r"visual|image")
_POSITIONS = re.compile(r"wpe|(char_)?(embed_)?pos(ition)?s?(_emb(ed(ding)?)?s?|_encoding)?")


@dataclass(frozen=True)
class Reading:
    """What a host reads, and where tokens can go before it.

    Attributes:
        host: the name of its class, for errors.
        arguments: the names of the arguments that it takes, in order.
        width: the number of features of a token at the first layer.
        first: how many positions stay first: 1 where a class token is read there.
        aligned: which other arguments hold something for each token of a text.
        room: how many positions a table of them has; None where there is no such table, since
            relative and rotary positions have no last one.
        longest: how many positions the configuration speaks of, which may be no limit.
        table: where a text host looks its token ids up; None for one that reads images.
        tables: the paths of the layers that look token ids up: whether they hold ``table``'s
            weight (T5's encoder has a layer of its own) or other rows for the same ids (Gemma 3n
            has some for each block).
        config: the configuration of what reads the text, if it has one.
        by_position: whether positions that begin again tell the texts in one row apart.
        image_is: where an image is in one sequence with the text, "behind" or "before" it.
        inside: in a host that reads images, the layers whose output is the first sequence of
            tokens, and whose input is the last.
    """

    host: str
    arguments: tuple[str, ...]
    width: int
    first: int
    aligned: Aligned
    room: int | None = None
    longest: int | None = None
    table: nn.Embedding | None = None
    tables: tuple[tuple[str, bool], ...] = ()
    config: Any = None
    by_position: bool = False
    image_is: str = ""
    inside: tuple[str, str] | None = None

    @property
    def padding(self) -> int | None:
        """The id of padding, if there is one now."""
        return getattr(self.config, "pad_token_id", None)

    @property
    def packs(self) -> bool:
        """Whether it keeps texts in one row apart, in its mask or in what attends without one."""
        attention = getattr(self.config, "_attn_implementation", None) or ""
        return self.by_position or "flash" in attention

    @property
    def paths(self) -> tuple[str, ...]:
        """The layers where tokens are put in or taken out inside the host."""
        return (*(path for path, _ in self.tables), *(self.inside or ()))

    def check_room(self, count: int, text: int = 0) -> None:
        """Refuse ``count`` tokens before a text of ``text`` tokens, if positions are too few.

        Raises:
            ModgraftError: with the numbers and what would fit.
        """
        room = self.room
        if room is not None and not (count + text <= room and (text or count < room)):
            raise self.no_room(room, count, text)

    def no_room(self, room: int, count: int, text: int) -> ModgraftError:
        """Return the error of ``count`` tokens and ``text`` more for ``room`` positions."""
        if text:
            remedy = f"leave the text {room - count} tokens (truncation=True, max_length="
            remedy += f"{room - count} in the tokenizer), or take at most {max(room - text, 0)} "
            remedy += "before it"
            wanted = f"{count} tokens before a text of {text}, {count + text} in all"
        else:
            remedy = f"take fewer, such as length={max(room // 8, 1)}: the text needs positions too"
            wanted = f"{count} tokens before the text"
        return ModgraftError(f"{wanted}, and this {self.host} has {room} positions; {remedy}")


def reading_of(host: nn.Module) -> Reading:
    """Work out what ``host`` reads, and where tokens can go before it.

    Raises:
        ModgraftError: for a host that reads no tokens.
    """
    name, arguments = type(host).__name__, arguments_of(host)
    beside = aligned(type(host).forward, arguments)
    inside = _image_layers(host)
    if inside:
        embeddings = host.get_submodule(inside[0])
        first = sum(p.shape[1] for n, p in embeddings.named_parameters(recurse=False) if _leads(n))
        width = int(host.config.hidden_size)  # type: ignore[union-attr]
        return Reading(name, arguments, width, first, beside, inside=inside)
    table = token_table(host)
    reader = _reader(host, table)
    tables = tuple(
        (path, _weight(module) is _weight(table))
        for path, module in host.named_modules()
        if isinstance(module, nn.Embedding) and _looks_ids_up(module, table)
    )
    config, first = getattr(reader, "config", None), int(_class_is_first(host, reader))
    longest = getattr(config, "max_position_embeddings", getattr(config, "max_seq_len", None))
    longest = longest if isinstance(longest, int) else None
    rooms = [rows if longest is None else min(rows, longest) for rows in _position_rows(reader)]
    return Reading(
        name,
        arguments,
        table.embedding_dim,
        first,
        beside,
        min(rooms, default=None),
        longest,
        table,
        tables,
        config,
        _packs(reader),
        _place_of_image(reader),
    )


def token_table(host: nn.Module) -> nn.Embedding:
    """Return the embedding table of a text host's tokens.

    Raises:
        ModgraftError: for a host that has none, or does not take embeddings instead of tokens.
    """
    if (table := _text_table(host)) is not None:
        return table
    if _image_layers(host):
        raise ModgraftError(
            f"{type(host).__name__} reads no text and has no vocabulary to look tokens up in; "
            f"what goes before its input here is SoftPrompt(init='random') or a LinearMap"
        )
    table, why = _input_table(host), "reads no token embeddings that others could be put before"
    if isinstance(table, nn.Embedding):
        why = (
            "looks its tokens up in a table, and its forward takes no inputs_embeds in their place"
        )
    elif table is not None and "input_ids" in arguments_of(host):
        why = f"looks its tokens up in a {type(table).__name__}, and no prompt can be served by one"
        why += " that is no nn.Embedding"
    raise ModgraftError(
        f"{type(host).__name__} {why}; implant a module that acts at a layer, such as LoRA(rank=8)"
    )


def _text_table(host: nn.Module) -> nn.Embedding | None:
    table = _input_table(host)
    if isinstance(table, nn.Embedding) and "inputs_embeds" in arguments_of(host):
        return table
    return None


def _input_table(host: nn.Module) -> nn.Module | None:
    try:
        return host.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None


def token_width(host: nn.Module) -> int:
    """Return the number of features of a token at the host's first layer.

    Raises:
        ModgraftError: for a host that reads no tokens.
    """
    if _image_layers(host):
        return int(host.config.hidden_size)  # type: ignore[union-attr]
    return token_table(host).embedding_dim


def arguments_of(host: nn.Module) -> tuple[str, ...]:
    """Return the names of the arguments that the host's ``forward`` takes, in order."""
    return tuple(inspect.signature(type(host).forward).parameters)[1:]  # the first is self


# -- text -----------------------------------------------------------------------------------------


def _looks_ids_up(layer: nn.Embedding, table: nn.Embedding) -> bool:
    """Return whether ``layer`` is called with ids alone, and has rows for most of the vocabulary.

    OPT's positions, for one, are worked out from a mask by their own layer.
    """
    return len(arguments_of(layer)) == 1 and 2 * layer.num_embeddings >= table.num_embeddings


def _weight(layer: nn.Embedding) -> nn.Parameter | None:
    """Return the layer's own weight, not what modules make of it for who reads it."""
    return dict(layer.named_parameters(recurse=False)).get("weight")


def _reader(host: nn.Module, table: nn.Embedding) -> nn.Module:
    """Return the innermost model that holds ``table``: of a model of images and text, the text's.

    Of an encoder-decoder it is the encoder, where that is a model by itself.
    """
    if getattr(getattr(host, "config", None), "is_encoder_decoder", False):
        encoder = getattr(host, "get_encoder", lambda: None)()
        if encoder is not None and _is_model(encoder):
            return encoder
    found = host
    for module in host.modules():  # from the outside in
        if _is_model(module) and any(m is table for m in module.modules()):
            found = module
    return found


def _is_model(module: nn.Module) -> bool:
    """Return whether ``module`` is a model of transformers, by itself or as a part of another."""
    return getattr(type(module), "base_model_prefix", None) is not None


def _class_is_first(host: nn.Module, reader: nn.Module) -> bool:
    """Return whether texts begin with a token that the class is read at.

    A few configurations say so. Otherwise the file that the model is written in does: it is that
    of an encoder, and reads position 0 of every example, or tells segments of a text apart, which
    come after a class token. A head that reads each token is put on the same encoder, whose texts
    begin alike.
    """
    config = getattr(reader, "config", None)
    if (summary := getattr(config, "summary_type", None)) is not None:
        return summary == "first"
    if not _is_model(reader):
        return False
    told = _is_told_to_decode(host, reader)
    if getattr(config, "is_decoder", False) if told is None else told:
        return False
    source = _source(type(reader).__module__)
    encodes = told is False or _MASKED.search(source) or not _WRITES.search(source)
    segments = "token_type_ids" in arguments_of(reader) and "causal" not in source
    return bool(encodes and (segments or _READS_FIRST.search(source)))


def _is_told_to_decode(host: nn.Module, reader: nn.Module) -> bool | None:
    """Return whether ``host`` tells ``reader`` to decode; None where no argument says so.

    BLIP's text model is an encoder by itself, whatever its configuration says.
    """
    for module in host.modules():  # from the outside in
        if _is_model(module) and any(m is reader for m in module.modules()):
            told = inspect.signature(type(module).forward).parameters.get("is_decoder")
            if told is not None:
                return bool(told.default)
    return None


def _packs(reader: nn.Module) -> bool:
    """Return whether ``reader`` gives its positions to what makes its mask."""
    return _is_model(reader) and bool(_MASKS_BY_POSITION.search(_source(type(reader).__module__)))


def _place_of_image(reader: nn.Module) -> str:
    """Return where ``reader`` puts an image in one sequence with its text, by the file that it is
    written in: ``"behind"`` or ``"before"`` it, and empty if it does neither.

    The class token that an eye puts before its patches is no text.
    """
    for names in _JOINS.findall(_source(type(reader).__module__)) if _is_model(reader) else ():
        seen = [bool(_SEEN.search(name)) for name in names]
        if seen == [False, True] or seen == [True, False]:
            return "behind" if seen[1] else "before"
    return ""


@cache
def _source(module: str) -> str:
    return inspect.getsource(_files[module])


def _position_rows(reader: nn.Module) -> Iterator[int]:
    """Yield the number of rows of each table in which ``reader`` looks up positions."""
    eyes = tuple(f"{path}." for path, m in reader.named_modules() if path and _is_eye(m, reader))
    for path, module in reader.named_modules():
        if not _POSITIONS.fullmatch(path.rpartition(".")[2]) or path.startswith(eyes):
            continue
        if hasattr(module, "make_weight"):
            continue  # one that makes its weight anew is as long as it has to be
        if isinstance(module, nn.Embedding):
            padding: Any = module.padding_idx
            yield module.num_embeddings - (0 if padding is None else padding + 1)
    for path, buffer in reader.named_buffers():  # GPT-J's rotations, which are looked up
        if path.startswith(eyes):
            continue
        if _POSITIONS.fullmatch(path.rpartition(".")[2]) and buffer.dim() == 2:
            yield len(buffer)


def _is_eye(part: nn.Module, reader: nn.Module) -> bool:
    """Return whether a part of what reads the text reads something else, such as an image.

    It says so, or is made by another kind of configuration, as Idefics' eye is.
    """
    if getattr(part, "main_input_name", "input_ids") != "input_ids":
        return True
    own, text = (getattr(m, "config", None) for m in (part, reader))
    return own is not None and text is not None and type(own) is not type(text)


def counts_from(model: nn.Module) -> int | None:
    """Return the position at which ``model`` begins to count, where that is free.

    It is where positions are rotations alone, of which only differences matter. None where the
    model takes no positions, has a table of them, or works them out for images.
    """
    if not _is_model(model) or not {"attention_mask", "position_ids"} <= set(arguments_of(model)):
        return None
    parts = [part for part in model.modules() if _is_model(part)]
    if any(hasattr(part, "get_rope_index") for part in parts):
        return None
    table = _text_table(model)
    reader = model if table is None else _reader(model, table)
    turns = any(path.endswith("inv_freq") for path, _ in reader.named_buffers())
    if not turns or any(_position_rows(reader)):
        return None
    files = {type(part).__module__ for part in parts}
    return int(any(f.startswith("transformers.") and _FROM_ONE.search(_source(f)) for f in files))


def not_given(model: nn.Module) -> str | None:
    """Say why nobody can give a model the positions of a text one by one, None where one can.

    It must take them, and count by itself 0, 1, 2, … (or from :func:`counts_from`).
    """
    name = type(model).__name__
    if not _is_model(model) or "position_ids" not in arguments_of(model):
        return f"{name} takes no position_ids"
    if any(hasattr(part, "get_rope_index") for part in model.modules()):
        return f"{name} works its positions out for images"
    if counts_from(model) is not None:
        return None
    table = _text_table(model)
    reader = model if table is None else _reader(model, table)
    if not any(_position_rows(reader)):
        return f"{name} has neither a table of positions nor rotations"
    tables = [
        module
        for path, module in reader.named_modules()
        if _POSITIONS.fullmatch(path.rpartition(".")[2]) and isinstance(module, nn.Embedding)
    ]
    if any(module.padding_idx is not None for module in tables):
        return f"{name} counts from where a text begins, after a position for padding"
    return None


# -- images ---------------------------------------------------------------------------------------


def _image_layers(host: nn.Module) -> tuple[str, str] | None:
    """Return where the tokens of a vision transformer's image begin and end, if it is one.

    ViLT, which reads a text before its image, is none.
    """
    if _text_table(host) is not None:
        return None
    base = _base_path(host)
    model = host.get_submodule(base)
    children = dict(model.named_children())
    if not isinstance(getattr(children.get("embeddings"), "cls_token", None), Tensor):
        return None
    if "layernorm" not in children or any(
        "relative_position" in n for n, _ in model.named_modules()
    ):
        return None
    return joined(base, "embeddings"), joined(base, "layernorm")


def _leads(name: str) -> bool:
    """Return whether a parameter of an image's embeddings stands before its patches."""
    return name.endswith(("_token", "_tokens")) and name != "mask_token"


def _base_path(model: nn.Module) -> str:
    """Return the path of the base model inside ``model`` (``"bert"``), empty where it is the
    model."""
    prefix = getattr(model, "base_model_prefix", "")
    return prefix if prefix and prefix in dict(model.named_children()) else ""
