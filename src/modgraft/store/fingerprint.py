"""The fingerprint of a host: what it is made of, and a hash of every value of its weights.

A module belongs to the host that it was trained in. Three things are compared, and named apart:

- what the host computes with: names and shapes of its tensors, and what of its configuration
  changes the function (heads, epsilons, activations, strides);
- its weights, and
- its persistent buffers, such as running statistics, value for value.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import BuiltinFunctionType, FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from modgraft.engine.own_forward import original

HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}

_SAMPLES = 256  # values of each tensor that the first format's fingerprint reads

_BESIDE_THE_FUNCTION = {
    "training", "gradient_checkpointing", "use_cache", "transformers_version", "dtype",
    "torch_dtype", "architectures", "id2label", "label2id", "problem_type", "return_dict",
    "name_or_path", "output_attentions", "output_hidden_states", "max_seq_len_cached", "inplace",
    "finetuning_task", "task_specific_params", "chunk_size_feed_forward", "attn_implementation",
    "experts_implementation", "return_dict_in_generate", "tokenizer_class", "prefix",
    "initializer_range", "initializer_factor", "init_std", "supports_gradient_checkpointing",
}  # fmt: skip
"""Settings that change how a host is trained, run or shown, and not what it computes."""

Digests = dict[str, tuple[tuple[Any, ...], bytes]]

_digests: WeakKeyDictionary[nn.Module, Digests] = WeakKeyDictionary()
"""The hash of each tensor of a host, with what tells whether it was written to since."""


def outline(model: nn.Module) -> dict[str, Any]:
    """Describe a host without reading its weights.

    Returns:
        ``architecture``, the class's name; ``shape``, a hash over names and shapes of the weights
        and persistent buffers; ``config``, what of its configuration changes the function.
    """
    return _outline(model, dict(model.named_parameters()), dict(_buffers(model)))


def _outline(
    model: nn.Module, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
) -> dict[str, Any]:
    shapes = sorted(
        (name, list(t.shape)) for each in (parameters, buffers) for name, t in each.items()
    )
    shape = hashlib.sha256("".join(f"{name}{size};" for name, size in shapes).encode())
    kind = original(model)
    return {"architecture": kind.__name__, "shape": shape.hexdigest()[:16], "config": config(model)}


def config(model: nn.Module) -> dict[str, Any]:
    """Return what of a host's configuration changes its function, by name.

    The numbers and words of a transformers config stand under their names (those of a part as
    ``vision_config.hidden_act``); the plain attributes of layers by class, ``LayerNorm.eps``, each
    with all its values.
    """
    found: dict[str, Any] = {}
    said: Any = getattr(model, "config", None)
    if hasattr(said, "to_dict"):
        found |= _flat(said.to_dict(), "")
    values: dict[str, set[str]] = {}
    places = hashlib.sha256()  # a setting at one layer is not the same at another
    for number, layer in enumerate(model.modules()):
        kind = original(layer).__name__
        places.update(f"{number}{kind}".encode())
        for name, value in layer.__dict__.items():
            if name[0] == "_" or _is_beside(name, kind):
                continue
            if isinstance(value, bool | int | float | str | tuple):
                values.setdefault(f"{kind}.{name}", set()).add(repr(value))
                places.update(f"{name}{value!r}".encode())
            elif isinstance(value, FunctionType | BuiltinFunctionType):  # an activation
                places.update(f"{name}{value.__qualname__}".encode())
        if not layer._parameters and not layer._modules:  # activations
            values.setdefault("layers", set()).add(kind)
    found["settings by layer"] = places.hexdigest()[:16]
    return found | {name: sorted(each) for name, each in values.items() if len(each) <= 8}


def _flat(said: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Return the plain values of a nested configuration by dotted name."""
    found: dict[str, Any] = {}
    for name, value in said.items():
        if name[:1] == "_" or _is_beside(name):
            continue
        if isinstance(value, Mapping):
            found |= _flat({str(k): v for k, v in value.items()}, f"{path}{name}.")
        elif isinstance(value, list | tuple):
            found[path + name] = repr(list(value))
        elif value is None or isinstance(value, bool | int | float | str):
            found[path + name] = value
    return found


def _is_beside(name: str, kind: str = "") -> bool:
    drops = "drop" in name or "Dropout" in kind  # off where a model is used
    return drops or name in _BESIDE_THE_FUNCTION or name == "layer_idx"


def fingerprint(model: nn.Module, without: Collection[str] = ()) -> dict[str, Any]:
    """Identify a host by every value of it.

    Args:
        model: the host's.
        without: the names of weights whose values do not count.

    Returns:
        :func:`outline`, and ``weights`` and ``buffers``, a hash over all values of each.
    """
    parameters, buffers = dict(model.named_parameters()), dict(_buffers(model))
    return {
        **_outline(model, parameters, buffers),
        "weights": _combined(_each(model, parameters), without),
        "buffers": _combined(_each(model, buffers), ()),
    }


def half_fingerprints(model: nn.Module, without: Collection[str] = ()) -> dict[str, str]:
    """Return the hash of the weights as they would be in each half precision, by its name."""
    parameters = dict(model.named_parameters())
    wide = any(p.dtype in (torch.float32, torch.float64) for p in parameters.values())
    return {
        name: _combined({n: _digest(p, dtype) for n, p in parameters.items()}, without)
        for name, dtype in HALVES.items()
        if wide
    }


def differences(
    model: nn.Module,
    there: Mapping[str, Any],
    without: Collection[str] = (),
    *,
    values: bool = True,
) -> list[str]:
    """Compare a host with a fingerprint.

    Args:
        model: the host's.
        there: the :func:`fingerprint` of another one, also one that the first format holds.
        without: the names of weights whose values do not count.
        values: whether to compare weights and buffers too, and not the :func:`outline` alone.

    Returns:
        What differs: ``"architecture"``, ``"shape"``, ``"num_attention_heads (12 there, 4 here)"``,
        ``"weights"``, ``"buffers"``. Of the configuration, only what both name is compared.
    """
    if "config" not in there:
        return _former(model, there, without, values)
    here = fingerprint(model, without) if values else outline(model)
    found = [k for k in here if k != "config" and here[k] != there.get(k)]
    theirs, ours = there["config"], here["config"]
    found += [
        f"{name} ({theirs[name]} there, {ours[name]} here)"
        for name in ours
        if name in theirs and not _agrees(name, theirs[name], ours[name])
    ]
    return found


def _agrees(name: str, there: Any, here: Any) -> bool:
    """Return whether two values of one setting mean the same."""
    unset = None in (there, here) and name.endswith("token_id")  # set by whoever tokenizes
    return there == here or unset


def is_in_another_precision(
    model: nn.Module, there: Mapping[str, str], without: Collection[str] = ()
) -> bool:
    """Return whether a host is ``model`` in another precision, one of both a half precision.

    Args:
        model: a host's model.
        there: the other's :func:`fingerprint` and :func:`half_fingerprints`.
        without: the names of weights whose values do not count.
    """
    sampled = "config" not in there
    dtypes = {None: torch.float32} | HALVES if sampled else {None: None} | HALVES
    ours = {
        name: _sample(model, without, dtype)
        if sampled
        else _combined({n: _digest(p, dtype) for n, p in model.named_parameters()}, without)
        for name, dtype in dtypes.items()
    }
    halves = [there.get(name) for name in HALVES]
    return ours[None] in halves or there.get("weights") in [ours[name] for name in HALVES]


def _name(item: tuple[str, Tensor]) -> str:
    return item[0]


def _buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Return the buffers that belong to a model's state, by name."""
    for path, layer in model.named_modules():
        for name, buffer in layer._buffers.items():
            if buffer is not None and name not in layer._non_persistent_buffers_set:
                yield f"{path}.{name}" if path else name, buffer


def _each(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, bytes]:
    """Hash tensors, those alone that were written to since this was asked last."""
    known = _digests.setdefault(model, {})
    traces = {name: _trace(tensor) for name, tensor in tensors.items()}
    new = [name for name, trace in traces.items() if known.get(name, (None,))[0] != trace]
    with ThreadPoolExecutor() as pool:  # hashing lets other threads run
        made = pool.map(lambda name: _digest(tensors[name]), new) if new else ()
        known.update({n: (traces[n], digest) for n, digest in zip(new, made, strict=True)})
    return {name: known[name][1] for name in tensors}


def _trace(tensor: Tensor) -> tuple[Any, ...]:
    """Return what changes when a tensor is written to.

    A write through ``.data`` is seen in a few values, if they are among those that it changes.
    """
    flat = tensor.detach().reshape(-1)
    some = flat[:: max(1, flat.numel() // 8)].tolist() if flat.is_contiguous() else ()
    return tensor.data_ptr(), tensor._version, tensor.dtype, tuple(some)


def _digest(tensor: Tensor, dtype: torch.dtype | None = None) -> bytes:
    """Hash the values of a tensor, rounded to ``dtype``."""
    flat = tensor.detach().to("cpu", dtype).contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data if flat.numel() else b"").digest()


def _combined(digests: Mapping[str, bytes], without: Collection[str]) -> str:
    whole = hashlib.sha256()
    for name, digest in sorted(digests.items()):
        if name not in without:
            whole.update(name.encode() + digest)
    return whole.hexdigest()[:16]


# -- the first format's --------------------------------------------------------------------------


def _former(
    model: nn.Module, there: Mapping[str, Any], without: Collection[str], values: bool
) -> list[str]:
    """Compare a host with what the first format holds: shapes, and a sample of the weights."""
    shape = hashlib.sha256()
    for name, tensor in sorted(model.named_parameters(), key=_name):
        shape.update(f"{name}{list(tensor.shape)};".encode())
    here = {"architecture": original(model).__name__, "shape": shape.hexdigest()[:16]}
    if values:
        here["weights"] = _sample(model, without, torch.float32)
    return [key for key in here if here[key] != there.get(key)]


def _sample(model: nn.Module, without: Collection[str], dtype: torch.dtype | None) -> str:
    """Hash a sample of the weights, rounded to ``dtype``."""
    weights = hashlib.sha256()
    for name, tensor in sorted(model.named_parameters(), key=_name):
        if name in without:
            continue
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLES)].to("cpu", dtype).float()
        weights.update(sample.contiguous().numpy().tobytes())
    return weights.hexdigest()[:16]
