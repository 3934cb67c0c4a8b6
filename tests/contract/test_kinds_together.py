"""Two and three kinds of modules at once on one host equal the reference, and train together."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import modgraft as mg
from common import counted
from contract.hosts import BATCH, FEATURES, HOSTS, HostCase, ids, side, tensor_of
from contract.modules import MODULES
from contract.written_out import linear_map_by_hand, prepend

NAMES = ("bert", "gpt2", "t5", "llama", "vit")
KINDS = (
    ("lora", "adapter", "prefix"),
    ("lora", "prefix"),
    ("adapter", "prefix_mlp"),
    ("prefix", "rescale", "parallel"),
)
pytestmark = pytest.mark.parametrize("case", [HOSTS[n] for n in NAMES], ids=NAMES)
together = pytest.mark.parametrize("kinds", KINDS, ids=[">>".join(k) for k in KINDS])


def implanted(case: HostCase, kinds: tuple[str, ...], stir: bool = True) -> mg.Host:
    """Make a host with one module of each kind, under the kind's name."""
    host = mg.Host(case.model()).eval()
    for kind in kinds:
        # beside the attention that a prefix acts in, where there is one
        at = "self_attention" if kind == "parallel" else MODULES[kind].at(case)
        host.implant(kind, MODULES[kind].make(), at=at)
    if stir:
        with torch.no_grad():
            for p in host.implants.parameters():
                p.normal_(0, 0.3)
    assert str(host.composition) == " >> ".join(kinds)
    return host


def batch_of(case: HostCase) -> dict[str, Any]:
    """Make a batch with labels."""
    labels = ids().new_tensor([1, 4, 2]) if case.name == "vit" else ids()
    return {"labels": labels, **case.batch()}


@together
def test_outputs_and_gradients_equal_the_written_out_composition(
    case: HostCase, kinds: tuple[str, ...]
) -> None:
    host = implanted(case, kinds).double()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch_of(case).items()}
    plain = copy.deepcopy(case.model()).double().requires_grad_(False)
    for sub in list(plain.modules()):  # so that a reference may put a computed weight in place
        for name in list(sub._parameters):
            value = sub._parameters.pop(name)
            setattr(sub, name, None if value is None else value.detach())
    written: dict[str, dict[str, Tensor]] = {}
    for kind in kinds:
        written[kind] = {
            key: t.detach().clone().requires_grad_() for key, t in host[kind].tensors().items()
        }
        MODULES[kind].reference({"m": host[kind]}, plain, written[kind])  # type: ignore[arg-type]
    out, expected = host(**batch), plain(**batch)
    torch.testing.assert_close(out.logits, expected.logits, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-9, atol=1e-11)
    out.loss.backward()
    expected.loss.backward()
    for kind in kinds:
        for path, place in zip(host[kind].paths, host[kind].places, strict=True):
            for name, own in place.named_parameters():
                theirs = written[kind][f"{path}:{name}"].grad
                torch.testing.assert_close(own.grad, theirs, rtol=1e-7, atol=1e-10)


@together
def test_trained_together(case: HostCase, kinds: tuple[str, ...], tmp_path: Path) -> None:
    host = implanted(case, kinds, stir=False)
    host.implant("idle", mg.LoRA(rank=2), at="key", active=False)
    before = {k: v.clone() for k, v in host.state_dict().items()}
    history = host.fit([batch_of(case)], train=list(kinds), steps=6, lr=0.01, progress=False)
    assert history.losses[-1] < history.losses[0]
    assert not history.untouched
    changed = {k for k, v in host.state_dict().items() if not torch.equal(v, before[k])}
    own = {f"implants.{kind}.{k}" for kind in kinds for k, _ in host[kind].named_parameters()}
    assert changed == own
    host.eval()
    with torch.no_grad():
        expected = tensor_of(host(**case.batch()))
        for kind in kinds:
            host.save(kind, tmp_path / kind)
        fresh = mg.Host(case.model()).eval()
        for kind in kinds:
            fresh.load(tmp_path / kind)
        assert torch.equal(tensor_of(fresh(**case.batch())), expected)
        bare = tensor_of(case.model()(**case.batch()))
        for kind in (*kinds[1:], kinds[0]):
            host.remove(kind)
        assert torch.equal(tensor_of(host(**case.batch())), bare)


def test_tokens_and_a_prefix_at_once(case: HostCase) -> None:
    """f([V W + b, x]) with the attention of every layer written out."""
    if not case.text:
        pytest.skip(f"{case.name} reads no text")
    host, twin = (mg.Host(case.model()).eval() for _ in range(2))
    for each in (host, twin):
        torch.manual_seed(1)
        each.implant("eye", mg.LinearMap(dim=FEATURES, tokens_each=2))
    host.implant("prefix", mg.Prefix(length=3))
    for path, place in zip(host["prefix"].paths, host["prefix"].places, strict=True):
        for p in place.parameters():
            nn.init.normal_(p, std=0.5)
        prepend(twin.model, path, place.keys, place.values)
    with torch.no_grad():
        expected = linear_map_by_hand(twin, case, at=1 if case.name == "bert" else 0)
        out = host(**case.batch(), side={"image": side()}).logits
    seen = case.seen()
    torch.testing.assert_close(out[seen], expected[seen], rtol=1e-4, atol=1e-5)
    if not case.generates:
        return
    batch = {k: v for k, v in case.batch().items() if k != "labels"}
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": 3}
    text = host.generate(**batch, side={"image": side()}, **settings)
    again = host.generate(**batch, side={"image": side()}, use_cache=False, **settings)
    assert torch.equal(text, again)


@together
def test_generated_with_a_cache_and_beams(case: HostCase, kinds: tuple[str, ...]) -> None:
    if not case.generates:
        pytest.skip(f"{case.name} does not generate")
    host, batch = implanted(case, kinds), case.batch()
    batch.pop("labels", None)
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": 3}
    out = host.generate(**batch, **settings)
    assert torch.equal(host.generate(**batch, **settings, use_cache=False), out)
    for i in range(BATCH):
        one = {k: v[i : i + 1] for k, v in batch.items()}
        assert torch.equal(host.generate(**one, **settings), out[i : i + 1])


@together
def test_compiled_in_one_graph(case: HostCase, kinds: tuple[str, ...]) -> None:
    host = implanted(case, kinds)
    compiled, graphs = counted(host)
    with torch.no_grad():
        for composition in (" >> ".join(kinds), kinds[0], None, kinds[-1]):
            host.use(composition)
            torch.testing.assert_close(
                tensor_of(compiled(**case.batch())),
                tensor_of(host(**case.batch())),
                rtol=1e-4,
                atol=1e-5,
            )
    assert len(graphs) == 1
