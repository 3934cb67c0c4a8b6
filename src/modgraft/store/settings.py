"""What a host computes with beside its weights and persistent buffers: what its layers hold.

There are plain settings (a number of heads, an epsilon, an activation), and lists, dictionaries and
tensors, among them buffers that no state dict has. Some of it is no setting but state: a cache, a
counter, a mask as long as the last input. State is what the layer's own code writes to while it
runs, in ``forward`` and whatever that calls.
"""

from __future__ import annotations

import dis
import hashlib
import math
import re
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from enum import Enum
from functools import cache, partial
from operator import is_
from types import BuiltinFunctionType, CodeType, FunctionType, SimpleNamespace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from modgraft.core.sharded import is_sharded, whole
from modgraft.engine.own_forward import own_class

BESIDE_THE_FUNCTION = {
    "training", "gradient_checkpointing", "use_cache", "transformers_version", "dtype",
    "torch_dtype", "architectures", "id2label", "label2id", "problem_type", "return_dict",
    "name_or_path", "output_attentions", "output_hidden_states", "max_seq_len_cached", "inplace",
    "finetuning_task", "task_specific_params", "chunk_size_feed_forward", "attn_implementation",
    "experts_implementation", "return_dict_in_generate", "tokenizer_class",
    "initializer_range", "initializer_factor", "init_std", "supports_gradient_checkpointing",
    "hf_device_map", "layer_idx", "all_tied_weights_keys", "warnings_issued",
    "use_nested_tensor", "enable_nested_tensor",
}  # fmt: skip
"""Settings that change how a host is trained, run or shown, and not what it computes."""

_DROPS = re.compile(r"(^|_|layer|p)drop(out|_?path)?(_|$)")
"""The names of rates of what is dropped in training."""

_DEVICE = re.compile(r"(cpu|cuda|mps|xpu|meta)(:\d+)?")

_OF_CONFIGS = {"config", "cfg", "args", "hparams"}
"""What objects are called that hold settings."""

_CHANGING = {
    "append", "extend", "insert", "add", "update", "setdefault", "pop", "popitem", "clear",
    "remove",
}  # fmt: skip
"""Functions that change what they are called of."""

_STORING = {"setattr", "register_buffer"}
"""Functions that are given the name of what they store."""

_ROUGH = {"float16", "bfloat16"}

_LARGEST = 1e4  # a mask's infinity is another number in each precision

_PLAIN = (bool, int, float, str)

Said = str | list[Any]
Layers = Iterable[tuple[str, nn.Module]]


class Setting(NamedTuple):
    """Something that a layer holds.

    Attributes:
        path: the layer's.
        kind: its class.
        name: what it calls it.
        value: a text where it is plain, and else a text and the tensors in it, each as
            :func:`_sketch` has it.
    """

    path: str
    kind: type[nn.Module]
    name: str
    value: Said

    @property
    def label(self) -> str:
        """Where it is."""
        return f"{self.path}.{self.name}" if self.path else self.name


class _Seen(NamedTuple):
    """A layer whose settings are all plain, as it was seen last."""

    path: str
    kind: type[nn.Module]
    names: list[str]
    values: list[Any]
    settings: list[Setting]

    def is_as(self, path: str, kind: type[nn.Module], held: Mapping[str, Any]) -> bool:
        """Return whether the layer holds the very same objects."""
        same = path == self.path and kind is self.kind and len(held) == len(self.values)
        return same and all(map(is_, held.values(), self.values)) and list(held) == self.names


_seen: WeakKeyDictionary[nn.Module, _Seen] = WeakKeyDictionary()


def settings(layers: Layers) -> list[Setting]:
    """Return what layers hold and is no state, in their order."""
    found: list[Setting] = []
    for path, layer in layers:
        kind, held = own_class(layer), layer.__dict__
        seen = None if layer._non_persistent_buffers_set else _seen.get(layer)
        if seen is None or not seen.is_as(path, kind, held):
            own = list(_settings_of(path, kind, layer))
            if any(not isinstance(each.value, str) for each in own):
                _seen.pop(layer, None)  # what they hold can change where it is
                found += own
                continue
            _seen[layer] = seen = _Seen(path, kind, list(held), list(held.values()), own)
        found += seen.settings
    return found


def _settings_of(path: str, kind: type[nn.Module], layer: nn.Module) -> Iterator[Setting]:
    stored, changed = _written(kind)
    for name, value in _held_by(layer, kind):
        if name in stored or (said := _said(name, value)) is None:
            continue
        if isinstance(said, str) or name not in changed:
            yield Setting(path, kind, name, said)


def is_beside(name: str, value: Any) -> bool:
    """Return whether a setting changes nothing of what a host computes."""
    if name[0] == "_" or name in BESIDE_THE_FUNCTION:
        return True
    kind = type(value)
    if kind is str:
        return bool(_DEVICE.fullmatch(value))
    return kind is float and _is_rate(name)


@cache
def _is_rate(name: str) -> bool:
    return bool(_DROPS.search(name))  # off where a model is used


def agrees(one: Said | None, other: Said | None) -> bool:
    """Return whether two values of one setting are the same, tensors to the precision they have.

    What is not in a state dict was computed where the host was made: the last bit may be another.
    """
    if one == other or not (isinstance(one, list) and isinstance(other, list)):
        return one == other
    if len(one) != len(other) or one[0] != other[0]:
        return False
    return all(_near(mine, theirs) for mine, theirs in zip(one[1:], other[1:], strict=True))


def _near(one: Any, other: Any) -> bool:
    match one, other:
        case [str(mine), float(a), float(b), m], [str(theirs), float(c), float(d), n]:
            most = (1e-2 if {mine, theirs} & _ROUGH else 1e-5) * max(abs(a), abs(c))
            return abs(a - c) <= most and abs(b - d) <= most and m == n
    return False  # no sketches


def _held_by(layer: nn.Module, kind: type[nn.Module]) -> Iterator[tuple[str, Any]]:
    dropout = "Dropout" in kind.__name__
    for name, value in layer.__dict__.items():
        if name[0] == "_" or is_beside(name, value) or (dropout and name == "p"):
            continue
        if not (callable(value) and hasattr(kind, name)):  # a method that a tool has wrapped
            yield name, value
    for name in sorted(layer._non_persistent_buffers_set):
        if layer._buffers.get(name) is not None:
            yield name, layer._buffers[name]


def _said(name: str, value: Any) -> Said | None:
    """Return a value as :attr:`Setting.value` has it, None where it says nothing of a function."""
    if value is None or isinstance(value, _PLAIN):
        return repr(value)
    if hasattr(type(value), "to_dict"):  # a config, which is read by itself
        return None
    if isinstance(value, FunctionType | BuiltinFunctionType):
        return value.__qualname__
    if isinstance(value, tuple) and all(isinstance(v, _PLAIN) for v in value):
        return repr(tuple(value))
    if name in _OF_CONFIGS and hasattr(value, "__dict__") and not callable(value):
        value = vars(value)
    tensors: list[Tensor] = []
    text = _text(value, tensors, 0)
    if text is None:
        return None
    short = text if len(text) <= 80 else hashlib.sha256(text.encode()).hexdigest()[:16]
    return [short, *map(_sketch, tensors)]


def _text(value: Any, tensors: list[Tensor], depth: int) -> str | None:
    """Write a value as a text; its tensors are put aside. None for what is not understood."""
    if value is None or isinstance(value, bool | int | float | str | range | slice):
        return repr(value)
    if isinstance(value, Enum | type | FunctionType | BuiltinFunctionType):
        return getattr(value, "__qualname__", str(value))
    if isinstance(value, np.generic):
        return repr(value.item())
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        value = torch.as_tensor(value)
    if isinstance(value, Tensor):
        tensors.append(value)
        return str(list(value.shape))
    if depth > 8:
        return None
    if isinstance(value, partial):
        value = [value.func, value.args, value.keywords]
    elif isinstance(value, SimpleNamespace | Namespace) or is_dataclass(value):
        value = vars(value)
    if isinstance(value, dict):  # in an order of its own: that of a file is another
        value = sorted(value.items(), key=lambda item: str(item[0]))
    elif isinstance(value, set | frozenset):
        value = sorted(value, key=str)
    if not isinstance(value, list | tuple):
        return None
    parts = [_text(each, tensors, depth + 1) or type(each).__name__ for each in value]
    return f"[{', '.join(parts)}]"


@torch.no_grad()
def _sketch(tensor: Tensor) -> list[Any]:
    """Return a tensor's type and its root mean square, its product with numbers that are fixed, and
    how many are NaN; of whole numbers, a hash."""
    kind = str(tensor.dtype).removeprefix("torch.")
    own = dense_parts(tensor)
    if not all(part.is_floating_point() or part.is_complex() for part in own):
        whole = hashlib.sha256()
        for part in own:
            whole.update(part.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return [kind, whole.hexdigest()[:16]]
    flat = [torch.view_as_real(p) if p.is_complex() else p for p in own]
    flat = torch.cat([p.to("cpu", torch.float64).flatten() for p in flat] or [torch.empty(0)])
    lost = int(flat.isnan().sum())
    flat = flat.nan_to_num().clamp(-_LARGEST, _LARGEST)
    if not len(flat):
        return [kind, 0.0, 0.0, lost]
    fixed = torch.cos(torch.arange(len(flat), dtype=torch.float64).square() + 0.5)
    size = math.sqrt(len(flat))
    return [kind, float(flat.norm()) / size, float(flat @ fixed) / size, lost]


def dense_parts(tensor: Tensor) -> list[Tensor]:
    """Return the dense tensors that a tensor of any layout is made of."""
    own = tensor.detach()
    if own.is_meta:
        return []
    if is_sharded(own):
        return dense_parts(whole(own))
    if is_traceable_wrapper_subclass(own):
        parts = own.__tensor_flatten__()[0]
        return [dense for part in parts for dense in dense_parts(getattr(own, part))]
    if own.is_nested:
        return [part.contiguous() for part in own.unbind()]
    if own.is_quantized:
        scales = (
            [torch.tensor([own.q_scale(), own.q_zero_point()])]
            if own.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric)
            else [own.q_per_channel_scales(), own.q_per_channel_zero_points()]
        )
        return [own.int_repr(), *scales]
    if own.layout == torch.sparse_coo:
        own = own.coalesce()
        return [own.indices(), own.values()]
    if own.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [own.crow_indices(), own.col_indices(), own.values()]
    if own.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [own.ccol_indices(), own.row_indices(), own.values()]
    if own.layout == torch._mkldnn:  # type: ignore[attr-defined]
        return [own.to_dense()]
    return [own.resolve_conj().resolve_neg()]


@cache
def _written(kind: type[nn.Module]) -> tuple[frozenset[str], frozenset[str]]:
    """Return the names that a class stores to while it runs, and those whose content it may change
    then."""
    stored: set[str] = set()
    changed: set[str] = set()
    classes = kind.__mro__[: kind.__mro__.index(nn.Module)]
    left, seen = ["forward", "train"], set()
    while left:
        if (name := left.pop()) in seen:
            continue
        seen.add(name)
        for function in (vars(each).get(name) for each in classes):
            function = getattr(function, "__func__", getattr(function, "fget", function))
            if isinstance(function, FunctionType):
                for code in _codes(function, set()):
                    left += code.co_names
                    _look(code, stored, changed)
    return frozenset(stored), frozenset(changed)


def _look(code: CodeType, stored: set[str], changed: set[str]) -> None:
    """Add the names that a piece of code stores to, and those whose content it may change."""
    lines = list(dis.get_instructions(code))
    names = set(code.co_names)
    stored |= {line.argval for line in lines if line.opname in ("STORE_ATTR", "DELETE_ATTR")}
    if names & _STORING:
        stored |= {each for each in code.co_consts if isinstance(each, str)}
    if (
        {line.opname for line in lines} & {"STORE_SUBSCR", "DELETE_SUBSCR"}
        or names & _CHANGING
        or any(name[-1] == "_" and name[0] != "_" for name in names)
    ):
        changed |= names


def _codes(function: FunctionType, seen: set[int]) -> Iterator[CodeType]:
    """Return the code of a function, and of those in it and around it."""
    seen.add(id(function))
    inside = [function.__code__]
    for code in inside:
        yield code
        inside += [each for each in code.co_consts if isinstance(each, CodeType)]
    for cell in function.__closure__ or ():
        inner = cell.cell_contents
        if isinstance(inner, FunctionType) and id(inner) not in seen:
            yield from _codes(inner, seen)


def by_class(found: Sequence[Setting]) -> dict[str, Any]:
    """Return the plain settings by class and name, ``LayerNorm.eps``: their values.

    Where a class has several values, a hash says which of its layers has which: a setting at one
    layer is not the same at another.
    """
    values: dict[str, list[str]] = {}
    for each in found:
        value = each.value if isinstance(each.value, str) else "…"  # compared by its place
        values.setdefault(f"{each.kind.__name__}.{each.name}", []).append(value)
    said: dict[str, Any] = {}
    for name, here in values.items():
        distinct = sorted(set(here))
        if len(distinct) <= 8:
            said[name] = distinct
        if len(distinct) > 1:
            said[f"{name} by layer"] = hashlib.sha256(repr(here).encode()).hexdigest()[:16]
    return said


def held(found: Sequence[Setting]) -> dict[str, Said]:
    """Return what is no plain setting, by its place."""
    return {each.label: each.value for each in found if not isinstance(each.value, str)}
