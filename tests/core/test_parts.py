"""Parts of a fused projection: taken, changed and put back, against indices written out."""

from __future__ import annotations

import pytest
import torch

import modgraft as mg
from modgraft.core.parts import Part, share, split_part

PARTS = {
    "[0/3]": list(range(4)),
    "[2/3]": list(range(8, 12)),
    "[0:4/6]": list(range(8)),
    "[5/6]": [10, 11],
    "[1/3x2]": [2, 3, 8, 9],
    "[0:2/3x4]": [0, 1, 3, 4, 6, 7, 9, 10],
}


@pytest.mark.parametrize("written", PARTS)
def test_a_part_is_these_rows(written: str) -> None:
    layer, part = split_part(f"a.b{written}")
    assert layer == "a.b"
    assert part is not None
    assert str(part) == written
    rows = PARTS[written]
    assert part.size(12) == len(rows)
    for shape, axis in (((12, 5), -2), ((2, 12, 5), -2), ((3, 2, 12), -1), ((12,), -1)):
        whole = torch.randn(shape)
        own = whole.index_select(axis, torch.tensor(rows))
        assert torch.equal(part.take(whole, axis), own)
        assert torch.equal(share(whole, part, axis), own)
        changed = part.replaced(whole, axis, lambda y: y + 1)
        alone = part.padded(torch.ones_like(own), axis)
        assert torch.equal(changed, whole + alone)
        assert torch.equal(part.take(alone, axis), torch.ones_like(own))
        assert alone.sum() == own.numel()


def test_no_part() -> None:
    assert split_part("a.b") == ("a.b", None)
    assert split_part("a.b[0]") == ("a.b[0]", None)
    whole = torch.randn(3)
    assert share(whole, None, -1) is whole
    for written in ("a[3/3]", "a[0/0]", "a[2:2/3]", "a[0:4/3]", "a[0/3x0]"):
        with pytest.raises(mg.ModgraftError, match="count from 0"):
            split_part(written)
    assert Part(0, 1, 3) < Part(1, 2, 3)
