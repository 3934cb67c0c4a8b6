"""LoRA with another rank or α at some sites."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import modgraft as mg
from contract.hosts import HOSTS


def test_another_rank_and_alpha_at_some_sites() -> None:
    host = mg.Host(HOSTS["bert"].model()).eval()
    method = mg.LoRA(rank=2, alpha=4.0, rank_pattern={"*.1.*": 5}, alpha_pattern={"*value": 3.0})
    host.implant("m", method, at=["query", "value"])
    places: list[Any] = list(host["m"].places)
    for path, place in zip(host["m"].paths, places, strict=True):
        rank = 5 if ".1." in path else 2
        assert place.A.shape[0] == place.B.shape[1] == rank
        assert place.scale == (3.0 if path.endswith("value") else 4.0) / rank
        with torch.no_grad():
            place.B.normal_()
    layer: Any = host.model.get_submodule(host["m"].paths[-1])
    place = places[-1]
    merged: Any = host.merge("m").get_submodule(host["m"].paths[-1])
    torch.testing.assert_close(merged.weight, layer.weight + 3 / 5 * place.B @ place.A)


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    host = mg.Host(HOSTS["bert"].model())
    with pytest.raises(mg.ModgraftError, match=r"'quary' of rank_pattern .* matches no site"):
        host.implant("m", mg.LoRA(rank=2, rank_pattern={"quary": 5}), at="query")
    with pytest.raises(mg.ModgraftError, match="at least 1"):
        mg.LoRA(rank_pattern={"*": 0})
