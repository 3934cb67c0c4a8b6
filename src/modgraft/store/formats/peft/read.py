"""PEFT's folders: ``adapter_config.json`` and ``adapter_model.safetensors``.

Each of its kinds is one class of ours: LoRA, IA³ (what scales inputs is a second module), VeRA,
OFT, trainable tokens, prompt and prefix tuning. Layers that it saves whole (``modules_to_save``),
and biases that trained (``bias="all"``), are weights of the host that come with the module. An
option that is set and not understood is refused, and so are tensors that are lacking or left over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from modgraft.core.errors import CheckpointError, warn
from modgraft.core.patterns import WRAPPERS
from modgraft.store.file import Entry, TensorFile, read_json, read_small
from modgraft.store.formats.base import module_name
from modgraft.store.formats.found import Found, stored
from modgraft.store.formats.peft import ia3, lora, oft, prompts, tokens, vera
from modgraft.store.formats.peft.folder import PICKLE, TENSORS, Folder, Group, Piece
from modgraft.store.formats.peft.host_weights import HostWeights
from modgraft.store.formats.peft.options import (
    CONFIG,
    IA3Options,
    LoraOptions,
    OFTOptions,
    Options,
    PrefixOptions,
    PromptOptions,
    TokensOptions,
    VeraOptions,
    options,
)
from modgraft.store.stored import Stored

_OPTIONS: dict[str, type[Options]] = {
    "LORA": LoraOptions, "IA3": IA3Options, "VERA": VeraOptions, "OFT": OFTOptions,
    "TRAINABLE_TOKENS": TokensOptions, "PROMPT_TUNING": PromptOptions,
    "PREFIX_TUNING": PrefixOptions,
}  # fmt: skip


def holds(folder: Path) -> bool:
    """Return whether a folder is one of PEFT, or what is left of one."""
    path = folder / CONFIG
    if not path.exists():
        return (folder / TENSORS).is_file()
    if not path.is_file() or path.stat().st_size > 2**24:
        return False
    return b'"peft_type"' in path.read_bytes()


def read(folder: Path, model: nn.Module) -> Stored:
    """Read what PEFT saved, for the host of ``model``.

    Raises:
        CheckpointError: for a pickle, an option or a tensor that is not understood, a tensor that
            is lacking, or a host without such layers.

    Warns:
        UserWarning: if it was trained in a model of another name.
    """
    path = folder / CONFIG
    try:
        text = read_small(path)
        for wrapper in WRAPPERS:  # of torch.compile and its like, which are in the keys too
            text = text.replace(f"{wrapper}.".encode(), b"")
        said = read_json(text)
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read ({error}); copy the folder again") from error
    kind = said.get("peft_type") if isinstance(said, dict) else None
    if not isinstance(kind, str) or kind not in _OPTIONS:
        raise CheckpointError(
            f"{path}: peft_type={kind!r:.40} has no class here; there are {', '.join(_OPTIONS)}"
        )
    if not (folder / TENSORS).exists() and (folder / PICKLE).exists():
        raise CheckpointError(
            f"{folder / PICKLE} is a pickle, which runs whatever its author wrote, and is not "
            f"read; load it in PEFT and save it again: model.save_pretrained(folder, "
            f"safe_serialization=True)"
        )
    chosen = options(_OPTIONS[kind], said, path)
    found = Folder(folder, TensorFile(folder / TENSORS), model)
    chosen = _below(chosen, found.before)
    host = HostWeights(found, chosen)
    groups = _groups(found, chosen, host.keys)
    host.check(groups)
    if found.left:
        key = min(found.left)
        found.refuse(
            f"{len(found.left)} tensors are left over, such as {key}: they belong to no option of "
            f"{CONFIG}; the file is another one, or was changed"
        )
    if not any(group.sites for group in groups):
        found.refuse(f"there are no tensors of {kind} in {TENSORS}; copy the folder again")
    _warn_of_another_model(folder, chosen, model)
    return _stored(found, chosen, groups, host)


def _below(said: Options, before: str) -> Options:
    """Name the layers in options without what comes ``before``: PEFT goes by the ends of paths."""
    changed = {}
    patterns = ("rank_pattern", "alpha_pattern")
    for name in ("target_modules", "exclude_modules", "modules_to_save", *patterns):
        value = getattr(said, name, None)
        if isinstance(value, list):
            changed[name] = [path.removeprefix(f"{before}.") for path in value]
        elif isinstance(value, dict):
            changed[name] = {path.removeprefix(f"{before}."): v for path, v in value.items()}
    return said.model_copy(update=changed) if before else said


def _groups(folder: Folder, said: Options, host: Mapping[str, str]) -> list[Group]:
    """Return what becomes modules of ours."""
    match said:
        case LoraOptions():
            groups = [lora.read(folder, said, host)]
            if said.trainable_token_indices is not None:
                groups += tokens.read_beside(folder, said.trainable_token_indices)
            return [group for group in groups if group.sites]
        case IA3Options():
            return ia3.read(folder, said)
        case VeraOptions():
            return [vera.read(folder, said)]
        case OFTOptions():
            return [oft.read(folder, said)]
        case TokensOptions():
            return tokens.read(folder, said)
        case PrefixOptions():
            return [prompts.read_prefix(folder, said)]
        case _:
            return [prompts.read_prompt(folder, said)]  # type: ignore[arg-type]


def _warn_of_another_model(folder: Path, said: Options, model: nn.Module) -> None:
    there, here = said.base_model_name_or_path, name_of(model)
    if there and here and there != here:
        warn(
            f"{folder} was trained in {there!r:.120}, and this host is {here!r:.120}; PEFT keeps "
            f"nothing that tells whether their weights are the same",
        )


def name_of(model: nn.Module) -> str | None:
    """Return the name of a host on a hub, None where it has none."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    return name if isinstance(name, str) and name else None


def _stored(folder: Folder, said: Options, groups: Sequence[Group], host: HostWeights) -> Stored:
    """Return modules as :class:`Stored` has them, called by the folder's name."""
    base = module_name(folder.path.resolve().name, "peft")
    ends = [groups[0].suffix if len(groups) == 1 else group.suffix for group in groups]
    names = [base + (end if len(groups) > 1 else "") for end in ends]
    names = [f"{name}_{i}" if name in names[:i] else name for i, name in enumerate(names)]
    modules = [
        Found(name, group.method, group.sites, {p.name: _waiting(p) for p in group.pieces})
        for name, group in zip(names, groups, strict=True)
    ]
    return stored(
        folder.path,
        modules,
        host.waiting,
        [host.verify],
        stem=base,
        composition=" + ".join(names),
        versions={"peft": said.peft_version or "unknown"},
        base_model=said.base_model_name_or_path,
        provenance={"peft_type": said.peft_type, "task_type": said.task_type},
    )


def _waiting(piece: Piece) -> tuple[Entry, Callable[[], Tensor]]:
    size = 4 * torch.Size(piece.shape).numel()
    return Entry(torch.float32, piece.shape, 0, size), piece.make
