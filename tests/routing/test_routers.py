"""Routers by themselves: their equations, the gradients of hard choices, and balance."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from modgraft.core.config import resolve
from modgraft.core.errors import ModgraftError
from modgraft.routing import losses
from modgraft.routing.base import Router
from modgraft.routing.fixed import Fixed
from modgraft.routing.learned import NoisyTopK, SkillMatrix, Soft, Threshold, Top1, TopK
from modgraft.routing.mixture import Mixture

NAMES = ("a", "b", "c", "d")
WIDTH = 5
LEARNED = (
    Soft(),
    Soft(temperature=0.5),
    Top1(),
    Top1(estimator="reinforce"),
    Top1(estimator="epsilon"),
    TopK(2),
    Threshold(0.5),
    NoisyTopK(2),
)


def built(router, width: int = WIDTH):
    made = router.fresh(NAMES, width)
    with torch.no_grad():
        for p in made.parameters():
            p.normal_()
    return made


def written_out(router, z: list[float]) -> list[float]:
    """α of one query without noise, number by number."""
    match router:
        case Soft(temperature=t):
            total = sum(math.exp(v / t) for v in z)
            return [math.exp(v / t) / total for v in z]
        case Top1():
            return [float(v == max(z)) for v in z]
        case TopK(k=k):
            return [float(v >= sorted(z)[-k]) / k for v in z]
        case Threshold(threshold=t):
            chosen = [1 / (1 + math.exp(-v)) > t for v in z]
            return [float(c) / max(1, sum(chosen)) for c in chosen]
        case NoisyTopK(k=k):
            kept = [v if v >= sorted(z)[-k] else -math.inf for v in z]
            total = sum(math.exp(v) for v in kept)
            return [math.exp(v) / total for v in kept]
    raise AssertionError(router)


@pytest.mark.parametrize("router", LEARNED, ids=repr)
@pytest.mark.parametrize("level", ["example", "token", "task"])
def test_without_noise_the_weights_are_the_equation(router, level: str) -> None:
    config = {**router.config(), "level": level}
    if level == "task":
        config["tasks"] = ("x", "y", "z")
    made = built(type(router)(**config)).eval()
    query = torch.randn(3, 2, WIDTH) if level != "task" else torch.tensor([[0, 2], [1, 1], [2, 0]])
    routing = made(query)
    z = made.table[query] if level == "task" else query @ made.map.weight.T + made.map.bias
    for own, row in zip(routing.weights.view(-1, 4), z.reshape(-1, 4), strict=True):
        torch.testing.assert_close(own, torch.tensor(written_out(router, row.tolist())))
    assert routing.weights.shape == routing.probabilities.shape == (3, 2, 4)


@pytest.mark.parametrize("router", LEARNED, ids=repr)
def test_what_is_not_chosen_is_exactly_zero_and_training_is_seeded(router) -> None:
    made = built(router).train()
    query = torch.randn(64, WIDTH)
    torch.manual_seed(3)
    first = made(query)
    torch.manual_seed(3)
    assert torch.equal(made(query).weights, first.weights)
    active = (first.weights != 0).sum(-1)
    expected = {Top1: 1, TopK: 2, NoisyTopK: 2, Soft: 4}.get(type(router))
    if expected is not None:
        assert (active == expected).all()
        torch.testing.assert_close(first.weights.sum(-1), torch.ones(64))


def test_nothing_above_the_threshold_means_no_module() -> None:
    made = Threshold(0.9).fresh(NAMES, WIDTH)
    assert made(torch.randn(3, WIDTH)).weights.abs().sum() == 0


def test_the_skill_matrix_is_polytropons() -> None:
    made = SkillMatrix(tasks=("x", "y")).fresh(NAMES, WIDTH).eval()
    with torch.no_grad():
        made.table.copy_(torch.tensor([[5.0, 5.0, -50.0, -50.0], [-1.0, 0.0, 1.0, 2.0]]))
    weights = made(torch.tensor([0, 1])).weights
    torch.testing.assert_close(weights[0], torch.tensor([0.5, 0.5, 0.0, 0.0]))
    s = [1 / (1 + math.exp(-v)) for v in (-1, 0, 1, 2)]
    torch.testing.assert_close(weights[1], torch.tensor([v / sum(s) for v in s]))
    # while training: σ((z + log u − log(1 − u)) / τ); its mean at z = 0 is ½
    made.train()
    many = made(torch.zeros(4000, dtype=torch.long)).weights
    assert (many[:, :2].mean(0) - 0.5).abs().max() < 0.02
    assert Mixture(NAMES, made).task_names("m") == ["m['x']", "m['y']"]


def test_fixed_sets() -> None:
    everything = Fixed().fresh(NAMES, WIDTH)
    torch.testing.assert_close(everything(torch.tensor([0])).weights, torch.full((1, 4), 0.25))
    by_task = Fixed({"x": ("a",), "y": ("b", "d")}).fresh(NAMES, WIDTH)
    expected = torch.tensor([[0, 0.5, 0, 0.5], [1.0, 0, 0, 0]])
    torch.testing.assert_close(by_task(torch.tensor([1, 0])).weights, expected)
    assert not list(by_task.parameters())
    with pytest.raises(ModgraftError, match="'e' is none of the mixture's modules a, b, c, d"):
        Fixed(("a", "e")).fresh(NAMES, WIDTH)
    with pytest.raises(ModgraftError, match="no modules"):
        Fixed(()).fresh(NAMES, WIDTH)


LOSSES = torch.tensor([0.3, -1.0, 2.0, 0.5], dtype=torch.float64)


def exact_gradient(logits: Tensor) -> Tensor:
    """∇_z Σ_j softmax(z)_j L_j, enumerated."""
    p = logits.softmax(-1)
    return p * (LOSSES - (p * LOSSES).sum())


@pytest.mark.parametrize("baseline", [0.0, 0.7])
@pytest.mark.parametrize("estimator", ["reinforce", "epsilon"])
def test_score_functions_are_unbiased(estimator: str, baseline: float) -> None:
    torch.manual_seed(0)
    samples = 400_000
    router = Top1(estimator=estimator, epsilon=0.3).fresh(NAMES, WIDTH).double().train()
    z = torch.tensor([0.2, -0.4, 0.1, 0.6], dtype=torch.float64, requires_grad=True)
    routing = router.choose(z.expand(samples, 4), z)
    came = (routing.weights.detach() * LOSSES).sum(-1)
    losses.score_function(routing.score, came, baseline).backward()
    assert z.grad is not None
    torch.testing.assert_close(z.grad, exact_gradient(z.detach()), atol=0.012, rtol=0)


def test_a_baseline_takes_variance_away() -> None:
    torch.manual_seed(0)
    router = Top1(estimator="reinforce").fresh(NAMES, WIDTH).double().train()
    spread = []
    for baseline in (0.0, 10.0):
        z = torch.zeros(2000, 4, dtype=torch.float64, requires_grad=True)
        routing = router.choose(z, z)
        came = 10 + (routing.weights.detach() * LOSSES).sum(-1)
        losses.score_function(routing.score, came, baseline).backward()
        spread.append((2000 * z.grad).var(0).sum())
    assert spread[1] < 0.1 * spread[0]


def test_straight_through_gumbel_nears_the_exact_gradient_as_tau_falls() -> None:
    torch.manual_seed(0)
    far = {}
    for tau in (2.0, 0.2):
        router = Top1(temperature=tau).fresh(NAMES, WIDTH).double().train()
        z = torch.tensor([0.2, -0.4, 0.1, 0.6], dtype=torch.float64, requires_grad=True)
        (router.choose(z.expand(400_000, 4), z).weights @ LOSSES).mean().backward()
        far[tau] = (z.grad - exact_gradient(z.detach())).abs().max().item()
    assert far[0.2] < 0.02 < far[2.0]


def test_straight_through_choices_have_the_soft_gradient() -> None:
    for router, soft in ((TopK(2), lambda z: z.softmax(-1)), (Top1(), None)):
        made = router.fresh(NAMES, WIDTH).double().train()
        z = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
        torch.manual_seed(1)
        (own,) = torch.autograd.grad((made.choose(z, z).weights * LOSSES).sum(), z)
        if soft is None:
            torch.manual_seed(1)
            g = -torch.empty_like(z).exponential_().log()
            expected = torch.autograd.grad((((z + g).softmax(-1)) * LOSSES).sum(), z)[0]
        else:
            expected = torch.autograd.grad((soft(z) * LOSSES).sum(), z)[0]
        torch.testing.assert_close(own, expected)


def test_balance_losses_are_shazeers() -> None:
    even = torch.full((6, 4), 0.25, dtype=torch.float64)
    assert losses.importance(even) == 0
    one_sided = torch.zeros(6, 4, dtype=torch.float64)
    one_sided[:, 0] = 1
    mean, var = 1.5, ((6 - 1.5) ** 2 + 3 * 1.5**2) / 4
    torch.testing.assert_close(losses.importance(one_sided).item(), var / mean**2)
    # P(x, i) by drawing the noise of module i again, many times
    torch.manual_seed(0)
    clean = torch.randn(4, dtype=torch.float64)
    spread = torch.rand(4, dtype=torch.float64) + 0.5
    noisy = clean + torch.randn(4, dtype=torch.float64) * spread
    chances = []
    for i in range(4):
        tries = noisy.repeat(200_000, 1)
        tries[:, i] = clean[i] + torch.randn(200_000, dtype=torch.float64) * spread[i]
        chances.append((tries.topk(2).indices == i).any(-1).double().mean())
    estimate = losses.squared_variation(torch.stack(chances))
    torch.testing.assert_close(
        losses.load(clean[None], noisy[None], spread[None], 2), estimate, atol=5e-3, rtol=0
    )
    assert losses.load(clean[None], noisy[None], spread[None], 4) == 0
    chosen = torch.eye(4, dtype=torch.float64).repeat(3, 1)
    torch.testing.assert_close(losses.switch(chosen, chosen).item(), 1.0)
    torch.testing.assert_close(losses.switch(one_sided, one_sided).item(), 4.0)


def test_balance_losses_prevent_the_collapse_that_happens_without_them() -> None:
    """Modules that are all alike, the first a little ahead: the rich get richer, or do not."""
    shares = {}
    for weight in (0.0, 1.0):
        torch.manual_seed(0)
        router = NoisyTopK(1, importance=weight, load=weight).fresh(NAMES, WIDTH).train()
        skill = torch.nn.Parameter(torch.tensor([0.3, 0.0, 0.0, 0.0]))
        optimiser = torch.optim.Adam([*router.parameters(), skill], lr=0.05)
        for _ in range(300):
            query = torch.randn(64, WIDTH)
            noisy = router(query)
            gate = noisy.probabilities * (noisy.weights > 0)  # what was chosen learns to be good
            loss = (gate * (1 - skill)).sum(-1).mean() - gate.sum(-1).mean() + noisy.balance
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        router.eval()
        shares[weight] = router(torch.randn(2000, WIDTH)).weights.mean(0)
    assert shares[0.0].max() > 0.9
    assert shares[1.0].min() > 0.1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Soft(level="word"), "one of task, example, token"),
        (lambda: Soft(tasks=("a",)), "level='task'"),
        (lambda: Soft(level="task", tasks=("a", "a")), "named twice"),
        (lambda: Soft(temperature=0.0), "finite and above 0"),
        (lambda: Top1(estimator="gumble"), "gumbel, reinforce, epsilon"),
        (lambda: Top1(epsilon=0.0), r"in \(0, 1\]"),
        (lambda: TopK(0), "at least 1"),
        (lambda: TopK(5).fresh(NAMES, 3), r"k=5\) over 4 modules \(a, b, c, d\)"),
        (lambda: NoisyTopK(5).fresh(NAMES, 3), "at most 4"),
        (lambda: NoisyTopK(load=-1.0), "at least 0"),
        (lambda: Threshold(1.0), r"in \[0, 1\)"),
        (lambda: SkillMatrix(level="token"), "routes tasks"),
        (lambda: Fixed(level="token"), "given set"),
        (lambda: resolve("Topp", Router), "known: Arrow, Fixed, NoisyTopK, Phatgoose"),
    ],
)
def test_options_that_mean_nothing(make, message: str) -> None:
    with pytest.raises(ModgraftError, match=message):
        make()
