"""`fit` on the library's own host: side inputs travel, and only the module trains."""

from __future__ import annotations

import pytest
import torch

import modgraft as mg
from modgraft.training.fit import fit
from training.tiny import loader, t5


def fused() -> mg.Host:
    torch.manual_seed(4)
    host = mg.Host(t5())
    host.implant("fusion", mg.GatedFusion(source="image", dim=5), at="encoder.output")
    host.implant("qa", mg.LoRA(rank=2), at=["query", "value"])
    return host


def batches(n: int = 6) -> list[dict]:
    found = []
    for batch in list(loader(shuffle=False, noisy=False))[:n]:
        rows = len(batch["ids"])
        image = torch.randn(rows, 3, 5, generator=torch.Generator().manual_seed(rows))
        found.append(batch | {"side": {"image": mg.Side(image)}})
    return found


@pytest.mark.parametrize("train", [["fusion"], ["fusion", "qa"]])
def test_implanted_modules_train_and_resume(tmp_path, train):
    def run(host, data):
        return host.fit(
            data, train=train, steps=10, lr=1e-2, folder=tmp_path, save_every=2, progress=False
        )

    whole, parts = fused(), fused()
    data = batches()
    reference = {k: v.clone() for k, v in whole.model.state_dict().items()}
    history = whole.fit(data, train=train, steps=10, lr=1e-2, progress=False)
    broken = [*data[:5], {"input_ids": None, "labels": None, "side": data[0]["side"]}]
    with pytest.raises((ValueError, AttributeError, TypeError)):
        run(parts, broken)
    assert run(fused(), data).losses == history.losses
    assert history.untouched == []
    assert all(torch.equal(v, reference[k]) for k, v in whole.model.state_dict().items())
    for name in ("fusion", "qa"):
        moved = [not torch.equal(a, b) for a, b in _pairs(whole, fused(), name)]
        assert any(moved) == (name in train)


def _pairs(a: mg.Host, b: mg.Host, name: str):
    return zip(a[name].parameters(), b[name].parameters(), strict=True)


def test_fit_and_host_fit_are_one():
    a, b = fused(), fused()
    a.fit(batches(), train="qa", steps=4, progress=False)
    learns = {id(p) for p in b["qa"].parameters()}
    for p in b.parameters():
        p.requires_grad_(id(p) in learns)
    fit(b, batches(), steps=4, progress=False)
    assert all(torch.equal(x, y) for x, y in _pairs(a, b, "qa"))


def test_a_part_of_the_host_learns_beside_a_module():
    host = fused()
    before = {k: v.clone() for k, v in host.state_dict().items()}
    host.fit(
        batches(), train=["qa", "host.decoder.final_layer_norm"], steps=2, lr=1e-2, progress=False
    )
    moved = {k for k, v in host.state_dict().items() if not torch.equal(v, before[k])}
    learns = {id(p) for p in (*host["qa"].parameters(), host.model.decoder.final_layer_norm.weight)}
    assert moved == {k for k, p in host.named_parameters() if id(p) in learns}
    assert not any(p.requires_grad for p in host.model.parameters())
    with pytest.raises(mg.ModgraftError, match=r"there are .*'host\.lm_head'"):
        host.fit(batches(), train="host.lm_haed", steps=2)
    with pytest.raises(mg.ModgraftError, match=r"Dropout has no parameters.* out of train=\.$"):
        host.fit(batches(), train="host.encoder.dropout", steps=2)


def test_a_run_in_which_nothing_can_learn_says_so():
    host = fused()
    host.use("qa - qa")
    with pytest.warns(UserWarning, match="nothing has learned in 3 steps.*qa"):
        host.fit(batches(), train="qa", steps=3, progress=False)


def test_a_head_that_trains_on_without_its_module_is_told():
    torch.manual_seed(0)
    host = mg.Host(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)))
    for name in "ab":
        host.implant(name, mg.LoRA(rank=1), at="0", active=False)
    host.model.forward = lambda x: {"loss": host.model[1](host.model[0](x)).square().mean()}
    data = [{"x": torch.ones(2, 3)}]
    for name in "aa":
        host.fit(data, train=[name, "host.1"], modules=name, steps=1, progress=False)
    with pytest.warns(UserWarning, match=r"1.bias, 1.weight trained with 'a' and trains on"):
        host.fit(data, train=["b", "host.1"], modules="b", steps=1, progress=False)
    host.fit(data, train=["a", "b", "host.1"], modules="a + b", steps=1, progress=False)


def test_a_mixture_of_what_is_not_there_names_itself():
    host = fused()
    with pytest.raises(mg.ModgraftError, match=r"Mixture\(\['qa', 'nope'\]\): no module 'nope'"):
        host.implant("mix", mg.Mixture(["qa", "nope"]))
