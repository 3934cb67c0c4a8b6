"""The fingerprint of a host: what it is made of, and a hash of every value of its weights.

A module belongs to the host that it was trained in. Three things are compared, and named apart:

- what the host computes with: names and shapes of its tensors, and what of its configuration
  changes the function (heads, epsilons, activations, strides);
- its weights and its persistent buffers, such as running statistics, value for value, and
- what else its layers hold (:mod:`modgraft.store.settings`).

The first may not differ at all; the others may, if that is asked for.
"""

from __future__ import annotations

import hashlib
import time
from base64 import b64decode, b64encode
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from modgraft.core.errors import CheckpointError, ModgraftError
from modgraft.core.offloaded import reads_offloaded
from modgraft.core.patterns import bare, wraps
from modgraft.core.sharded import is_sharded
from modgraft.engine.own_forward import own_class
from modgraft.store.file import DTYPES
from modgraft.store.settings import agrees, by_class, dense_parts, held, is_beside, settings

HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
PRECISIONS = {"float32": torch.float32, **HALVES}

VALUES = ("weights", "buffers", "settings", "held")
"""The parts of a fingerprint that are no architecture."""

_PLAIN = frozenset(DTYPES.values())

_SAMPLES = 256  # values of each tensor that the first format's fingerprint reads

_PATIENCE = 20  # what was read in a second is not read again for so many, so that it costs 5 %


_Digests = dict[str, tuple[tuple[Any, ...], bytes]]


@dataclass
class _Read:
    """What was read of a host.

    Attributes:
        digests: the hash of each tensor by name, with what tells whether it was written to since.
        rounded: the same of the tensors as they would be in each precision that was asked for.
        at: when all of them were read last.
        took: how long that took, in seconds.
        outline: see :func:`outline`,
        trace: and what it was made of.
    """

    digests: _Digests = field(default_factory=dict)
    rounded: dict[torch.dtype, _Digests] = field(default_factory=dict)
    at: float = 0.0
    took: float = 0.0
    outline: dict[str, Any] = field(default_factory=dict)
    trace: tuple[Any, ...] = ()


_read: WeakKeyDictionary[nn.Module, _Read] = WeakKeyDictionary()


@reads_offloaded
def outline(model: nn.Module) -> dict[str, Any]:
    """Describe a host without reading its weights.

    Returns:
        ``architecture``, the class's name; ``shape``, a hash over names and shapes of the weights
        and persistent buffers; ``config``, what of its configuration changes the function;
        ``settings``, the plain ones of layers that are no class of torch.
    """
    return _outline(_Parts(model))


class _Parts:
    """What a model is made of: layers, and what of it has values, by name."""

    def __init__(self, model: nn.Module) -> None:
        every = model.named_modules(remove_duplicate=False)  # what stands twice runs twice
        self.model = model
        self.layers = [(bare(path), layer) for path, layer in every if not wraps(layer)]
        self.kinds = [own_class(layer) for _, layer in self.layers]
        self.settings = settings(self.layers)
        self.parameters: dict[str, Tensor] = {}
        self.buffers: dict[str, Tensor] = {}  # those that belong to the model's state
        seen: set[int] = set()  # a tied tensor counts once, by its first name
        for path, layer in self.layers:
            at = f"{path}." if path else ""
            for name, tensor in layer._parameters.items():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    self.parameters[at + name] = tensor
            for name, buffer in layer._buffers.items():
                if buffer is None or name in layer._non_persistent_buffers_set:
                    continue
                if id(buffer) not in seen:
                    seen.add(id(buffer))
                    self.buffers[at + name] = buffer
            if unpack := getattr(layer, "_weight_bias", None):  # of torch's quantised layers
                packed = zip(("weight", "bias"), unpack(), strict=True)
                self.buffers |= {at + name: tensor for name, tensor in packed if tensor is not None}
        config: Any = getattr(model, "config", None)
        self.config = _flat(config.to_dict(), "") if hasattr(config, "to_dict") else {}

    @property
    def trace(self) -> tuple[Any, ...]:
        """What :func:`_outline` depends on."""
        shapes = [(n, t.shape) for each in (self.parameters, self.buffers) for n, t in each.items()]
        return self.config, self.kinds, self.settings, shapes


def _outline(parts: _Parts) -> dict[str, Any]:
    known, trace = _read.setdefault(parts.model, _Read()), parts.trace
    if trace != known.trace:
        known.trace, known.outline = trace, _new_outline(parts)
    return known.outline


def _new_outline(parts: _Parts) -> dict[str, Any]:
    tensors = sorted({**parts.parameters, **parts.buffers}.items(), key=_name)
    text = "".join(f"{name}{list(t.shape)};" for name, t in tensors)
    try:
        shape = hashlib.sha256(text.encode())
        "".join(each.path for each in parts.settings).encode()
    except UnicodeEncodeError as error:
        raise ModgraftError(
            f"a layer of the host has half a character in its name, which no file can hold "
            f"({error.object[error.start]!r}); call it otherwise"
        ) from error
    return {
        "architecture": parts.kinds[0].__name__,
        "shape": shape.hexdigest()[:16],
        "config": _config(parts),
        "settings": _settings(parts, of_torch=False),
    }


def _config(parts: _Parts) -> dict[str, Any]:
    """Return what of a host's configuration changes its function, by name.

    The numbers and words of a transformers config stand under their names (those of a part as
    ``vision_config.hidden_act``); the plain settings of torch's layers by class,
    ``LayerNorm.eps``, each with all its values.
    """
    alone = {
        kind.__name__
        for kind, (_, layer) in zip(parts.kinds, parts.layers, strict=True)
        if not layer._parameters and not layer._modules
    }
    found = dict(parts.config)
    if 0 < len(alone) <= 8:
        found["layers"] = sorted(alone)  # activations
    return found | _settings(parts, of_torch=True)


def _settings(parts: _Parts, of_torch: bool) -> dict[str, Any]:
    """Return the plain settings of layers by class, of torch's classes or of all others.

    Those may hold what changes no function, and switch classes of parts as they run.
    """
    some = [e for e in parts.settings if e.kind.__module__.startswith("torch.nn.") is of_torch]
    found = by_class(some)
    if not of_torch:
        each = "".join(f"{kind.__name__};" for kind in parts.kinds)
        found["layers in their order"] = hashlib.sha256(each.encode()).hexdigest()[:16]
    return found


def _flat(said: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Return the plain values of a nested configuration by dotted name."""
    found: dict[str, Any] = {}
    for name, value in said.items():
        if is_beside(name, value):
            continue
        if isinstance(value, Mapping):
            found |= _flat({str(k): v for k, v in value.items()}, f"{path}{name}.")
        elif isinstance(value, list | tuple):
            found[path + name] = repr(list(value))
        elif value is None or isinstance(value, bool | int | float | str):
            found[path + name] = value
    return found


@reads_offloaded
def fingerprint(model: nn.Module, without: Collection[str] = ()) -> dict[str, Any]:
    """Identify a host by every value of it.

    Args:
        model: the host's.
        without: the names of weights and buffers whose values do not count.

    Returns:
        :func:`outline`, and ``weights`` and ``buffers``, a hash over all values of each, and
        ``held``: what else its layers hold, by its place.
    """
    parts = _Parts(model)
    digests = _each(model, {**parts.parameters, **parts.buffers})
    return {
        **_outline(parts),
        "weights": _combined({name: digests[name] for name in parts.parameters}, without),
        "buffers": _combined({name: digests[name] for name in parts.buffers}, without),
        "held": held(parts.settings),
    }


def fingerprint_of_part(
    model: nn.Module, path: str, without: Collection[str] = ()
) -> dict[str, Any]:
    """Identify the part of a host at ``path`` as :func:`fingerprint` does a host, after the host.

    What was read of the host just now is not read again.
    """
    part, start, whole = model.get_submodule(path), f"{bare(path)}.", _read.get(model, _Read())

    def own(digests: _Digests) -> _Digests:
        return {n.removeprefix(start): d for n, d in digests.items() if n.startswith(start)}

    rounded = {dtype: own(digests) for dtype, digests in whole.rounded.items()}
    _read[part] = _Read(own(whole.digests), rounded, whole.at, whole.took)
    return fingerprint(part, without)


@reads_offloaded
def rounded_fingerprints(model: nn.Module, without: Collection[str] = ()) -> dict[str, str]:
    """Return the hash of the weights as they would be in each lower precision, by its name.

    That of the buffers stands beside it, as ``"float16 buffers"``.
    """
    parts = _Parts(model)
    widest = max((p.dtype.itemsize for p in parts.parameters.values() if _is_float(p)), default=0)
    found = {}
    for name, dtype in PRECISIONS.items():
        if dtype.itemsize < widest:
            found[name] = _rounded(model, parts.parameters, dtype, without)
            if any(map(_is_float, parts.buffers.values())):
                found[f"{name} buffers"] = _rounded(model, parts.buffers, dtype, without)
    return found


def _rounded(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
    without: Collection[str],
) -> str:
    return _combined(_each(model, tensors, dtype), without)


def _is_float(tensor: Tensor) -> bool:
    return tensor.is_floating_point()


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
        without: the names of weights and buffers whose values do not count.
        values: whether to compare weights and buffers too, and not the :func:`outline` alone.

    Returns:
        What differs: ``"architecture"``, ``"shape"``, ``"num_attention_heads (12 there, 4 here)"``,
        ``"weights"``, ``"buffers"``, ``"held: encoder.scale"``. Of the configuration, and of what
        layers hold, only what both name is compared.

    Raises:
        CheckpointError: for what is no fingerprint.
    """
    if "config" not in there:
        return _former(model, there, without, values)
    here = fingerprint(model, without) if values else outline(model)
    parts = [k for k in here if k not in ("config", "settings", "held")]
    found = [k for k in parts if here[k] != there.get(k)]
    for part, called in (("config", ""), ("settings", "settings: ")):
        theirs, ours = _part(there, part), here[part]
        found += [
            called + _in_words(name, theirs[name], ours[name])
            for name in ours
            if name in theirs and not means_the_same(name, theirs[name], ours[name])
        ]
    theirs, ours = _part(there, "held"), here.get("held", {})
    found += [
        f"held: {name}" for name in ours if name in theirs and not agrees(theirs[name], ours[name])
    ]
    return found


def _in_words(name: str, there: Any, here: Any) -> str:
    hashed = name.endswith((" by layer", " in their order"))
    return name if hashed else f"{name} ({there} there, {here} here)"


def _part(there: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = there.get(name, {})
    if not isinstance(part, Mapping):
        raise CheckpointError(
            f"the card's {name} of the host is {part!r:.80}, and no names with their values; it "
            f"was changed: copy the folder again"
        )
    return part


def are_of_values(differs: Collection[str]) -> bool:
    """Return whether :func:`differences` are of values alone, and the architecture is the same."""
    return all(each.partition(":")[0] in VALUES for each in differs)


def means_the_same(name: str, there: Any, here: Any) -> bool:
    """Return whether two values of one setting mean the same."""
    unset = None in (there, here) and name.endswith("token_id")  # set by whoever tokenizes
    return there == here or unset


@reads_offloaded
def is_in_another_precision(
    model: nn.Module,
    there: Mapping[str, Any],
    differs: Collection[str],
    without: Collection[str] = (),
) -> bool:
    """Return whether a host that differs is ``model`` in another precision.

    Args:
        model: a host's model.
        there: the other's :func:`fingerprint` and :func:`rounded_fingerprints`.
        differs: their :func:`differences`.
        without: the names of weights and buffers whose values do not count.
    """
    if not {"weights"} <= set(differs) <= {"weights", "buffers"}:
        return False
    if "config" not in there:
        said = [_sample(model, without, dtype) for dtype in HALVES.values()]
        ours = _sample(model, without, torch.float32)
        return ours in [there.get(name) for name in HALVES] or there.get("weights") in said
    parts, here = _Parts(model), fingerprint(model, without)

    def is_rounded(name: str, dtype: torch.dtype) -> bool:
        weights, others = there.get(name), there.get(f"{name} buffers")
        return (
            here["weights"] == weights
            or _rounded(model, parts.parameters, dtype, without) == there["weights"]
        ) and (
            "buffers" not in differs
            or here["buffers"] == others
            or _rounded(model, parts.buffers, dtype, without) == there["buffers"]
        )

    return any(is_rounded(*precision) for precision in PRECISIONS.items())


@reads_offloaded
def sketches(model: nn.Module, without: Collection[str] = ()) -> dict[str, str]:
    """Return of each weight and buffer of a host a short hash, and a few of its values.

    By these it can be said which of them another host has otherwise, and by about how much.
    """
    parts = _Parts(model)
    tensors = {n: t for n, t in (parts.parameters | parts.buffers).items() if n not in without}
    digests = _each(model, tensors)
    return {
        name: f"{digests[name].hex()[:8]}:{b64encode(_some(t).tobytes()).decode()}"
        for name, t in tensors.items()
    }


def _some(tensor: Tensor) -> np.ndarray:
    """Return some numbers of a tensor, evenly spaced, in half precision ``[≤ 8 of each part]``."""
    some = torch.cat([torch.empty(0), *map(_some_of_part, dense_parts(tensor))])
    return some.clamp(-65504, 65504).to(torch.float16).numpy()


def _some_of_part(part: Tensor) -> Tensor:
    """Return some numbers of a dense tensor; none where its type has no numbers, such as bits."""
    flat = part.reshape(-1)
    some = flat[:: max(1, flat.numel() // 8)][:8].cpu()
    try:
        real = torch.view_as_real(some).reshape(-1) if some.is_complex() else some
        return real.to(torch.float32)
    except NotImplementedError:  # as PyTorch says of a type that it does not compute with
        return torch.empty(0)


def changed(
    model: nn.Module, there: Mapping[str, Any], without: Collection[str] = ()
) -> dict[str, float]:
    """Return which weights and buffers of a host differ from :func:`sketches`, and by how much.

    Returns:
        The name of each, with ‖there − here‖ / max(‖there‖, ‖here‖) of the values that are known:
        about 1.4 where they have nothing to do with each other, and 0 where none of those tells.
    """
    found = {}
    for name, ours in sketches(model, without).items():
        theirs = str(there.get(name, ours))
        if ours.partition(":")[0] != theirs.partition(":")[0]:
            a, b = _numbers(ours), _numbers(theirs)
            found[name] = 0.0
            if len(a) == len(b) and (largest := max(np.linalg.norm(a), np.linalg.norm(b))) > 0:
                found[name] = float(np.linalg.norm(a - b) / largest)
    return found


def _numbers(sketch: str) -> np.ndarray:
    """Return the numbers of a sketch; none where some are NaN, or the card was changed."""
    try:
        some = np.frombuffer(b64decode(sketch.partition(":")[2]), np.float16).astype(np.float64)
    except ValueError:
        return np.empty(0)
    return some if np.isfinite(some).all() else np.empty(0)


def _name(item: tuple[str, Tensor]) -> str:
    return item[0]


def _each(
    model: nn.Module, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> dict[str, bytes]:
    """Hash tensors: all where that was long ago, and else those that were written to since.

    Numbers with a fraction are rounded to ``dtype`` before.

    A write that PyTorch does not count, through ``.data`` or numpy, is seen when all are read.
    """
    known = _read.setdefault(model, _Read())
    begin = time.monotonic()
    if begin - known.at > _PATIENCE * known.took:
        known.digests.clear()
        known.rounded.clear()
    with torch.no_grad():
        traces = {name: _trace(tensor) for name, tensor in tensors.items()}
    of = known.digests if dtype is None else known.rounded.setdefault(dtype, {})
    new = [name for name, trace in traces.items() if of.get(name, (None,))[0] != trace]
    if new and dtype is not None:  # one after the other: each is a copy
        for n in new:
            of[n] = traces[n], _digest(tensors[n], dtype if _is_float(tensors[n]) else None)
    elif new:
        # hashing lets other threads run; what is gathered from processes comes in one order
        one = any(is_sharded(tensors[name]) for name in new)
        with ThreadPoolExecutor(1 if one else None) as pool:
            made = list(pool.map(lambda name: _digest(tensors[name]), new))
        if not of:
            known.at = time.monotonic()
            known.took = known.at - begin
        of |= {n: (traces[n], digest) for n, digest in zip(new, made, strict=True)}
    return {name: of[name][1] for name in tensors}


def _trace(tensor: Tensor) -> tuple[Any, ...]:
    """Return what changes when a tensor is written to.

    One that is not counted is seen in a few values, if they are among those that it changes.
    While the trace is kept, no other tensor's storage is taken for this one's.
    """
    if (
        tensor.layout != torch.strided
        or tensor.dtype not in _PLAIN
        or tensor.is_nested
        or tensor.is_meta
        or tensor.is_inference()
        or (type(tensor) not in (Tensor, nn.Parameter) and is_traceable_wrapper_subclass(tensor))
    ):
        return (object(),)  # equal to nothing
    some: list[Any] = []
    if tensor.is_contiguous() and (size := tensor.numel()):
        step = max(1, size // 8)
        some = tensor.as_strided((-(-size // step),), (step,)).tolist()
    storage = StorageWeakRef(tensor.untyped_storage())
    return storage, tensor.data_ptr(), tensor._version, tensor.dtype, some


def _digest(tensor: Tensor, dtype: torch.dtype | None = None) -> bytes:
    """Hash the values of a tensor, rounded to ``dtype``."""
    whole, kind = hashlib.sha256(), dtype or tensor.dtype
    if kind not in (torch.float32, torch.float64):  # others have the same bytes for other numbers
        whole.update(str(kind).encode())
    for part in dense_parts(tensor):
        flat = part.to("cpu", dtype).contiguous().reshape(-1)
        whole.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return whole.digest()


def _combined(digests: Mapping[str, bytes], without: Collection[str]) -> str:
    whole = hashlib.sha256()
    for name, digest in sorted(digests.items()):
        if name not in without:
            whole.update(name.encode() + digest)
    return whole.hexdigest()[:16]


# -- the first format's --------------------------------------------------------------------------


@reads_offloaded
def _former(
    model: nn.Module, there: Mapping[str, Any], without: Collection[str], values: bool
) -> list[str]:
    """Compare a host with what the first format holds: shapes, and a sample of the weights."""
    shape = hashlib.sha256()
    for name, tensor in sorted(model.named_parameters(), key=_name):
        shape.update(f"{name}{list(tensor.shape)};".encode())
    here = {"architecture": own_class(model).__name__, "shape": shape.hexdigest()[:16]}
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
