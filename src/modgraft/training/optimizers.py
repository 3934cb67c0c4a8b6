"""The optimisers by name: AdamW, Lion, and Muon for matrices with AdamW for the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from modgraft.training.optim import parameter_groups, trainable, undecayed


class Stepwise(Optimizer):
    """An optimiser whose step is :meth:`update`, after what a closure computes."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update the parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.update()
        return loss

    def update(self) -> None:
        """Update the parameters that have a gradient."""
        raise NotImplementedError


class Lion(Stepwise):
    """θ ← θ − η (sign(β₁ m + (1 − β₁) g) + λ θ);  m ← β₂ m + (1 − β₂) g.

    Each entry moves by η, whatever its gradient's size, so that η is best three to ten times
    smaller than AdamW's, and λ as much larger. Chen et al. 2023 (arXiv:2302.06675).

    Args:
        params: parameters, or groups of them.
        lr: η.
        betas: β₁ and β₂.
        weight_decay: λ.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    def update(self) -> None:  # noqa: D102
        for group in self.param_groups:
            first, second = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                if not self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
                mean: Tensor = self.state[p]["exp_avg"]
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(mean.lerp(p.grad, 1 - first).sign_(), alpha=group["lr"])
                mean.lerp_(p.grad, 1 - second)


class Muon(Stepwise):
    """M ← μ M + (1 − μ) g;  θ ← θ − η (0.2 √max(r, c) NS(μ M + (1 − μ) g) + λ θ).

    NS(X) is near U Vᵀ, where U S Vᵀ = X is the singular value decomposition: it moves a matrix in
    all directions alike (Jordan et al. 2024, kellerjordan.github.io/posts/muon). The factor makes
    its moves as large as AdamW's are (Liu et al. 2025, arXiv:2502.16982).

    It is ``torch.optim.Muon(adjust_lr_fn="match_rms_adamw")``, which computes NS in bfloat16 on any
    machine. Here that is so on a GPU; a CPU, where bfloat16 may take ten times as long, computes in
    float32. Matrices of one shape are one batch.

    Args:
        params: matrices ``[r, c]``, or groups of them.
        lr: η.
        weight_decay: λ.
        momentum: μ.
        iterations: of NS.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        iterations: int = 5,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.iterations = iterations

    def update(self) -> None:  # noqa: D102
        for group in self.param_groups:
            alike: dict[tuple[Any, ...], list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    alike.setdefault((p.shape, p.dtype, p.device), []).append(p)
            for some in alike.values():
                self._move(some, group)

    def _move(self, some: Sequence[nn.Parameter], group: Mapping[str, Any]) -> None:
        """Update matrices of one shape."""
        momentum, moves = group["momentum"], []
        for p in some:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            mean: Tensor = self.state[p]["momentum_buffer"]
            mean.lerp_(p.grad, 1 - momentum)  # type: ignore[arg-type]
            moves.append(p.grad.lerp(mean, momentum))  # type: ignore[union-attr]
        size = 0.2 * max(some[0].shape) ** 0.5
        for p, move in zip(some, orthogonal(torch.stack(moves), self.iterations), strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.sub_(move, alpha=group["lr"] * size)


def orthogonal(x: Tensor, iterations: int) -> Tensor:
    """X ← a X + (b A + c A²) X, A = X Xᵀ, from X / ‖X‖: all singular values come near 1.

    Args:
        x: matrices ``[k, r, c]``.
        iterations: how often; with five, singular values from 0.01 on end between 0.5 and 1.5.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = x.shape[1] <= x.shape[2]
    y = (x if wide else x.mT).to(torch.bfloat16 if x.is_cuda else torch.float32)
    y = y / y.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(iterations):
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return (y if wide else y.mT).to(x.dtype)


class Several(Stepwise):
    """Several optimisers, each of parameters of its own, as one.

    Args:
        parts: the optimisers.
    """

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        self.parts = list(parts)
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Let each part work on its groups of this one, and keep its state here."""
        groups = iter(self.param_groups)
        for part in self.parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""
        super().load_state_dict(dict(state_dict))
        self._share()

    def update(self) -> None:  # noqa: D102
        for part in self.parts:
            part.step()


def make_optimizer(
    name: str,
    host: nn.Module,
    *,
    lr: float,
    betas: tuple[float, float] | None = None,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    fused: bool = True,
) -> Optimizer:
    """Make the optimiser of what trains in ``host``.

    Tables of ``nn.Embedding(…, sparse=True)`` go to ``torch.optim.SparseAdam`` beside any of them:
    it moves the rows of a batch alone, so that a step's cost does not grow with the table.

    Args:
        name: of :data:`OPTIMIZERS`.
        host: any module; only its parameters with ``requires_grad`` are taken.
        lr: the peak learning rate.
        betas: the decay rates of the moments; None: :data:`BETAS`.
        eps, fused: AdamW's.
        weight_decay: on matrices only, see :func:`~modgraft.training.optim.undecayed`.
    """
    betas, every = betas or BETAS[name], trainable(host)
    tables = {
        id(m.weight)
        for m in host.modules()
        if isinstance(m, nn.Embedding | nn.EmbeddingBag) and m.sparse
    }
    rows = [p for p in every.values() if id(p) in tables]
    rest = {n: p for n, p in every.items() if id(p) not in tables}
    given = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "fused": fused}
    parts = OPTIMIZERS[name](host, rest, **given) if rest else []
    if rows:
        parts.append(torch.optim.SparseAdam(rows, lr, betas, eps))
    return parts[0] if len(parts) == 1 else Several(parts)


def _adamw(
    host: nn.Module, of: Mapping[str, nn.Parameter], *, weight_decay: float, **given: Any
) -> list[Optimizer]:
    groups = parameter_groups(host, weight_decay=weight_decay, of=of.values())
    return [torch.optim.AdamW(groups, **given)]


def _lion(
    host: nn.Module, of: Mapping[str, nn.Parameter], *, lr: float, betas: tuple[float, float],
    weight_decay: float, **_: Any,
) -> list[Optimizer]:  # fmt: skip
    groups = parameter_groups(host, weight_decay=weight_decay, of=of.values())
    return [Lion(groups, lr, betas)]


def _muon(
    host: nn.Module, of: Mapping[str, nn.Parameter], *, lr: float, weight_decay: float, **given: Any
) -> list[Optimizer]:
    """Make Muon for matrices, and AdamW for the rest: vectors and scalars, and embeddings and
    heads, whose rows are tokens or classes and no directions."""
    matrices = matrices_of(host, of)
    rest = {n: p for n, p in of.items() if n not in matrices}
    parts: list[Optimizer] = [Muon(matrices.values(), lr, weight_decay)] if matrices else []
    return parts + (_adamw(host, rest, lr=lr, weight_decay=weight_decay, **given) if rest else [])


def matrices_of(host: nn.Module, of: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Return those of some parameters of ``host`` that are matrices between layers.

    Others are embeddings, heads, which are told by their name (:data:`HEADS`), the parameters of
    norms, and what is no matrix.
    """
    apart = undecayed(host)
    for path, module in host.named_modules():
        if path.rpartition(".")[2] in HEADS:
            apart |= {id(p) for p in module.parameters(recurse=False)}
    return {n: p for n, p in of.items() if p.ndim == 2 and id(p) not in apart}


HEADS = ("head", "lm_head", "embed_out", "classifier", "score", "qa_outputs")
"""What layers that give logits are called in transformers, timm and this library."""


OPTIMIZERS: dict[str, Callable[..., list[Optimizer]]] = {
    "adamw": _adamw, "lion": _lion, "muon": _muon,
}  # fmt: skip
"""Name → what makes the optimisers of some parameters of a host."""

BETAS = {"adamw": (0.9, 0.999), "lion": (0.9, 0.99), "muon": (0.9, 0.999)}
"""Name → the decay rates that it has by default."""


def described(optimizer: Optimizer, names: Mapping[int, str]) -> str:
    """Say which parameters each part of an optimiser moves.

    Args:
        optimizer: the optimiser.
        names: id → name of its parameters.
    """
    said = []
    for part in getattr(optimizer, "parts", [optimizer]):
        some = [p for group in part.param_groups for p in group["params"]]
        first = ", ".join(names[id(p)] for p in some[:2])
        more = ", …" if len(some) > 2 else ""
        count = sum(p.numel() for p in some)
        said.append(
            f"{type(part).__name__}: {len(some)} tensors, {count:,} numbers ({first}{more})"
        )
    return "; ".join(said)
