"""Many modules of one kind and shape as one, over stacked tensors: a module for each example.

The tensors of the modules in use lie in ``[N, …]``, and an index picks those of each example. The
module's own computation runs over the examples: as it is written where the method is ``by_row``,
else mapped by ``torch.vmap``. A change of low rank is two batched products. Without gradients a
call stacks the tensors once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modgraft.computation._redirect import is_redirected
from modgraft.computation.base import Computation, ParameterComposition
from modgraft.core.context import kept_in_call
from modgraft.core.layers import feature_axis
from modgraft.engine.kernels.functional_call import with_tensors

T = TypeVar("T")


def batch_key(module: Computation) -> object:
    """Return a key that is equal for modules that can be batched, None for one that cannot be."""
    if not module.can_batch or is_redirected(module):
        return None
    shapes = tuple((k, tuple(t.shape), t.dtype) for k, t in _tensors(module).items())
    return type(module), str(module.config()), shapes


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


class Batched:
    """Runs the modules of a batch, one for each example, as one module.

    Args:
        each: the module of every example, in order; one module may serve several examples.
    """

    def __init__(self, each: Sequence[Computation]) -> None:
        self.like = each[0]
        self.different = list(dict.fromkeys(each))
        place = {module: i for i, module in enumerate(self.different)}
        self.pick: Sequence[int] | Tensor = [place[module] for module in each]
        self.all = self.pick == list(range(len(self.different)))
        examples = len(each) // len(self.different)
        # equally many examples of each module, side by side, are one block: nothing is picked
        self.in_blocks = self.pick == [i for i in place.values() for _ in range(examples)]
        self.is_weight_change = isinstance(self.like, ParameterComposition)
        self._is_low_rank = self.is_weight_change and self.like.factors() is not None  # type: ignore[attr-defined]
        self.side_source = self.like.side_source
        self._modules = object()  # under which a call keeps what it makes of their tensors

    def picking(self, pick: Tensor) -> Self:
        """Return the same modules for other examples: their numbers are ``pick`` ``[g]`` (int64).

        A router picks anew at every call, and nothing is kept of what it picked.
        """
        made = object.__new__(type(self))
        made.__dict__.update(self.__dict__)
        made.pick, made.all, made.in_blocks = pick, False, False
        return made

    def _kept(self, key: object, make: Callable[[], T]) -> T:
        return kept_in_call((self._modules, key), make)

    # -- tensors ----------------------------------------------------------------------------------

    def _every(self, kind: str | torch.dtype) -> dict[str, Tensor]:
        """Return the tensors ``[N, …]`` of all modules: their state, or factors of a type."""
        return self._state() if isinstance(kind, str) else self._factors(kind)

    def _picked(self, kind: str | torch.dtype, times: int) -> dict[str, Tensor]:
        """Return the tensors ``[g, …]`` of each example, each repeated ``times``."""

        def make() -> dict[str, Tensor]:
            made = self._every(kind)
            if times == 1 and self.all:
                return made
            pick = [i for i in self.pick for _ in range(times)]
            return {name: value[pick] for name, value in made.items()}

        if isinstance(self.pick, Tensor):
            made = self._kept(kind, partial(self._every, kind))
            return {name: value.index_select(0, self.pick) for name, value in made.items()}
        return self._kept((kind, times), make)

    def _state(self) -> dict[str, Tensor]:
        own = [_tensors(m) for m in self.different]
        return {key: torch.stack([tensors[key] for tensors in own]) for key in own[0]}

    def _factors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        parts = [m.factors() for m in self.different]  # type: ignore[attr-defined]
        made = {
            "B": torch.stack([s * B for B, _, s in parts]).to(dtype).mT.contiguous(),  # [N, r, out]
            "A": torch.stack([A for _, A, _ in parts]).to(dtype).mT,  # [N, in, r]
        }
        bias = [m.bias_delta(None) for m in self.different]  # type: ignore[attr-defined]
        if bias[0] is not None:
            made["b"] = torch.stack(bias).to(dtype)
        return made

    # -- computing --------------------------------------------------------------------------------

    def effect(self, x: Tensor, layer: nn.Module, weight: Tensor, y: Tensor) -> Tensor:
        """Return the effect of each example's change of weights on its row of x ``[g, …, in]``."""
        if not self.has_factors(layer):
            return self._mapped("effect", (x, y), x.shape[0] // len(self.pick), layer, weight)
        hidden, own = self._hidden(x)
        if "b" in own:
            effect = torch.baddbmm(own["b"][:, None], hidden, own["B"])  # [g, n, out]
        else:
            effect = torch.bmm(hidden, own["B"])
        return effect.view(*x.shape[:-1], effect.shape[-1])

    def added(self, total: Tensor, x: Tensor, in_place: bool) -> Tensor:
        """Add the effect of low rank to ``total`` ``[g, …, out]``, in one pass over it."""
        hidden, own = self._hidden(x)
        to = total.reshape(*hidden.shape[:-1], total.shape[-1])  # [g, n, out]
        to = to + own["b"][:, None] if "b" in own else to
        add = Tensor.baddbmm_ if in_place else torch.baddbmm
        return add(to, hidden, own["B"]).view(total.shape)

    def _hidden(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return x A ``[g, n, r]`` with the picked factors, and these."""
        if self.in_blocks:
            own = self._kept(x.dtype, partial(self._factors, x.dtype))
            rows = x.reshape(len(self.different), -1, x.shape[-1])  # [N, g/N · n, in]
        else:
            own = self._picked(x.dtype, x.shape[0] // len(self.pick))
            rows = x.reshape(x.shape[0], -1, x.shape[-1])  # [g, n, in]
        return torch.bmm(rows, own["A"]), own

    def has_factors(self, layer: nn.Module) -> bool:
        """Return whether it changes a linear layer by a matrix of low rank."""
        return self._is_low_rank and (
            isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D"
        )

    def sums(self, x: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
        """Return Σ weight · effect over the picks of each row, ``[T, out]``.

        Rows of B are read where they lie and added up; none is copied.

        Args:
            x: ``[P, in]``, the input of each pick.
            weights: ``[P]``.
            offsets: ``[T]``, where the picks of each row begin.
        """
        pick, every = self.pick, self._kept(x.dtype, partial(self._factors, x.dtype))
        assert isinstance(pick, Tensor)  # noqa: S101
        hidden = torch.bmm(x[:, None], every["A"].index_select(0, pick))[:, 0]  # [P, r]
        rank, B = hidden.shape[1], every["B"]
        places = pick[:, None] * rank + torch.arange(rank, device=pick.device)
        total = F.embedding_bag(
            places.view(-1), B.view(-1, B.shape[2]), offsets * rank, mode="sum",
            per_sample_weights=(hidden * weights[:, None]).to(B.dtype).view(-1),
        )  # fmt: skip
        if "b" in every:
            total = total + F.embedding_bag(
                pick, every["b"], offsets, mode="sum", per_sample_weights=weights.to(B.dtype)
            )
        return total

    def __call__(self, y: Tensor, x: Tensor | None, side: Any) -> Tensor:
        """Apply each example's function to its row of y ``[g, …]``, and of x and ``side``."""
        times = y.shape[0] // len(self.pick)
        return self._mapped("forward", (y, x, side), times)

    def _in_blocks(self, value: Tensor | None) -> Tensor | None:
        """View ``[g, n, d]`` as ``[N, g/N · n, d]``."""
        return None if value is None else value.reshape(len(self.different), -1, value.shape[-1])

    def _mapped(self, kind: str, given: tuple, times: int, *fixed: Any) -> Tensor:
        def run(module: nn.Module, rows: Sequence[Any]) -> Tensor:
            if kind == "effect":
                x, y = rows
                return module.effect(x, *fixed, y)  # type: ignore[operator]
            return module(*rows)

        y = given[1] if kind == "effect" else given[0]
        if (
            self.like.by_row
            and y.dim() == 3
            and all(feature_axis(layer) == -1 for layer in fixed[:1])
        ):
            if self.in_blocks and self.like.by_token:
                one = self._kept("module", lambda: _by_row(self.like, self._state()))
                rows = [self._in_blocks(value) for value in given]
                return run(one, rows).reshape(*y.shape[:2], -1)

            def make() -> nn.Module:
                return _by_row(self.like, self._picked("state", times))

            chosen = isinstance(self.pick, Tensor)
            return run(make() if chosen else self._kept(("module", times), make), given)

        def one(tensors: dict[str, Tensor], *rows: Any) -> Tensor:
            rows = tuple(None if row is None else row[None] for row in rows)
            return run(with_tensors(self.like, tensors), rows)[0]

        dims = (0, *(None if value is None else 0 for value in given))
        return torch.vmap(one, in_dims=dims)(self._picked("state", times), *given)


class _Linears:
    """A linear layer for each example: ``[g, n, in]`` → ``[g, n, out]``."""

    def __init__(self, like: nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
        self.in_features, self.out_features = like.in_features, like.out_features
        # a product of few rows reads the weight along its longer side
        turned = self.out_features > self.in_features
        self.weight = weight.mT.contiguous() if turned else weight.mT  # [g, in, out]
        self.bias = None if bias is None else bias[:, None]  # [g, 1, out]

    def __call__(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return torch.bmm(x, self.weight)
        return torch.baddbmm(self.bias, x, self.weight)


def _by_row(module: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """Return a shallow copy of ``module`` with ``tensors`` ``[g, …]``, a row for each example."""
    copy = with_tensors(module, {k: v[:, None] for k, v in tensors.items() if "." not in k})
    layers = {
        name: _Linears(child, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))
        for name, child in module._modules.items()
        if isinstance(child, nn.Linear)
    }
    copy.__dict__["_modules"] = {**module._modules, **layers}
    return copy
