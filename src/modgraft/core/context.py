"""What one call carries to its sites: the composition that acts, and the side inputs.

A host's ``forward`` has no argument for an image or a task, so the sites read both from here.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Hashable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from modgraft.core.errors import SideError
from modgraft.core.expression import Chain, Expression, Run, T


@dataclass(frozen=True)
class Side:
    """A tensor that a module needs and the host's ``forward`` has no argument for.

    Args:
        tensor: ``[B, m, d]`` floating point: ``m`` vectors of ``d`` features for each example.
        mask: ``[B, m]`` bool, True where there is something to see; None: everything is seen. An
            example whose row is all False has no such input, and is left exactly as it was.

    Raises:
        SideError: for a tensor that is not ``[B, m, d]`` floating point, or a mask of another
            shape or type.
    """

    tensor: Tensor
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        if self.tensor.dim() != 3 or not self.tensor.is_floating_point():
            raise SideError(
                f"a side input is a floating-point tensor [batch, m, d], got {self.tensor.dtype} "
                f"{list(self.tensor.shape)}; one vector an example is written tensor[:, None]"
            )
        mask = self.mask
        if mask is not None and (mask.dtype != torch.bool or mask.shape != self.tensor.shape[:2]):
            raise SideError(
                f"the mask of a side input is bool {list(self.tensor.shape[:2])} (True where there "
                f"is something to see), got {mask.dtype} {list(mask.shape)}"
            )

    def to(self, *args: object, **kwargs: object) -> Side:
        """Move it to a device (or to a floating type), as :meth:`torch.Tensor.to` does."""
        tensor = self.tensor.to(*args, **kwargs)  # type: ignore[arg-type]
        return Side(tensor, None if self.mask is None else self.mask.to(tensor.device))

    def pin_memory(self) -> Side:
        """Copy it to page-locked memory, as ``DataLoader(pin_memory=True)`` asks."""
        return Side(self.tensor.pin_memory(), None if self.mask is None else self.mask.pin_memory())

    def seen(self) -> Tensor:
        """Return the mask ``[B, m]``, all True where none was given."""
        if self.mask is not None:
            return self.mask
        return torch.ones(self.tensor.shape[:2], dtype=torch.bool, device=self.tensor.device)

    def picked(self, rows: Tensor) -> Side:
        """Take the examples ``rows`` alone."""
        return Side(self.tensor[rows], None if self.mask is None else self.mask[rows])

    def follow(self, rows: int) -> Side:
        """Repeat each example's row for a batch that ``generate`` expanded to ``rows``.

        The beams of one example are neighbours there and stay together.
        """
        times = rows // self.tensor.shape[0]
        if times == 1:
            return self
        mask = None if self.mask is None else self.mask.repeat_interleave(times, dim=0)
        return Side(self.tensor.repeat_interleave(times, dim=0), mask)


EXAMPLE = "example"  # the side input that examples are routed by


@dataclass(frozen=True)
class Call:
    """One call of a host, and what its sites work out once for all of them.

    Attributes:
        composition: which modules act.
        side: the side inputs by name.
        generating: whether this is a ``generate``.
        in_forward: whether the host runs, and not only a ``using`` block.
        spliced: whether input modules have already put their tokens into this call.
        relay: puts tokens in inside the host: a site's path and its output → the new output.
        choices: the routers' choices that hold at all sites, by (router, task).
        routings: each mixture that is learning with its choice, for the losses that they add.
        outputs: outputs computed ahead, of layers that share an input with one that has run.
        valid: the caches that were found to be up to date; see :func:`once_in_a_call`.
        reads: what checks, when the host has run, that a layer whose weight was read was called.
    """

    composition: Expression | None
    side: Mapping[str, Side] = field(default_factory=dict)
    generating: bool = False
    in_forward: bool = False
    spliced: bool = False
    relay: Callable[[str, Tensor], Tensor] | None = None
    choices: dict[Hashable, Any] = field(default_factory=dict, compare=False)
    routings: list[tuple[Any, Any]] = field(default_factory=list, compare=False)
    outputs: dict[Hashable, Any] = field(default_factory=dict, compare=False)
    valid: dict[Hashable, bool] = field(default_factory=dict, compare=False)
    reads: list[Callable[[], None]] = field(default_factory=list, compare=False)

    def resolve(self, source: str, name: str, batch: int, rows: Tensor | None = None) -> Side:
        """Return the side input ``source`` that the module ``name`` reads at a site.

        Args:
            source: the side input's name.
            name: the module's name, for the error.
            batch: how many examples the site works on; in ``generate`` an example's beams share
                its side input.
            rows: int64, the examples to take of the batch; None: all.

        Raises:
            SideError: if the call has no such side input, or it has another number of examples.
        """
        side = self.side.get(source)
        if side is None:
            raise missing_side(name, source)
        have = side.tensor.shape[0]
        if have != batch:
            if not self.generating or batch % have:
                raise SideError(
                    f"side input {source!r} has {have} examples where the host works on {batch}; "
                    f"pass one row for each example of the batch"
                )
            side = side.follow(batch)
        return side if rows is None else side.picked(rows)


def missing_side(name: str, source: str) -> SideError:
    """Return the error of a call without a side input that an active module needs."""
    return SideError(
        f"module {name!r} needs the side input {source!r} and this call has none; pass "
        f"host(..., side={{{source!r}: mg.Side(tensor, mask)}}), with an all-False mask row for an "
        f"example without one, or leave the module out with host.use(None)"
    )


@dataclass(frozen=True)
class Switch(Expression):
    """y + w (f(y) − y), with w a 0-dimensional tensor: how compiled code runs one module.

    Putting another composition in force writes into ``weight`` and so changes no graph. The result
    is exactly y where w is 0, and exactly f(y) where it is 1.
    """

    name: str
    weight: Tensor

    def names(self) -> tuple[str, ...]:  # noqa: D102
        return (self.name,)

    def weights(self) -> dict[str, Any]:  # noqa: D102
        return {self.name: self.weight}

    def mapped(self, to: Callable[[str], str | None]) -> Expression | None:  # noqa: D102
        name = to(self.name)
        return None if name is None else Switch(name, self.weight)

    def apply(self, run: Run[T], y: T) -> T:  # noqa: D102
        before, after = y, run(self.name, y, y, 1.0)
        if after is before:  # a module that does not act here
            return y
        assert isinstance(before, Tensor)  # noqa: S101
        assert isinstance(after, Tensor)  # noqa: S101
        weight = self.weight.to(before.dtype)
        mixed = torch.where(weight == 1, after, before + weight * (after - before))
        return torch.where(weight == 0, before, mixed)  # type: ignore[return-value]


def switched(composition: Expression | None) -> bool:
    """Return whether ``composition`` is the chain of all modules' switches that compiled code
    runs."""
    return type(composition) is Chain and any(isinstance(p, Switch) for p in composition.parts)


class Compiled:
    """What compiled code reads instead of the composition in force and the call under way.

    ``torch.compile`` cannot trace a context variable, and would compile anew for each composition.
    So the call is an attribute here, and where weights alone can express the composition, the code
    runs every implanted module behind a :class:`Switch`.

    Attributes:
        call: the call under way.
        composition: the composition that the weights express.
        weights: for each implanted module the 0-dimensional float32 tensor of its switch.
        switches: all implanted modules in a chain, each behind its switch.
        by_weights: whether the weights alone express the composition.
        token_modules: the composition's modules that put tokens before the input, in order.
    """

    def __init__(self) -> None:
        self.call = Call(None)
        self.composition: Expression | None = None
        self.weights: dict[str, Tensor] = {}
        self.switches: Expression | None = None
        self.by_weights = True
        self.token_modules: tuple[str, ...] = ()
        self._order: dict[str, int] = {}  # in which the modules were implanted
        self._additive: set[str] = set()  # changes of weights, whose order does not matter
        self._on: tuple[str, ...] = ()  # the modules whose weights are not 0

    def current(self) -> Call:
        """Return the call under way, with the composition that the code runs."""
        if self.call.composition is not None:  # given with the call: its weights are data
            return self.call
        composition = self.switches if self.by_weights else self.composition
        return replace(self.call, composition=composition)

    def write(self, composition: Expression | None, token_modules: Container[str]) -> None:
        """Make ``composition`` the one that the weights express."""
        self.composition = composition
        weights = {} if composition is None else composition.weights()
        weights = {n: w for n, w in weights.items() if not isinstance(w, Tensor)}
        self.token_modules = tuple(name for name in weights if name in token_modules)
        self.by_weights = (
            composition is None
            or all(name in self._additive for name in composition.names())
            or composition.is_line(self._order)
        )
        for name in self._on:  # the cost grows with the composition, not with all that is implanted
            if name not in weights and name in self.weights:
                self.weights[name].zero_()
        for name, weight in weights.items():
            self.weights[name].fill_(weight)
        self._on = tuple(weights)

    def add(self, name: str, device: torch.device, additive: bool) -> None:
        """Give a new module a switch; ``additive`` says that it is a change of weights."""
        if additive:
            self._additive.add(name)
        self.weights[name] = torch.zeros((), device=device)
        self._order[name] = 1 + max(self._order.values(), default=0)
        self._chain()

    def remove(self, name: str) -> None:
        """Take out the switch of a module."""
        del self.weights[name], self._order[name]
        self._additive.discard(name)
        self._chain()

    def _chain(self) -> None:
        self.switches = Chain(tuple(Switch(n, w) for n, w in self.weights.items()))
        self.switches.weights()  # computed now and cached: compiled code reads it


_calls: ContextVar[tuple[tuple[int, Call], ...]] = ContextVar("modgraft_calls", default=())


def once_in_a_call(key: Hashable, ask: Callable[[], bool]) -> bool:
    """Return ``ask()``, which without gradients is not asked again in one call once it was True.

    The call is the innermost one under way in this thread or task, of any host, so that a
    ``generate`` does not check its caches at each step.
    """
    calls = () if torch.is_grad_enabled() else _calls.get()
    if not calls:
        return ask()
    valid = calls[-1][1].valid
    valid[key] = valid.get(key) or ask()
    return valid[key]


class Context:
    """The composition in force on one host, and the call under way in this thread or task.

    Attributes:
        composition: the one in force; None is the bare host.
        token_modules: the implanted modules that put tokens before the input.
        side_sources: for each implanted module that reads a side input, the name of that input.
        routed: the implanted modules that are over others, as mixtures are.
        by_example: the implanted modules that have to know which rows are an example's.
        axes: by a layer's path, the axis of its output on which examples lie where that is not the
            first, None where none is; see :mod:`modgraft.engine.examples`.
        by_rows: the paths of the layers where it is known to be the first.
        asked: the signatures of the calls that this was asked for.
        compiled: what code under ``torch.compile`` reads instead.
    """

    def __init__(self) -> None:
        self.composition: Expression | None = None
        self.token_modules: set[str] = set()
        self.side_sources: dict[str, str] = {}
        self.routed: set[str] = set()
        self.by_example: set[str] = set()
        self.axes: dict[str, int | None] = {}
        self.by_rows: set[str] = set()
        self.asked: set[Hashable] = set()
        self.compiled = Compiled()

    @property
    def names(self) -> Mapping[str, object]:
        """The names that a composition may use: a module's, or one for each of its tasks."""
        return self.compiled.weights

    def add(
        self,
        name: str,
        device: torch.device,
        additive: bool,
        source: str | None,
        routed: bool,
        by_example: bool,
    ) -> None:
        """Register a module: whether it only changes weights, its side input, what it is over."""
        self.compiled.add(name, device, additive)
        self.asked.clear()
        if by_example:
            self.by_example.add(name)
        if source is not None:
            self.side_sources[name] = source
        if routed:
            self.routed.add(name)

    def remove(self, name: str) -> None:
        """Forget a module."""
        self.compiled.remove(name)
        self.side_sources.pop(name, None)
        self.routed.discard(name)
        self.by_example.discard(name)

    def now(self) -> Call:
        """Return the call under way, in compiled code or not."""
        return self.compiled.current() if torch.compiler.is_compiling() else self.current()

    def token_modules_in(self, composition: Expression) -> tuple[str, ...]:
        """Return the modules that put tokens before the input, in the order of ``composition``.

        They change shapes, so a graph is compiled for each set of them.
        """
        if torch.compiler.is_compiling():
            given = self.compiled.call.composition
            by_names = given is not None and not switched(given)
            return composition.names() if by_names else self.compiled.token_modules
        return tuple(name for name in composition.names() if name in self.token_modules)

    def current(self) -> Call:
        """Return the call under way, or else one with the composition in force and no side
        input."""
        for owner, call in reversed(_calls.get()):
            if owner == id(self):
                return call
        return Call(self.composition)

    def under_way(self, call: Call) -> bool:
        """Return whether all sites share ``call``, unlike one that :meth:`current` makes for a
        caller."""
        return any(owner == id(self) and one is call for owner, one in _calls.get())

    def in_forward(self) -> bool:
        """Return whether the host runs in this thread or task."""
        return self.current().in_forward

    def enter(self) -> None:
        """Begin a forward of the host's model, in the call under way or in one of its own."""
        call = self.current()
        call = call if call.in_forward else replace(call, in_forward=True)
        _calls.set((*_calls.get(), (id(self), call)))

    def leave(self) -> Call:
        """End a forward that :meth:`enter` began; return its call."""
        *before, (_, call) = _calls.get()
        _calls.set(tuple(before))
        return call

    def switch(self, composition: Expression | None) -> None:
        """Put ``composition`` in force."""
        self.composition = composition
        self.compiled.write(composition, self.token_modules)

    @contextmanager
    def call(self, call: Call) -> Iterator[None]:
        """Make ``call`` the one under way, for this thread or task only."""
        before, self.compiled.call = self.compiled.call, call
        if torch.compiler.is_compiling():
            yield
            self.compiled.call = before
            return
        other = call.composition is not self.composition
        if other:
            self.compiled.write(call.composition, self.token_modules)
        token = _calls.set((*_calls.get(), (id(self), call)))
        try:
            yield
        finally:
            _calls.reset(token)
            self.compiled.call = before
            if other:
                self.compiled.write(self.composition, self.token_modules)
