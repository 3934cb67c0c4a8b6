"""Side inputs: what a module reads beside what its layer reads, as an image or a task's vector."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from modgraft.core.errors import SideError

EXAMPLE = "example"  # the side input that examples are routed by


@dataclass(frozen=True)
class Side:
    """A tensor that a module needs and the host's ``forward`` has no argument for.

    Args:
        tensor: ``[B, m, d]`` floating point: ``m`` vectors of ``d`` features for each example.
        mask: ``[B, m]`` bool, True where there is something to see; None: everything is seen. What
            is behind False is read as 0, whatever it is. An example whose row is all False has no
            such input, and is left exactly as it was.

    Raises:
        SideError: for a tensor that is not ``[B, m, d]`` floating point, or a mask of another
            shape or type.
    """

    tensor: Tensor
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        tensor, mask = self.tensor, self.mask
        if not isinstance(tensor, Tensor) or tensor.dim() != 3 or not tensor.is_floating_point():
            raise SideError(
                f"a side input is a floating-point tensor [batch, m, d], got {_kind(tensor)}; one "
                f"vector an example is written tensor[:, None]"
            )
        shape = tensor.shape[:2]
        if mask is not None and (
            not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != shape
        ):
            raise SideError(
                f"the mask of a side input is bool {list(shape)} (True where there is something to "
                f"see), got {_kind(mask)}"
            )
        if mask is not None and mask.device != tensor.device:
            object.__setattr__(self, "mask", mask.to(tensor.device))

    def to(self, *args: object, **kwargs: object) -> Side:
        """Move it to a device (or to a floating type), as :meth:`torch.Tensor.to` does."""
        return Side(self.tensor.to(*args, **kwargs), self.mask)  # type: ignore[arg-type]

    def pin_memory(self) -> Side:
        """Copy it to page-locked memory, as ``DataLoader(pin_memory=True)`` asks."""
        return Side(self.tensor.pin_memory(), None if self.mask is None else self.mask.pin_memory())

    def seen(self) -> Tensor:
        """Return the mask ``[B, m]``, all True where none was given."""
        if self.mask is not None:
            return self.mask
        return torch.ones(self.tensor.shape[:2], dtype=torch.bool, device=self.tensor.device)

    def shown(self) -> Side:
        """Put 0 where the mask hides what is there, so that it reaches no value and no gradient.

        A weight of 0 would not do: 0 · NaN is NaN.
        """
        if self.mask is None:
            return self
        return Side(self.tensor.masked_fill(~self.mask[..., None], 0.0), self.mask)

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


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}"
    return f"a {type(value).__name__}"


def missing_side(name: str, source: str) -> SideError:
    """Return the error of a call without a side input that an active module needs."""
    return SideError(
        f"module {name!r} needs the side input {source!r} and this call has none; pass "
        f"host(..., side={{{source!r}: mg.Side(tensor, mask)}}), with an all-False mask row for an "
        f"example without one, or leave the module out with host.use(None)"
    )
