"""A host that writes to its own weights is moved by its calls alone, and not by questions to it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import modgraft as mg
from modgraft.engine.writes import taken_back

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


class Teacher(nn.Module):
    """A student beside a teacher, whose weights ``write`` writes at each call."""

    def __init__(self, write: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.student, self.teacher, self.write = nn.Linear(8, 8), nn.Linear(8, 8), write

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.write(self.teacher.weight)
        return self.student(x) - self.teacher(x)


def exchange(own: Tensor) -> None:
    own.data = own.data * 0.9


WRITES = {
    "in place": lambda own: own.mul_(0.9),
    "to .data": lambda own: own.data.mul_(0.9),
    "to rows": lambda own: own[:2].zero_(),
    "of a list": lambda own: torch._foreach_mul_([own], 0.9),
    "out=": lambda own: torch.add(own, 1.0, out=own),
    "exchanged": exchange,
}


def hosted(write: Callable[[Tensor], object]) -> mg.Host:
    torch.manual_seed(0)
    host = mg.Host(Teacher(write)).eval()
    for name in "ab":
        host.implant(name, mg.LoRA(rank=2), at="student", active=False)
    with torch.no_grad():
        for p in host.implants.parameters():
            p.normal_(0.0, 0.3)
    return host


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_bare_host_writes_to_its_weights_once_a_call_and_modules_never(write: Callable) -> None:
    host, twin = hosted(write), hosted(write).model
    before = host.model.teacher.weight.clone()
    for modules in ("a", ["a", "b", None, "a"]):  # which asks for the axis of the examples
        with pytest.raises(mg.ModgraftError, match=r"writes to teacher.weight.*put back"):
            host(X, modules=modules)
    assert torch.equal(host.model.teacher.weight, before)
    for _ in range(2):
        torch.testing.assert_close(host(X, modules=None), twin(X))
    assert torch.equal(host.model.teacher.weight, twin.teacher.weight)
    assert not torch.equal(twin.teacher.weight, before)


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_probe_moves_nothing_and_is_not_moved(write: Callable) -> None:
    host = hosted(write)
    before = {name: value.clone() for name, value in host.state_dict().items()}
    own = host.model.teacher.weight.data_ptr()
    for faults in (found := host.probe({"x": X}).faults).values():
        assert ["writes to teacher.weight, frozen" in fault for fault in faults] == [True], found
    assert found.keys() == {"a", "b"}
    assert all(torch.equal(value, before[name]) for name, value in host.state_dict().items())
    assert host.model.teacher.weight.data_ptr() == own


def test_nothing_is_copied_where_nothing_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[object] = []
    clone = torch.UntypedStorage.clone
    monkeypatch.setattr(torch.UntypedStorage, "clone", lambda s: copied.append(s) or clone(s))
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Embedding(3, 8, max_norm=1e-3))
    with taken_back(model), torch.no_grad():
        model[1](model[0](X))
        assert not copied
        before = model[2].weight.clone()
        model[2](torch.tensor([0]))
        assert len(copied) == 1
        assert not torch.equal(model[2].weight, before)
    assert torch.equal(model[2].weight, before)


def test_weights_in_one_storage_are_taken_back_together() -> None:
    flat = torch.randn(128)
    before, model = flat.clone(), nn.Linear(8, 8, bias=False)
    model.weight = nn.Parameter(flat[:64].view(8, 8))
    with taken_back(model):
        flat.zero_()
    assert torch.equal(flat, before)
