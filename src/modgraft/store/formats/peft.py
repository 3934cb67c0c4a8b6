"""PEFT's folders: ``adapter_config.json`` and ``adapter_model.safetensors``.

Each of its kinds is one class of ours: LoRA, IA³ (what scales inputs is a second module), VeRA,
OFT, trainable tokens, prompt and prefix tuning. Layers that it saves whole (``modules_to_save``),
and biases that trained (``bias="all"``), are weights of the host that come with the module. An
option that is set and not understood is refused, and so are tensors that are lacking or left over.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modgraft.computation.base import Computation
from modgraft.computation.lora import LoRA
from modgraft.computation.oft import OFT
from modgraft.computation.prefix import Prefix
from modgraft.computation.prompts import SoftPrompt
from modgraft.computation.rescale import Rescale
from modgraft.computation.trainable_tokens import TrainableTokens
from modgraft.computation.vera import VeRA
from modgraft.core.errors import CheckpointError, ModgraftError
from modgraft.core.files import locked, write_json
from modgraft.core.layers import LINEAR
from modgraft.core.sites import Site, located
from modgraft.engine.implant import check_name, learning_parts
from modgraft.store.card import Card, Saved, to_json
from modgraft.store.file import Entry, TensorFile, read_json, write_tensors
from modgraft.store.formats import _peft_kinds as kinds
from modgraft.store.formats import _peft_lora as lora
from modgraft.store.formats._peft_folder import (
    CONFIG,
    PICKLE,
    PREFIX,
    TENSORS,
    Folder,
    Group,
    IA3Options,
    LoraOptions,
    OFTOptions,
    Options,
    PrefixOptions,
    PromptOptions,
    TokensOptions,
    VeraOptions,
    Written,
    aim,
    options,
)
from modgraft.store.stored import Stored
from modgraft.training.host_like import HostLike

VERSION = "0.21.2"  # of PEFT, whose format is written

_OPTIONS: dict[str, type[Options]] = {
    "LORA": LoraOptions, "IA3": IA3Options, "VERA": VeraOptions, "OFT": OFTOptions,
    "TRAINABLE_TOKENS": TokensOptions, "PROMPT_TUNING": PromptOptions,
    "PREFIX_TUNING": PrefixOptions,
}  # fmt: skip
_BEFORE_INPUT = ("PROMPT_TUNING", "PREFIX_TUNING")
"""What changes no layer of the host, so that this is not wrapped, and its keys are others."""

_TASKS = {
    "SequenceClassification": "SEQ_CLS", "TokenClassification": "TOKEN_CLS",
    "QuestionAnswering": "QUESTION_ANS", "ConditionalGeneration": "SEQ_2_SEQ_LM",
    "CausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM",
}  # fmt: skip
_WITH_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"),
               "QUESTION_ANS": ("qa_outputs",)}  # fmt: skip
"""The tasks for which PEFT saves the head by itself, and what it takes for one."""


def holds(folder: Path) -> bool:
    """Return whether a folder is one of PEFT."""
    path = folder / CONFIG
    if not path.is_file() or path.stat().st_size > 2**24:
        return False
    return b'"peft_type"' in path.read_bytes()


# -- reading ---------------------------------------------------------------------------------------


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
        said = read_json(path.read_bytes())
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
    host = _HostWeights(found, chosen)
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


def _groups(folder: Folder, said: Options, host: Mapping[str, str]) -> list[Group]:
    """Return what becomes modules of ours."""
    match said:
        case LoraOptions():
            groups = [lora.read(folder, said, host)]
            if said.trainable_token_indices is not None:
                groups += kinds.read_tokens_beside(folder, said.trainable_token_indices)
            return [group for group in groups if group.sites]
        case IA3Options():
            return kinds.read_ia3(folder, said)
        case VeraOptions():
            return [kinds.read_vera(folder, said)]
        case OFTOptions():
            return [kinds.read_oft(folder, said)]
        case TokensOptions():
            return kinds.read_tokens(folder, said)
        case PrefixOptions():
            return [kinds.read_prefix(folder, said)]
        case _:
            return [kinds.read_prompt(folder, said)]  # type: ignore[arg-type]


class _HostWeights:
    """The weights of the host that stand in a folder beside the module.

    Attributes:
        keys: their keys in the file by their names in the host.
    """

    def __init__(self, folder: Folder, said: Options) -> None:
        self.folder, self.said = folder, said
        model = folder.model
        self._prefix = "base_model." if isinstance(said, PromptOptions | PrefixOptions) else PREFIX
        self._bias = getattr(said, "bias", "none")
        first: dict[int, str] = {}
        self._names = {
            name: first.setdefault(id(p), name)
            for name, p in model.named_parameters(remove_duplicate=False)
        }
        self._buffers = dict(model.named_buffers())
        self._tables = _tables(model)
        self.keys: dict[str, str] = {}
        self._again: list[tuple[str, str]] = []  # of one weight: another key, and its name
        for key in sorted(folder.left):
            self._sort(key)

    def _sort(self, key: str) -> None:
        """Take a tensor that is the host's."""
        said = key.removeprefix(self._prefix)
        name = re.sub(r"\.(base_layer|original_module|modules_to_save)\.", ".", said)
        if name == said == key or not self._is_meant(said, name):
            return
        if name in self._names:
            own = self._names[name]
            if re.search(r"\.(original_module|modules_to_save)\.", said) or own in self.keys:
                self._again.append((key, own))
            else:
                self.keys[own] = key
            self.folder.left.discard(key)
        elif name in self._buffers:
            self._again.append((key, name))
            self.folder.left.discard(key)

    def _is_meant(self, said: str, name: str) -> bool:
        """Return whether the options say that a weight of the host is saved."""
        path = name.rpartition(".")[0]
        whole = self.said.modules_to_save or []
        if any(part.endswith(m) for part in _ancestors(path) for m in whole):
            return True
        if name.endswith(".bias") and (
            self._bias == "all" or (self._bias != "none" and ".base_layer." in said)
        ):
            return True
        return id(self.folder.modules.get(path)) in self._tables  # which PEFT saves by itself

    def check(self, groups: Iterable[Group]) -> None:
        """Check that everything is there that the options say is saved.

        Raises:
            CheckpointError: with what is lacking.
        """
        wanted: set[str] = set()
        for path, module in self.folder.modules.items():
            if path and any(path.endswith(m) for m in self.said.modules_to_save or ()):
                for name, _ in module.named_parameters():
                    wanted.add(self._names[f"{path}.{name}"])
        if self._bias != "none":
            paths = {site for group in groups for site in group.sites}
            wanted |= {
                own
                for name, own in self._names.items()
                if name.endswith(".bias")
                and (self._bias == "all" or name.removesuffix(".bias") in paths)
            }
        if lacking := sorted(wanted - self.keys.keys()):
            self.folder.refuse(
                f"{CONFIG} says that the host's {lacking[0]} is saved too, and it is missing, with "
                f"{len(lacking) - 1} others; the file is cut short, or another one: copy it again"
            )

    def tensors(self) -> dict[str, Tensor]:
        """Read them, and compare what stands there twice.

        Raises:
            CheckpointError: for one that stands there twice, or in a buffer of the host, otherwise.
        """
        found = {name: self.folder.tensor(key) for name, key in self.keys.items()}
        for key, name in self._again:
            if ".original_module." in key:  # as it was before; nothing reads it
                continue
            other = found.get(name)
            if other is None:
                own = self._buffers.get(name)
                other = self.folder.model.get_parameter(name) if own is None else own
            tensor = self.folder.tensor(key)
            if tensor.shape != other.shape or not torch.equal(tensor.to(other), other):
                self.folder.refuse(
                    f"{key} is another one than {name} of this host, which it cannot replace: "
                    f"it is a buffer, or another layer's weight too; load it into the host that it "
                    f"was trained in"
                )
        return found


def _ancestors(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[: n + 1]) for n in range(len(parts))]


def _tables(model: nn.Module) -> set[int]:
    """Return the ids of the layers that PEFT saves by itself where they are changed or resized."""
    asked = [kinds.asked(model, name) for name in ("get_input_embeddings", "get_output_embeddings")]
    return {id(table) for table in asked if table is not None}


def _warn_of_another_model(folder: Path, said: Options, model: nn.Module) -> None:
    there, here = said.base_model_name_or_path, _name_of(model)
    if there and here and there != here:
        warnings.warn(
            f"{folder} was trained in {there!r:.120}, and this host is {here!r:.120}; PEFT keeps "
            f"nothing that tells whether their weights are the same",
            stacklevel=2,
        )


def _name_of(model: nn.Module) -> str | None:
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    return name if isinstance(name, str) and name else None


def _stored(folder: Folder, said: Options, groups: Sequence[Group], host: _HostWeights) -> Stored:
    """Return modules as :class:`Stored` has them, called by the folder's name."""
    base = re.sub(r"\W", "_", folder.path.resolve().name)
    try:
        check_name(base)
    except ModgraftError:
        base = "peft"
    ends = [groups[0].suffix if len(groups) == 1 else group.suffix for group in groups]
    names = [base + (end if len(groups) > 1 else "") for end in ends]
    names = [f"{name}_{i}" if name in names[:i] else name for i, name in enumerate(names)]
    entries: dict[str, Entry] = {}
    for name, group in zip(names, groups, strict=True):
        for piece in group.pieces:
            size = 4 * torch.Size(piece.shape).numel()
            entries[f"{name}:{piece.name}"] = Entry(torch.float32, piece.shape, 0, size)
    entries |= {f":{name}": folder.file.entries[key] for name, key in host.keys.items()}
    modules = [
        Saved(name=name, **to_json(group.method), sites=list(group.sites))
        for name, group in zip(names, groups, strict=True)
    ]
    card = Card(
        names=names,
        modules=modules,
        composition=" + ".join(names),
        beside=sorted(host.keys),
        versions={"peft": said.peft_version or "unknown"},
        made="",
        base_model=said.base_model_name_or_path,
        provenance={"peft_type": said.peft_type, "task_type": said.task_type},
    )

    def tensors() -> Mapping[str, Tensor]:
        found = {
            f"{name}:{piece.name}": piece.make().contiguous()
            for name, group in zip(names, groups, strict=True)
            for piece in group.pieces
        }
        return found | {f":{name}": tensor for name, tensor in host.tensors().items()}

    return Stored(folder.path, card, entries, tensors)


# -- writing ---------------------------------------------------------------------------------------


def write(host: HostLike, names: Sequence[str], folder: Path) -> None:
    """Write modules of a host as PEFT saves one adapter.

    Raises:
        ModgraftError: for what PEFT has no place for, with the reason, or a folder of other things.
    """
    if folder.is_dir() and any(folder.iterdir()) and not holds(folder):
        raise CheckpointError(f"{folder} is there and holds nothing of PEFT; choose another folder")
    model = host.model
    implants = {name: host._implants[name] for name in names}
    placed = {
        name: list(zip(located(model, implant.paths), implant.places, strict=True))
        for name, implant in implants.items()
    }
    kind, written = _written({n: i.method for n, i in implants.items()}, placed, model)
    beside = sorted({n for i in implants.values() for n in i.beside} | learning_parts(model))
    prefix = "base_model." if kind in _BEFORE_INPUT else PREFIX
    bare = {"prompt_embeddings"}
    tensors = {(k if k in bare else prefix + k): t for k, t in written.tensors.items()}
    tensors |= {f"base_model.{key}": tensor for key, tensor in written.shared.items()}
    task, heads = _task(model)
    if kind in _BEFORE_INPUT and task is None:
        raise ModgraftError(
            f"PEFT puts prompts and prefixes before the input of models for {', '.join(_TASKS)}, "
            f"and this host is a {type(model).__name__}"
        )
    saved = _saved_beside(kind, written, beside, heads, model)
    tensors |= {prefix + key: tensor for key, tensor in saved.items()}
    if heads and not set(heads) & set(written.options.get("modules_to_save") or ()):
        task = None  # with which PEFT would look for a head in the folder
    said = {
        "peft_type": kind, "peft_version": VERSION, "task_type": task,
        "base_model_name_or_path": _name_of(model), "revision": None, "inference_mode": True,
        "auto_mapping": None, "modules_to_save": None, **written.options,
    }  # fmt: skip
    if kind not in _BEFORE_INPUT:
        layers = {path: m for path, m in model.named_modules() if path}
        own = [layers[path] for path in written.paths if isinstance(layers[path], LINEAR)]
        said["fan_in_fan_out"] = bool(own) and not any(isinstance(m, nn.Linear) for m in own)
        said["target_modules"] = []
        if written.paths:
            aim(written.paths, layers, said)
        if kind == "IA3":
            kinds.aim_inner(written.paths, said)
    with locked(folder, TENSORS, CONFIG):
        write_tensors({k: t.detach().clone() for k, t in tensors.items()}, folder / TENSORS, {})
        write_json(folder / CONFIG, dict(sorted(said.items())))


Placed = Mapping[str, list[tuple[Site, Any]]]


def _written(
    methods: Mapping[str, Computation], placed: Placed, model: nn.Module
) -> tuple[str, Written]:
    """Return the type that PEFT has for modules, and what it keeps of them."""
    if len(set(map(type, methods.values()))) == 1 and all(
        isinstance(m, Rescale) for m in methods.values()
    ):
        name = " and ".join(methods)
        return "IA3", kinds.write_ia3(name, [each for some in placed.values() for each in some])
    by_type = {type(m): n for n, m in methods.items()}
    if len(methods) == 2 and by_type.keys() == {LoRA, TrainableTokens}:
        one, other = by_type[LoRA], by_type[TrainableTokens]
        written = lora.write(one, methods[one], placed[one])  # type: ignore[arg-type]
        tokens = kinds.write_tokens(other, methods[other], placed[other], model, True)  # type: ignore[arg-type]
        both = {s.path for s, _ in placed[one]} & {s.path for s, _ in placed[other]}
        if both:
            raise ModgraftError(f"PEFT has LoRA or trainable tokens at {min(both)}, and not both")
        written.tensors |= tokens.tensors
        written.options |= tokens.options
        return "LORA", written
    if len(methods) != 1:
        raise ModgraftError(
            f"PEFT keeps one module in a folder, and {', '.join(methods)} are several; save each "
            f"to a folder of its own"
        )
    [(name, method)] = methods.items()
    sites = placed[name]
    match method:
        case LoRA():
            return "LORA", lora.write(name, method, sites)
        case VeRA():
            return "VERA", kinds.write_vera(name, method, sites)
        case OFT():
            return "OFT", kinds.write_oft(name, method, sites)
        case TrainableTokens():
            return "TRAINABLE_TOKENS", kinds.write_tokens(name, method, sites, model, False)
        case SoftPrompt():
            return "PROMPT_TUNING", kinds.write_prompt(name, method, model, sites[0][1])
        case Prefix():
            return "PREFIX_TUNING", kinds.write_prefix(name, method, sites, model)
    raise ModgraftError(
        f"{name!r} is a {type(method).__name__}, which PEFT's format has no place for; "
        f"save it without format='peft'"
    )


def _saved_beside(
    kind: str, written: Written, beside: Sequence[str], heads: Sequence[str], model: nn.Module
) -> dict[str, Tensor]:
    """Return what PEFT keeps of the host, by key, and set its options accordingly."""
    parameters, modules = dict(model.named_parameters()), dict(model.named_modules())
    left, found = set(beside), {}
    if "bias" in written.options:
        every = {name for name in parameters if name.endswith(".bias")}
        own = {f"{path}.bias" for path in written.paths} & every
        for word, some in (("all", every), (f"{kind.lower()}_only", own)):
            if some and some <= left:
                written.options["bias"] = word
                left -= some
                inner = {f"{name}.base_layer.bias": f"{name}.bias" for name in written.paths}
                found |= {k: parameters[n] for k, n in inner.items() if n in some}
                found |= {n: parameters[n] for n in some - set(inner.values())}
                break
    tables = _tables(model)
    for name in sorted(left):
        path, _, parameter = name.rpartition(".")
        if path in written.paths and parameter == "weight" and id(modules[path]) in tables:
            found[f"{path}.base_layer.weight"] = parameters[name]
            left.discard(name)
    owners = {name.rpartition(".")[0] for name in left}
    among = {h for h in heads for o in owners if f"{o}.".startswith(f"{h}.")}
    if kind in _BEFORE_INPUT:
        among = set(heads)
    whole = {o for o in owners if not any(f"{o}.".startswith(f"{h}.") for h in among)} | among
    whole = sorted(whole)
    for path in whole:
        meant = [p for p in modules if p.endswith(path)]
        inside = [p for p in written.paths if f"{p}.".startswith(f"{path}.")]
        if not path or meant != [path] or inside:
            raise ModgraftError(
                f"weights of {path or 'the host itself'} trained with the module, and PEFT saves "
                f"the whole of a layer by its name: "
                f"{'it is changed by the module too' if inside else 'others are called so'}; "
                f"save it without format='peft'"
            )
        module = modules[path]
        found |= {f"{path}.{name}": tensor for name, tensor in module.state_dict().items()}
    if whole:
        written.options["modules_to_save"] = whole
    return found


def _task(model: nn.Module) -> tuple[str | None, list[str]]:
    """Return PEFT's word for what a host is for, and the layers that it then takes for heads."""
    name = type(model).__name__
    task = next((task for end, task in _TASKS.items() if name.endswith(end)), None)
    ends = _WITH_HEADS.get(task or "", ())
    return task, [p for p, _ in model.named_modules() if ends and p.endswith(ends)]
