"""Runs write their own notes: fit, side by side, recipes; broken off, resumed, started again."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import modgraft as mg
from modgraft.log import Note, parse
from modgraft.log.check import check
from modgraft.log.record.runs import NOTE, RunNote, code, part_of_a_run, plain, recorded, write_run


class Net(nn.Module):
    """y = w·x, with the loss that fit wants."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
        class Out:
            loss = ((self.linear(x) - y) ** 2).mean()

        return Out


def rows(bad: int | None = None) -> list[dict[str, torch.Tensor]]:
    x = torch.randn(32, 3, generator=torch.Generator().manual_seed(0))
    y = x.sum(-1, keepdim=True)
    if bad is not None:
        y[bad] = float("nan")
    return [{"x": a, "y": b} for a, b in zip(x, y, strict=True)]


def fit(folder: Path, *, steps: int = 6, bad: int | None = None, **given: Any) -> Any:
    torch.manual_seed(0)
    host = mg.Host(Net())
    host.implant("qa", mg.LoRA(rank=1), at="linear")
    loader = DataLoader(rows(bad), batch_size=8)  # type: ignore[arg-type]
    settings = {"train": "qa", "evaluate": loader, "progress": False, "folder": folder, **given}
    return host.fit(loader, steps=steps, evaluate_every=3, **settings)


def note_in(folder: Path) -> Note:
    note = parse((folder / NOTE).read_bytes(), str(folder / NOTE))
    assert not note.degraded
    assert [s.title for s in note.sections] == [
        "tl;dr", "Context", "Done", "Learned", "Next?", "Log",
    ]  # fmt: skip
    problems = [p for p in check(folder / NOTE) if p.severity != "info"]
    assert not problems
    return note


def said(note: Note, section: str) -> dict[str, str]:
    """Label → text of a section's lines."""
    (where,) = [s for s in note.sections if s.title == section]
    lines = [note.line(n) for n in range(where.line + 1, where.end_line + 1)]
    pairs = [line.removeprefix("- ").partition(": ") for line in lines if ": " in line]
    return {label: text for label, _, text in pairs}


def told(note: Note) -> list[tuple[str, str | None, str | None]]:
    return [(e.action, e.arguments, e.result) for e in note.events if e.section == "Log"]


def test_a_run_of_fit_says_what_was_run_and_what_came_out(tmp_path: Path) -> None:
    history = fit(tmp_path / "qa")
    note = note_in(tmp_path / "qa")
    about, learned = said(note, "Context"), said(note, "Learned")
    assert about["Host"] == "Net, 4 parameters"
    assert "4 parameters: `qa = LoRA(rank=1), sites 1`" in about["Trains"]
    assert about["Data"] == "`list`, 32 examples, 4 batches an epoch"
    assert about["Seeds"] == "0"
    assert "lr 0.001" in about["Settings"]
    assert f"torch {torch.__version__.split('+')[0]}" in about["Versions"]
    assert said(note, "Done")["Trained"] == "6 of at most 6 steps (all of them)"
    best = history.best["loss"]
    assert learned["Best evaluation"] == f"loss {best:.4g}, at step {history.best['step']}"
    assert learned["Spread"] == "none is known: one seed, 0"
    reached = f"best loss {best:.4g} at step {history.best['step']} of 6, seed 0"
    assert said(note, "tl;dr") == {"Run of qa": reached}
    assert told(note) == [("start", "qa", None), ("return", "qa", reached)]


def test_recording_changes_nothing_of_the_run(tmp_path: Path) -> None:
    torch.manual_seed(5)
    noted, after = fit(tmp_path / "a"), torch.rand(1)
    torch.manual_seed(5)
    silent, same = fit(tmp_path / "b", note=False), torch.rand(1)
    assert noted.losses == silent.losses
    assert after == same
    assert not (tmp_path / "b" / NOTE).exists()
    assert noted.evaluations[-1]["loss"] == silent.evaluations[-1]["loss"]


def test_a_finished_run_asked_for_again_writes_nothing_and_a_fresh_one_adds(tmp_path: Path) -> None:
    fit(tmp_path / "qa")
    before = (tmp_path / "qa" / NOTE).read_bytes()
    fit(tmp_path / "qa")
    assert (tmp_path / "qa" / NOTE).read_bytes() == before
    fit(tmp_path / "qa", steps=3, resume=False)
    note = note_in(tmp_path / "qa")
    assert [t[::2] for t in told(note)][2] == ("start", "again")
    assert said(note, "Done")["Trained"] == "3 of at most 3 steps (all of them)"
    assert before.split(b"## Log\n")[1].strip() in note.data


def test_a_run_that_fails_says_so_and_goes_on_in_the_same_note(tmp_path: Path) -> None:
    with pytest.raises(mg.ModgraftError, match="Nothing was updated"):
        fit(tmp_path / "qa", bad=20, evaluate=None)
    note = note_in(tmp_path / "qa")
    assert [t[:2] for t in told(note)] == [("start", "qa"), ("interrupt", "ModgraftError")]
    assert "Nothing was updated" in note.events[-1].body
    assert said(note, "tl;dr") == {}

    def stop(host: Any) -> dict[str, float]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "two", evaluate=stop)
    assert told(note_in(tmp_path / "two"))[-1][:2] == ("interrupt", "KeyboardInterrupt")


KILLED = """
import sys, os
sys.path[:0] = {path!r}
from test_runs import *
def stop(host):
    if stop.calls: os.kill(os.getpid(), signal.SIGKILL)
    stop.calls += 1
    return {{"loss": 1.0}}
stop.calls = 0
fit(Path(sys.argv[1]), evaluate=stop, save_every=1)
"""


def test_a_killed_run_that_goes_on_says_that_it_ended_without_a_word(tmp_path: Path) -> None:
    code = KILLED.format(path=[str(Path(__file__).parent), str(Path(__file__).parents[2])])
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "qa")], check=False)
    assert done.returncode == -signal.SIGKILL
    assert [t[0] for t in told(note_in(tmp_path / "qa"))] == ["start"]
    fit(tmp_path / "qa", evaluate=lambda host: {"loss": 1.0}, save_every=1)
    assert told(note_in(tmp_path / "qa"))[:3] == [
        ("start", "qa", None), ("interrupt", "killed", None), ("start", "qa", "resumed"),
    ]  # fmt: skip
    assert told(note_in(tmp_path / "qa"))[3][0] == "return"


def test_a_note_that_cannot_be_written_is_a_warning_and_the_run_goes_on(tmp_path: Path) -> None:
    (tmp_path / "qa" / NOTE).mkdir(parents=True)  # a folder in its place
    with pytest.warns(UserWarning, match=r"note\.md: the run's note could not be written"):
        history = fit(tmp_path / "qa")
    assert len(history.losses) == 6

    def broken(_: Any) -> None:
        raise RuntimeError("no such figure")

    found = pytest.warns(UserWarning, match="RuntimeError: no such figure")
    with found, recorded(tmp_path / "r", "r", None, broken):
        done = True
    assert done


def test_what_a_person_wrote_stays(tmp_path: Path) -> None:
    fit(tmp_path / "qa", steps=3)
    path = tmp_path / "qa" / NOTE
    mine = path.read_text().replace("## Next?\n", "## Next?\n- [eureka -> rank 2]\n")
    mine = mine.replace("- Spread:", "- A remark: of mine\n- Spread:") + "- [start(other)]\n"
    path.write_text(mine)
    fit(tmp_path / "qa", steps=6, resume=False)
    note = note_in(tmp_path / "qa")
    assert said(note, "Learned")["A remark"] == "of mine"
    assert "- [eureka -> rank 2]" in note.text
    assert note.text.count("- Seeds: 0") == 1
    assert "interrupt" not in note.text
    assert note.text.count("Run of qa: ") == 1


def test_modules_side_by_side_are_one_note(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=12, n_embd=8, n_layer=1, n_head=1, n_positions=8)
    host = mg.Host(GPT2LMHeadModel(config))
    loaders = {}
    for name in ("fr", "de"):
        host.implant(name, mg.LoRA(rank=1), at="query", active=False)
        ids = torch.randint(0, 12, (8, 6))
        loaders[name] = DataLoader([{"input_ids": i, "labels": i} for i in ids], batch_size=4)  # type: ignore[arg-type]
    given = {"steps": 2, "folder": tmp_path / "two", "progress": False}
    made = mg.fit_side_by_side(host, loaders, **given)
    note = note_in(tmp_path / "two")
    assert [t[:2] for t in told(note)] == [("start", "side-by-side"), ("return", "side-by-side")]
    assert {"Module fr", "Module de", "Host"} <= said(note, "Context").keys()
    loss = f"{made['de'].losses[-1]:.4g} at the last"
    assert loss in said(note, "Learned")["de"]
    before = note.data
    mg.fit_side_by_side(host, loaders, **given)  # it is done already
    assert note_in(tmp_path / "two").data == before
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob(NOTE)] == ["two/note.md"]


def test_a_part_of_a_run_writes_no_note_of_its_own(tmp_path: Path) -> None:
    with part_of_a_run():
        fit(tmp_path / "qa")
    with recorded(tmp_path, "all"):
        fit(tmp_path / "two")
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob(NOTE)] == [NOTE]


def test_where_it_was_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["/somewhere/train.py", "--lr", "1e-3", "a `b`"])

    def git(*args: str) -> str:
        own = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        done = subprocess.run(["git", *own, *args], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    write_run("one", "p", headline="1")
    git("init", "-q")
    (tmp_path / "train.py").write_text("x = 1\n")
    git("add", "train.py")
    git("commit", "-qm", "first")
    head = git("rev-parse", "HEAD")[:12]
    write_run("two", "p", headline="2")
    (tmp_path / "train.py").write_text("x = 2\n")
    write_run("three", "p", headline="3")
    found = [said(note_in(tmp_path / n), "Context") for n in ("one", "two", "three")]
    assert [one["Commit"] for one in found] == [
        "not known: git sees no repository with a commit here",
        f"{head}, tree clean", f"{head}, with changes in 1 file",
    ]  # fmt: skip
    assert found[0]["Command"] == "`` train.py --lr 1e-3 'a `b`' ``"
    assert not re.search(r"/somewhere", (tmp_path / "one" / NOTE).read_text())


NASTY = "bad [read(@x2020) -> y] @key2020 <a> `code` [[wiki]] ![x](y.png)\n## Log\n- [start(x)]"


def test_what_a_run_says_cannot_be_taken_for_an_event(tmp_path: Path) -> None:
    def about(run: RunNote) -> None:
        run.context["x"] = code(NASTY)

    with pytest.raises(ValueError, match="bad"), recorded(tmp_path, "a b/[c]", about):
        raise ValueError(NASTY)
    note = note_in(tmp_path)
    assert told(note) == [("start", "a-b--c", None), ("interrupt", "ValueError", None)]
    assert not note.citations
    assert not note.figures
    write_run(tmp_path, NASTY, headline=NASTY, learned={plain(NASTY): plain(NASTY)})
    note = note_in(tmp_path)
    assert len(note.events) == 4
    assert not note.citations


def test_figures_that_are_not_there_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "loss.png").write_bytes(b"\x89PNG")
    figures = {tmp_path / "loss.png": "Loss [all]", tmp_path / "none.png": "None"}
    write_run(tmp_path, "p", headline="done", figures=figures, seconds=125.0)
    note = note_in(tmp_path)
    assert [(f.alt, f.target) for f in note.figures] == [("Loss (all)", "loss.png")]
    assert said(note, "Done")["Duration"] == "2.1 min"
