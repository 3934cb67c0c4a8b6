"""Lion, Muon with AdamW beside it, and their places in a fit."""

from __future__ import annotations

import copy

import pytest
import torch

import modgraft as mg
from modgraft.core.errors import ModgraftError
from modgraft.models.gpt import GPT, GPTConfig
from modgraft.training.fit import fit
from modgraft.training.optim import trainable
from modgraft.training.optimizers import (
    OPTIMIZERS,
    Lion,
    Muon,
    Several,
    described,
    make_optimizer,
    matrices_of,
)
from training.test_checkpoint import GIVEN, StopError, curve, same, stop_after
from training.tiny import loader, t5

GIVEN_TO_ALL = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "fused": True}


def gpt(**more) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, **more))


def gradients(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def test_lion_is_the_published_update():
    model, lr, (b1, b2), decay = gpt().double(), 1e-2, (0.9, 0.99), 0.1
    want = {n: p.detach().clone() for n, p in model.named_parameters()}
    means = {n: torch.zeros_like(p) for n, p in want.items()}
    optimizer = Lion(model.parameters(), lr, (b1, b2), decay)
    for step in range(4):
        gradients(model, step)
        for name, p in model.named_parameters():
            move = (b1 * means[name] + (1 - b1) * p.grad).sign()
            want[name] -= lr * (move + decay * want[name])
            means[name] = b2 * means[name] + (1 - b2) * p.grad
        optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), want[name])


def test_muon_moves_matrices_and_adamw_the_rest_as_torch_does():
    model, alone = gpt(), gpt()
    matrices = matrices_of(model, trainable(model))
    rest = [n for n in trainable(model) if n not in matrices]
    assert sorted(n.rpartition("attention.")[2] for n in matrices) == sorted(
        [f"{n}.weight" for n in ("query", "key", "value", "output")]
        + [f"blocks.0.feedforward.{n}.weight" for n in ("up", "down")]
    )
    assert "embedding.weight" in rest  # the head is tied to it
    ours = make_optimizer("muon", model, **GIVEN_TO_ALL)
    theirs = dict(alone.named_parameters())
    parts = [
        torch.optim.Muon([theirs[n] for n in matrices], 0.01, 0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([theirs[n] for n in rest], 0.01, (0.9, 0.99), weight_decay=0.0),
    ]
    for step in range(3):
        gradients(model, step)
        gradients(alone, step)
        ours.step()
        for part in parts:
            part.step()
    for name, p in model.named_parameters():  # theirs rounds to bfloat16 on its way
        near = {"atol": 4e-4, "rtol": 0.0} if name in matrices else {"atol": 1e-7, "rtol": 1e-5}
        torch.testing.assert_close(p, theirs[name], **near)


@pytest.mark.parametrize("shape", [(6, 6), (5, 9), (9, 5)])
def test_muon_is_the_published_update(shape):
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(shape))
    x, mean = p.detach().double(), torch.zeros(shape, dtype=torch.float64)
    optimizer = Muon([p], lr := 0.1, decay := 0.3, momentum := 0.9)
    for step in range(3):
        g = torch.sin(p.detach() * (step + 1))
        p.grad = g.clone()
        optimizer.step()
        mean = momentum * mean + (1 - momentum) * g
        u, s, v = torch.linalg.svd(momentum * mean + (1 - momentum) * g, full_matrices=False)
        s = s / s.norm()
        for _ in range(5):  # what each iteration does to a singular value
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        x = x - lr * (0.2 * max(shape) ** 0.5 * (u * s) @ v + decay * x)
        torch.testing.assert_close(p.detach().double(), x, atol=1e-5, rtol=1e-5)


def test_muon_updates_matrices_of_one_shape_as_each_alone():
    torch.manual_seed(0)
    together = [torch.nn.Parameter(torch.randn(4, 7)) for _ in range(2)]
    alone = [torch.nn.Parameter(p.detach().clone()) for p in together]
    one, two = Muon(together), [Muon([p]) for p in alone]
    for p, q in zip(together, alone, strict=True):
        p.grad = q.grad = torch.cos(p.detach())
    for optimizer in (one, *two):
        optimizer.step()
    torch.testing.assert_close(together, alone)


def test_an_untied_head_and_a_classifier_are_no_matrices_of_muons():
    untied = GPT(GPTConfig(hidden_size=16, tie_word_embeddings=False))
    assert "head.weight" not in matrices_of(untied, trainable(untied))
    host = mg.Host(gpt())
    host.implant("l", mg.LoRA(rank=2), at="query")
    assert len(matrices_of(host, trainable(host))) == 2  # A and B, and nothing else trains
    assert len(trainable(host)) == 2


@pytest.mark.parametrize("name", ["lion", "muon"])
def test_state_is_saved_and_loaded(name):
    model, again = gpt(), gpt()
    optimizer = make_optimizer(name, model, **GIVEN_TO_ALL)
    for step in range(2):
        gradients(model, step)
        optimizer.step()
    again.load_state_dict(model.state_dict())
    loaded = make_optimizer(name, again, **GIVEN_TO_ALL)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for group in (*optimizer.param_groups, *loaded.param_groups):
        group["lr"] = 0.003  # as a schedule sets it, and it reaches every part
    for each, of in ((optimizer, model), (loaded, again)):
        gradients(of, 7)
        each.step()
    assert same(model, again)


@pytest.mark.parametrize("name", ["lion", "muon"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, name):
    given = GIVEN | {"optimizer": name}
    whole, parts = t5(), t5()
    fit(whole, loader(), folder=tmp_path / "whole", **given)
    with pytest.raises(StopError):
        fit(parts, stop_after(loader(), 8), folder=tmp_path / "parts", **given)
    resumed = fit(parts, loader(), folder=tmp_path / "parts", **given)
    assert resumed.resumed_from == 6
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    assert same(whole, parts)
    with pytest.raises(ModgraftError, match="optimizer"):
        fit(parts, loader(), folder=tmp_path / "parts", **(given | {"optimizer": "adamw"}))


def test_what_is_moved_by_what_is_printed(capsys):
    model = gpt()
    batch = {"input_ids": torch.randint(65, (2, 8)), "labels": torch.randint(65, (2, 8))}
    fit(model, [batch], steps=2, optimizer="muon")
    said = capsys.readouterr().err
    assert "Muon: 6 tensors, 3,072 numbers (blocks.0.attention.query.weight, " in said
    assert "AdamW: 14 tensors" in said
    names = {id(p): n for n, p in model.named_parameters()}
    assert "AdamW: 20 tensors" in described(make_optimizer("adamw", model, **GIVEN_TO_ALL), names)


def test_an_unknown_optimiser_is_refused():
    with pytest.raises(ModgraftError, match=r"optimizer='sgd': it must be one of .*'muon'"):
        fit(gpt(), [{}], steps=1, optimizer="sgd")


def test_each_learns():
    torch.manual_seed(0)
    ids = torch.randint(65, (8, 16))
    for name in OPTIMIZERS:
        history = fit(gpt(), [{"input_ids": ids, "labels": ids}], steps=60, lr=1e-2, optimizer=name,
                      progress=False)  # fmt: skip
        assert history.losses[-1] < 0.6 * history.losses[0], name


def test_several_parts_share_one_state():
    model = gpt()
    optimizer = make_optimizer("muon", model, **GIVEN_TO_ALL)
    assert isinstance(optimizer, Several)
    gradients(model, 0)
    optimizer.step()
    assert {id(p) for p in optimizer.state} == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_tables_with_sparse_gradients_are_trained_and_resumed(tmp_path, name):
    given = GIVEN | {"optimizer": name}
    ids = torch.randint(65, (40, 9), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row} for row in ids]

    def data():
        return torch.utils.data.DataLoader(Rows(rows), 4, shuffle=True)

    whole, parts = (gpt(ngram_rows=(4356, 900)) for _ in range(2))
    before = [table.weight.detach().clone() for table in whole.ngrams.tables]
    fit(whole, data(), folder=tmp_path / "whole", **given)
    for table, then in zip(whole.ngrams.tables, before, strict=True):
        moved = (table.weight != then).any(1)
        assert 0 < moved.sum() < len(then)
    with pytest.raises(StopError):
        fit(parts, stop_after(data(), 8), folder=tmp_path / "parts", **given)
    fit(parts, data(), folder=tmp_path / "parts", **given)
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    assert same(whole, parts)


class Rows(torch.utils.data.Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]
