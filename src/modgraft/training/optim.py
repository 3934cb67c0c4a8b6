"""The optimiser and its learning-rate schedules: AdamW with decay only where it makes sense."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from modgraft.core.errors import ModgraftError

#: decay of one schedule: progress u in [0, 1) after warm-up -> factor in [0, 1]
Decay = Callable[[float], float]


#: modules whose parameters are not decayed, whatever their number of axes
UNDECAYED = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)

SCHEDULES: dict[str, Decay] = {
    "constant": lambda u: 1.0,
    "linear": lambda u: 1.0 - u,
    # Loshchilov and Hutter 2017, SGDR, without restarts
    "cosine": lambda u: 0.5 * (1.0 + math.cos(math.pi * u)),
}


def warmup_steps(warmup: int | float, total: int) -> int:
    """Return the number of warm-up steps: an int is that number, a float in [0, 1) a fraction of
    `total`.

    Raises:
        ModgraftError: negative, a fraction of 1 or more, or a warm-up as long as the run.
    """
    if isinstance(warmup, float):
        if not 0.0 <= warmup < 1.0:
            raise ModgraftError(
                f"warmup={warmup}: a float is a fraction of the run, 0 <= warmup < 1; "
                f"for a number of steps give an int, warmup={int(warmup)}"
            )
        return round(warmup * total)
    if not 0 <= warmup < max(total, 1):
        raise ModgraftError(f"warmup={warmup} steps does not fit a run of {total} steps")
    return warmup


def learning_rate(
    step: int, *, lr: float, total: int, warmup: int = 0, schedule: str = "linear"
) -> float:
    """Return η(s) = η·s/w for s ≤ w, else η·d((s − w − 1)/(T − w)).

    s = 1 … T is the step, w the warm-up. The peak η is reached at s = w and held at s = w + 1; no
    step has a rate of zero, so none is wasted. d is one of `SCHEDULES`.

    Raises:
        ModgraftError: an unknown schedule.
    """
    if schedule not in SCHEDULES:
        raise ModgraftError(f"schedule={schedule!r} is unknown; choose one of {sorted(SCHEDULES)}")
    if step <= warmup:
        return lr * step / warmup
    return lr * SCHEDULES[schedule]((step - warmup - 1) / (total - warmup))


def trainable(host: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters with `requires_grad`, by name; a tied one only once.

    Raises:
        ModgraftError: nothing trains.
    """
    found = {name: p for name, p in host.named_parameters() if p.requires_grad}
    if not found:
        count = sum(1 for _ in host.parameters())
        raise ModgraftError(
            f"nothing to train: none of the {count} parameters of {type(host).__name__} has "
            "requires_grad. Implant a module first, or free some: "
            "for p in module.parameters(): p.requires_grad_(True)"
        )
    return found


def undecayed(host: nn.Module) -> set[int]:
    """Return the `id`s of the parameters that are not decayed.

    These are vectors and scalars (biases, norm scales, gates), the parameters of norm layers, and
    embedding tables, whose rows would shrink in batches that do not use them. A table that is tied
    to an output layer is one object and is not decayed either.
    """
    found: set[int] = set()
    for module in host.modules():
        exempt = isinstance(module, UNDECAYED)
        for p in module.parameters(recurse=False):
            if exempt or p.ndim < 2:
                found.add(id(p))
    return found


def parameter_groups(
    host: nn.Module, *, weight_decay: float, of: Iterable[nn.Parameter] | None = None
) -> list[dict[str, object]]:
    """Return the trainable parameters, or those of them in `of`, in two groups, decayed and not, in
    the order of the host's tree."""
    exempt = undecayed(host)
    parameters = list(trainable(host).values() if of is None else of)
    groups: list[dict[str, object]] = [
        {"params": [p for p in parameters if id(p) not in exempt], "weight_decay": weight_decay},
        {"params": [p for p in parameters if id(p) in exempt], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return ‖g‖₂ over all gradients, a scalar tensor; sparse ones are coalesced."""
    return torch.nn.utils.get_total_norm([_dense(p) for p in parameters if p.grad is not None])


def clip_gradients(parameters: Iterable[nn.Parameter], norm: Tensor, clip: float) -> None:
    """Set g ← g · min(1, clip / ‖g‖₂), given ‖g‖₂ = `norm`, which must be finite."""
    dense: list[nn.Parameter] = []
    for p in parameters:
        if p.grad is not None and p.grad.is_sparse:
            _dense(p).mul_((clip / (norm + 1e-6)).clamp(max=1.0))
        else:
            dense.append(p)
    torch.nn.utils.clip_grads_with_norm_(dense, clip, norm)


def _dense(p: nn.Parameter) -> Tensor:
    """Return the gradient of a parameter, or of those of its rows that have one."""
    grad = p.grad
    assert grad is not None  # noqa: S101
    if not grad.is_sparse:
        return grad
    p.grad = grad = grad.coalesce()
    return grad._values()
