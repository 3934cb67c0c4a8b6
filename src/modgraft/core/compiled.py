"""What compiled code reads instead of the composition in force and the call under way.

``torch.compile`` cannot trace a context variable, and would compile anew for each composition. So
compiled code holds every implanted module behind a :class:`Switch`, and asks an operator for the
weights of all of them. The operator is called whenever the code runs, in the thread that runs it,
and answers for the composition of that thread: another composition makes no new graph, and no
thread runs another one's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Container
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from modgraft.core.errors import ModgraftError
from modgraft.core.expression import Chain, Expression, Run, T
from modgraft.core.per_example import Each

F = TypeVar("F", bound=Callable[..., Any])

REMEMBERED = 256
"""How many compositions that weights cannot express keep their number."""

DATA = "data"
"""The number of a program that holds weights for one batch, and is never met again."""

NOT_COMPILED = (
    "torch.compile cannot make one graph of this host, which therefore runs as without it; "
    "TORCH_LOGS=graph_breaks says where the graph ends. torch.compile(host.model) compiles the "
    "parts that can be"
)

NOT_EXPORTED = (
    "torch.export(strict=True) would keep a program that asks this host for the composition in "
    "force whenever it runs; export with strict=False, which keeps the one in force now, or export "
    "what host.merge() gives, where that can be merged"
)

_numbers = itertools.count()  # of the process: threads never draw one twice


def eagerly(function: F) -> F:
    """Have ``torch.compile`` leave ``function`` alone, with all that it calls.

    Where it cannot make one graph of a host's forward, it would go on to compile the functions that
    put a call under way, each by itself.
    """
    return torch.compiler.disable(function)  # type: ignore[return-value]


@dataclass(frozen=True)
class Switch(Expression):
    """y + w (f(y) − y), with w a 0-dimensional tensor: how compiled code runs one module.

    The result is exactly y where w is 0, and exactly f(y) where it is 1.
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


@dataclass(frozen=True)
class Switches(Chain):
    """The chain of all modules' switches."""

    def weights(self) -> dict[str, Any]:  # noqa: D102
        return {part.name: part.weight for part in self.parts}  # type: ignore[attr-defined]


def switched(composition: Expression | None) -> bool:
    """Return whether ``composition`` is the chain of all switches that compiled code runs."""
    return isinstance(composition, Switches)


@dataclass(frozen=True)
class Program:
    """What a composition asks of compiled code: another number asks for another graph.

    Attributes:
        composition: the composition.
        by_weights: whether the weights of all modules alone express it.
        token_modules: its modules that put tokens before the input, in order: they change shapes.
        number: the same for compositions of one graph.
    """

    composition: Expression | None
    by_weights: bool
    token_modules: tuple[str, ...]
    number: str  # an int that differs would become a symbol in the graph, and bind it to nothing


class Compiled:
    """One host's programs, weights and call, as compiled code reads them.

    Attributes:
        order: the implanted modules, each with its place among the weights.
        host: the number by which the operator finds the host.
        program: the one that was put in force, or called for, last.
        call: the call that was begun last, for parts of a model that are compiled by themselves.
        traced: the call of a compiled host, while it is traced.
        by_parts: whether a part of the model was compiled by itself.
    """

    def __init__(self, call: Any) -> None:
        self.order: dict[str, int] = {}
        self.host = -1
        self.call = self.bare = call
        self.traced: Any = None
        self.by_parts = False
        self._additive: set[str] = set()  # changes of weights, whose order does not matter
        self._numbers: dict[tuple[str, ...], str] = {}  # by token modules
        self._known: dict[int, Program] = {}
        self._own = torch.zeros(0)
        self.program = self.program_of(None, ())

    @property
    def composition(self) -> Expression | None:
        """The composition of the program."""
        return self.program.composition

    def current(self) -> Any:
        """Return the call under way, with the composition that the code runs."""
        if self.traced is not None:
            return self.traced
        self.by_parts = True
        return self.filled(self.call)

    def is_past_the_host(self) -> bool:
        """Return whether no call of the host is under way, as in ``torch.compile(host.model)``."""
        return self.traced is None and self.call is self.bare

    def filled(self, call: Any) -> Any:
        """Return ``call`` with the composition that the code runs, where it has none of its own."""
        if call.composition is not None or not self.order:  # its weights are data
            return call
        program = self.program
        weights = torch.ops.modgraft.weights_now(self._own, self.host, program.number)
        composition = program.composition
        if program.by_weights:
            each = tuple(Switch(name, weights[i]) for name, i in self.order.items())
            composition = Switches(each)
        return replace(call, composition=composition)

    def write(self, composition: Expression | None, token_modules: Container[str]) -> None:
        """Make ``composition`` the one that the code runs next."""
        self.program = self.program_of(composition, token_modules)

    def program_of(self, composition: Expression | None, token_modules: Container[str]) -> Program:
        """Return the program of a composition."""
        known = self._known.get(id(composition))
        if known is not None and known.composition is composition:
            return known
        names = () if composition is None else composition.names()
        tokens = tuple(name for name in names if name in token_modules)
        data = composition is not None and composition.is_data
        by_weights = composition is None or (
            not (data or isinstance(composition, Each))
            and (all(n in self._additive for n in names) or composition.is_line(self.order))
        )
        number = DATA if data else self._number(tokens if by_weights else None)
        made = Program(composition, by_weights, tokens, number)
        if not data:
            while len(self._known) >= REMEMBERED:
                self._known.pop(next(iter(list(self._known))), None)
            self._known[id(composition)] = made
        return made

    def read(
        self, composition: Expression | None, number: str, tokens: Container[str], alone: bool
    ) -> Tensor:
        """Return the weights ``[modules]`` of ``composition``, for code of the program ``number``.

        Raises:
            ModgraftError: for code of another program: another thread has put it in force.
        """
        own = self.program_of(composition, tokens)
        of_this = own.number == number and (own.number != DATA or self.composition is composition)
        if not of_this or not (own.by_weights or alone):  # it may be traced while others write
            raise ModgraftError(
                f"this compiled host was about to run {self.composition or 'the bare host'} of "
                f"another thread where this one has {composition or 'the bare host'} in force: "
                f"compositions that differ in the order of functions, in their prompts or from "
                f"example to example are run by one thread at a time, or each thread by a compiled "
                f"copy.deepcopy(host) of its own"
            )
        weights = {} if composition is None else composition.weights()
        values = [0.0] * len(self.order)
        for name, weight in weights.items():
            if not isinstance(weight, Tensor):
                values[self.order[name]] = weight
        return torch.tensor(values, dtype=torch.float32, device=self._own.device)

    def add(self, name: str, device: torch.device, additive: bool) -> None:
        """Give a new module a switch; ``additive`` says that it is a change of weights."""
        if additive:
            self._additive.add(name)
        self.order[name] = len(self.order)
        self._changed(device)

    def remove(self, name: str) -> None:
        """Take out the switch of a module."""
        del self.order[name]
        self.order = {each: i for i, each in enumerate(self.order)}
        self._additive.discard(name)
        self._changed(self._own.device)

    def _changed(self, device: torch.device) -> None:
        self._known.clear()
        with torch.inference_mode(False):  # the operator's argument, of which it reads the size
            self._own = torch.zeros(len(self.order), device=device)

    def _number(self, tokens: tuple[str, ...] | None) -> str:
        """Return the number of the programs by weights with these ``tokens``; None: a new one."""
        if tokens is None:
            return str(next(_numbers))
        return self._numbers.setdefault(tokens, str(next(_numbers)))
