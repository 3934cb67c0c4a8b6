"""Learned routing: soft, hard, and sparse."""

from __future__ import annotations

from dataclasses import field
from typing import ClassVar, Literal, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modgraft.core.errors import ModgraftError
from modgraft.routing import losses
from modgraft.routing.base import (
    Level,
    Router,
    Routing,
    check_k,
    check_positive,
    one_hot_like,
    softmax_of_best,
    straight_through,
)


def _gumbel(like: Tensor) -> Tensor:
    """Draw standard Gumbel noise of the shape of ``like``."""
    return -torch.empty_like(like).exponential_().log()


@final
class Soft(Router):
    """α = softmax(z / τ): every module acts.

    The soft mixture of experts (Jacobs et al. 1991).

    Args:
        level: ``task``, ``example`` or ``token``.
        tasks: names of the tasks, at level ``task``.
        temperature: τ.
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        self.check()
        check_positive(self, temperature=self.temperature)

    def choose(self, logits: Tensor, query: Tensor) -> Routing:
        probabilities = (logits / self.temperature).softmax(-1)
        return Routing(probabilities, probabilities)


@final
class Top1(Router):
    """α = one-hot(argmax z); while training, a sampled choice and an estimator of its gradient.

    ``"gumbel"``: j = argmax(z + g) with Gumbel noise g; forward one-hot, backward the gradient of
    softmax((z + g)/τ) (Jang et al. 2017, arXiv:1611.01144). It is biased, less so for small τ.
    ``"reinforce"``: j is drawn from p = softmax(z), and log p_j · (L − baseline) is added to the
    loss (Williams 1992). It is unbiased. ``"epsilon"``: j is argmax z, or with probability ε a
    uniformly drawn module; the same loss is weighted by p_j / μ_j, μ_j the probability with which j
    was drawn, which keeps it unbiased. The last two need the loss L of each example:
    :func:`modgraft.routing.losses.score_function`.

    Args:
        level: ``task``, ``example`` or ``token``.
        tasks: names of the tasks, at level ``task``.
        estimator: ``gumbel``, ``reinforce`` or ``epsilon``.
        temperature: τ of ``gumbel``.
        epsilon: ε in (0, 1].
    """

    estimator: Literal["gumbel", "reinforce", "epsilon"] = "gumbel"
    temperature: float = 1.0
    epsilon: float = 0.1

    def __post_init__(self) -> None:
        self.check()
        check_positive(self, temperature=self.temperature)
        if self.estimator not in ("gumbel", "reinforce", "epsilon"):
            raise ModgraftError(
                f"Top1(estimator={self.estimator!r}): one of gumbel, reinforce, epsilon"
            )
        if not 0 < self.epsilon <= 1:
            raise ModgraftError(f"Top1(epsilon={self.epsilon}): a chance in (0, 1]")

    @property
    def sparse(self) -> bool:
        return self.estimator != "gumbel" or super().sparse

    def choose(self, logits: Tensor, query: Tensor) -> Routing:
        probabilities = logits.softmax(-1)
        if not self.training:
            return Routing(one_hot_like(logits, logits.argmax(-1)), probabilities)
        if self.estimator == "gumbel":
            noisy = logits + _gumbel(logits)
            hard = one_hot_like(noisy, noisy.argmax(-1))
            return Routing(
                straight_through(hard, (noisy / self.temperature).softmax(-1)), probabilities
            )
        drawn_from = probabilities.detach()
        if self.estimator == "epsilon":
            greedy = one_hot_like(logits, logits.argmax(-1))
            drawn_from = (1 - self.epsilon) * greedy + self.epsilon / logits.shape[-1]
        index = torch.distributions.Categorical(probs=drawn_from).sample()[..., None]  # […, 1]
        score = logits.log_softmax(-1).gather(-1, index)[..., 0]
        if self.estimator == "epsilon":
            score = score * (probabilities.detach() / drawn_from).gather(-1, index)[..., 0]
        return Routing(one_hot_like(logits, index), probabilities, score=score)


@final
class TopK(Router):
    """α_j = 1/k for the k largest z, else 0; backward the gradient of softmax(z).

    Args:
        k: how many modules act.
        level: ``task``, ``example`` or ``token``.
        tasks: names of the tasks, at level ``task``.
    """

    k: int = 1

    def __post_init__(self) -> None:
        self.check()
        check_k(self, self.k)

    def build(self, names: tuple[str, ...], width: int) -> None:
        check_k(self, self.k, names)
        super().build(names, width)

    def choose(self, logits: Tensor, query: Tensor) -> Routing:
        probabilities = logits.softmax(-1)
        hard = one_hot_like(logits, logits.topk(self.k, dim=-1).indices) / self.k
        return Routing(straight_through(hard, probabilities), probabilities)


@final
class Threshold(Router):
    """α_j = 1/|K| for K = {j : σ(z_j) > t}, else 0; backward the gradient of σ(z_j)/|K|.

    Modules outside K have that gradient too, so they can return to K. If no σ(z_j) is above t, no
    module acts. Logits start near 0, where σ = 1/2, so that for t below 1/2 all modules start in K.

    Args:
        threshold: t in [0, 1).
        level: ``task``, ``example`` or ``token``.
        tasks: names of the tasks, at level ``task``.
    """

    threshold: float = 0.4

    def __post_init__(self) -> None:
        self.check()
        if not 0 <= self.threshold < 1:
            raise ModgraftError(f"Threshold(threshold={self.threshold}): t is in [0, 1)")

    def choose(self, logits: Tensor, query: Tensor) -> Routing:
        probabilities = logits.sigmoid()
        chosen = (probabilities > self.threshold).to(logits.dtype)
        size = chosen.sum(-1, keepdim=True).clamp_min(1)
        return Routing(straight_through(chosen, probabilities) / size, probabilities)


@final
class SkillMatrix(Router):
    """α = Ẑ_t / Σ Ẑ_t, Ẑ a soft binary task–skill matrix: Ẑ_tj = σ((z_tj + logit u) / τ).

    Polytropon (Ponti et al. 2022, arXiv:2202.13914): u is uniform while training (a Gumbel-sigmoid
    sample); otherwise there is no noise.

    Args:
        tasks: names of the tasks, one for each row; empty: one task.
        temperature: τ.
    """

    levels: ClassVar[tuple[Level, ...]] = ("task",)
    only_levels: ClassVar[str] = "a matrix of tasks and skills routes tasks"

    level: Level = field(default="task", kw_only=True)
    temperature: float = 1.0

    def __post_init__(self) -> None:
        self.check()
        check_positive(self, temperature=self.temperature)

    def choose(self, logits: Tensor, query: Tensor) -> Routing:
        probabilities = logits.sigmoid()
        noise = _gumbel(logits) - _gumbel(logits) if self.training else 0.0  # logistic
        skills = ((logits + noise) / self.temperature).sigmoid()
        return Routing(skills / skills.sum(-1, keepdim=True), probabilities)


@final
class NoisyTopK(Router):
    """α = softmax of the k largest of h = z + ε ⊙ softplus(W_n q + b_n), 0 elsewhere; ε ~ N(0, 1).

    The sparsely gated mixture of experts (Shazeer et al. 2017, arXiv:1701.06538), with its
    importance and load losses as ``balance``. There is noise only while training. At level ``task``
    the balance is taken over the tasks, and a single task has no balance loss.

    Args:
        k: how many modules act.
        level: ``task``, ``example`` or ``token``.
        tasks: names of the tasks, at level ``task``.
        importance: weight of the importance loss.
        load: weight of the load loss.
    """

    k: int = 2
    importance: float = 0.1
    load: float = 0.1

    def __post_init__(self) -> None:
        self.check()
        check_k(self, self.k)
        for name, value in (("importance", self.importance), ("load", self.load)):
            if not 0 <= value < float("inf"):
                raise ModgraftError(f"NoisyTopK({name}={value}): finite and at least 0")

    @property
    def sparse(self) -> bool:
        return True

    def build(self, names: tuple[str, ...], width: int) -> None:
        check_k(self, self.k, names)
        super().build(names, width)
        if self.level == "task":
            self.noise_table = nn.Parameter(torch.zeros_like(self.table))
        else:
            self.noise = nn.Linear(width, len(names))
            nn.init.zeros_(self.noise.weight)
            nn.init.zeros_(self.noise.bias)

    def choose(self, logits: Tensor, query: Tensor) -> Routing:
        if not self.training:
            return Routing(softmax_of_best(logits, self.k), logits.softmax(-1))
        by_task = self.level == "task"
        clean = self.table if by_task else logits  # of all tasks: the balance is taken over them
        spread = F.softplus(self.noise_table if by_task else self.noise(query))
        noisy = clean + torch.randn_like(clean) * spread
        weights = softmax_of_best(noisy, self.k)
        balance = self.importance * losses.importance(weights)
        balance = balance + self.load * losses.load(clean, noisy, spread, self.k)
        if not by_task:
            return Routing(weights, logits.softmax(-1), balance=balance)
        return Routing(
            weights[query], logits.softmax(-1), balance=balance if len(clean) > 1 else None
        )
