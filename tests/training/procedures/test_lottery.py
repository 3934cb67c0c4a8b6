"""Lottery tickets on a small T5 equal the papers' procedures, written out on the weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import modgraft as mg
from training.tiny import Pairs, collate, t5

PATHS = [f"{s}.block.0.layer.0.SelfAttention.{n}" for s in ("encoder", "decoder") for n in "qv"]
FIT: dict[str, Any] = {
    "steps": 6, "lr": 0.02, "schedule": "constant", "weight_decay": 0.0, "clip": None,
    "progress": False,
}  # fmt: skip


def loader() -> list[dict[str, Any]]:
    data = Pairs(6, noisy=False)
    return [collate([data[i] for i in range(6)])]


def implanted(method: mg.Computation) -> mg.Host:
    host = mg.Host(t5(dropout=0.0).double())
    host.implant("m", method, at="*.SelfAttention.{q,v}", expect=4)
    return host


def effective(host: mg.Host) -> list[Tensor]:
    plain = host.merge("m")
    return [plain.get_submodule(label).weight.detach() for label in host["m"].paths]


class Written:
    """The published procedure: the weights are trained where a mask is 1."""

    def __init__(self, host: mg.Host) -> None:
        self.model = copy.deepcopy(mg.Host(t5(dropout=0.0).double()).model)
        self.weights = [self.model.get_submodule(label).weight for label in host["m"].paths]
        self.begun = [w.detach().clone() for w in self.weights]

    def train(self, masks: list[Tensor], steps: int = 6) -> None:
        for w in self.weights:
            w.requires_grad_(True)
        optimiser = torch.optim.AdamW(self.weights, lr=0.02, weight_decay=0.0)
        batch = {k: v for k, v in loader()[0].items() if k != "ids"}
        for _ in range(steps):
            optimiser.zero_grad()
            self.model(**batch).loss.backward()
            for w, mask in zip(self.weights, masks, strict=True):
                w.grad *= mask
            optimiser.step()

    @torch.no_grad()
    def put(self, values: list[Tensor]) -> None:
        for w, value in zip(self.weights, values, strict=True):
            w.copy_(value)

    def same(self, host: mg.Host) -> None:
        for own, other in zip(effective(host), self.weights, strict=True):
            torch.testing.assert_close(own, other.detach(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("everywhere", [True, False])
@pytest.mark.parametrize("rewind", [0, 2])
def test_magnitude_pruning_is_the_published_procedure(rewind: int, everywhere: bool) -> None:
    host = implanted(mg.SparseSubnetwork())
    written = Written(host)
    masks = [torch.ones_like(w, dtype=torch.bool) for w in written.weights]
    if rewind:
        written.train(masks, rewind)
    begun = [w.detach().clone() for w in written.weights]
    rounds = mg.magnitude_pruning(
        host, "m", loader(), rounds=2, share=0.25, rewind=rewind, everywhere=everywhere, **FIT
    )
    total, losses = sum(m.numel() for m in masks), []
    for number, found in enumerate(rounds):
        if number:  # the smallest quarter of what is there goes, the rest goes back
            groups = [range(len(masks))] if everywhere else [[i] for i in range(len(masks))]
            for group in groups:
                left = torch.cat([written.weights[i].detach().abs()[masks[i]] for i in group])
                limit = left.sort().values[round(0.25 * len(left)) - 1]
                for i in group:
                    masks[i] = masks[i] & (written.weights[i].detach().abs() > limit)
            written.put([w * mask for w, mask in zip(begun, masks, strict=True)])
        written.train(masks)
        written.same(host)
        there = sum(int(m.sum()) for m in masks)
        assert (found.number, found.density) == (number, there / total)
        losses.append((found.history.losses[0], found.history.last))
    assert len(losses) == 3
    assert found.density == pytest.approx(0.75**2, abs=0.01)
    assert all(last < first for first, last in losses)  # each ticket learns
    for w, b in zip(written.begun, [m.weight for m in sites(host)], strict=True):
        assert torch.equal(w, b)  # the host's own weights never moved


def sites(host: mg.Host) -> list[nn.Module]:
    return [host.model.get_submodule(label) for label in host["m"].paths]


def test_sparse_finetuning_is_the_published_procedure(tmp_path: Path) -> None:
    host = implanted(mg.SparseDelta(density=0.03))
    written = Written(host)
    first, second = mg.sparse_finetuning(host, "m", loader(), first={"steps": 9}, **FIT)
    assert (len(first.losses), len(second.losses)) == (9, 6)
    written.train([torch.ones_like(w) for w in written.weights], 9)
    changes = [(w.detach() - b).abs() for w, b in zip(written.weights, written.begun, strict=True)]
    everything = torch.cat([c.flatten() for c in changes])
    k = round(0.03 * everything.numel())
    limit = everything.sort(descending=True).values[k - 1]
    written.put(written.begun)
    written.train([c >= limit for c in changes])
    written.same(host)
    assert second.losses[0] == pytest.approx(first.losses[0])  # it went back
    assert second.last < second.losses[0]
    assert host["m"].size == k
    assert sum(place.indices.numel() for place in host["m"].places) == k

    host.save("m", tmp_path / "m")
    fresh = mg.Host(t5(dropout=0.0).double()).eval()
    fresh.load(tmp_path / "m")
    batch = {k: v for k, v in loader()[0].items() if k != "ids"}
    host.eval()
    assert torch.equal(fresh(**batch).logits, host(**batch).logits)
    with pytest.raises(mg.ModgraftError, match=r"has its mask already; .*train='m'"):
        mg.sparse_finetuning(fresh, "m", loader(), **FIT)


def test_each_training_has_its_folder_and_a_second_call_goes_on(tmp_path: Path) -> None:
    runs = []
    for stop in (1, 9):  # interrupted after the first pruning, then started again
        host = implanted(mg.SparseSubnetwork())
        rounds = mg.magnitude_pruning(
            host, "m", loader(), rounds=2, rewind=1, folder=tmp_path, **FIT
        )
        runs.append([r for r, _ in zip(rounds, range(stop + 1), strict=False)])
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"rewind", "round-0", "round-1", "round-2"}
    assert [r.history.losses for r in runs[1][:2]] == [r.history.losses for r in runs[0][:2]]

    whole = implanted(mg.SparseSubnetwork())
    for _ in mg.magnitude_pruning(whole, "m", loader(), rounds=2, rewind=1, **FIT):
        pass
    for one, other in zip(effective(host), effective(whole), strict=True):
        assert torch.equal(one, other)


def test_both_phases_go_on_in_their_folders(tmp_path: Path) -> None:
    runs = []
    for _ in range(2):
        host = implanted(mg.SparseDelta(density=0.03))
        phases = mg.sparse_finetuning(host, "m", loader(), folder=tmp_path, **FIT)
        runs.append(([phase.losses for phase in phases], effective(host)))
    assert {path.name for path in tmp_path.iterdir()} == {"first", "second"}
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))


@pytest.mark.parametrize(
    "wrong", [{"rounds": 0}, {"rounds": 1, "share": 1.0}, {"rounds": 1, "rewind": -1}]
)
def test_pruning_refuses_what_means_nothing_before_it_trains(wrong: dict[str, Any]) -> None:
    host = implanted(mg.SparseSubnetwork())
    with pytest.raises(mg.ModgraftError, match="rounds is at least 1, share is in"):
        mg.magnitude_pruning(host, "m", loader(), **wrong, **FIT)


def test_another_method_is_refused() -> None:
    host = implanted(mg.LoRA(rank=2))
    with pytest.raises(mg.ModgraftError, match=r"is a LoRA; .*mg\.SparseSubnetwork\(\)"):
        mg.magnitude_pruning(host, "m", loader(), rounds=1, **FIT)
    with pytest.raises(mg.ModgraftError, match=r"is a LoRA; .*mg\.SparseDelta\(\)"):
        mg.sparse_finetuning(host, "m", loader(), **FIT)


def test_a_module_that_is_not_in_force_gets_no_mask_by_chance() -> None:
    for method in (mg.SparseSubnetwork(), mg.SparseDelta()):
        host = implanted(method)
        host.use(None)
        with pytest.raises(mg.ModgraftError, match="learns where it is in force"):
            run(method, host)
        for place in host["m"].places:
            tensors = place.state_dict()
            assert tensors["mask"].all() if "mask" in tensors else not len(tensors["indices"])


def run(method: mg.Computation, host: mg.Host) -> None:
    if isinstance(method, mg.SparseDelta):
        mg.sparse_finetuning(host, "m", loader(), **FIT)
    else:
        list(mg.magnitude_pruning(host, "m", loader(), rounds=1, **FIT))


def test_what_learns_beside_it_is_rewound_as_well() -> None:
    host = implanted(mg.SparseSubnetwork())
    head = host.model.lm_head.weight
    before, after = head.detach().clone(), []
    rounds = mg.magnitude_pruning(host, "m", loader(), rounds=1, also=["host.lm_head"], **FIT)
    for _ in rounds:
        after.append(head.detach().clone())
    assert not torch.equal(after[0], before)
    assert not torch.equal(after[1], after[0])
    alone = implanted(mg.SparseSubnetwork())  # the second training, by itself from the beginning
    for place, done in zip(alone["m"].places, host["m"].places, strict=True):
        place.prune(done.get_buffer("mask"))
    alone.fit(loader(), train=["m", "host.lm_head"], **FIT)
    torch.testing.assert_close(alone.model.lm_head.weight, head, rtol=1e-9, atol=1e-12)

    host = implanted(mg.SparseDelta(density=0.1))
    mg.sparse_finetuning(host, "m", loader(), also=["host.lm_head"], **FIT)
    assert not torch.equal(host.model.lm_head.weight, before)
