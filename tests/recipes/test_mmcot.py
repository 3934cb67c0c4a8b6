from __future__ import annotations

import inspect
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import T5ForConditionalGeneration, T5PreTrainedModel

import modgraft as mg
from command import QUICK, files, modgraft, refused, train
from modgraft.data.text import find_form
from modgraft.log import parse
from modgraft.models.t5 import T5
from modgraft.models.transformers_t5 import small_t5
from modgraft.recipes.mmcot import nets, recipe
from modgraft.recipes.mmcot import run as mmcot_run
from modgraft.recipes.mmcot.data import load_questions, load_run_tokenizer, settings_of
from modgraft.recipes.mmcot.nets import load_net, predict
from modgraft.recipes.mmcot.recipe import (
    DEMO,
    NETS,
    ROWS,
    Settings,
    build_host,
    nets_of,
    smaller,
)
from modgraft.report.run import read_run


def figures(run: Path, row: str) -> dict[str, Any]:
    """A row's figures but for the seconds."""
    rows = json.loads((run / "results.json").read_text())["rows"]
    found = next(r for r in rows if r["key"] == row)["seeds"]["0"]
    return {k: v for k, v in found.items() if k != "seconds"}


# the recipe


def code_lines(function: object) -> list[str]:
    source = inspect.getsource(function)  # type: ignore[arg-type]
    body = source.split('"""')[2] if '"""' in source else source
    head = [line for line in source.split('"""')[0].splitlines() if line.strip()]
    return head + [line for line in body.splitlines() if line.strip()]


def test_the_surgery_is_at_most_ten_lines_and_no_class_is_a_t5() -> None:
    assert len(code_lines(build_host)) <= 10
    classes = [c for _, c in inspect.getmembers(recipe, inspect.isclass)]
    own = [c for c in classes if c.__module__ == recipe.__name__]
    assert own
    assert not [c for c in own if issubclass(c, T5PreTrainedModel | torch.nn.Module)]
    assert "def forward" not in inspect.getsource(recipe)


@pytest.mark.parametrize("key", ["stage1-modular", "stage2-modular"])
def test_the_modular_variant_trains_at_most_15_percent(key: str) -> None:
    settings = Settings()
    host = build_host(recipe.text_t5(settings, 110, 0), NETS[key], 80, settings)
    trained = sum(p.numel() for p in host.parameters() if p.requires_grad)
    share = trained / sum(p.numel() for p in host.parameters())
    assert 0.02 < share <= 0.15
    theirs = {id(p) for p in host.model.parameters()}
    assert not [n for n, p in host.named_parameters() if p.requires_grad and id(p) in theirs]


def test_nets_come_after_their_bases_and_rows_name_nets_there_are() -> None:
    nets = [net.key for net in nets_of(ROWS)]
    assert nets == list(NETS)
    for net in nets_of(["modular"]):
        assert net.base is None or nets.index(net.base) < nets.index(net.key)
    assert set(DEMO) <= set(ROWS)


def test_a_quick_look_is_a_share() -> None:
    quick = smaller(Settings(), 0.02)
    assert (quick.train, quick.test, quick.steps_rationale) == (
        round(0.02 * Settings().train), 18, round(0.02 * Settings().steps_rationale)
    )  # fmt: skip
    assert quick.warmup < quick.steps_answer


# the run


def test_a_row_has_the_parameters_and_time_of_what_it_trained(run: Path) -> None:
    measured = {row: figures(run, row) for row in ROWS}
    cards = {net: json.loads((run / f"seed0/{net}/net.json").read_text()) for net in NETS}
    for row in ("shuffled", "gold", "forced", "forced-text"):
        assert [measured[row][c] for c in ("parameters", "trained", "fusion")] == [None] * 3, row
    for row in ("fused", "text", "direct", "modular"):
        for cost in ("parameters", "trained", "fusion"):
            total = sum(cards[net][cost] for net in ROWS[row].nets)
            assert measured[row][cost] == total, (row, cost)
    assert measured["text"]["fusion"] == 0 < measured["fused"]["fusion"]
    hosts = [load_net(run, 0, net) for net in ROWS["modular"].nets]
    modules = sum(host[name].size for host in hosts for name in host.implants)
    assert measured["modular"]["trained"] == modules < measured["modular"]["parameters"]
    assert cards["stage1"]["fusion"] == load_net(run, 0, "stage1")["fusion"].size
    own = mmcot_run._own_nets(["gold", "fused"])  # whichever was asked for first
    assert own == {"fused": ["stage1", "stage2"], "gold": []}
    assert mmcot_run._own_nets(["gold"]) == {"gold": ["stage2"]}


def test_digits_have_columns_and_chance_but_no_subjects_and_grades(run: Path) -> None:
    names = ["TXT", "IMG", "NO", "Avg"]
    for row in ROWS:
        found = figures(run, row)
        assert list(found["columns"]) == list(found["chance"]) == names
        assert 20 <= found["chance"]["Avg"] <= 50
    text = (run / "report.html").read_text()
    assert "natural science" not in text
    assert "school grades" not in text


def test_every_row_is_there_and_the_report_reads_it(run: Path) -> None:
    read = read_run(run)
    assert read.results is not None
    assert [row.key for row in read.results.rows] == list(ROWS)
    assert not read.notes
    for row in read.results.rows:
        (measured,) = row.seeds.values()
        assert measured.n == 18
        assert measured.image is not None
        assert row.leaks == ("forced" in row.key)
        assert (measured.rouge_l is None) == (
            ROWS[row.key].rationale_net is None and row.key == "direct"
        )
        assert len(read.predictions[row.key][0]) == 18
    assert set(read.curves) == set(NETS)
    assert len(read.gates) == 6
    assert "<html" in (run / "report.html").read_text()[:200]
    raw = json.loads((run / "results.json").read_text())
    assert (raw["split"], raw["notes"], raw["skipped"]) == ("test", [], [])
    assert raw["task"].startswith("DigitsQA: ")
    assert all(raw[name] for name in ("command", "commit", "versions"))
    assert not list(run.glob("seed0/*/checkpoints"))
    assert not [p for p in files(run) if p.endswith(".part") or p.endswith("error.txt")]


def test_rationales_are_handed_over_by_id(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = load_questions(run, 0).split("test")
    tokenizer, settings = load_run_tokenizer(run, 0), settings_of(run)
    gold = recipe.gold_rationales(questions, settings)

    class Echo:
        """Writes what it reads."""

        def __init__(self, host: mg.Host) -> None:
            self.eval, self.parameters = host.eval, host.parameters

        def generate(self, *, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
            return input_ids

    real = nets.load_net
    monkeypatch.setattr(nets, "load_net", lambda *args: Echo(real(*args)))
    monkeypatch.setattr(nets, "write_rationales", lambda *_: dict(reversed(list(gold.items()))))
    made = {p.id: p for p in predict(run, 0, ROWS["fused"], questions, settings)}
    form = find_form(settings.answer)
    for record in questions:
        read = tokenizer(form.input(record, gold[record.id]))["input_ids"]
        assert made[record.id].text == tokenizer.decode(read, skip_special_tokens=True)
        assert made[record.id].rationale == gold[record.id]


@pytest.mark.parametrize("key", ["stage1", "stage2", "stage1-released", "stage1-modular"])
def test_without_images_logits_are_bit_equal_to_the_text_models(run: Path, key: str) -> None:
    host = load_net(run, 0, key)
    questions, tokenizer = load_questions(run, 0).split("test"), load_run_tokenizer(run, 0)
    rationales = recipe.gold_rationales(questions, settings_of(run))
    form = find_form(getattr(settings_of(run), NETS[key].form))
    texts = [form.input(r, rationales[r.id] if form.reads_rationale else None) for r in questions]
    batch = dict(tokenizer(texts, padding=True, return_tensors="pt"))
    batch["decoder_input_ids"] = torch.arange(12).expand(len(texts), 12)
    features = torch.randn(len(texts), 12, 80)
    absent = {"image": mg.Side(features, torch.zeros(len(texts), 12, dtype=torch.bool))}
    with torch.no_grad():
        with host.using("lora" if "modular" in key else None):
            alone = host(**batch).logits
        blind = host(**batch, side=absent).logits
        seeing = host(**batch, side={"image": mg.Side(features)}).logits
        plain = T5ForConditionalGeneration.from_pretrained(
            run / "seed0" / (NETS[key].base or key) / "model"
        ).eval()(**batch).logits  # fmt: skip
    assert torch.equal(blind, alone)
    assert not torch.equal(seeing, alone)
    assert torch.equal(plain, alone) == ("modular" not in key)


def test_the_run_left_a_note_and_the_log_answers_from_it(run: Path) -> None:
    assert list(run.rglob("note.md")) == [run / "note.md"]  # the nets' trainings write none
    done = modgraft("log", "check", run / "note.md", "--least", "info")
    assert done.code == 0
    assert "1 info" in done.out  # Next? is empty: that is for a person
    note = parse((run / "note.md").read_bytes())
    lines = note.text.splitlines()
    accuracy = figures(run, "fused")["accuracy"]
    (found,) = [line for line in lines if line.startswith("- Two stages, fused: ")]
    assert f"All questions {accuracy:.1f}, " in found
    assert any(line.startswith("- Teacher-forced (control, leak): ") for line in lines)
    assert any(line.startswith("- Chance: Image questions ") for line in lines)
    assert "- Questions: 240 train, 10 val, 18 test" in lines
    assert {"results.png", "loss-stage1.png"} <= {f.target for f in note.figures}
    assert [e.action for e in note.events] == ["start", "return"]
    asked = "what did the last mmcot run reach?"
    answer = json.loads(modgraft("ask", asked, "--json", "--in", run).out)
    assert answer["refused"] is None
    assert f"Two stages, fused: {accuracy:.1f} % of all questions right" in answer["text"]
    assert all(lines[one["line"] - 1] == one["quote"] for one in answer["evidence"])
    assert found in [one["quote"] for one in answer["evidence"]]


def test_the_same_command_again_changes_nothing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmcot_run, "side_by_side", lambda *_: pytest.fail("a job would be run"))
    before = files(run)
    result = train(run, "--rows", "all", *QUICK)
    assert result.code == 0
    assert "Two stages, fused" in result.out
    assert files(run) == before


def test_fewer_rows_of_the_same_run_change_nothing(run: Path) -> None:
    before = (run / "results.json").read_bytes()
    assert train(run, "--rows", "text", *QUICK).code == 0
    assert (run / "results.json").read_bytes() == before


def test_other_settings_are_refused(run: Path) -> None:
    before = files(run)
    said = refused(train(run, "--rows", "all", *QUICK, "--set", "lr=0.5"), "other settings", "lr")
    assert "0.001, now 0.5" in said
    assert "--run NAME" in said
    assert "--fresh" in said
    assert files(run) == before


def test_evaluating_again_gives_the_same_figures(run: Path) -> None:
    before = {row: figures(run, row) for row in ROWS}
    seen = files(run)
    result = modgraft("mmcot", "evaluate", "--run", run, "--rows", "fused,shuffled")
    assert result.code == 0, result
    assert "test, Images shuffled: done" in result.out
    assert "Stage 1" not in result.out
    assert {row: figures(run, row) for row in ROWS} == before
    changed = {name for name, what in files(run).items() if what != seen.get(name)}
    assert "seed0/fused/predictions.jsonl" in changed
    assert "seed0/text/predictions.jsonl" not in changed


def test_evaluating_what_is_not_trained(tmp_path: Path, run: Path) -> None:
    refused(
        modgraft("mmcot", "evaluate", "--run", tmp_path / "none"),
        "run.json", "no such file", "modgraft mmcot train --run",
    )  # fmt: skip
    before = (run / "run.json").read_bytes()
    result = modgraft("mmcot", "evaluate", "--run", run, "--seeds", "0,7")
    refused(result, "seed7", "no such file", "modgraft mmcot train")
    assert (run / "run.json").read_bytes() == before


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--rows", "fused,nonsense"], ["no row is named 'nonsense'", "'fused'"]),
        (["--features", "vit.npy"], ["eye of their own"]),
        (["--data", "absent"], ["absent", "no such folder", "--data"]),
        (["--set", "rationale=QCM-X"], ["no text form is named 'QCM-X'", "'QCM-E'"]),
        (["--set", "decode_batch=0"], ["decode_batch=0", "at least 1"]),
        (["--set", "heads=3"], ["heads=3", "a divisor of d_model=128"]),
        (["--set", "heads=1"], ["heads=1", "2 or more"]),
        (["--set", "lr=-1"], ["lr=-1.0", "positive"]),
        (["--set", "weight_decay=-1"], ["weight_decay=-1.0", "0 or more"]),
        (["--set", "warmup=600"], ["warmup=600", "below the 600 steps"]),
        (["--set", "published=true"], ["digits have no published form"]),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    tmp_path: Path, args: list[str], words: list[str]
) -> None:
    refused(train(tmp_path / "run", *args), *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "args", [["--rows", ","], ["--seeds", "0,x"], ["--seeds", "-1"], ["--set", "nolr=3"],
             ["--set", "lr=much"], ["--set", "weight_decay=nan"], ["--set", "lr=inf"],
             ["--set", "published=yes"], ["--steps", "0"]],
)  # fmt: skip
def test_what_cannot_be_read_is_a_usage_error(tmp_path: Path, args: list[str]) -> None:
    result = train(tmp_path / "run", *args)
    assert result.code == 2
    assert "Traceback" not in result.err
    assert not (tmp_path / "run").exists()


def test_settings_from_python_are_checked_too(tmp_path: Path) -> None:
    for settings, said in (
        (Settings(weight_decay=float("nan")), "weight_decay is float, not NaN"),
        (Settings(heads="4"), "heads is int, not str"),  # type: ignore[arg-type]
    ):
        with pytest.raises(mg.ModgraftError, match=said):
            mmcot_run.run(tmp_path / "run", settings, DEMO, [0])
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_a_file(tmp_path: Path) -> None:
    file = tmp_path / "run"
    file.write_text("dear")
    refused(train(file, *QUICK), f"{file} is a file")
    refused(modgraft("recipe", "arithmetic", "--run", file), f"{file} is a file")
    refused(modgraft("mmcot", "evaluate", "--run", file), "run is a file, and no folder")
    refused(modgraft("report", file), "run is a file, and no folder")
    assert file.read_text() == "dear"


def test_damaged_results_are_named_and_left(run: Path) -> None:
    path, figures = run / "results.json", run / "seed0" / "gold" / "figures.json"
    whole, one = path.read_text("utf-8"), figures.read_text("utf-8")
    again = ("train", "--rows", "all", *QUICK, "--run", run)
    try:
        damage = {
            whole[:100]: "not JSON",
            "[1]": "the whole: ",
            '{"name": "x", "rows": 3}': "rows:",
        }
        for text, said in damage.items():
            path.write_text(text, "utf-8")
            before = files(run)
            refused(modgraft("mmcot", *again), str(path), said)
            refused(modgraft("report", run), str(path), said)
            assert files(run) == before
        path.unlink()
        figures.write_text("{")
        refused(modgraft("mmcot", *again), str(figures), "not JSON", "Delete it")
    finally:
        path.write_text(whole, "utf-8")
        figures.write_text(one, "utf-8")


def test_a_report_into_a_page_that_is_not_there(run: Path, tmp_path: Path) -> None:
    before = files(run)
    none, plain, odd = tmp_path / "none.md", tmp_path / "plain.md", tmp_path / "odd.md"
    plain.write_text("no place")
    odd.write_bytes(b"\xff\xfe")
    for page, said in ((none, "no such page"), (plain, "0 places"), (odd, "not UTF-8")):
        refused(modgraft("report", run, "--readme", page), str(page), said)
    assert files(run) == before


def test_fresh_deletes_runs_only(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("dear")
    refused(train(tmp_path, "--fresh", *QUICK), "holds no run", "thesis.txt")
    assert (tmp_path / "thesis.txt").exists()
    run = tmp_path / "run"
    (run / "seed0" / "stage1").mkdir(parents=True)
    (run / "seed0" / "stage1" / "metrics.jsonl").write_text("")
    old = {"settings": vars(Settings()), "rows": ["fused"], "seeds": [0]}
    (run / "run.json").write_text(json.dumps(old))
    refused(train(run, "--rows", "text", *QUICK), "other settings")
    result = train(run, "--rows", "gold", "--fresh", *QUICK)
    assert result.code == 0, result
    assert not (run / "seed0" / "stage1").exists()
    assert [r["key"] for r in json.loads((run / "results.json").read_text())["rows"]] == ["gold"]


# damage and interruption


def test_a_net_of_another_model(run: Path, tmp_path: Path) -> None:
    home = run / "seed0"
    for key in ("stage1", "stage2-text"):
        own = home / key / "model"
        own.rename(tmp_path / key)
        try:
            vocabulary = len(load_run_tokenizer(run, 0))
            small_t5(vocabulary, d_model=32, d_ff=32, layers=1, seed=9).save_pretrained(own)
            row = "fused" if key == "stage1" else "text"
            before = (run / "results.json").read_bytes()
            result = modgraft("mmcot", "evaluate", "--run", run, "--rows", row)
            refused(result, str(own), "another T5", "put that one back", "modgraft mmcot train")
            if key == "stage1":
                asked = modgraft("mmcot", "ask", "-", "What?", "1", "2", "--run", run)
                refused(asked, str(own), "another T5")
            weights = own / "model.safetensors"
            weights.write_bytes(weights.read_bytes()[:1000])
            result = modgraft("mmcot", "evaluate", "--run", run, "--rows", row)
            refused(result, str(own), "cannot be read", "modgraft mmcot train")
            assert (run / "results.json").read_bytes() == before
        finally:
            for part in own.iterdir():
                part.unlink()
            own.rmdir()
            (tmp_path / key).rename(own)


@pytest.mark.parametrize("how", ["kill", "ctrl-c"])
def test_an_interrupted_run_ends_as_an_undisturbed_one(run: Path, tmp_path: Path, how: str) -> None:
    folder = tmp_path / "run"
    args = ["mmcot", "train", "--run", str(folder), "--rows", "text", *QUICK]
    process = subprocess.Popen(
        [sys.executable, "-c", "from modgraft.cli.app import entry; entry()", *args],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    curve, net = folder / "seed0/stage1-text/metrics.jsonl", folder / "seed0/stage1-text/net.json"
    end = time.monotonic() + 60
    while not (curve.exists() and curve.read_bytes().count(b"\n") >= 5):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL if how == "kill" else signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert "Traceback" not in out
    if how == "ctrl-c":
        assert process.returncode == 130
        assert "stopped; the same command goes on where it was" in out
    assert not net.exists(), "it was too fast to be interrupted"
    assert not (folder / "results.json").exists()
    assert modgraft(*args).code == 0
    assert figures(folder, "text") == figures(run, "text")
    for key in ("stage1-text", "stage2-text"):
        assert losses(folder, key) == losses(run, key)
    broke = "killed" if how == "kill" else "KeyboardInterrupt"
    events = [(e.action, e.arguments) for e in parse((folder / "note.md").read_bytes()).events]
    assert events == [
        ("start", "mmcot"), ("interrupt", broke), ("start", "mmcot"), ("return", "mmcot"),
    ]  # fmt: skip


def losses(run: Path, key: str) -> list[tuple[int, str, float]]:
    lines = (run / "seed0" / key / "metrics.jsonl").read_text().splitlines()
    return [(d["step"], d["split"], d["loss"]) for d in map(json.loads, lines)]


def test_our_own_t5_takes_the_same_steps(run: Path, tmp_path: Path) -> None:
    result = train(tmp_path / "own", "--rows", "fused,modular", "--t5", "modgraft", *QUICK)
    assert result.code == 0, result
    assert isinstance(load_net(tmp_path / "own", 0, "stage2-modular").model, T5)
    for key in ("stage1", "stage2", "stage1-modular", "stage2-modular"):
        ours, theirs = losses(tmp_path / "own", key), losses(run, key)
        assert [line[:2] for line in ours] == [line[:2] for line in theirs]
        for (*_, mine), (*_, other) in zip(ours, theirs, strict=True):
            assert mine == pytest.approx(other, abs=1e-4)
    assert figures(tmp_path / "own", "fused") == figures(run, "fused")


def test_whose_t5_is_named(tmp_path: Path) -> None:
    refused(train(tmp_path / "r", "--t5", "mine", *QUICK), "t5", "mine", "modgraft")


def test_settings_of_another_version(tmp_path: Path) -> None:
    old = {"settings": {**vars(replace(Settings())), "gone": 1}, "rows": [], "seeds": [0]}
    (tmp_path / "run.json").write_text(json.dumps(old))
    refused(modgraft("mmcot", "evaluate", "--run", tmp_path), "run.json", "gone", "--fresh")
