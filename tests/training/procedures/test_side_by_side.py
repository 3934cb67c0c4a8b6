"""Modules trained side by side in one pass equal each trained alone."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import (
    BertForQuestionAnswering,
    MixtralConfig,
    MixtralForCausalLM,
    NllbMoeConfig,
    NllbMoeForConditionalGeneration,
)

import modgraft as mg
from contract.hosts import HOSTS

QUIET: dict[str, Any] = {"progress": False}
KINDS: dict[str, dict[str, tuple[Any, Any]]] = {
    "bert": {
        "fr": (mg.LoRA(rank=2), ["query", "value"]),
        "de": (mg.LoRA(rank=2), ["query", "value"]),  # of one shape: stacked
        "it": (mg.Adapter(width=3), "feedforward"),
        "scale": (mg.Rescale(), "down"),
    },
    "t5": {
        "fr": (mg.LoRA(rank=3), ["query", "value"]),
        "de": (mg.Prefix(length=2), None),
        "it": (mg.Adapter(width=3), "feedforward"),
    },
    "gpt2": {
        "fr": (mg.LoRA(rank=2), ["query", "value"]),
        "de": (mg.SoftPrompt(length=3), None),  # the host's own loss counts the first word here
        "it": (mg.SoftPrompt(length=2), None),
        "more": (mg.LoRA(rank=4, dora=True), "query"),
    },
}


def made(kind: str, dtype: torch.dtype = torch.float64) -> mg.Host:
    host = mg.Host(HOSTS[kind].model().to(dtype)).eval()
    torch.manual_seed(5)
    for name, (module, at) in KINDS[kind].items():
        host.implant(name, module, at, active=False)
    return host


def rows(name: str, kind: str, count: int = 14) -> list[dict[str, Tensor]]:
    """Make padded texts, of a length that depends on ``name``, in batches of unequal size."""
    g = torch.Generator().manual_seed(len(name) + ord(name[0]))
    length = 5 + ord(name[0]) % 4
    found = []
    for i in range(count):
        ids = torch.randint(3, 41, (length,), generator=g)
        labels = ids if kind != "t5" else torch.randint(3, 41, (length - 2,), generator=g)
        labels = torch.where(torch.rand(labels.shape, generator=g) < 0.3, -100, labels)
        labels[1] = 7
        row = {"input_ids": ids, "labels": labels}
        if name != "it":  # whose batches say nothing of padding: all of it is seen
            seen = torch.ones_like(ids)
            seen[length - i % 3 :] = 0
            row["attention_mask"] = seen
        found.append(row)
    return found


def loader(name: str, kind: str, **more: Any) -> DataLoader:
    return DataLoader(rows(name, kind, **more), batch_size=2 + len(name) % 3, shuffle=True)  # type: ignore[arg-type]


def loaders(kind: str) -> dict[str, Any]:
    return {name: loader(name, kind) for name in KINDS[kind]}


def tensors(host: mg.Host, name: str) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in host[name].tensors().items()}


def close(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float) -> None:
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=tolerance, atol=tolerance)


def batches(name: str, kind: str, count: int = 14) -> list[dict[str, Tensor]]:
    return list(DataLoader(rows(name, kind, count), batch_size=3))  # type: ignore[arg-type]


def alone(kind: str, name: str, dtype: torch.dtype, **given: Any) -> tuple[mg.Host, Any]:
    host = made(kind, dtype)
    with host.using(name):
        history = host.fit(loader(name, kind), train=name, **given, **QUIET)
    return host, history


@pytest.mark.parametrize("kind", KINDS)
def test_each_is_what_it_becomes_alone_in_float64(kind: str) -> None:
    """Each has its learning rate and is clipped differently; with warm-up and decay."""
    near = 1e-6 if kind == "gpt2" else 1e-8  # whose loss transformers takes in float32
    lrs = {name: 1e-2 * (i + 1) for i, name in enumerate(KINDS[kind])}
    given = {"steps": 6, "clip": 0.5, "warmup": 2, "schedule": "cosine"}
    host = made(kind)
    before = {k: v.clone() for k, v in host.model.state_dict().items()}
    found = mg.fit_side_by_side(host, loaders(kind), lr=lrs, **given, **QUIET)
    for name in KINDS[kind]:
        own, history = alone(kind, name, torch.float64, lr=lrs[name], **given)
        close(tensors(host, name), tensors(own, name), near)
        assert found[name].losses == pytest.approx(history.losses, rel=near)
        assert (found[name].steps, found[name].stopped) == (history.steps, "steps")
        start = made(kind)
        moved = zip(tensors(host, name).values(), tensors(start, name).values(), strict=True)
        assert any(not torch.equal(a, b) for a, b in moved)
    assert all(torch.equal(v, before[k]) for k, v in host.model.state_dict().items())
    assert not any(p.grad is not None for p in host.parameters())


def test_each_is_what_it_becomes_alone_in_float32() -> None:
    host = made("bert", torch.float32)
    mg.fit_side_by_side(host, loaders("bert"), steps=5, lr=1e-3, **QUIET)
    for name in KINDS["bert"]:
        own, _ = alone("bert", name, torch.float32, steps=5, lr=1e-3)
        close(tensors(host, name), tensors(own, name), 1e-5)


def test_each_reads_its_data_in_the_order_of_its_seed() -> None:
    host, seeds = made("bert"), {name: i for i, name in enumerate(KINDS["bert"])}
    found = mg.fit_side_by_side(host, loaders("bert"), seed=seeds, steps=5, **QUIET)
    for name, seed in seeds.items():
        own, history = alone("bert", name, torch.float64, seed=seed, steps=5)
        close(tensors(host, name), tensors(own, name), 1e-8)
        assert found[name].losses == pytest.approx(history.losses, rel=1e-8)


def test_a_pass_ends_where_it_is_to_and_goes_on(tmp_path: Path) -> None:
    given = {"steps": 6, "schedule": "cosine", "save_every": 4, **QUIET}
    whole, parts = made("bert"), made("bert")
    mg.fit_side_by_side(whole, loaders("bert"), **given)
    for until in (2, 4, 6):
        found = mg.fit_side_by_side(
            parts, loaders("bert"), until=until, folder=tmp_path, note=False, **given
        )
        assert {h.steps[-1] for h in found.values()} == {until}
    for name in KINDS["bert"]:
        close(tensors(parts, name), tensors(whole, name), 0.0)


def test_epochs_evaluations_and_early_stopping_of_each() -> None:
    """Each stops at its own step, with its best weights."""
    kind, names = "bert", ("fr", "de", "it")
    held = {name: batches(name, kind, 4) for name in names}
    for batch in held["de"]:  # what it learns makes this worse
        batch["labels"] = torch.where(batch["labels"] < 0, -100, (batch["labels"] + 1) % 41)
    given: dict[str, Any] = {"epochs": 4, "evaluate_every": 2, "patience": 1}
    lrs = {"fr": 1e-2, "de": 3e-1, "it": 1e-3}
    host = made(kind)
    own_loaders = {name: loader(name, kind) for name in names}
    found = mg.fit_side_by_side(host, own_loaders, lr=lrs, evaluate=held, **given, **QUIET)
    ends = {}
    for name in names:
        own, history = alone(kind, name, torch.float64, lr=lrs[name], evaluate=held[name], **given)
        ends[name] = (history.stopped, history.steps[-1])
        assert (found[name].stopped, found[name].steps[-1]) == ends[name]
        mine = [e["loss"] for e in found[name].evaluations]
        assert mine == pytest.approx([e["loss"] for e in history.evaluations], rel=1e-8)
        close(tensors(host, name), tensors(own, name), 1e-8)
    assert len(set(ends.values())) > 1


def test_on_top_of_a_frozen_module() -> None:
    kind = "bert"

    def data(name: str) -> list[dict[str, Any]]:
        return [{**batch, "modules": f"it >> {name}"} for batch in batches(name, kind)]

    host, own = made(kind), made(kind)
    mg.fit_side_by_side(host, {n: data(n) for n in ("fr", "de")}, steps=3, lr=1e-2, **QUIET)
    for name in ("fr", "de"):
        own.fit(data(name), train=name, steps=3, lr=1e-2, **QUIET)
        close(tensors(host, name), tensors(own, name), 1e-8)
    close(tensors(host, "it"), tensors(made(kind), "it"), 0.0)


def test_a_module_that_diverges_stops_nobody_else(tmp_path: Any) -> None:
    kind = "bert"
    host = made(kind)
    calls = {"n": 0}

    def spoil(module: Any, args: Any, out: Tensor) -> Tensor:
        learns = torch.is_grad_enabled()  # a forward a step, beside those that compare losses
        calls["n"] += learns
        if learns and calls["n"] == 3:
            out = out.clone()
            out[:de_rows] = torch.nan
        return out

    de_rows = 4
    data = {n: loader(n, kind) for n in ("de", "fr", "scale")}
    hook = host.model.bert.embeddings.register_forward_hook(spoil)  # type: ignore[union-attr]
    given: dict[str, Any] = {"steps": 6, "lr": 1e-2, "folder": tmp_path, "save_every": 2, **QUIET}
    with pytest.warns(UserWarning, match="de: step 3: the loss is .nan.*the others go on"):
        found = mg.fit_side_by_side(host, data, **given)
    hook.remove()
    assert found["de"].stopped == "diverged"
    assert "de: step 3" in (found["de"].error or "")
    assert found["de"].steps == [1, 2]
    for name in ("fr", "scale"):
        own, history = alone(kind, name, torch.float64, steps=6, lr=1e-2)
        close(tensors(host, name), tensors(own, name), 1e-8)
        assert found[name].losses == pytest.approx(history.losses, rel=1e-8)
    assert all(t.isfinite().all() for t in tensors(host, "de").values())
    again = mg.fit_side_by_side(made(kind), data, **given)  # the record, of all three
    assert [h.stopped for h in again.values()] == ["diverged", "steps", "steps"]
    assert again["de"].error == found["de"].error


class StopError(Exception):
    pass


class Breaking(list):
    """Fails when a batch is read for the ``left``-th time."""

    left = 1 << 30

    def __iter__(self) -> Any:
        for batch in super().__iter__():
            self.left -= 1
            if self.left < 0:
                raise StopError
            yield batch


def dropping(kind: str) -> mg.Host:
    """Make a host with dropout, whose random numbers have to be the same after a resume."""
    host = made(kind, torch.float32)
    for part in host.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.2
    return host


@pytest.mark.parametrize("lost", [None, "fr", "de"])
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Any, lost: str | None) -> None:
    """It also resumes when it was killed between saving one module and the next."""
    kind, names = "bert", ("fr", "de")
    data = {n: batches(n, kind) for n in names}
    held = {n: data[n][:1] for n in names}
    given: dict[str, Any] = {
        "steps": 10, "lr": 1e-2, "save_every": 2, "evaluate": held, "evaluate_every": 3, **QUIET
    }  # fmt: skip
    whole = dropping(kind)
    wanted = mg.fit_side_by_side(whole, data, folder=tmp_path / "whole", **given)
    broken = {n: Breaking(data[n]) for n in names}
    broken["de"].left = 7
    with pytest.raises(StopError):
        mg.fit_side_by_side(dropping(kind), broken, folder=tmp_path / "parts", **given)
    saved = {n: sorted((tmp_path / "parts" / n / "checkpoints").glob("step-*")) for n in names}
    assert saved["fr"][-1].name == saved["de"][-1].name == "step-000006"
    if lost is not None:  # killed before this one was saved
        for file in saved[lost][-1].iterdir():
            file.unlink()
        saved[lost][-1].rmdir()
    parts = dropping(kind)
    found = mg.fit_side_by_side(parts, data, folder=tmp_path / "parts", **given)
    for name in names:
        assert found[name].resumed_from == (6 if lost is None else 4)
        assert found[name].losses == wanted[name].losses
        close(tensors(parts, name), tensors(whole, name), 0.0)
        lines = [
            list(map(json.loads, (tmp_path / f / name / "metrics.jsonl").read_text().splitlines()))
            for f in ("whole", "parts")
        ]
        for a, b in zip(*lines, strict=True):
            assert {**a, "seconds": 0} == {**b, "seconds": 0}
    with pytest.raises(mg.ModgraftError, match=r"other settings.*beside"):
        mg.fit_side_by_side(parts, {"fr": data["fr"]}, folder=tmp_path / "parts",
                            **{**given, "evaluate": held["fr"]})  # fmt: skip


def test_side_inputs_travel() -> None:
    host = mg.Host(HOSTS["t5"].model().double())
    for name in ("a", "b"):
        host.implant(name, mg.GatedFusion(source="image", dim=3), "encoder.output", active=False)
    data = {
        name: [{
            "input_ids": torch.full((2, 4 + i), 5), "labels": torch.full((2, 3), 7),
            "side": {"image": mg.Side(torch.randn(2, 2 + i, 3, dtype=torch.float64))},
        }]
        for i, name in enumerate(("a", "b"))
    }  # fmt: skip
    twin = mg.Host(HOSTS["t5"].model().double())
    for name in ("a", "b"):
        twin.implant(name, mg.GatedFusion(source="image", dim=3), "encoder.output", active=False)
        twin[name].load_state_dict(host[name].state_dict())
    mg.fit_side_by_side(host, data, steps=3, lr=1e-2, **QUIET)
    for name in ("a", "b"):
        with twin.using(name):
            twin.fit(data[name], train=name, steps=3, lr=1e-2, **QUIET)
        close(tensors(host, name), tensors(twin, name), 1e-8)


class Odd(nn.Module):
    """A host whose loss comes from no loss function of PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Any:
        return SimpleNamespace(loss=self.read(x).square().mean())


def bad_inputs() -> dict[str, tuple[Any, dict[str, Any], str]]:
    ids = torch.full((2, 4), 5)
    good = [{"input_ids": ids, "labels": ids}]

    def both(other: Any, **more: Any) -> dict[str, Any]:
        return {"loaders": {"fr": good, "de": other}, **more}

    return {
        "nothing": ({"loaders": {}}, {}, "give a loader"),
        "unknown": ({"loaders": {"frr": good}}, {}, "did you mean 'fr'"),
        "setting": (both(good), {"rate": 1}, "rate= is no setting.*lr"),
        "of the pass": (both(good), {"until": {"fr": 1, "de": 2}}, "until= is one for the pass"),
        "one missing": (both(good), {"lr": {"fr": 1e-3}}, r"lr=.* has fr;.*fr, de"),
        "accumulate": (both(good), {"accumulate": 2}, "accumulate=2.*one batch"),
        "keep": (both(good), {"keep": 1}, "keep=1.*at least 2"),
        "other keys": (
            both([{**good[0], "token_type_ids": ids}]), {}, "only one of them has token_type_ids"
        ),
        "other shape": (
            both([{"input_ids": ids, "labels": ids[..., None]}]), {},
            r"'labels' is \[2, 4\], \[2, 4, 1\]",
        ),
        "composition": (
            both([{**good[0], "modules": "fr >> de"}]), {}, "a batch of 'de'.*'fr >> de'"
        ),
        "without it": (both([{**good[0], "modules": None}]), {}, "has to go through 'de'"),
        "a mixture": ({"loaders": {"mix": good}}, {}, "Mixture.*host.fit"),
        "no steps": (both(good), {"steps": None}, "give exactly one"),
        "early": (both(good), {"patience": 1}, "give evaluate="),
    }  # fmt: skip


@pytest.mark.parametrize("case", bad_inputs())
def test_what_means_nothing_is_refused(case: str) -> None:
    given, settings, message = bad_inputs()[case]
    host = made("bert", torch.float32)
    host.implant("mix", mg.Mixture(["fr", "de"]), active=False)
    before = {n: tensors(host, n) for n in ("fr", "de")}
    with pytest.raises(mg.ModgraftError, match=message):
        mg.fit_side_by_side(host, **given, **{"steps": 2, **settings}, **QUIET)
    for name, own in before.items():
        close(tensors(host, name), own, 0.0)


def test_a_loss_that_cannot_be_told_apart() -> None:
    host = mg.Host(Odd())
    for name in ("a", "b"):
        host.implant(name, mg.LoRA(rank=1), "read", active=False)
    data = {n: [{"x": torch.ones(2, 3)}] for n in ("a", "b")}
    with pytest.raises(mg.ModgraftError, match=r"loss \[\] where the batch has 2 parts \(a, b\)"):
        mg.fit_side_by_side(host, data, steps=1, **QUIET)


def answers(lengths: list[int]) -> list[dict[str, Tensor]]:
    """Make batches of texts with an answer in each."""
    g = torch.Generator().manual_seed(sum(lengths))
    return [
        {
            "input_ids": torch.randint(3, 41, (3, length), generator=g),
            "start_positions": torch.randint(0, length, (3,), generator=g),
            "end_positions": torch.randint(0, length, (3,), generator=g),
        }
        for length in lengths
    ]


def with_answers() -> mg.Host:
    torch.manual_seed(0)
    config = HOSTS["bert"].model().config
    host = mg.Host(BertForQuestionAnswering(config))
    for name in ("a", "b"):
        host.implant(name, mg.LoRA(rank=2), "query", active=False)
    return host


@pytest.mark.parametrize("lengths", [[6], [9, 6]], ids=["at once", "later"])
def test_a_loss_over_the_places_of_padded_texts_is_refused(lengths: list[int]) -> None:
    host = with_answers()
    data = {"a": answers(lengths), "b": answers([9] * len(lengths))}
    before = {name: tensors(host, name) for name in data}
    with pytest.raises(
        mg.ModgraftError, match=r"the loss of 'a' is 1\.\d+ alone and 2\.\d+ in one"
    ):
        mg.fit_side_by_side(host, data, steps=2, **QUIET)
    if len(lengths) == 1:  # before anything was trained
        for name, own in before.items():
            close(tensors(host, name), own, 0.0)


def test_a_loss_over_places_of_texts_of_one_length() -> None:
    host, twin = with_answers(), with_answers()
    data = {"a": answers([7, 7]), "b": answers([7, 7])[::-1]}
    for part in (*host.modules(), *twin.modules()):
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    found = mg.fit_side_by_side(host, data, steps=4, lr=1e-2, **QUIET)
    for name in data:
        twin[name].load_state_dict(with_answers()[name].state_dict())
        with twin.using(name):
            own = twin.fit(data[name], train=name, steps=4, lr=1e-2, **QUIET)
        assert found[name].losses == pytest.approx(own.losses, rel=1e-5)
        close(tensors(host, name), tensors(twin, name), 1e-5)


def test_a_balance_of_experts_over_all_examples_is_refused() -> None:
    small = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 41, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4}
    config = MixtralConfig(**small, **heads, output_router_logits=True)
    host = mg.Host(MixtralForCausalLM(config))
    for name in ("a", "b"):
        host.implant(name, mg.LoRA(rank=2), "query", active=False)
    texts = {"a": answers([5])[0]["input_ids"], "b": answers([6])[0]["input_ids"]}
    data = {name: [{"input_ids": ids, "labels": ids}] for name, ids in texts.items()}
    with pytest.raises(mg.ModgraftError, match=r"the aux_loss of 'a' .*output_router_logits=False"):
        mg.fit_side_by_side(host, data, steps=1, **QUIET)
    config.output_router_logits = False
    mg.fit_side_by_side(host, data, steps=1, **QUIET)


class Chance(nn.Module):
    """A host that reads a part of its input, left to chance also in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Any:
        shown = x * (torch.rand_like(x) < 0.5)
        return SimpleNamespace(loss=F.mse_loss(self.read(shown), x[:, :2]))


def test_a_loss_that_is_left_to_chance_is_not_compared() -> None:
    host = mg.Host(Chance())
    for name in ("a", "b"):
        host.implant(name, mg.LoRA(rank=1), "read", active=False)
    found = mg.fit_side_by_side(
        host, {n: [{"x": torch.ones(2, 3)}] for n in "ab"}, steps=2, **QUIET
    )
    assert [history.stopped for history in found.values()] == ["steps", "steps"]


class OfDict(nn.Module):
    """Puts out a plain dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def test_a_host_that_puts_out_a_dictionary() -> None:
    host = mg.Host(OfDict())
    batches = {n: [{"x": torch.randn(4, 6), "labels": torch.tensor([0, 1, 2, 0])}] for n in "ab"}
    for name in batches:
        host.implant(name, mg.LoRA(rank=2), at="head", active=False)
    host.use("a")
    host.fit(batches["a"], train="a", steps=2, **QUIET)
    assert len(mg.fit_side_by_side(host, batches, steps=2, **QUIET)["b"].losses) == 2


def test_the_pass_asks_where_the_examples_lie() -> None:
    """A host with a table for all examples can be asked within the pass as in any other call."""
    host = made("t5")
    for name in "xy":
        host.implant(name, mg.LoRA(rank=2), at="*.relative_attention_bias", active=False)
    ids = torch.randint(3, 41, (3, 5))
    batches = {name: [{"input_ids": ids, "labels": ids[:, :3].contiguous()}] for name in "xy"}
    assert len(mg.fit_side_by_side(host, batches, steps=2, **QUIET)["y"].losses) == 2


def test_one_row_of_positions_is_for_every_example() -> None:
    host = mg.Host(HOSTS["gpt2"].model().eval())
    for name in "xy":
        host.implant(name, mg.LoRA(rank=2), at="query", active=False)
    places = torch.arange(1, 7)[None]
    batches = {}
    for i, name in enumerate("xy"):
        ids = torch.randint(3, 41, (3 + i, 6))
        batches[name] = [{"input_ids": ids, "labels": ids, "position_ids": places}]
    before = {name: host(**batches[name][0], modules=name).loss.item() for name in "xy"}
    found = mg.fit_side_by_side(host, batches, steps=1, **QUIET)
    for name, history in found.items():
        assert history.losses[0] == pytest.approx(before[name], rel=1e-5)


def test_examples_that_meet_in_training_alone_are_refused() -> None:
    """An expert of NLLB-MoE takes so many tokens of the whole batch, and in evaluation all."""
    config = NllbMoeConfig(
        vocab_size=41, d_model=16, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=24,
        decoder_ffn_dim=24, encoder_attention_heads=2, decoder_attention_heads=2, num_experts=2,
        encoder_sparse_step=2, decoder_sparse_step=2, pad_token_id=0, expert_capacity=2,
        moe_token_dropout=0.0, router_jitter_noise=0.0, encoder_layerdrop=0.0,
        decoder_layerdrop=0.0, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    host = mg.Host(NllbMoeForConditionalGeneration(config))
    batches = {}
    for name in "xy":
        host.implant(name, mg.LoRA(rank=2), at="query", active=False)
        ids = torch.randint(3, 41, (4, 6))
        seen = torch.ones_like(ids)
        batches[name] = [{"input_ids": ids, "attention_mask": seen, "labels": ids[:, :4].clone()}]
    with torch.no_grad():
        for p in host.model.parameters():
            p.normal_(0, 0.3)
    with pytest.raises(mg.ModgraftError, match=r"alone and .* in one pass"):
        mg.fit_side_by_side(host, batches, steps=1, **QUIET)
