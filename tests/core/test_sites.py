"""Select the layers that a module is implanted at: by role, path, type or function."""

from __future__ import annotations

import pytest
from torch import nn

import modgraft as mg
from contract.hosts import HOSTS


def test_selections() -> None:
    host = mg.Host(HOSTS["t5"].model())
    assert len(host.sites("query")) == 6
    assert len(host.sites("decoder.*.SelfAttention.{q,v}", expect=4)) == 4
    assert len(host.sites(nn.Embedding)) >= 3
    assert len(host.sites(lambda path, m: path.endswith(".wo"), expect=4)) == 4
    assert [s.path for s in host.sites("encoder.output")] == ["encoder"]
    assert len(host.sites(["query", "encoder.block.0.*.q"])) == 6  # each once
    with pytest.raises(mg.ModgraftError, match="did you mean at='query'"):
        host.sites("querry")
    with pytest.raises(mg.ModgraftError, match="opens a brace"):
        host.sites("encoder.{q")
    with pytest.raises(mg.ModgraftError, match="no Conv2d in the host"):
        host.sites(nn.Conv2d)
    with pytest.raises(mg.ModgraftError, match="at most 16"):
        host.implant("wide", mg.LoRA(rank=99), at="query")
    with pytest.raises(mg.ModgraftError, match="no weight that a parameter module can change"):
        host.implant("norm", mg.LoRA(rank=1), at="*.layer_norm")
    with pytest.raises(mg.ModgraftError, match="equal parts"):
        host.implant("part", mg.LoRA(rank=1), at="encoder.block.0.layer.0.SelfAttention.q[0/5]")
    assert not list(host.implants)
