"""What one call carries to the sites: the composition that acts, and the side inputs.

A host's ``forward`` has no argument for an image or a task; sites read both from here instead.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
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
        """The same on another device (or in another floating type), as :meth:`torch.Tensor.to`."""
        tensor = self.tensor.to(*args, **kwargs)  # type: ignore[arg-type]
        mask = None if self.mask is None else self.mask.to(tensor.device)
        return Side(tensor, mask)

    def pin_memory(self) -> Side:
        """The same in page-locked memory (asked for by ``DataLoader(pin_memory=True)``)."""
        return Side(self.tensor.pin_memory(), None if self.mask is None else self.mask.pin_memory())

    def seen(self) -> Tensor:
        """``[B, m]`` bool, True where there is something to see."""
        if self.mask is not None:
            return self.mask
        return torch.ones(self.tensor.shape[:2], dtype=torch.bool, device=self.tensor.device)

    def picked(self, rows: Tensor) -> Side:
        """The same of some examples."""
        return Side(self.tensor[rows], None if self.mask is None else self.mask[rows])

    def follow(self, rows: int) -> Side:
        """The same for a batch that ``generate`` expanded to ``rows``: beams of one example are
        neighbours there, and never leave it, so each row is repeated in place."""
        times = rows // self.tensor.shape[0]
        return (
            self
            if times == 1
            else Side(
                self.tensor.repeat_interleave(times, dim=0),
                None if self.mask is None else self.mask.repeat_interleave(times, dim=0),
            )
        )


EXAMPLE = "example"  # the side input that examples are routed by


@dataclass(frozen=True)
class Call:
    """One call of a host: its composition, its side inputs, and whether it is a ``generate``."""

    composition: Expression | None
    side: Mapping[str, Side] = field(default_factory=dict)
    generating: bool = False
    spliced: bool = False  # input modules have already put their tokens into this call
    # where they are put in inside the host: a site's path and its output → the new output
    relay: Callable[[str, Tensor], Tensor] | None = None
    # what has been worked out once for all sites, in this call
    memo: dict[Any, Any] = field(default_factory=dict, compare=False)

    def side_input(self, source: str, rows: int) -> Side | None:
        """The side input named ``source`` for a site that sees ``rows`` examples, None if absent.

        Raises:
            SideError: if its batch cannot be that of the site.
        """
        side = self.side.get(source)
        if side is None:
            return None
        have = side.tensor.shape[0]
        if have == rows:
            return side
        if self.generating and rows % have == 0:
            return side.follow(rows)
        raise SideError(
            f"side input {source!r} has {have} examples where the host works on {rows}; "
            f"pass one row for each example of the batch"
        )

    def resolve(self, source: str, name: str, batch: int, rows: Tensor | None = None) -> Side:
        """The side input ``source`` that the module ``name`` reads at a site.

        Args:
            source: the side input's name.
            name: the module's, for the error message.
            batch: how many examples the site works on; in ``generate`` an example's beams share
                its side input.
            rows: int64, the examples to take of the batch; None: all.

        Raises:
            SideError: if the call has no such side input, or it has another number of examples.
        """
        side = self.side_input(source, batch)
        if side is None:
            raise missing_side(name, source)
        return side if rows is None else side.picked(rows)


def missing_side(name: str, source: str) -> SideError:
    """The error of a call without a side input that an active module needs."""
    return SideError(
        f"module {name!r} needs the side input {source!r} and this call has none; pass "
        f"host(..., side={{{source!r}: mg.Side(tensor, mask)}}), with an all-False mask row for an "
        f"example without one, or leave the module out with host.use(None)"
    )


@dataclass(frozen=True)
class Switch(Expression):
    """y + w (f(y) − y): what compiled code has for each module, w a 0-dimensional tensor.

    A change of composition writes into ``weight``. Exactly y where w is 0, exactly f(y) where it
    is 1.
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
    """Whether it is what compiled code has for every composition in line: all that is resident."""
    return type(composition) is Chain and any(isinstance(p, Switch) for p in composition.parts)


_calls: ContextVar[tuple[tuple[int, Call], ...]] = ContextVar("modgraft_calls", default=())


def once_in_a_call(key: Hashable, ask: Callable[[], bool]) -> bool:
    """Whether ``ask()`` says so.

    Without gradients its yes stands for the whole call that is under way in this thread or task, of
    whatever host: it is not asked again at each step of a ``generate``.
    """
    calls = () if torch.is_grad_enabled() else _calls.get()
    if not calls:
        return ask()
    memo = calls[-1][1].memo
    memo[key] = memo.get(key) or ask()
    return memo[key]


class Context:
    """The composition in force on one host, and the call under way in this thread or task.

    Under ``torch.compile`` a context variable cannot be traced, so there the call is read from an
    attribute, and the composition is every resident module behind a :class:`Switch`: a
    0-dimensional float32 tensor, which ``use`` writes into, so that it changes no graph.
    """

    def __init__(self) -> None:
        self.composition: Expression | None = None
        self.weights: dict[str, Tensor] = {}
        self.order: dict[str, int] = {}  # of implanting
        self.additive: set[str] = set()  # changes of weights alone: their weights say all
        self.on: tuple[str, ...] = ()  # whose weights are not 0
        self.in_line = True  # the weights alone say what the composition is
        self.mirrored: Expression | None = None  # the composition that the weights are of
        self.switches: Expression | None = None  # all that is resident
        self.traced = Call(None)
        self.token_modules: set[str] = set()  # the modules that put tokens before the input
        self.leading: tuple[str, ...] = ()  # those of them in the composition, in order

    def now(self) -> Call:
        """The call under way, as the code that asks can read it: compiled or not."""
        if not torch.compiler.is_compiling():
            return self.current()
        if self.traced.composition is not None:  # given with the call: weights that are data
            return self.traced
        composition = self.switches if self.in_line else self.mirrored
        return replace(self.traced, composition=composition)

    def token_modules_in(self, composition: Expression) -> tuple[str, ...]:
        """The modules that put tokens before the input, in the order of ``composition``.

        They change shapes, so that a graph is bound to which of them do.
        """
        if torch.compiler.is_compiling():
            given = self.traced.composition
            return self.leading if given is None or switched(given) else composition.names()
        return tuple(name for name in composition.names() if name in self.token_modules)

    def current(self) -> Call:
        """The call under way, or one of the composition in force and no side input."""
        for owner, call in reversed(_calls.get()):
            if owner == id(self):
                return call
        return Call(self.composition)

    def under_way(self, call: Call) -> bool:
        """Whether ``call`` is one that sites share, and not made for one that asked."""
        return any(owner == id(self) and one is call for owner, one in _calls.get())

    def switch(self, composition: Expression | None) -> None:
        """Put ``composition`` in force."""
        self.composition = composition
        self.mirror(composition)

    def mirror(self, composition: Expression | None) -> None:
        """Write ``composition`` into what compiled code reads."""
        self.mirrored = composition
        weights = {} if composition is None else composition.weights()
        weights = {n: w for n, w in weights.items() if not isinstance(w, Tensor)}
        self.leading = tuple(name for name in weights if name in self.token_modules)
        self.in_line = (
            composition is None
            or all(name in self.additive for name in composition.names())
            or composition.is_line(self.order)
        )
        for name in self.on:  # what follows is as long as the composition, not as what is resident
            if name not in weights and name in self.weights:
                self.weights[name].zero_()
        for name, weight in weights.items():
            self.weights[name].fill_(weight)
        self.on = tuple(weights)

    def add(self, name: str, device: torch.device, additive: bool) -> None:
        """A new module has come; ``additive`` says that it is a change of weights."""
        if additive:
            self.additive.add(name)
        self.weights[name] = torch.zeros((), device=device)
        self.order[name] = 1 + max(self.order.values(), default=0)
        self._line_up()

    def remove(self, name: str) -> None:
        """A module has left."""
        del self.weights[name], self.order[name]
        self.additive.discard(name)
        self._line_up()

    def _line_up(self) -> None:
        self.switches = Chain(tuple(Switch(n, w) for n, w in self.weights.items()))
        self.switches.weights()  # remembered: compiled code reads it

    @contextmanager
    def call(self, call: Call) -> Iterator[None]:
        """Make ``call`` the one under way, for this thread or task only."""
        if torch.compiler.is_compiling():
            before, self.traced = self.traced, call
            yield
            self.traced = before
            return
        before, self.traced = self.traced, call
        other = call.composition is not self.composition
        if other:
            self.mirror(call.composition)
        token = _calls.set((*_calls.get(), (id(self), call)))
        try:
            yield
        finally:
            _calls.reset(token)
            self.traced = before
            if other:
                self.mirror(self.composition)

    def with_side(self, **changes: object) -> Call:
        """The current call with some fields changed."""
        return replace(self.current(), **changes)  # type: ignore[arg-type]
