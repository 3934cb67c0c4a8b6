"""The layers that are linear in their weight, and how each applies one: a table."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from modgraft.errors import SiteError

# layer type → (its weight as a matrix [out, in], x and such a matrix → the layer without bias)
_LAYERS: dict[
    type[nn.Module],
    tuple[Callable[[nn.Module], Tensor], Callable[[nn.Module, Tensor, Tensor], Tensor]],
] = {
    nn.Linear: (lambda m: m.weight, lambda m, x, w: F.linear(x, w)),
    Conv1D: (lambda m: m.weight.T, lambda m, x, w: F.linear(x, w)),  # stored [in, out]
    nn.Embedding: (lambda m: m.weight, lambda m, x, w: F.embedding(x, w)),
}  # type: ignore[return-value]


def _row(layer: nn.Module) -> tuple:
    for kind, row in _LAYERS.items():
        if isinstance(layer, kind):
            return row
    raise SiteError(
        f"a {type(layer).__name__} has no weight that a parameter module can change; "
        f"it acts on {', '.join(k.__name__ for k in _LAYERS)}"
    )


def weight_matrix(layer: nn.Module, part: tuple[int, int] | None = None) -> Tensor:
    """The weight of ``layer`` as a view ``[out, in]``, or the rows of one part of a fused one.

    Raises:
        SiteError: for a layer without such a weight, or an output that has no such parts.
    """
    weight = _row(layer)[0](layer)
    if part is None:
        return weight
    index, count = part
    if isinstance(layer, nn.Embedding) or weight.shape[0] % count:
        raise SiteError(
            f"a {type(layer).__name__} with {weight.shape[0]} outputs has no {count} equal parts"
        )
    return weight.chunk(count)[index]


def bias_vector(layer: nn.Module, part: tuple[int, int] | None = None) -> Tensor | None:
    """The bias of ``layer`` as a view ``[out]``, or its part; None for a layer without one."""
    bias = getattr(layer, "bias", None)
    if not isinstance(bias, Tensor) or part is None:
        return bias
    return bias.chunk(part[1])[part[0]]


def linear_map(layer: nn.Module, x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """What ``layer`` computes with ``matrix`` for its weight and ``bias`` for its bias."""
    y = _row(layer)[1](layer, x, matrix)
    return y if bias is None else y + bias
