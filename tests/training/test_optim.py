from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from modgraft.core.errors import ModgraftError
from modgraft.training.optim import (
    clip_gradients,
    gradient_norm,
    learning_rate,
    parameter_groups,
    trainable,
    undecayed,
    warmup_steps,
)
from modgraft.training.optimizers import make_optimizer
from training.tiny import Line, t5


def rates(**given) -> list[float]:
    return [learning_rate(s, lr=8.0, total=8, **given) for s in range(1, 9)]


def test_schedules_by_hand():
    assert rates(schedule="constant") == [8.0] * 8
    assert rates(schedule="linear") == [8, 7, 6, 5, 4, 3, 2, 1]
    assert rates(schedule="linear", warmup=4) == [2, 4, 6, 8, 8, 6, 4, 2]
    half = rates(schedule="cosine", warmup=4)
    assert half == pytest.approx([2, 4, 6, 8, 8, 4 + 4 * math.sqrt(0.5), 4, 4 - 4 * math.sqrt(0.5)])
    assert rates(schedule="constant", warmup=2) == [4, 8, 8, 8, 8, 8, 8, 8]


def test_warmup_is_steps_or_a_fraction():
    assert warmup_steps(7, 100) == 7
    assert warmup_steps(0.06, 100) == 6
    for bad, total in [(1.5, 100), (100, 100), (-1, 10), (-0.1, 10)]:
        with pytest.raises(ModgraftError, match="warmup"):
            warmup_steps(bad, total)
    with pytest.raises(ModgraftError, match="cosine"):
        learning_rate(1, lr=1.0, total=2, schedule="quadratic")


def test_only_matrices_decay_decided_by_object():
    host = t5()
    exempt = undecayed(host)
    for name, p in host.named_parameters():
        # shared.weight is also the output layer's matrix: one object, an embedding, undecayed
        table = name == "shared.weight" or "relative_attention_bias" in name
        assert (id(p) in exempt) == (p.ndim < 2 or table), name
    groups = parameter_groups(host, weight_decay=0.1)
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0]
    grouped = [id(p) for g in groups for p in g["params"]]
    assert sorted(grouped) == sorted(id(p) for p in host.parameters())


def test_frozen_parameters_are_in_no_group():
    host = Line()
    assert list(trainable(host)) == ["linear.weight", "linear.bias", "norm.weight", "norm.bias"]
    held = {id(p) for g in parameter_groups(host, weight_decay=0.1) for p in g["params"]}
    assert id(host.frozen) not in held


def test_nothing_to_train_is_an_error():
    host = Line().requires_grad_(False)
    with pytest.raises(ModgraftError, match=r"none of the 5 parameters of Line .*requires_grad_"):
        trainable(host)


@pytest.mark.parametrize("fused", [True, False])
def test_adamw_is_the_published_update(fused):
    host = nn.Linear(2, 2, dtype=torch.float64)
    lr, (b1, b2), eps, decay = 0.1, (0.8, 0.9), 1e-6, 0.3
    optimizer = make_optimizer(
        "adamw", host, lr=lr, betas=(b1, b2), eps=eps, weight_decay=decay, fused=fused
    )
    for p, rate in ((host.weight, decay), (host.bias, 0.0)):
        x = p.detach().clone()
        m, v = torch.zeros_like(x), torch.zeros_like(x)
        for t in (1, 2, 3):
            g = torch.sin(x * t)
            host.zero_grad()
            p.grad = torch.sin(p.detach() * t)
            optimizer.step()
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
            root = (v / (1 - b2**t)).sqrt() + eps
            x = x - lr * (m / (1 - b1**t) / root + rate * x)
        torch.testing.assert_close(p.detach(), x, rtol=1e-12, atol=1e-12)


def test_clipping_scales_the_whole_gradient():
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1)), Line().frozen]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    norm = gradient_norm(parameters)
    assert norm.item() == 5.0
    clip_gradients(parameters, norm, 10.0)
    assert parameters[0].grad.tolist() == [3.0, 0.0]
    clip_gradients(parameters, norm, 1.0)
    assert torch.cat([p.grad for p in parameters[:2]]).tolist() == pytest.approx([0.6, 0, 0.8])


def test_sparse_gradients_count_and_are_clipped_as_dense_ones():
    found = []
    for sparse in (True, False):
        torch.manual_seed(0)
        table, head = nn.Embedding(9, 3, sparse=sparse), nn.Linear(3, 1)
        parameters = [*table.parameters(), *head.parameters()]
        head(table(torch.tensor([1, 4, 4, 7]))).square().sum().backward()
        norm = gradient_norm(parameters)
        clip_gradients(parameters, norm, 0.1)
        found.append([norm, *(p.grad.to_dense() for p in parameters)])
    torch.testing.assert_close(found[0], found[1])
