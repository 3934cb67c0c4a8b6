"""The tables of ``print(host)``: modules, sites, and the selection that each row names."""

from __future__ import annotations

import pytest
from torch import nn

import modgraft as mg
from common import fnet, lines
from contract.hosts import HOSTS, QV
from modgraft.host.describe import rows_of
from modgraft.host.probe_result import Probe, Probed, Verdict


@pytest.mark.parametrize("name", HOSTS)
def test_every_row_is_a_selection_of_what_it_shows(name: str) -> None:
    model = HOSTS[name].model()
    rows = rows_of(model)
    assert rows
    for row in rows:
        assert mg.Host(model).sites(row.at, expect=len(row.sites)) == list(row.sites)


def test_what_has_parameters_is_among_the_rows_of_an_unknown_family() -> None:
    model = fnet()
    rows = rows_of(model)
    shown = {site.path for row in rows for site in row.sites}
    for path, module in model.named_modules():
        assert path in shown or not list(module.parameters(recurse=False))
    blocks = next(row for row in rows if row.kind == "FNetLayer")
    assert blocks.at == "fnet.encoder.layer.{0,1}"
    for row in rows:
        mg.Host(model).sites(row.at, expect=len(row.sites))


def test_single_weights_of_attention_are_rows() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
    rows = rows_of(nn.TransformerEncoder(layer, 3))
    shapes = {row.at: row.shape for row in rows if len(row.sites) == 3}
    assert shapes["layers.*.self_attn.in_proj_weight[0/3]"] == "16 × 16"
    assert len({row.at for row in rows}) == len(rows)


def test_print_of_a_host() -> None:
    host = mg.Host(HOSTS["t5"].model())
    host.implant("qa", mg.LoRA(rank=2), at=QV)
    host.implant("style", mg.Adapter(width=3), at="block", active=False)
    host.implant("keys_2", mg.Rescale(), at="key")
    host["style"].requires_grad_(False)
    host.use("qa - 0.5*keys_2")
    text = repr(host)
    assert text == str(host)
    assert "\x1b" not in text  # no colour, wherever it is printed
    assert not any(line.endswith(" ") for line in text.splitlines())
    trains = host["qa"].size + host["keys_2"].size
    own = sum(p.numel() for p in host.model.parameters())
    first = text.splitlines()[0]
    assert first.startswith(f"Host(T5ForConditionalGeneration): {own:,} parameters, {trains:,} tr")
    assert first.endswith("in force: qa - 0.5*keys_2")
    rows = lines(text)
    share = f"{100 * host['qa'].size / own:.2f}"
    path = "encoder.block.0.layer.0.SelfAttention.q"
    assert rows["qa"] == ["qa", "LoRA(rank=2)", "12", path, "768", share, "%", "yes", "yes"]
    assert rows["style"][-2:] == ["no", "no"]
    assert rows["keys_2"][-3:] == ["yes", "×", "-0.5"]
    assert rows["up"][1:] == ["4", "encoder.block.0.layer.1.DenseReluDense.wi", "24", "×", "16",
                              "Linear"]  # fmt: skip
    header = next(line for line in text.splitlines() if line.startswith("module"))
    row = next(line for line in text.splitlines() if line.startswith("qa "))
    assert header.index("first") == row.index("encoder")  # the columns are aligned


def test_a_notebook_shows_tables_of_html() -> None:
    host = mg.Host(HOSTS["t5"].model())
    host.implant("qa", mg.LoRA(rank=2), at=QV)
    html = host._repr_html_()
    assert html.count("<table>") == 2
    assert html.startswith('<p style="white-space: pre-line">Host(T5ForConditionalGeneration): ')
    assert '<td style="text-align: right">' + f"{host['qa'].size:,}</td>" in html
    assert "<table>" in host.plan("qa")._repr_html_()
    probe = Probe([Probed("a.b", "qa", called=1, acts=True)], [Verdict("qa")], ["<note>"])
    html = probe._repr_html_()
    assert html.count("<table>") == 2
    assert "&lt;note&gt;</p>" in html


def test_text_is_returned_in_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rich shows there what it prints, so that the text had no tables."""
    host = mg.Host(HOSTS["t5"].model())
    host.implant("qa", mg.LoRA(rank=2), at=QV)
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert lines(str(host))["qa"][1] == "LoRA(rank=2)"
    assert "without gradients" in host.plan("qa")


def test_print_of_a_host_of_no_family_and_of_a_module_at_the_input() -> None:
    text = repr(mg.Host(HOSTS["plain"].model()))
    assert lines(text)["{0,2,4}"][1:3] == ["3", "0"]
    host = mg.Host(HOSTS["bert"].model())
    host.implant("eye", mg.LinearMap(dim=6))
    assert "the input" in repr(host)


def test_repr_tells_what_is_where() -> None:
    host = mg.Host(HOSTS["t5"].model())
    host.implant("qa", mg.LoRA(rank=2), at=QV)
    text = repr(host)
    assert "LoRA(rank=2)" in text
    assert f"{host['qa'].size:,} train" in text
