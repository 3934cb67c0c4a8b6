"""``modgraft inspect``: what it shows of a model, without its weights."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification
from typer.testing import CliRunner

import modgraft as mg
from common import fnet, lines
from contract.hosts import HOSTS, QV
from contract.modules import MODULES, implanted
from modgraft.cli.app import app
from modgraft.cli.inspect import read_model
from modgraft.core.errors import DataError, SiteError
from modgraft.host.describe import lora_cost


def saved(tmp_path: Path, name: str = "bert") -> Path:
    HOSTS[name].model().save_pretrained(tmp_path / name)
    return tmp_path / name


def run(*args: str | Path) -> str:
    result = CliRunner().invoke(app, ["inspect", *map(str, args)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_inspect_shows_roles_without_weights(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    (folder / "model.safetensors").unlink()
    text = run(folder)
    assert text.startswith("BertForMaskedLM: ")
    assert lines(text)["query"][1:3] == ["2", "bert.encoder.layer.0.attention.self.query"]
    report = json.loads(run(folder, "--json"))
    assert report["roles"]
    assert report["parameters"] == sum(p.numel() for p in HOSTS["bert"].model().parameters())
    assert [len(row["paths"]) for row in report["sites"] if row["at"] == "block"] == [2]


def test_inspect_counts_what_a_selection_costs(tmp_path: Path) -> None:
    folder = saved(tmp_path, "gpt2")
    text = run(folder, "--at", "query", "--at", "down", "--rank", "4")
    host = mg.Host(HOSTS["gpt2"].model())
    size = host.implant("m", mg.LoRA(rank=4), at=["query", "down"]).size
    assert "query, down: 4 sites" in text
    assert f"LoRA(rank=4): {size:,} parameters" in text
    assert "transformer.h.0.attn.c_attn[0/3]" in text
    report = json.loads(run(folder, "--at", "query", "--at", "down", "--rank", "4", "--json"))
    assert report["selection"]["lora_parameters"] == size
    assert "needs a weight matrix" in run(folder, "--at", "block")
    assert lora_cost(host.sites("query"), rank=17) is None  # wider than the weight


def test_inspect_says_which_modules_fit(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    host = mg.Host(HOSTS["bert"].model())
    host.implant("qa", mg.LoRA(rank=2), at=QV)
    host.save("qa", tmp_path / "qa")
    other = mg.Host(HOSTS["gpt2"].model())
    other.implant("eye", mg.Adapter(width=2), at="block")
    other.save("eye", tmp_path / "eye")
    both = ("--modules", tmp_path / "qa", "--modules", tmp_path / "eye")
    text = run(folder, *both)
    assert "in shape; weights not compared" in text
    assert "no: 2 of its sites are not here, transformer.h.0 for one" in text
    report = json.loads(run(folder, *both, "--weights", "--json"))
    assert [card["fits"] for card in report["modules"]] == [True, False]
    assert report["modules"][0]["parameters"] == host["qa"].size
    assert report["modules"][0]["method"] == "LoRA(rank=2)"
    compared = ["architecture", "shape", "config", "weights", "buffers"]
    assert report["modules"][0]["compared"] == compared
    HOSTS["bert"].model(seed=5).save_pretrained(folder)
    assert "no: another host (weights)" in run(folder, *both, "--weights")


def test_inspect_of_an_unknown_family_and_of_a_bare_type(tmp_path: Path) -> None:
    fnet().save_pretrained(tmp_path)
    text = run(tmp_path, "--at", "*.intermediate.dense")
    assert "of no family whose roles are known; roles guessed from names and shapes: up, " in text
    assert json.loads(run(tmp_path, "--json"))["guessed"] == ["up", "down"]
    assert "*.intermediate.dense: 2 sites" in text
    config = json.loads((tmp_path / "config.json").read_text())
    del config["architectures"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert run(tmp_path).startswith("FNetModel: ")
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["Mine"]}))
    result = CliRunner().invoke(app, ["inspect", str(tmp_path)])
    assert "transformers has no Mine; the bare model is shown" in result.stderr


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_inspect_says_what_is_wrong(tmp_path: Path) -> None:
    def refused(*args: str | Path, kind: type[Exception] = DataError) -> str:
        with pytest.raises(kind) as error:
            CliRunner().invoke(app, ["inspect", *map(str, args)], catch_exceptions=False)
        return str(error.value)

    assert "no config.json here. Give a folder that model.save_pretrained" in refused(tmp_path)
    assert "this is no folder" in refused(tmp_path / "config.json")
    assert "this is no folder" in refused("/nowhere")  # which no hub is asked for
    assert "this is no folder" in refused("./nowhere")
    (tmp_path / "config.json").write_text('{"model_type": "unheard"}')
    assert "model type `unheard`" in refused(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "not a valid JSON file" in refused(tmp_path)
    assert "See the name and the network" in refused("nobody/nothing")
    folder = saved(tmp_path)
    wrong = refused(folder, "--at", "querry", kind=SiteError)
    assert "did you mean at='query'?" in wrong
    with pytest.raises(mg.ModgraftError, match="no module in"):
        CliRunner().invoke(
            app, ["inspect", str(folder), "--modules", str(tmp_path)], catch_exceptions=False
        )


def test_inspect_says_what_it_fetches_before_it_does() -> None:
    result = CliRunner().invoke(app, ["inspect", "nobody/nothing"])
    assert "fetching config.json, no weights, of nobody/nothing" in result.stderr


def test_help_is_there_before_torch_is() -> None:
    code = (
        "import sys; from modgraft.cli.app import app\n"
        "try: app(['inspect', '--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Examples" in done.stdout
    assert "--modules" in done.stdout


def test_meta_models_take_no_memory(tmp_path: Path) -> None:
    from modgraft.cli.inspect import read_model

    assert {p.device for p in read_model(str(saved(tmp_path))).parameters()} == {
        torch.device("meta")
    }


@pytest.mark.parametrize("weights", [False, True])
def test_inspect_tries_what_it_says_to_fit(tmp_path: Path, weights: bool) -> None:
    """A head of another size, a layer that is not there: a line of the table, in any format."""
    shape = {"vocab_size": 40, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}

    def model(labels: int, layers: int = 2) -> Path:
        config = BertConfig(**shape, num_labels=labels, num_hidden_layers=layers)
        torch.manual_seed(0)
        BertForSequenceClassification(config).save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    host = mg.Host(BertForSequenceClassification.from_pretrained(model(3)))
    host.implant("c", mg.LoRA(rank=2), at="query")
    modules = []
    with host.training_only(["c", "host.classifier"]):
        for form in ("peft", "modgraft"):
            modules += ["--modules", host.save("c", tmp_path / form, format=form)]
    flags = ["--weights"] * weights

    def fits(folder: Path) -> list[bool]:
        report = json.loads(run(folder, *modules, *flags, "--json"))
        return [each["fits"] for each in report["modules"]]

    assert fits(model(3)) == [True, True]
    assert fits(model(2)) == fits(model(3, layers=1)) == [False, False]
    text = run(model(2), *modules, *flags)
    assert "classifier.bias, which is [3] in the folder and is [2] in this host" in text
    text = run(model(3, layers=1), *modules, *flags)
    assert "no: base_model.model.bert.encoder.layer.1" in text
    assert "no: 1 of its sites are not here" in text
    (tmp_path / "peft" / "adapter_config.json").write_text("{")
    assert "no: " in run(model(3), *modules, *flags)


def test_inspect_says_nothing_false_of_modules_that_need_values(tmp_path: Path) -> None:
    """Without weights a model is only shapes, which some modules ask for values."""
    folder = saved(tmp_path)
    modules = []
    for name in ("lora", "sparse", "subnetwork", "gated_fusion", "prefix", "mixture"):
        if name in MODULES and "bert" not in MODULES[name].refused:
            host = implanted(HOSTS["bert"], MODULES[name])
            modules += ["--modules", host.save("m", tmp_path / name)]
    report = json.loads(run(folder, *modules, "--json"))
    assert len(report["modules"]) >= 4
    assert all(each["fits"] for each in report["modules"])


def test_without_a_network_it_is_said_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Their library tries again for half a minute."""

    def nowhere(*args: object, **more: object) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr("socket.create_connection", nowhere)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    began = time.monotonic()
    with pytest.raises(DataError, match=r"someone/no-model: .*See the name and the network"):
        read_model("someone/no-model")
    assert time.monotonic() - began < 5
    assert "the hub cannot be reached" in capsys.readouterr().err
