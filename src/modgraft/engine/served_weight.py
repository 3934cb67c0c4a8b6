"""The weight that a grafted layer shows to others: θ + Δ, to whoever computes with it.

Some hosts never call a layer but compute with its weight themselves: state-space models read that
of their convolution in decoding, an attention may hand the weights of its projections to one
function. There a module acts through the weight that is read. While the host runs, reading the
weight of a grafted layer gives θ + Σ w·Δ, by the composition of the call; where the layer is called
too, a :class:`ServedWeight`, which tells its shape and type as the layer's own does, and becomes
that in the first computation.
Hooks tell when the host runs: it is called through :class:`~modgraft.host.host.Host`, but also as
``host.model(…)``, and in ``generate`` its encoder by itself.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._ops import OpOverload
from torch.autograd.function import Function
from torch.nn.utils import stateless
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from modgraft.core.context import Context
from modgraft.core.errors import ModgraftError, UndividedError, warn
from modgraft.core.layers import STATE, stored
from modgraft.core.patterns import joined
from modgraft.core.sharded import is_sharded
from modgraft.engine.copies import OfHost
from modgraft.routing.losses import with_routing_losses

COPIED = "_modgraft_copied"
"""Marks a shallow copy of a layer that runs with changed tensors, which it reads as they are."""

SERVED = ("weight", "bias")

_changes: ContextVar[dict[nn.Module, Sequence[Any]] | None] = ContextVar(
    "modgraft_changes", default=None
)

FACTS = frozenset(
    getattr(Tensor, name).__get__
    for name in (
        "dtype",
        "device",
        "shape",
        "ndim",
        "is_cuda",
        "layout",
        "requires_grad",
        "grad_fn",
    )
) | {Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.__len__}
"""What a tensor says of itself without being computed with."""

_WRITES = {"__setitem__", "__set__"} | {
    f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")
}


class ServedWeight(Tensor):
    """The weight (or bias) of a layer, which becomes θ + Δ where something is computed with it.

    It has no data of its own. A function of torch's gets θ + Δ with its graph; what passes these by
    (vmap, TorchScript, the forward of an autograd function) gets the numbers where no gradient is
    asked for, and an error where one would be lost.
    """

    layer: nn.Module
    stored_as: str
    learns: bool

    @staticmethod
    def of(layer: nn.Module, name: str, theta: Tensor) -> ServedWeight:
        """Make it for the tensor ``theta``, which ``layer`` stores as ``name``."""
        shell = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            ServedWeight,
            theta.shape,
            strides=theta.stride(),
            dtype=theta.dtype,
            device=theta.device,
        )
        shell.layer, shell.stored_as, shell.learns = layer, name, False
        if isinstance(theta, nn.Parameter):  # which is what get_parameter looks for
            shell._is_param = True
        return shell

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Compute ``func`` with the tensors that the served ones stand for.

        A host that writes to its weight writes to θ, and to nothing else.
        """
        called = func.__name__
        writes = called in _WRITES or (called.endswith("_") and not called.endswith("__"))
        written, others = (args[:1], args[1:]) if writes else ((), args)
        bare = partial(tree_map, partial(_stands_for, bare=True))
        if func in FACTS:
            return func(*bare(args), **bare(kwargs or {}))
        lost = isinstance(func, OpOverload) and _is_below_autograd()
        lost = lost or (not torch.is_grad_enabled() and _is_in_autograd_function())
        real = partial(tree_map, partial(_stands_for, bare=False, lost=str(func) if lost else ""))
        return func(*bare(written), *real(others), **real(kwargs or {}))

    @classmethod
    def __torch_dispatch__(
        cls, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Compute ``func`` with the numbers alone.

        Raises:
            ModgraftError: where a gradient would be lost.
        """
        real = partial(tree_map, partial(_stands_for, bare=False, lost=str(func)))
        return func(*real(args), **real(kwargs or {}))


def _stands_for(value: Any, bare: bool, lost: str = "") -> Any:
    """Return the tensor that a served one stands for: θ + Δ, or bare θ.

    Raises:
        ModgraftError: where it would get no gradient of a function, ``lost``.
    """
    if not isinstance(value, ServedWeight):
        return value
    layer, name = value.layer, value.stored_as
    theta, state = stored(layer, name), layer.__dict__[STATE]
    if lost and value.learns:
        raise ModgraftError(
            f"the {name} of {state.path}, which this host also calls, is given to code that passes "
            f"torch's functions by ({lost:.60}), as vmap, TorchScript or an autograd function "
            f"does, and the modules there would get no gradient of it; compute with a copy, "
            f"1 * layer.{name}, or without gradients"
        )
    return theta if bare else state.changed(layer, name, theta)


def _is_below_autograd() -> bool:
    """Return whether this runs where a mode looks at what autograd has passed on already."""
    return torch._C._dispatch_tls_is_dispatch_key_excluded(
        torch._C.DispatchKey.AutogradFunctionality
    )  # type: ignore[attr-defined]


def _is_in_autograd_function() -> bool:
    """Return whether the forward of an autograd function runs, which sees no graph."""
    code, frame = Function.apply.__func__.__code__, sys._getframe(1)  # type: ignore[attr-defined]
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame is not None


def served(name: str, original: property | None) -> property:
    """Return the property that a grafted class has in place of its tensor ``name``.

    Args:
        name: the tensor's.
        original: the class's own property of that name, as parametrised layers have.
    """

    def read(layer: nn.Module) -> Any:
        if (own := layer._parameters.get(name)) is not None and (own.is_meta or is_sharded(own)):
            return own  # nothing is computed with an offloaded weight, or a part of one
        own, state = stored(layer, name), layer.__dict__.get(STATE)
        if own is None or state is None or COPIED in layer.__dict__:
            return own
        try:
            return _shown(layer, state, name, own)
        except AttributeError as error:  # which would make nn.Module look for the plain tensor
            raise RuntimeError(f"the weight of {state.path}: {error}") from error

    def write(layer: nn.Module, value: Any) -> None:
        if original is not None and original.fset is not None:
            original.fset(layer, value)
        else:
            layer.__dict__[name] = value

    def delete(layer: nn.Module) -> None:
        if name not in layer.__dict__:
            raise AttributeError(name)
        del layer.__dict__[name]

    return _Served(read, write, delete)


def _shown(layer: nn.Module, state: Any, name: str, own: Tensor) -> Tensor:
    """Return what is read of the tensor ``own``, which ``layer`` stores as ``name``."""
    if torch.compiler.is_dynamo_compiling():  # what nothing is computed with leaves the graph
        return own if state.compiled_bare else state.changed(layer, name, own)
    running = _changes.get()
    if running is not None and layer in running:
        return state.with_changes(layer, name, own, running[layer])
    if not state.context.in_forward():
        if state.context.in_backward():  # an autograd function computes with what its forward read
            return state.changed(layer, name, own) if state.changes_now() else own
        state.context.check_reader(lambda composition: bool(state.groups(composition)))
        return own
    if not state.changes_now():
        return own
    several = isinstance(layer, nn.ParameterList | nn.ParameterDict)  # a slice takes leaves alone
    if not state.called and not several:  # it may never be, and any code may compute with it
        with suppress(UndividedError):  # only its shape may be asked for
            new = state.changed(layer, name, own)
            if new is not own and isinstance(own, nn.Parameter):
                new._is_param = True  # which is what isinstance looks for
            return new
    kept = state.served.get(name)
    if kept is None:
        kept = state.served[name] = ServedWeight.of(layer, name, own)
    modules = (e.module for e in state.every() if isinstance(e.module, nn.Module))
    kept.learns = torch.is_grad_enabled() and any(
        p.requires_grad for module in modules for p in module.parameters()
    )
    return kept


def shown_by_name(kind: type[nn.Module], names: tuple[str, ...]) -> dict[str, Callable[..., Any]]:
    """Return the methods of a grafted class by which its layer shows its tensors by their names.

    Args:
        kind: the layer's own class.
        names: the tensors.
    """

    def is_run(layer: nn.Module) -> bool:
        state = layer.__dict__.get(STATE)
        return state is not None and state.context.runs_now() and not is_serving(layer)

    def named_parameters(layer: nn.Module, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Any]]:
        runs = is_run(layer)
        for name, own in kind.named_parameters(layer, *args, **kwargs):
            last = name.rpartition(".")[2]
            read = runs and last in names and layer._parameters.get(last) is own
            yield name, getattr(layer, last) if read else own

    def save_to_state_dict(layer: nn.Module, destination: Any, prefix: str, keep: bool) -> None:
        kind._save_to_state_dict(layer, destination, prefix, keep)
        for name in names if is_run(layer) else ():
            value = getattr(layer, name, None)
            if isinstance(value, Tensor) and value is not layer._parameters.get(name):
                destination[prefix + name] = value if keep else value.detach()

    return {"named_parameters": named_parameters, "_save_to_state_dict": save_to_state_dict}


class Shells(dict[str, ServedWeight]):
    """The served weights of a layer, by name; a copy of the layer makes its own."""

    def __deepcopy__(self, memo: Any) -> Shells:
        return Shells()

    def __reduce__(self) -> Any:
        return Shells, ()


class _Served(property):
    """A property of the engine's; :func:`~modgraft.core.layers.stored` passes it by."""


@contextmanager
def serving(layer: nn.Module, changes: Sequence[Any]) -> Iterator[None]:
    """Let ``layer`` read its weight with ``changes`` in a ``with`` block, in this thread alone."""
    if torch.compiler.is_dynamo_compiling():
        state = layer.__dict__[STATE]
        state.compiled_bare = True
        yield
        state.compiled_bare = False
        return
    token = _changes.set({**(_changes.get() or {}), layer: changes})
    try:
        yield
    finally:
        _changes.reset(token)


def hook_functional_calls() -> None:
    """Hook ``torch.func.functional_call``, once a process, where a layer gets other weights."""
    call = stateless._functional_call

    @wraps(call)
    def new_call(module: nn.Module, tensors: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_dynamo_compiling():
            for name, value in tensors.items():
                _check_given(module, name, value)
        return call(module, tensors, *args, **kwargs)

    stateless._functional_call = new_call


def _check_given(module: nn.Module, name: str, value: Tensor) -> None:
    """Refuse to run a layer with a weight that a host gives it while it runs, if modules change it.

    Their change would be added to what has it already, as ``2 * layer.weight``, or what is no
    weight of the layer. Its own weight may be given.

    Raises:
        ModgraftError: with the remedy.
    """
    path, _, last = name.rpartition(".")
    try:
        layer = module.get_submodule(path)
    except AttributeError:
        return
    state = layer.__dict__.get(STATE)
    if state is None or not state.context.in_forward() or not state.changes_now():
        return
    theta = stored(layer, last)
    if not _is_same(value, theta) and state.changed(layer, last, theta) is not theta:
        raise ModgraftError(
            f"{state.path} is run with another {last} by torch.func.functional_call while the host "
            f"runs, and modules change that {last}: their change would be added to what is given; "
            f"compute with what is given, by torch.nn.functional.linear for instance, or call "
            f"{state.path} as it is"
        )


def _is_same(value: Tensor, theta: Tensor) -> bool:
    """Return whether ``value`` is ``theta``, or a view of all of it."""
    if isinstance(value, ServedWeight) or is_functorch_wrapped_tensor(value):
        return False
    return value.data_ptr() == theta.data_ptr() and value.shape == theta.shape


_BRANCHES = {"_buffers", "_modules"}


def _held(value: Any) -> Iterator[Any]:
    """Yield ``value``, or what it holds as a container or as a function that is given arguments."""
    if isinstance(value, partial):
        value = (*value.args, *value.keywords.values())
    if type(value) in (list, tuple):
        for one in value:
            yield from _held(one)
    else:
        yield value


def kept_elsewhere(model: nn.Module, layers: Sequence[nn.Module]) -> dict[nn.Module, str]:
    """Return which of ``layers`` have a weight that ``model`` keeps beside them, and where.

    ``self.w = self.layer.weight`` in a constructor is found so, also in a list, a dictionary or a
    ``functools.partial``. A weight that layers share is not: each of them runs with its own.
    """
    owners = {
        id(tensor): layer
        for layer in layers
        for name, tensor in layer._parameters.items()
        if tensor is not None and name != "bias"
    }
    found: dict[nn.Module, str] = {}
    for path, module in model.named_modules():
        if type(module).__module__.startswith("torch."):  # as DistributedDataParallel
            continue
        for name, value in module.__dict__.items():
            if name in _BRANCHES or (name == "_parameters" and not module._modules):
                continue
            some = value if type(value) is dict else {name: value}
            for key, own in some.items():
                for each in _held(own):
                    layer = owners.get(id(each))
                    if layer is not None and layer is not module:
                        at = key if name == "_parameters" else name
                        found.setdefault(layer, joined(path, at))
    return found


def warn_of_kept(model: nn.Module, name: str, paths: Mapping[nn.Module, str]) -> None:
    """Warn of the weights that ``model`` keeps of layers where a module begins to act.

    Args:
        model: the host's.
        name: the module's.
        paths: the layers, with their paths.
    """
    for layer, keeper in kept_elsewhere(model, list(paths)).items():
        path = paths[layer]
        warn(
            f"the model keeps a weight of {path} itself, in its attribute {keeper}: {name!r} acts "
            f"where {path} is called or its weight is read there, and not in what computes with "
            f"{keeper}; read {path}.weight in the forward",
        )


def is_serving(layer: nn.Module) -> bool:
    """Return whether the layer's own forward runs in this thread, by :func:`serving`."""
    if torch.compiler.is_dynamo_compiling():
        return layer.__dict__[STATE].compiled_bare
    running = _changes.get()
    return running is not None and layer in running


# -- when the host runs ---------------------------------------------------------------------------


class _Enter(OfHost):
    """A forward pre-hook: a forward begins."""

    def __init__(self, context: Context, is_root: bool) -> None:
        self.context, self.is_root = context, is_root

    def __call__(self, module: nn.Module, args: Any) -> None:
        """Leave the call as it is.

        Raises:
            ModgraftError: where a part that reads the text is called without the host, and prompts
                are in force, which are put in where the host is called; or as ``check_thread``.
        """
        if torch.compiler.is_dynamo_compiling():
            if self.is_root and self.context.compiled.is_past_the_host():
                self.context.compiled.bare.forget()
            return
        call = self.context.current()
        self.context.enter(module)
        if self.is_root or call.in_forward:
            return
        self.context.check_thread(call)
        if call.spliced or call.composition is None:
            return
        names = self.context.token_modules_in(call.composition)
        if names and any(m.__dict__[STATE].relays for m in module.modules() if STATE in m.__dict__):
            raise ModgraftError(
                f"{', '.join(names)}: the tokens are put in where the whole host is called, and "
                f"its {type(module).__name__} was called without it; call host(...), or "
                f"host.use(None) first"
            )


class _Leave(_Enter):
    """A forward hook that always runs: a forward has ended."""

    def __call__(self, module: nn.Module, args: Any, kwargs: Any = None, out: Any = None) -> Any:
        """Add what routers add to the loss to that of a model that was called without the host."""
        if torch.compiler.is_dynamo_compiling():
            compiled = self.context.compiled
            if self.is_root and compiled.is_past_the_host():
                out = with_routing_losses(out, compiled.bare.routings, kwargs)
                compiled.bare.routings.clear()
            return out
        call = self.context.leave(module)
        for check in call.reads if self.is_root and out is not None else ():  # else it has failed
            check()
        if self.is_root and call.routings and not self.context.in_forward():
            return with_routing_losses(out, call.routings, kwargs)
        return out


def watch_forwards(model: nn.Module, context: Context) -> None:
    """Watch the forwards of ``model``, and of the whole models in it, unless they are watched."""
    if any(isinstance(hook, _Enter) for hook in model._forward_pre_hooks.values()):
        return
    for part in _models(model):
        part.register_forward_pre_hook(_Enter(context, part is model))
        leave = _Leave(context, part is model)
        part.register_forward_hook(leave, with_kwargs=True, always_call=True)


def unwatch_forwards(model: nn.Module) -> None:
    """Undo :func:`watch_forwards` everywhere in ``model``."""
    for part in _models(model):
        for hooks in (part._forward_pre_hooks, part._forward_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, _Enter)]:
                del hooks[key]
                part._forward_hooks_always_called.pop(key, None)
                part._forward_hooks_with_kwargs.pop(key, None)


def _models(model: nn.Module) -> Iterator[nn.Module]:
    for part in model.modules():
        if part is model or isinstance(part, PreTrainedModel):
            yield part
