"""A method on a host, of which the contract's rules are asked, and how results are compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from modgraft.computation.base import Computation, InputComposition, TokenComposition
from modgraft.core.errors import ContractError
from modgraft.core.side import Side
from modgraft.core.sites import At
from modgraft.core.tensors import tensor_of
from modgraft.host.host import Host


class NotAsked(Exception):  # noqa: N818, it is no error
    """A rule that means nothing for this method on this host, with the reason."""


@dataclass(frozen=True)
class Trial:
    """A method on a host.

    Attributes:
        model: returns the bare model, in evaluation, with the same weights each time.
        batch: what the host is called with: tensors whose first axis is that of the examples, two
            at least.
        make: returns the method.
        at: where it goes; None: where it goes by itself.
        sides: side inputs by name, for the examples of the batch.
        prepare: does, to a host and the name of a new module, what the method's training procedure
            does beside learning parameters, such as choosing a mask.
        noise: the standard deviation of the parameters of a module that has been trained.
        adds: whether its effect is independent of the output of its site, so that ``a >> b`` is
            ``a + b``, as it is for a change of weights; None: it is not known.
        generates: whether the host generates.
        exact_in_half: whether the bare host rounds in half precision as with a module of no effect;
            a sum whose result has another layout in memory is rounded otherwise.
    """

    model: Callable[[], nn.Module]
    batch: Mapping[str, Any]
    make: Callable[[], Computation]
    at: At | None = None
    sides: Mapping[str, Side] = field(default_factory=dict)
    prepare: Callable[[Host, str], None] = lambda host, name: None
    noise: float = 0.3
    adds: bool | None = None
    generates: bool = False
    exact_in_half: bool = True

    @property
    def count(self) -> int:
        """The number of examples of the batch."""
        return next(v.shape[0] for v in self.batch.values() if isinstance(v, Tensor))

    @property
    def chains_only(self) -> bool:
        """Whether the method puts vectors before others, which are neither added nor scaled."""
        return isinstance(self.make().unwrapped, InputComposition)

    @property
    def before_input(self) -> bool:
        """Whether it puts tokens before the input, which changes the shapes that follow."""
        return isinstance(self.make().unwrapped, TokenComposition)

    def host(self) -> Host:
        """Return the bare model as a host."""
        return Host(self.model()).eval()

    def put(self, host: Host, name: str = "m", stir: bool = True, newborn: bool = False) -> str:
        """Implant the method, with random numbers for parameters where ``stir``.

        Args:
            host: where to.
            name: of the module.
            stir: whether its parameters are random numbers, as of one that has been trained.
            newborn: whether it is left as it is built.

        Returns:
            Its name in compositions; it joins the one in force.
        """
        several = len(self.make().task_names(name)) > 1
        implant = host.implant(name, self.make(), at=self.at, active=not several)
        if several:
            now = "" if host.composition is None else f"{host.composition} >> "
            host.use(now + implant.names[0])
        if newborn:
            return implant.names[0]
        self.prepare(host, name)
        if stir:
            with torch.no_grad():
                for parameter in implant.parameters():
                    parameter.normal_(0.0, self.noise)
        return implant.names[0]

    def implanted(self, stir: bool = True) -> Host:
        """Return a host with the method as ``m``, in force."""
        host = self.host()
        self.put(host, stir=stir)
        return host

    def inputs(self, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """Return the batch, its floating tensors of a type."""
        return {
            k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v
            for k, v in self.batch.items()
        }

    def side(self, dtype: torch.dtype | None = None) -> dict[str, Any]:
        """Return ``side=`` for a call, of a type; nothing where the method reads no side input."""
        sides = {n: s if dtype is None else s.to(dtype) for n, s in self.sides.items()}
        return {"side": sides} if sides else {}

    def example(self, i: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """Return the i-th example alone, as the arguments of a call."""
        rows, count = torch.tensor([i]), self.count
        one = {
            k: v[i : i + 1] if isinstance(v, Tensor) and v.dim() and v.shape[0] == count else v
            for k, v in self.inputs(dtype).items()
        }
        sides = {n: s.to(dtype).picked(rows.to(s.tensor.device)) for n, s in self.sides.items()}
        return one | ({"side": sides} if sides else {})

    def run(self, host: nn.Module, **more: Any) -> Tensor:
        """Call ``host`` with the batch, of float32; return the tensor that it puts out."""
        with torch.no_grad():
            return output_of(host(**self.inputs(), **more))

    def seen(self, out: Tensor) -> Tensor:
        """Return a mask ``[B, …]`` of an output, true at what is no padding of the batch."""
        mask = self.batch.get("attention_mask")
        if isinstance(mask, Tensor) and mask.shape == out.shape[:2]:
            return mask.bool()
        return torch.ones(out.shape[:1], dtype=torch.bool, device=out.device)


def output_of(out: Any) -> Tensor:
    """Return the tensor of a host's output: its logits where it has some."""
    if isinstance(out, Mapping):
        out = out["logits"] if "logits" in out else next(iter(out.values()))
    return tensor_of(out)


def agree(
    found: Tensor, wanted: Tensor, words: str, *, rtol: float = 0.0, atol: float = 0.0
) -> None:
    """Compare two results, exactly unless a tolerance is given.

    Raises:
        ContractError: ``words`` with the two numbers that lie furthest apart, and their place.
    """
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        kinds = [f"{list(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in (found, wanted)]
        raise ContractError(f"{words}: a tensor {kinds[0]} where {kinds[1]} was expected")
    off = ~torch.isclose(found, wanted, rtol=rtol, atol=atol)
    if not off.any():
        return
    far = (found.double() - wanted.double()).abs().nan_to_num(nan=float("inf"))
    place = [int(i) for i in torch.unravel_index((far * off).nan_to_num(0.0).argmax(), far.shape)]
    a, b = (float(t[tuple(place)]) for t in (found, wanted))
    raise ContractError(
        f"{words}: {a:.6g} where {b:.6g} was expected, at {place} "
        f"({int(off.sum())} of {off.numel()} numbers differ)"
    )


def expect(holds: bool, words: str) -> None:
    """Raise a :class:`ContractError` that says ``words`` unless something holds."""
    if not holds:
        raise ContractError(words)
