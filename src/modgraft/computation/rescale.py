"""Rescaling: a layer's output or input, feature by feature."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar, Literal, final

import torch
from torch import Tensor, nn

from modgraft.computation.base import ParameterComposition
from modgraft.core.errors import ModgraftError
from modgraft.core.layers import bias_vector, linear_map, over_output, weight_matrix
from modgraft.core.sites import Site


@final
class Rescale(ParameterComposition):
    """f'(x) = φ ⊙ f(x), or f(φ ⊙ x): Δ = (diag φ − I)·[W, b], or W·(diag φ − I); φ = 1 at first.

    IA³ (Liu et al. 2022, arXiv:2205.05638). At a layer linear in its weight W ``[out, in]`` both
    are changes of the weight, so they can be added and merged exactly: φ ``[out]`` scales the
    output with its bias, φ ``[in]`` the input. PEFT's IA³ is ``Rescale()`` at ``["key", "value"]``
    and ``Rescale(where="input")`` at ``"down"``, after the activation; that of the ``adapters``
    library scales before it, ``Rescale()`` at ``"up"``. At an embedding ``[entries, width]`` only
    the output can be scaled. At a convolution φ scales channels, at a single weight of attention or
    an RNN the rows or columns of that weight.

    Args:
        where: ``"output"`` or ``"input"``.

    Raises:
        ModgraftError: for another ``where``, the input of an embedding, or a layer that is not
            linear in a weight.
    """

    identity: ClassVar[bool] = True
    by_row: ClassVar[bool] = True

    where: Literal["output", "input"] = "output"

    def __post_init__(self) -> None:
        if self.where not in ("output", "input"):
            raise ModgraftError(f"Rescale(where={self.where!r}): 'output' or 'input'")

    def build(self, site: Site) -> None:
        layer = site.module
        rows, columns = weight_matrix(site.module, site.part, site.parameter).shape
        looked_up = isinstance(layer, nn.Embedding)
        if looked_up and self.where == "input":
            raise ModgraftError(
                f"Rescale(where='input') at {site.label}: an embedding's input is ids; use "
                f"Rescale(where='output')"
            )
        self._part = site.part
        self._along_columns = looked_up or self.where == "input"
        # of a convolution's in/groups · k… columns, an input channel scales k…, in its group's rows
        self._groups, self._taps = 1, 1
        if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            self._groups, self._taps = layer.groups, math.prod(layer.kernel_size)
        channels = columns // self._taps * self._groups if self._along_columns else rows
        self.phi = nn.Parameter(torch.ones(channels))

    def delta(self, weight: Tensor) -> Tensor:
        change = self.phi - 1
        if not self._along_columns:
            return weight * change[:, None]
        columns = change.view(self._groups, -1).repeat_interleave(self._taps, 1)  # [g, in/g · k…]
        grouped = weight.unflatten(0, (self._groups, -1))  # [g, out/g, in/g · k…]
        return (grouped * columns[:, None]).flatten(0, 1)

    def bias_delta(self, bias: Tensor | None) -> Tensor | None:
        return None if bias is None or self.where == "input" else bias * (self.phi - 1)

    def fused_forward(self, f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if self.where == "input":
            return f((x * self.phi).to(x.dtype))
        y = f(x)
        return (y * self.phi).to(y.dtype)  # under autocast y is in half precision, φ is not

    @property
    def can_batch(self) -> bool:
        return True

    def effect(
        self, x: Tensor, layer: nn.Module, weight: Tensor, y: Tensor | None = None
    ) -> Tensor:
        """Return (φ − 1) ⊙ f(x), or W((φ − 1) ⊙ x), without a dense Δ."""
        change = self.phi - 1
        if self.where == "input":
            return linear_map(layer, x * over_output(layer, change), weight)
        if y is None:
            y, bias = linear_map(layer, x, weight), bias_vector(layer, self._part)
            y = y if bias is None else y + over_output(layer, bias)
        # under autocast y is in half precision, φ is not
        return (over_output(layer, change) * y).to(y.dtype)
