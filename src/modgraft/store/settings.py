"""What a host computes with beside its weights and persistent buffers: what its layers hold.

There are plain settings (a number of heads, an epsilon, an activation), and lists, dictionaries and
tensors, among them buffers that no state dict has. Some of it is no setting but state: a cache, a
counter, a mask as long as the last input. State is what has changed since the host was made, and
what the layer's own code writes to outside its constructor; what is empty is not said.
"""

from __future__ import annotations

import dis
import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from enum import Enum
from functools import cache, partial
from types import BuiltinFunctionType, CodeType, FunctionType, SimpleNamespace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from modgraft.engine.own_forward import original

BESIDE_THE_FUNCTION = {
    "training", "gradient_checkpointing", "use_cache", "transformers_version", "dtype",
    "torch_dtype", "architectures", "id2label", "label2id", "problem_type", "return_dict",
    "name_or_path", "output_attentions", "output_hidden_states", "max_seq_len_cached", "inplace",
    "finetuning_task", "task_specific_params", "chunk_size_feed_forward", "attn_implementation",
    "experts_implementation", "return_dict_in_generate", "tokenizer_class", "prefix",
    "initializer_range", "initializer_factor", "init_std", "supports_gradient_checkpointing",
    "hf_device_map", "layer_idx", "all_tied_weights_keys", "warnings_issued",
    "use_nested_tensor", "enable_nested_tensor",
}  # fmt: skip
"""Settings that change how a host is trained, run or shown, and not what it computes."""

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


_made: WeakKeyDictionary[nn.Module, dict[tuple[str, str], Said]] = WeakKeyDictionary()
"""What the layers of a host held when it was made, by path and name."""


def remember(model: nn.Module, held: dict[tuple[str, str], Said] | None = None) -> None:
    """Take down what the layers of a model hold, before it runs as a host.

    Args:
        model: the host's.
        held: of a copy, what was taken down of the first one.
    """
    if model not in _made:
        found = _found(model.named_modules()) if held is None else ()
        _made[model] = held or {(each.path, each.name): each.value for each in found}


def remembered(model: nn.Module) -> dict[tuple[str, str], Said] | None:
    """Return what was taken down of a host, for a copy of it."""
    return _made.get(model)


def settings(model: nn.Module, layers: Layers) -> list[Setting]:
    """Return what the layers of a model hold and is no state, in the order of the layers."""
    found, made = list(_found(layers)), _made.get(model)
    if made is None or {(each.path, each.name): each.value for each in found} == made:
        return found
    changed = [each for each in found if not agrees(each.value, made.get((each.path, each.name)))]
    states = {(each.kind, each.name) for each in changed if _is_written(each)}
    return [each for each in found if (each.kind, each.name) not in states]


@cache
def is_beside(name: str, kind: str = "") -> bool:
    """Return whether a setting changes nothing of what a host computes."""
    drops = "drop" in name or "Dropout" in kind  # off where a model is used
    return drops or name[:1] == "_" or name in BESIDE_THE_FUNCTION


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
        case [str() as mine, float() as a, float() as b], [
            str() as theirs,
            float() as c,
            float() as d,
        ]:
            most = (1e-2 if {mine, theirs} & _ROUGH else 1e-5) * max(abs(a), abs(c))
            return abs(a - c) <= most and abs(b - d) <= most
    return False  # no sketches


def _found(layers: Layers) -> Iterator[Setting]:
    for path, layer in layers:
        kind = original(layer)
        for name, value in layer.__dict__.items():
            if name[0] == "_" or is_beside(name, kind.__name__) or (said := _said(value)) is None:
                continue
            if not callable(value) or not hasattr(kind, name):  # a method that a tool has wrapped
                yield Setting(path, kind, name, said)
        for name in sorted(layer._non_persistent_buffers_set):
            buffer = layer._buffers.get(name)
            if buffer is not None and (said := _said(buffer)) is not None:
                yield Setting(path, kind, name, said)


def _said(value: Any) -> Said | None:
    """Return a value as :attr:`Setting.value` has it, None where it says nothing of a function."""
    if value is None or hasattr(type(value), "to_dict"):  # a config, which is read by itself
        return None
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, FunctionType | BuiltinFunctionType):
        return value.__qualname__
    if isinstance(value, dict | list | tuple | set) and not value:
        return None
    if isinstance(value, tuple) and all(isinstance(v, _PLAIN) for v in value):
        return repr(tuple(value))
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
    if isinstance(value, Tensor):
        tensors.append(value)
        return str(list(value.shape))
    if depth > 8:
        return None
    if isinstance(value, partial):
        value = [value.func, value.args, value.keywords]
    elif isinstance(value, SimpleNamespace) or is_dataclass(value):
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
    """Return a tensor's type, its root mean square, and its product with numbers that are fixed."""
    kind = str(tensor.dtype).removeprefix("torch.")
    if tensor.is_meta or tensor.layout != torch.strided:
        return [kind, 0.0, 0.0]
    flat = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    flat = flat.detach().to("cpu", torch.float64).nan_to_num().clamp(-_LARGEST, _LARGEST).flatten()
    if not len(flat):
        return [kind, 0.0, 0.0]
    fixed = torch.cos(torch.arange(len(flat), dtype=torch.float64).square() + 0.5)
    size = math.sqrt(len(flat))
    return [kind, float(flat.norm()) / size, float(flat @ fixed) / size]


def _is_written(setting: Setting) -> bool:
    """Return whether a layer's own code writes to what it holds, after it was made."""
    stored, changed = _written(setting.kind)
    return setting.name in (stored if isinstance(setting.value, str) else stored | changed)


@cache
def _written(kind: type[nn.Module]) -> tuple[frozenset[str], frozenset[str]]:
    """Return the names that a class stores to after it was made, and those whose content it may
    change there."""
    stored: set[str] = set()
    changed: set[str] = set()
    for each in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        for name, function in vars(each).items():
            if name != "__init__" and isinstance(function, FunctionType):
                for code in _codes(function, set()):
                    lines = list(dis.get_instructions(code))
                    names = set(code.co_names)
                    stored |= {line.argval for line in lines if line.opname == "STORE_ATTR"}
                    if names & _STORING:
                        stored |= {c for c in code.co_consts if isinstance(c, str)}
                    if (
                        {line.opname for line in lines} & {"STORE_SUBSCR", "DELETE_SUBSCR"}
                        or names & _CHANGING
                        or any(n[-1] == "_" and n[0] != "_" for n in names)
                    ):
                        changed |= names
    return frozenset(stored), frozenset(changed)


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


def by_class(found: Sequence[Setting], paths: Mapping[str, int]) -> dict[str, Any]:
    """Return the plain settings by class and name, ``LayerNorm.eps``: their values.

    Where a class has several values, a hash says which layer has which: a setting at one layer is
    not the same at another.
    """
    values: dict[str, list[tuple[int, str]]] = {}
    for each in found:
        if isinstance(each.value, str):
            name = f"{each.kind.__name__}.{each.name}"
            values.setdefault(name, []).append((paths[each.path], each.value))
    said: dict[str, Any] = {}
    for name, here in values.items():
        distinct = sorted({value for _, value in here})
        if len(distinct) <= 8:
            said[name] = distinct
        if len(distinct) > 1:
            said[f"{name} by layer"] = hashlib.sha256(repr(here).encode()).hexdigest()[:16]
    return said


def held(found: Sequence[Setting]) -> dict[str, Said]:
    """Return what is no plain setting, by its place."""
    return {each.label: each.value for each in found if not isinstance(each.value, str)}
