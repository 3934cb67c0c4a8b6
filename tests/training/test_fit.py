from __future__ import annotations

import json
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import modgraft.training.progress as progress
from modgraft.core.errors import ModgraftError
from modgraft.training.fit import fit
from modgraft.training.stream import label_tokens
from training.tiny import Line, loader, points, t5

QUIET = {"progress": False}


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_it_learns_and_records(tmp_path):
    host = t5(dropout=0.0)
    history = fit(
        host, loader(noisy=False), steps=60, lr=1e-2, warmup=0.1, folder=tmp_path, **QUIET
    )
    assert history.losses[-1] < 0.8 * history.losses[0]
    assert history.steps == list(range(1, 61))
    assert (history.last, history.stopped) == (history.losses[-1], "steps")
    found = lines(tmp_path)
    assert [x["loss"] for x in found] == history.losses
    assert found[0].keys() == {"step", "split", "loss", "lr", "grad_norm", "epoch", "seconds"}
    assert max(x["lr"] for x in found) == 1e-2
    assert [x["epoch"] for x in found[5:7]] == [0, 1]  # 22 examples, 4 a batch


def test_only_what_requires_grad_trains_and_the_caller_finds_things_as_they_were():
    host = t5()
    host.encoder.requires_grad_(False)
    host.eval()
    host.decoder.train()
    modes = [m.training for m in host.modules()]
    before = {n: p.detach().clone() for n, p in host.named_parameters()}
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    wanted = torch.rand(1), random.random(), np.random.rand()
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    fit(host, loader(), steps=3, **QUIET)
    assert (torch.rand(1), random.random(), np.random.rand()) == wanted
    assert [m.training for m in host.modules()] == modes
    for name, p in host.named_parameters():
        assert torch.equal(p, before[name]) != p.requires_grad, name
        assert p.grad is None


def test_the_same_call_gives_the_same_weights():
    hosts = [t5(), t5()]
    for host in hosts:
        torch.rand(random.randint(1, 9))
        fit(host, loader(), steps=8, **QUIET)
    for a, b in zip(*(h.parameters() for h in hosts), strict=True):
        assert torch.equal(a, b)


def test_accumulating_equals_one_large_batch_in_float64():
    small = points(5, count=4)  # 5, 4, 3 and 2 targets: the mean of means is another number
    large = [{k: torch.cat([b[k] for b in small]) for k in ("x", "y")}]
    weigh = lambda b: float((~b["y"].isnan()).sum())  # noqa: E731
    hosts, histories = [Line(), Line(), Line()], []
    for host, data, n, w in zip(
        hosts, (large, small, small), (1, 4, 4), (None, weigh, None), strict=True
    ):
        histories.append(fit(host, data, steps=6, lr=0.1, accumulate=n, weigh=w, **QUIET))
    assert histories[1].losses == pytest.approx(histories[0].losses, rel=1e-12)
    torch.testing.assert_close(hosts[1].linear.weight, hosts[0].linear.weight, rtol=1e-12, atol=0)
    assert histories[2].losses[0] != pytest.approx(histories[0].losses[0], rel=1e-3)


def test_accumulating_t5_by_label_tokens_equals_one_large_batch():
    hosts = [t5(dropout=0.0).double() for _ in range(2)]
    for host, batch, n in zip(hosts, (8, 2), (1, 4), strict=True):
        data = loader(n=8, batch=batch, noisy=False, shuffle=False)
        fit(host, data, steps=3, accumulate=n, weigh=label_tokens, **QUIET)
    for a, b in zip(*(h.parameters() for h in hosts), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_an_epoch_ends_with_a_short_step():
    history = fit(Line(), points(5, count=7), epochs=2, accumulate=3, **QUIET)
    assert len(history.steps) == 2 * 3


@pytest.mark.parametrize("clip", [1e-3, None])
def test_clipping(tmp_path, clip):
    host = Line()
    start = host.linear.weight.detach().clone()
    # with eps far above the gradient AdamW is plain descent: θ moves by lr·g/eps
    fit(
        host, points(5), steps=1, lr=1.0, eps=1e6, weight_decay=0, clip=clip, folder=tmp_path,
        schedule="constant", **QUIET,
    )  # fmt: skip
    norm = lines(tmp_path)[0]["grad_norm"]
    moved = (host.linear.weight - start).norm().item() * 1e6
    assert norm > 1
    assert moved < 1.01e-3 if clip else moved > 0.5


def test_bf16_runs_and_keeps_float32_weights():
    seen = []
    host = t5()
    host.lm_head.register_forward_hook(lambda m, a, out: seen.append(out.dtype))
    history = fit(host, loader(), steps=3, precision="bf16", **QUIET)
    assert seen == [torch.bfloat16] * 3
    assert all(math.isfinite(x) for x in history.losses)
    assert {p.dtype for p in host.parameters()} == {torch.float32}
    plain = fit(t5(), loader(), steps=3, **QUIET)
    assert history.losses == pytest.approx(plain.losses, rel=2e-2)
    assert history.losses != plain.losses


def test_evaluation_by_loader_and_by_function():
    host = t5()
    batches = list(loader(noisy=False, shuffle=False))
    history = fit(host, loader(), steps=7, evaluate=batches, evaluate_every=3, **QUIET)
    assert [e["step"] for e in history.evaluations] == [3, 6, 7]
    host.eval()
    with torch.no_grad():  # the mean over examples; 22 of them, 2 in the last batch
        expected = [host(input_ids=b["input_ids"], labels=b["labels"]).loss.item() for b in batches]
    mean = sum(w * x for w, x in zip([4] * 5 + [2], expected, strict=True)) / 22
    assert history.evaluations[-1]["loss"] == pytest.approx(mean, rel=1e-6)

    def accuracy(host):
        assert not host.training
        assert not torch.is_grad_enabled()
        torch.rand(17)  # what evaluation draws does not disturb training
        return {"accuracy": 50, "rouge": math.nan}

    other = fit(
        t5(), loader(), steps=7, evaluate=accuracy, evaluate_every=3, monitor="accuracy", **QUIET
    )
    assert other.losses == history.losses
    assert other.best == other.evaluations[0]
    assert other.best["accuracy"] == 50.0
    assert other.best["rouge"] is None


@pytest.mark.parametrize("kept", [True, False])
def test_early_stopping_ends_with_the_best_weights(tmp_path, kept):
    folder = tmp_path if kept else None
    scores = iter([1.0, 3.0, 2.0, 2.5, 9.0])
    weights = []

    def score(host):
        weights.append([p.detach().clone() for p in host.parameters()])
        return {"accuracy": next(scores)}

    given = {"evaluate_every": 2, "patience": 2, "monitor": "accuracy", "folder": folder, **QUIET}
    host = t5()
    history = fit(host, loader(), steps=50, evaluate=score, **given)
    assert (history.stopped, history.steps[-1], history.best["step"]) == ("patience", 8, 4)
    assert all(torch.equal(a, b) for a, b in zip(host.parameters(), weights[1], strict=True))
    if kept:
        again = t5(4)
        assert fit(again, loader(), steps=50, evaluate=score, **given).losses == history.losses
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), weights[1], strict=True))


def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path):
    data = points(5)
    data[2]["x"][4, 0] = torch.inf
    host = Line()
    given = {"steps": 8, "folder": tmp_path, "save_every": 1, **QUIET}
    with pytest.raises(ModgraftError, match=r"step 3: the loss is \[(nan|inf)\].*ids 2\.0, 2\.1"):
        fit(host, data, **given)
    assert host.linear.weight.isfinite().all()
    assert len(lines(tmp_path)) == 2
    assert sorted(p.name for p in (tmp_path / "checkpoints").glob("step-*"))[-1] == "step-000002"


def test_a_gradient_that_is_not_finite_is_named():
    host = Line()
    host.linear.bias.register_hook(lambda g: g * torch.nan)
    with pytest.raises(ModgraftError, match=r"step 1: the gradient norm is nan \(linear\.bias\)"):
        fit(host, points(5), steps=2, **QUIET)
    assert host.linear.weight.isfinite().all()


def test_tensors_without_a_gradient_are_told(capsys):
    history = fit(Line(), points(5), steps=2)
    assert history.untouched == ["norm.weight", "norm.bias"]
    assert "2 tensors never had a gradient: norm.weight" in capsys.readouterr().err


class Silent(nn.Linear):
    def forward(self, **batch):
        return SimpleNamespace(loss=batch.get("loss"), logits=torch.ones(2))


@pytest.mark.parametrize(
    ("host", "given", "message"),
    [
        (Line(), {}, "give exactly one"),
        (Line(), {"steps": 1, "epochs": 1}, "give exactly one"),
        (Line(), {"steps": 0}, "steps=0"),
        (Line(), {"steps": 5, "schedule": "step"}, "schedule='step'.*cosine"),
        (Line(), {"steps": 5, "precision": "fp16"}, "precision='fp16'"),
        (Line(), {"steps": 5, "clip": 0.0}, "clip=0.0.*None"),
        (Line(), {"steps": 5, "accumulate": 0}, "accumulate=0"),
        (Line(), {"steps": 5, "warmup": 5}, "warmup=5"),
        (Line(), {"steps": 5, "patience": 2}, "evaluate="),
        (Line(), {"steps": 5, "world": 2}, "2 processes were asked for and 1 run"),
        (Line(), {"steps": 1, "evaluate": lambda h: 3}, "must be a dict"),
        (Line(), {"steps": 1, "evaluate": lambda h: {"f1": 3}}, r"'loss' is not among \['f1'\]"),
        (Line().requires_grad_(False), {"steps": 5}, "nothing to train"),
        (Silent(1, 1), {"steps": 5}, r"Silent.forward\(x, y\) returned no scalar .loss"),
    ],
)
def test_what_means_nothing_is_refused(host, given, message):
    with pytest.raises(ModgraftError, match=message):
        fit(host, points(5), **given, **QUIET)


def test_a_loss_that_reaches_no_parameter():
    with pytest.raises(ModgraftError, match=r"depends on none .* weight, bias"):
        fit(Silent(1, 1), [{"loss": torch.ones(())}], steps=1, **QUIET)


def test_progress_in_a_pipe(capsys, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    fit(Line(), points(5), steps=3, evaluate=points(5), label="stage 1")
    shown = capsys.readouterr()
    assert shown.out == ""
    first, *rest = shown.err.splitlines()
    assert first.startswith("stage 1: step 1/3  loss ")
    assert "steps/s" in first
    assert "left" in first
    assert any(line.startswith("stage 1: step 3  evaluation  loss ") for line in rest)


def test_progress_on_a_terminal(monkeypatch):
    from io import StringIO

    from rich.console import Console

    screen = StringIO()
    terminal = Console(file=screen, force_terminal=True, width=100)
    monkeypatch.setattr(progress, "Console", lambda **_: terminal)
    fit(Line(), points(5), steps=3, label="stage 1")
    text = screen.getvalue()
    assert "3/3" in text
    assert "loss" in text
    assert "steps/s" in text


def test_clock():
    assert [progress.clock(s) for s in (5, 65, 3700)] == ["0:05", "1:05", "1:01:40"]
