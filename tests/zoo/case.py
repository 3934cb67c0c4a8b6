"""What the checks share: a host and its plain copy, their outputs, and what came of a check.

The oracles know nothing of modgraft: a copy of the model whose weights are edited by hand, forward
hooks on it, and the bare model's own behaviour.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

import modgraft as mg
from modgraft.core.errors import ModgraftError
from zoo.row import EXAMPLES, Batch, Row

WEIGHTED = (nn.Linear, Conv1D, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
CLOSE = 1e-3
"""How far a result may be from the oracle's, as a share of the effect that is looked for."""
ROUNDING = 3e-5
"""The same, as a share of the output: what float32 loses on the way through a host."""

Outputs = dict[str, Tensor]


class Meaningless(Exception):  # noqa: N818
    """Raised where a check means nothing for a host: its bare model cannot do what is asked."""


def outputs(out: Any) -> Outputs:
    """Return the floating tensors that a model puts out, by name."""
    if isinstance(out, Tensor):
        out = (out,)
    named = out.items() if hasattr(out, "items") else enumerate(out)
    found = {str(k): v for k, v in named if isinstance(v, Tensor) and v.is_floating_point()}
    return {name: value.float() for name, value in found.items() if value.dim()}


def difference(ours: Outputs, theirs: Outputs) -> float:
    """Return the largest difference of any number; infinity where only one of two is a number."""
    found = [0.0]
    for name, value in theirs.items():
        other = ours[name]
        if other.shape != value.shape:
            return float("inf")
        odd = ~(value.isfinite() & other.isfinite())
        if bool((odd & (value != other) & ~(value.isnan() & other.isnan())).any()):
            return float("inf")
        found.append(float((value - other).masked_fill(odd, 0).abs().max()) if len(value) else 0.0)
    return max(found)


def size(values: Outputs) -> float:
    zero = {name: torch.zeros_like(value) for name, value in values.items()}
    return difference(zero, {n: v.nan_to_num(0, 0, 0) for n, v in values.items()})


@dataclass
class Cell:
    """What came of a check at all its sites.

    Attributes:
        holds: at how many sites it holds.
        refused, wrong, raw: where it does not, with what was said, how far off, and the error.
        meaningless: why it means nothing here, if so.
    """

    holds: int = 0
    refused: dict[str, str] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)
    raw: dict[str, str] = field(default_factory=dict)
    meaningless: str = ""

    @property
    def status(self) -> str:
        """``raw``, ``wrong``, ``refused``, ``holds`` or ``–``, the worst that was found."""
        for kind in ("raw", "wrong", "refused"):
            if getattr(self, kind):
                return kind
        return "holds" if self.holds else "–"

    @contextmanager
    def at(self, where: str) -> Iterator[None]:
        """Count what comes of a ``with`` block, as that of one site."""
        before = len(self.wrong)
        with self.caught(where):
            yield
            self.holds += len(self.wrong) == before

    @contextmanager
    def caught(self, where: str) -> Iterator[None]:
        """Note the error of a ``with`` block."""
        try:
            yield
        except ModgraftError as error:
            self.refused[where] = str(error)
        except Meaningless as error:
            self.meaningless = str(error)
        except Exception as error:  # noqa: BLE001
            self.raw[where] = f"{type(error).__name__}: {error}"

    def expect(self, where: str, ours: Outputs, truth: Outputs, bare: Outputs | None) -> None:
        """Compare with the truth, in units of its distance from ``bare`` (None: bit for bit)."""
        off = difference(ours, truth)
        if bare is None:
            if off:
                self.wrong[where] = f"off by {off:.2g}, not equal bit for bit"
            return
        effect = difference(truth, {name: bare[name] for name in truth})
        if not off <= CLOSE * effect + ROUNDING * size(truth):
            self.wrong[where] = f"off by {off:.2g} of {effect:.2g}"


class Case:
    """A row of the zoo with everything that its checks need."""

    def __init__(self, row: Row, dtype: torch.dtype | None = None) -> None:
        self.row, self.dtype = row, dtype
        self.batch: Batch = {
            name: value.to(dtype)
            if isinstance(value, Tensor) and value.is_floating_point() and dtype is not None
            else value
            for name, value in row.batch().items()
        }

    @cached_property
    def plain(self) -> nn.Module:
        """A model whose weights are plain parameters, to be edited by hand."""
        return self.fresh(plain=True)

    def fresh(self, plain: bool = False) -> nn.Module:
        """Make the model anew: a copy would share what is bound to the original's layers."""
        model = self.row.model()
        for module in list(model.modules()) if plain else ():
            if parametrize.is_parametrized(module):
                for name in list(module.parametrizations):  # type: ignore[arg-type]
                    value = getattr(module, name).detach().clone()
                    parametrize.remove_parametrizations(module, name)
                    delattr(module, name)
                    setattr(module, name, nn.Parameter(value, requires_grad=False))
        return model if self.dtype is None else model.to(self.dtype)

    def host(self) -> mg.Host:
        return mg.Host(self.fresh()).eval()

    def run(self, model: nn.Module, batch: Batch | None = None, **how: Any) -> Outputs:
        torch.manual_seed(0)  # some hosts draw what they look at
        with torch.no_grad():
            return outputs(model(**(self.batch if batch is None else batch), **how))

    def oracle(self, batch: Batch | None = None, model: nn.Module | None = None) -> Outputs:
        """Return what the plain copy, or another bare model, puts out now."""
        try:
            return self.run(self.plain if model is None else model, batch)
        except Exception as error:
            raise Meaningless(f"the bare model raises {type(error).__name__}: {error}") from error

    @cached_property
    def bare(self) -> Outputs:
        return self.oracle()

    # -- sites

    @cached_property
    def layers(self) -> list[str]:
        """The paths of the layers that are linear in one weight."""
        return [p for p, m in self.plain.named_modules() if isinstance(m, WEIGHTED)]

    @cached_property
    def blocks(self) -> list[str]:
        """The paths of other parts with weights whose output is [·, ·, d]."""
        return [p for p, shape in self.shapes.items() if p not in self.layers and len(shape) == 3]

    @cached_property
    def shapes(self) -> dict[str, torch.Size]:
        """The shape of the first tensor that each part with weights puts out, by its path."""
        return self._shapes(self.batch)

    @cached_property
    def maps(self) -> set[str]:
        """The parts whose output grows along its last axis with the input: it holds no features."""
        for axis in (-1, 1):
            longer = {
                name: torch.cat([value, value], axis) if isinstance(value, Tensor) else value
                for name, value in self.batch.items()
            }
            with suppress(Meaningless):
                there, here = self._shapes(longer), self.shapes
                return {p for p in here if p in there and here[p][-1] != there[p][-1]}
        return set()

    @cached_property
    def shared(self) -> set[str]:
        """The parts whose output is one for all examples: it is as large for twice as many."""
        with suppress(Meaningless):
            there = self._shapes(self.changed(lambda rows: rows * 2))
            return {path for path, shape in self.shapes.items() if there.get(path) == shape}
        return set()

    def _shapes(self, batch: Batch) -> dict[str, torch.Size]:
        found: dict[str, torch.Size] = {}

        def look(path: str) -> Callable[..., None]:
            def hook(_: nn.Module, __: Any, out: Any) -> None:
                first = first_of(out)
                if first is not None:
                    found.setdefault(path, first.shape)

            return hook

        parts = [(p, m) for p, m in self.plain.named_modules() if p and list(m.parameters())]
        with hooks((m, look(p)) for p, m in parts):
            self.oracle(batch)
        return found

    # -- oracles

    @contextmanager
    def edited(
        self, path: str, delta: Tensor, name: str = "weight", fresh: bool = False
    ) -> Iterator[None]:
        """Add ``delta`` to one weight of the plain model by hand, in a ``with`` block.

        Where layers share it, it is that layer's alone. A model that writes into its weights as it
        runs, or may have kept what it made of them, is made anew.
        """
        before = self.plain
        if fresh or self.moves:
            self.__dict__["plain"] = self.fresh(plain=True)
        layer = self.plain.get_submodule(path)
        old = getattr(layer, name)
        delta = delta.T if isinstance(layer, Conv1D) else delta
        delta = delta.detach().to(old.dtype)
        if delta.dim() > 2 and delta.shape != old.shape:  # experts that are stored [E, in, out]
            delta = delta.mT
        setattr(layer, name, nn.Parameter(old.detach() + delta.reshape(old.shape), False))
        try:
            yield
        finally:
            setattr(layer, name, old)
            self.__dict__["plain"] = before

    @cached_property
    def moves(self) -> bool:
        """Whether the model writes into its own weights when it runs."""
        model = self.fresh(plain=True)
        before = [p.clone() for p in model.parameters()]
        self.oracle(model=model)
        return any(not torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))

    def examples(self, values: Tensor, axis: int | None = None) -> tuple[Tensor, ...]:
        """Take a tensor apart into what belongs to each example."""
        return values.chunk(EXAMPLES, self.row.axis if axis is None else axis)

    def changed(self, to: Callable[[list[Tensor]], list[Tensor]]) -> Batch:
        """Return the batch with the examples of each of its tensors changed by ``to``."""
        axis = self.row.axis
        return {
            name: torch.cat(to(list(self.examples(value))), axis)
            if isinstance(value, Tensor) and value.shape[axis] % EXAMPLES == 0
            else value
            for name, value in self.batch.items()
        }

    @cached_property
    def local(self) -> list[str]:
        """The names of the outputs in which each example's rows depend on that example alone.

        Raises:
            Meaningless: if there are none.
        """
        other = self.oracle(self.changed(lambda rows: [rows[1], *rows[1:]]))
        names = [
            name
            for name, value in self.bare.items()
            if value.dim() > self.row.axis
            and value.shape[self.row.axis] % EXAMPLES == 0
            and other[name].shape == value.shape
            and all(
                torch.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)
                for a, b in list(
                    zip(self.examples(value), self.examples(other[name]), strict=True)
                )[1:]
            )
        ]
        if not names:
            raise Meaningless("the examples of this host's batch look at one another")
        return names

    def row_of(self, values: Outputs, i: int) -> Outputs:
        return {name: self.examples(values[name])[i] for name in self.local}


def first_of(out: Any) -> Tensor | None:
    """Return the first floating tensor of what a layer puts out."""
    while not isinstance(out, Tensor):
        values = list(out.values()) if hasattr(out, "values") else out
        if not isinstance(values, list | tuple) or not values:
            return None
        out = values[0]
    return out if out.is_floating_point() else None


def with_first(out: Any, value: Tensor) -> Any:
    """Return ``out`` with ``value`` for its first tensor."""
    if isinstance(out, Tensor):
        return value
    if isinstance(out, tuple):
        return (with_first(out[0], value), *out[1:])
    key = next(iter(out.keys()))
    out[key] = with_first(out[key], value)
    return out


@contextmanager
def hooks(
    some: Iterable[tuple[nn.Module, Callable[..., Any]]], with_kwargs: bool = False
) -> Iterator[None]:
    """Hook functions to the forwards of layers in a ``with`` block, before those that listen."""
    handles = [m.register_forward_hook(f, with_kwargs=with_kwargs, prepend=True) for m, f in some]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def randomise(implant: nn.Module, seed: int = 7, scale: float = 0.3) -> None:
    """Give a module's parameters values by which its effect shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in implant.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_(noise.to(parameter.dtype))


def at(*paths: str) -> Callable[[str, nn.Module], bool]:
    """Select sub-modules by their paths, whatever roles are called."""
    return lambda found, _: found in paths


def rank_of(layer: nn.Module) -> int:
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return min(2, weight.shape[0], weight[0].numel())
