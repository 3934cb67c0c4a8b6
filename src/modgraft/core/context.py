"""The composition in force on a host, and the calls under way in a thread or task.

A host's ``forward`` has no argument for an image or a task, so the sites read both from here.
"""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, NoReturn, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from modgraft.core.call import Call, Layout
from modgraft.core.compiled import Compiled, switched
from modgraft.core.errors import ModgraftError
from modgraft.core.expression import Expression

R = TypeVar("R")

LAYOUTS = 64
"""How many kinds of calls a host remembers its layouts of."""

# The calls under way, the innermost last: each with its host's context, and with the backward pass
# that it was begun in, NO_BACKWARD outside of any.
Calls = tuple[tuple["Context", Call, int], ...]
_calls: ContextVar[Calls] = ContextVar("modgraft_calls", default=())

NO_BACKWARD = -1
_backward = torch._C._current_graph_task_id


def _store() -> dict[Hashable, Any] | None:
    """Return where the innermost call under way keeps things; None where nothing may be kept."""
    calls = () if torch.is_grad_enabled() else _calls.get()
    if not calls or calls[-1][2] != NO_BACKWARD:
        return None
    return calls[-1][1].kept


def kept_in_call(key: Hashable, make: Callable[[], R]) -> R:
    """Return what ``make`` makes, kept by ``key`` until the innermost call under way ends.

    Nothing trains or is written to within one call, of any host, and so a ``generate`` makes it
    once. Between calls nothing can be kept: a write through ``.data`` leaves no trace. Where a
    gradient may be wanted it is made anew.
    """
    kept = _store()
    if kept is None:
        return make()
    key = key, torch.is_inference_mode_enabled()  # its tensors cannot be used outside of it
    if key not in kept:
        kept[key] = make()
    return kept[key]


def seen_in_call(key: Hashable) -> bool:
    """Return whether the same was asked before in this call, where :func:`kept_in_call` keeps."""
    kept = _store()
    if kept is None:
        return False
    seen = (seen_in_call, key) in kept
    kept[seen_in_call, key] = True
    return seen


class Context:
    """The composition in force on one host, and the call under way in this thread or task.

    Attributes:
        composition: the one in force; None is the bare host.
        token_modules: the implanted modules that put tokens before the input.
        side_sources: for each implanted module that reads a side input, the name of that input.
        routed: the implanted modules that are over others, as mixtures are.
        inputs: the implanted modules that put vectors before what is read.
        keys_values: those of them, and mixtures of those, that put them before keys and values.
        by_example: the implanted modules that have to know which rows are an example's.
        layouts: where the examples lie, for calls that are alike; see
            :mod:`modgraft.engine.examples`.
        odd: of the layout that was found last, what is not the first axis. A graph is bound to it.
        compiled: what code under ``torch.compile`` reads instead.
    """

    def __init__(self) -> None:
        self.composition: Expression | None = None
        self.token_modules: set[str] = set()
        self.side_sources: dict[str, str] = {}
        self.routed: set[str] = set()
        self.inputs: set[str] = set()
        self.keys_values: set[str] = set()
        self.by_example: set[str] = set()
        self.layouts: dict[Hashable, Layout] = {}
        self.odd: Layout = {}
        self.compiled = Compiled(Call(None))
        # what graphs were made under: () nothing yet, one composition, or two: several
        self._graphs: tuple[Expression | None, ...] = ()
        self.__setstate__({})

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Register the context, also that of a host that was copied or unpickled."""
        self.__dict__.update(state)
        self._threads: dict[int, int] = {}  # how many calls are under way in each thread
        self._running: dict[int, list[tuple[object, Call]]] = {}  # the forwards in each thread
        self.compiled.host = next(_numbers)
        _contexts[self.compiled.host] = self

    def remember(self, kind: Hashable, layout: Layout) -> None:
        """Remember where the examples lie in calls of one kind."""
        while len(self.layouts) >= LAYOUTS:
            self.layouts.pop(next(iter(list(self.layouts))), None)
        self.layouts[kind] = layout
        odd = {path: axis for path, axis in layout.items() if axis != 0}
        if odd != self.odd:
            self.odd = odd

    @property
    def layout(self) -> Layout:
        """The layout that was found last, for calls that cannot be asked."""
        return next(reversed(self.layouts.values()), {})

    @property
    def names(self) -> Mapping[str, object]:
        """The names that a composition may use: a module's, or one for each of its tasks."""
        return self.compiled.order

    def add(
        self,
        name: str,
        device: torch.device,
        source: str | None,
        *,
        additive: bool,
        inputs: bool,
        keys_values: bool,
        routed: bool,
        by_example: bool,
    ) -> None:
        """Register a module.

        Args:
            name: what compositions call it.
            device: the host's.
            source: the name of its side input, None where it has none.
            additive: whether it only changes weights.
            inputs: whether it puts vectors before what is read.
            keys_values: whether these, or those of modules that it is over, are keys and values.
            routed: whether it is over others.
            by_example: whether it has to know which rows are an example's.
        """
        self.compiled.add(name, device, additive)
        self.layouts.clear()
        if source is not None:
            self.side_sources[name] = source
        for kind, holds in zip(self._kinds, (inputs, keys_values, routed, by_example), strict=True):
            if holds:
                kind.add(name)

    def remove(self, name: str) -> None:
        """Forget a module."""
        self.compiled.remove(name)
        self.side_sources.pop(name, None)
        for kind in self._kinds:
            kind.discard(name)

    @property
    def _kinds(self) -> tuple[set[str], ...]:
        return self.inputs, self.keys_values, self.routed, self.by_example

    def now(self) -> Call:
        """Return the call that a layer is part of, in compiled code or not.

        Raises:
            ModgraftError: as :meth:`current`, and in a thread that is none of the host's while it
                runs, where it cannot be told whether the layer is a part of that.
        """
        if torch.compiler.is_dynamo_compiling():
            return self.compiled.current()
        call = self.current()
        if self._running and not call.in_forward:
            self.check_thread(call)
        return call

    def token_modules_in(self, composition: Expression) -> tuple[str, ...]:
        """Return the modules that put tokens before the input, in the order of ``composition``.

        They change shapes, so a graph is compiled for each set of them.
        """
        if torch.compiler.is_dynamo_compiling():
            by_names = not switched(composition)
            return composition.names() if by_names else self.compiled.program.token_modules
        return tuple(name for name in composition.names() if name in self.token_modules)

    def current(self) -> Call:
        """Return the call that a layer is part of, or else one with the composition in force and no
        side input.

        Raises:
            ModgraftError: in a backward pass that computes a layer again by itself, where it cannot
                be told under which composition.
        """
        backward = _backward()
        for owner, call, begun_in in reversed(_calls.get()):
            if owner is self and begun_in == backward:
                return call
        call = Call(self.composition)
        if backward != NO_BACKWARD:
            self._check_recomputed()
        else:  # also without gradients, as the forward of another checkpoint function runs it
            self._remember(call)
        return call

    def around(self) -> Call | None:
        """Return the call or ``using`` block that a new call is within; None: it is within none."""
        return next((call for owner, call, _ in reversed(_calls.get()) if owner is self), None)

    def under_way(self, call: Call) -> bool:
        """Return whether all sites share ``call``, unlike one that :meth:`current` makes for a
        caller."""
        return any(owner is self and one is call for owner, one, _ in _calls.get())

    def in_forward(self) -> bool:
        """Return whether the host runs in this thread or task."""
        return self.current().in_forward

    def runs_now(self) -> bool:
        """Return whether the host runs in this thread or task, whoever asks, also in backward."""
        backward = _backward()
        calls = reversed(_calls.get())
        found = (call for owner, call, begun in calls if owner is self and begun == backward)
        return next((call.in_forward for call in found), False)

    def enter(self, part: object) -> None:
        """Begin a forward of a part of the host's model, in the call under way or in a new one."""
        call = self.current()
        if not call.in_forward:  # of a using block perhaps, in which there may be many
            call = Call(call.composition, call.side, call.generating, True, call.spliced)
        _calls.set((*_calls.get(), (self, call, _backward())))
        self._running.setdefault(threading.get_ident(), []).append((part, call))

    def leave(self, part: object) -> Call:
        """End a forward, if :meth:`enter` began it; return its call."""
        me = threading.get_ident()
        running = self._running.get(me)
        if not running or running[-1][0] is not part:  # what was called before that has failed
            return self.current()
        *before, (_, call, _) = _calls.get()
        _calls.set(tuple(before))
        running.pop()
        if not running:
            del self._running[me]
        return call

    def switch(self, composition: Expression | None) -> None:
        """Put ``composition`` in force."""
        self.compiled.write(composition, self.token_modules)
        self.composition = composition

    @contextmanager
    def call(self, call: Call) -> Iterator[None]:
        """Make ``call`` the one under way, for this thread or task only."""
        compiled = self.compiled
        if torch.compiler.is_dynamo_compiling():
            before, compiled.traced = compiled.traced, call
            yield
            compiled.traced = before
            return
        if torch.is_grad_enabled():
            self._remember(call)
        me = threading.get_ident()
        depth = self._threads.get(me, 0)
        if compiled.by_parts and not depth and self._threads:
            raise ModgraftError(
                "parts of this host's model are compiled, and read the call that was begun last: a "
                "call of another thread is under way; compile the host as a whole, "
                "torch.compile(host), or call it in one thread at a time"
            )
        self._threads[me] = depth + 1
        token = _calls.set((*_calls.get(), (self, call, _backward())))
        self._show(call)
        try:
            yield
        finally:
            _calls.reset(token)
            if depth:
                self._threads[me] = depth
            else:
                del self._threads[me]
            self._show(self.around())

    def _show(self, call: Call | None) -> None:
        """Let compiled code see ``call``; None: no call is under way.

        Code that another thread is tracing now goes on to read what it began with.
        """
        dynamo = sys.modules.get("torch._dynamo.convert_frame")
        with nullcontext() if dynamo is None else dynamo.compile_lock:
            self.compiled.call = self.compiled.bare if call is None else call
            self.compiled.write(
                self.composition if call is None else call.composition, self.token_modules
            )

    def check_thread(self, call: Call) -> None:
        """Refuse to run a layer under ``call``, which is in force, while the host runs elsewhere.

        A host may hand layers to other threads, which know nothing of its call. It is all the same
        where that is under what is in force too, without routers, which choose once for a call.

        Raises:
            ModgraftError: with the remedy.
        """
        for other in self._elsewhere():
            names = () if other.composition is None else other.composition.names()
            routed = not self.routed.isdisjoint(names)
            if other.side or routed or other.composition != call.composition:
                self._refuse_thread("a layer runs", call, other, routed)

    def check_reader(self, acts: Callable[[Expression], bool]) -> None:
        """Refuse to read a weight outside of a call, while modules change it in another thread.

        Args:
            acts: whether a composition changes the weight.

        Raises:
            ModgraftError: with the remedy.
        """
        for other in self._elsewhere():
            if other.composition is not None and acts(other.composition):
                self._refuse_thread("a layer's weight is read", self.current(), other, True)

    @staticmethod
    def in_backward() -> bool:
        """Return whether gradients are computed in this thread."""
        return _backward() != NO_BACKWARD

    def _elsewhere(self) -> list[Call]:
        """Return the innermost forward of each thread in which the host runs."""
        if self.in_backward():
            return []
        return [call for some in list(self._running.values()) for _, call in some[-1:]]

    @staticmethod
    def _refuse_thread(what: str, call: Call, other: Call, always: bool) -> NoReturn:
        error = ModgraftError(
            f"{what} in a thread of its own, by the composition in force, {call.composition}, "
            f"while a call of this host with {other.composition}"
            f"{' and side inputs' * bool(other.side)} runs in another, and whether it is a part of "
            f"that call cannot be told. If the host's forward hands it to that thread, let it take "
            f"the call along, pool.submit(contextvars.copy_context().run, layer, x)"
            + ("" if always else ", or put the modules in force before the call: host.use(…)")
        )

        def again() -> NoReturn:
            raise error

        other.reads.append(again)  # a thread may end with it, and its call go on
        raise error

    def _remember(self, call: Call) -> None:
        """Remember that a graph is made under ``call``; see :meth:`_check_recomputed`."""
        if len(self._graphs) == 2:
            return
        if call.side:
            self._graphs = None, None
        elif not self._graphs or self._graphs[0] == call.composition:
            self._graphs = (call.composition,)
        else:
            self._graphs = self._graphs[0], call.composition

    def _check_recomputed(self) -> None:
        """Refuse to compute a layer again in backward, outside of the call of its forward.

        ``torch.utils.checkpoint`` does so within it (``engine/gradient_checkpointing.py``); what
        another function computes again is right where all graphs were made under what is in force.

        Raises:
            ModgraftError: with the remedy.
        """
        if len(self._graphs) == 2 or (self._graphs and self._graphs[0] != self.composition):
            raise ModgraftError(
                "a layer is computed again in backward, or its weight is read there, outside of "
                "the call of its forward, and this host has run under several compositions or "
                "with side inputs, so which of them it was cannot be told; checkpoint it with "
                "torch.utils.checkpoint.checkpoint, which modgraft follows, call host(...) there, "
                "not host.model(...), or save the weight in the forward of an autograd function"
            )


_contexts: WeakValueDictionary[int, Context] = WeakValueDictionary()
_numbers = itertools.count()


@torch.library.custom_op(
    "modgraft::weights_now",
    mutates_args=("own",),  # it writes nothing, but is so never left out as code without an effect
    schema="(Tensor(a!) own, int host, str program) -> Tensor",
)
def _weights_now(own: Tensor, host: int, program: str) -> Tensor:
    """Return the weights of all modules, as the composition of this thread has them."""
    context = _contexts[host]
    alone = len(context._threads) < 2
    composition = context.current().composition
    return context.compiled.read(composition, program, context.token_modules, alone)


@_weights_now.register_fake
def _(own: Tensor, host: int, program: str) -> Tensor:
    return torch.empty_like(own)


# whether this runs in a block that is checkpointed in the reentrant form: its forward has no graph
reentrant: ContextVar[bool] = ContextVar("modgraft_reentrant", default=False)


def calls_under_way() -> tuple[tuple[Context, Call], ...]:
    """Return the calls under way here, before them one of each host with what is in force there."""
    contexts = [context for ref in _contexts.valuerefs() if (context := ref()) is not None]
    return (
        *((context, Call(context.composition)) for context in contexts),
        *((owner, call) for owner, call, _ in _calls.get()),
    )


@contextmanager
def under(calls: tuple[tuple[Context, Call], ...]) -> Iterator[None]:
    """Run a ``with`` block under calls that were under way elsewhere, or earlier.

    Raises:
        ModgraftError: where a module of one of them has been removed since.
    """
    for owner, call in calls:
        active = call.composition if call.in_forward else None
        names = () if active is None else active.names()
        if gone := [name for name in names if name not in owner.names]:
            raise ModgraftError(
                f"{gone[0]!r} was removed between a forward and its backward, which computes a "
                f"layer of that forward once more; call backward() first"
            )
    token = _calls.set(tuple((owner, call, _backward()) for owner, call in calls))
    try:
        yield
    finally:
        _calls.reset(token)
