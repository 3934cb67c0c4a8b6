"""Configurations of AdapterHub that were edited at random load as they were, or are refused."""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_adapterhub_format import FOLDER, computed, model, output_of

import modgraft as mg

FILES = [
    ("several", "bert", "adapter_config.json"),
    ("pfeiffer", "bert", "adapter_config.json"),
    ("compacter", "bert", "adapter_config.json"),
    ("ia3", "bert", "adapter_config.json"),
    ("prefix", "bert", "adapter_config.json"),
    ("invertible", "gpt2", "adapter_config.json"),
    ("fusion", "bert", "adapter_fusion_config.json"),
    ("fusion", "bert", "m/adapter_config.json"),
    ("head_classification", "bert", "head_config.json"),
    ("head_causal_lm", "gpt2", "head_config.json"),
]
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 3),
    st.sampled_from([2**70, -(2**70), 0.5, -1.0, 1e308, float("inf"), float("nan")]),
    st.text(max_size=3),
    st.sampled_from(["lora", "union", "prefix_tuning", "nice", "relu", "tagging", "../x", "m"]),
    st.lists(st.one_of(st.none(), st.integers(-1, 2), st.text(max_size=2)), max_size=3),
    st.dictionaries(st.text(max_size=2), st.one_of(st.none(), st.integers(0, 1)), max_size=2),
)  # fmt: skip


MEANT = {"alpha", "scaling", "non_linearity", "original_ln_before", "version"}
"""What gives another function of the same tensors, as the file now says."""


@cache
def host_of(method: str, name: str) -> Any:
    return model(name, method)


def places(said: Any) -> list[tuple[Any, Any]]:
    """Return each container in a configuration with each of its keys."""
    keys = said.items() if isinstance(said, dict) else enumerate(said)
    found = []
    for key, value in list(keys):
        found.append((said, key))
        if isinstance(value, dict | list):
            found += places(value)
    return found


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_an_edited_configuration_loads_as_it_was_or_is_refused(data: st.DataObject) -> None:
    method, name, file = data.draw(st.sampled_from(FILES))
    with tempfile.TemporaryDirectory() as made:
        folder = Path(shutil.copytree(FOLDER / "saved" / method / name, Path(made) / "m"))
        said = json.loads((folder / file).read_text("utf-8"))
        edited = set()
        for _ in range(data.draw(st.integers(1, 2))):
            if not (every := places(said)):
                break
            at, key = data.draw(st.sampled_from(every))
            edited.add(key)
            match data.draw(st.sampled_from(["value", "value", "missing", "unknown"])):
                case "value":
                    at[key] = data.draw(VALUES)
                case "missing":
                    del at[key]
                case "unknown" if isinstance(at, dict):
                    at[data.draw(st.text(min_size=1, max_size=3))] = data.draw(VALUES)
        (folder / file).write_text(json.dumps(said), encoding="utf-8")
        host = mg.Host(copy.deepcopy(host_of(method, name)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                host.load(folder)
            except mg.ModgraftError:
                assert not host.implants
                return
        output, there = computed(host, name, method), output_of(method, name)
        assert torch.isfinite(output).all() or edited & MEANT
        assert torch.allclose(output, there, rtol=0, atol=1e-6) or edited & MEANT, edited
