from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from modgraft.core.errors import ModgraftError
from modgraft.core.files import held
from modgraft.training.checkpoint import Checkpoints
from modgraft.training.fit import fit
from training.tiny import Line, loader, points, t5

GIVEN = {"steps": 12, "lr": 3e-3, "save_every": 3, "progress": False}


def curve(folder: Path) -> list[dict]:
    """Read metrics.jsonl without the wall time, the only thing that may differ."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in found]


def saved(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / "checkpoints").iterdir() if p.name != ".lock")


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


class StopError(Exception):
    pass


def stop_after(data, count: int):
    """Make a loader that fails when batch `count` is read."""

    class Failing(type(data.dataset)):
        reads = 0

        def __getitem__(self, i):
            Failing.reads += 1
            if Failing.reads > count * data.batch_size:
                raise StopError
            return super().__getitem__(i)

    data.dataset.__class__ = Failing
    return data


@pytest.mark.parametrize("kind", ["generator", "plain"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, kind):
    def data():
        return loader(generator=torch.Generator().manual_seed(7) if kind == "generator" else None)

    whole, parts = t5(), t5()
    history = fit(whole, data(), folder=tmp_path / "whole", **GIVEN)
    with pytest.raises(StopError):
        fit(parts, stop_after(data(), 8), folder=tmp_path / "parts", **GIVEN)
    assert saved(tmp_path / "parts")[-1] == "step-000006"
    torch.rand(11)
    parts = t5(seed=9)  # a fresh process starts from whatever its weights are
    resumed = fit(parts, data(), folder=tmp_path / "parts", **GIVEN)
    assert (history.resumed_from, resumed.resumed_from) == (None, 6)
    assert resumed.losses == history.losses
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    assert same(whole, parts)


def test_buffers_that_training_changes_are_resumed(tmp_path):
    def host():
        line = Line()
        line.use_norm = True
        return line

    whole, parts = host(), host()
    fit(whole, points(9), folder=tmp_path / "whole", **GIVEN)
    data = points(9)
    broken = [*data[:7], {"x": None, "y": None}]
    with pytest.raises(AttributeError):
        fit(parts, broken, folder=tmp_path / "parts", **GIVEN)
    # going on with the very host that failed: its buffers hold what the failed run left
    fit(parts, data, folder=tmp_path / "parts", **GIVEN)
    assert same(whole, parts)
    fresh = host()
    fit(fresh, data, folder=tmp_path / "parts", **GIVEN)
    assert same(whole, fresh)


def test_a_finished_run_returns_at_once(tmp_path):
    host = t5()
    first = fit(host, loader(), folder=tmp_path, evaluate=loader(), **GIVEN)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    other = t5(seed=5)
    other.forward = None  # would fail if it were called
    again = fit(other, loader(), folder=tmp_path, evaluate=loader(), **GIVEN)
    assert (again.losses, again.evaluations) == (first.losses, first.evaluations)
    assert (again.best, again.stopped, again.seconds) == (first.best, "steps", first.seconds)
    assert (again.resumed_from, first.resumed_from) == (12, None)
    assert same(host, other)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_what_is_kept(tmp_path):
    scores = iter([5.0, 9.0, 1.0, 2.0])
    given = GIVEN | {"evaluate": lambda h: {"accuracy": next(scores)}, "monitor": "accuracy"}
    fit(t5(), loader(), folder=tmp_path, evaluate_every=3, **given)
    assert saved(tmp_path) == ["step-000006", "step-000009", "step-000012"]  # best, latest two
    files = {p.name for p in (tmp_path / "checkpoints" / "step-000012").iterdir()}
    assert files == {
        "state.json", "fingerprint.json", "tensors.safetensors", "optimizer.safetensors",
    }  # fmt: skip


def test_starting_over_deletes_only_the_run(tmp_path):
    fit(t5(), loader(), folder=tmp_path, **GIVEN)
    (tmp_path / "notes.txt").write_text("mine")
    history = fit(t5(), loader(), folder=tmp_path, resume=False, **(GIVEN | {"steps": 2}))
    assert history.resumed_from is None
    assert saved(tmp_path) == ["step-000002"]
    assert len(curve(tmp_path)) == 2
    assert (tmp_path / "notes.txt").read_text() == "mine"


def wider():
    host = t5()
    host.lm_head = nn.Linear(16, 41, bias=False)
    return host


def other_weights():
    host = t5(seed=8)
    host.encoder.requires_grad_(False)
    return host


def frozen():
    host = t5()
    host.encoder.requires_grad_(False)
    return host


@pytest.mark.parametrize(
    ("first", "host", "given", "message"),
    [
        (t5, wider, {}, r"another model \(1 differ\): lm_head.weight: only here"),
        (
            t5,
            frozen,
            {},
            r"another model \(\d+ differ\): .*: trains True there, False here; .* more",
        ),
        (frozen, other_weights, {}, r"another model .*encoder.*: other weights"),
        (t5, lambda: t5().double(), {}, "dtype float32 there, float64 here"),
        (t5, Line, {}, r"shared.weight: only there"),
        (t5, t5, {"lr": 1e-4}, r"other settings \(1 differ\): lr: 0.003 there, 0.0001 here"),
        (t5, t5, {"steps": 24}, "steps: 12 there, 24 here"),
        (t5, t5, {"data": loader(n=20)}, "batches: 6 there, 5 here"),
        (t5, t5, {"data": loader(shuffle=False)}, "first_ids: .* there, .* here"),
    ],
)
def test_the_checkpoint_of_another_run_is_refused(tmp_path, first, host, given, message):
    fit(first(), loader(), folder=tmp_path, **GIVEN)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    given = GIVEN | given
    data = given.pop("data", None) or loader()
    with pytest.raises(ModgraftError, match=message) as error:
        fit(host(), data, folder=tmp_path, **given)
    assert str(tmp_path / "checkpoints" / "step-000012") in str(error.value)
    assert "resume=False" in str(error.value)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    "name", ["state.json", "fingerprint.json", "tensors.safetensors", "optimizer.safetensors"]
)
@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_a_damaged_checkpoint_is_refused_and_the_remedy_works(tmp_path, name, damage):
    host = Line()
    fit(host, points(5), folder=tmp_path, **GIVEN)
    path = tmp_path / "checkpoints" / "step-000012"
    content = (path / name).read_bytes()
    if damage == "gone":
        (path / name).unlink()
    elif damage == "cut":
        (path / name).write_bytes(content[: len(content) // 2])
    else:
        middle = len(content) // 2
        (path / name).write_bytes(content[:middle] + b"\xff" + content[middle + 1 :])
    with pytest.raises(ModgraftError, match=r"step-000012 is damaged: .* from step-000009"):
        fit(Line(), points(5), folder=tmp_path, **GIVEN)
    for file in path.iterdir():
        file.unlink()
    path.rmdir()
    again = Line()
    assert fit(again, points(5), folder=tmp_path, **GIVEN).resumed_from == 9
    assert same(host, again)


def test_not_one_character_of_a_state_changes_unseen(tmp_path):
    fit(Line(), points(5), folder=tmp_path, **GIVEN)
    path = tmp_path / "checkpoints" / "step-000012" / "state.json"
    store, text = Checkpoints(tmp_path), path.read_text()
    whole = store.load(path.parent).state
    for at in range(len(text)):
        for other in "7a":
            changed = text[:at] + other + text[at + 1 :]
            with suppress(ValueError):  # a number's 17th digit may change nothing
                if json.loads(changed) == json.loads(text):
                    continue
            path.write_text(changed)
            with pytest.raises(ModgraftError, match="step-000012 is damaged"):
                store.load(path.parent)
    path.write_text(text.replace("\n", " "))  # the same, laid out in another way
    assert store.load(path.parent).state == whole


def test_what_a_killed_save_left_is_pruned(tmp_path, monkeypatch):
    """Left-over files are also pruned at the end of a run, when no save follows."""

    def killed(self):
        raise StopError

    fit(Line(), points(5), folder=tmp_path / "whole", **GIVEN)
    fit(Line(), points(5), folder=tmp_path / "parts", **GIVEN | {"keep": 4})
    assert len(saved(tmp_path / "parts")) == 4
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "prune", killed)
        with pytest.raises(StopError):
            fit(Line(), points(5), folder=tmp_path / "parts", **GIVEN)
    assert len(saved(tmp_path / "parts")) == 4
    fit(Line(), points(5), folder=tmp_path / "parts", **GIVEN)
    assert saved(tmp_path / "parts") == saved(tmp_path / "whole")


def test_nothing_is_pruned_by_a_checkpoint_that_cannot_be_read(tmp_path):
    fit(Line(), points(5), folder=tmp_path, **GIVEN | {"keep": 4})
    before = saved(tmp_path)
    (tmp_path / "checkpoints" / "step-000009" / "state.json").write_text("{")
    remedy = r"step-000009 is damaged: .*\(the run then goes on from step-000012\)"
    with pytest.raises(ModgraftError, match=remedy):
        fit(Line(), points(5), folder=tmp_path, **GIVEN)
    assert saved(tmp_path) == before


def test_damaged_metrics_are_refused(tmp_path):
    fit(Line(), points(5), folder=tmp_path, **GIVEN)
    path = tmp_path / "metrics.jsonl"
    content = path.read_bytes()
    path.write_bytes(content[:100])
    with pytest.raises(ModgraftError, match=r"metrics.jsonl holds 100 bytes.*resume=False"):
        fit(Line(), points(5), folder=tmp_path, **GIVEN)
    path.write_bytes(b"#" + content[1:])
    with pytest.raises(ModgraftError, match=r"metrics.jsonl, line 1: "):
        fit(Line(), points(5), folder=tmp_path, **GIVEN)


def test_a_folder_that_is_not_a_runs(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("precious\n")
    with pytest.raises(ModgraftError, match=r"no checkpoints/"):
        fit(Line(), points(5), folder=tmp_path, **GIVEN)
    assert (tmp_path / "metrics.jsonl").read_text() == "precious\n"


def test_two_runs_do_not_share_a_folder(tmp_path):
    def again(host):
        fit(Line(), points(5), folder=tmp_path, **GIVEN)

    who = (
        rf"another process is training in {tmp_path} \(process {os.getpid()}: .*give another folder"
    )
    with pytest.raises(ModgraftError, match=who):
        fit(Line(), points(5), folder=tmp_path, evaluate=again, evaluate_every=1, **GIVEN)
    assert fit(Line(), points(5), folder=tmp_path, resume=False, **GIVEN).stopped == "steps"
    assert not (tmp_path / ".lock").exists()


def test_a_folder_is_held_before_a_run_in_it_is_deleted_and_until_its_process_is_killed(tmp_path):
    fit(Line(), points(5), folder=tmp_path, **GIVEN)
    before = curve(tmp_path)
    child = os.fork()
    if child == 0:
        with held(tmp_path, "training"):
            (tmp_path / "is held").touch()
            signal.pause()
    while not (tmp_path / "is held").exists():
        pass
    with pytest.raises(ModgraftError, match=rf"training in {tmp_path} \(process {child}: "):
        fit(Line(), points(5), folder=tmp_path, resume=False, **GIVEN | {"steps": 2})
    assert curve(tmp_path) == before
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert fit(Line(), points(5), folder=tmp_path, **GIVEN).losses


class Pressing(Line):
    """Presses Ctrl-C in its n-th forward, or raises another signal."""

    def __init__(self, at: int, number: signal.Signals = signal.SIGINT) -> None:
        super().__init__()
        self.at, self.number = at, number

    def forward(self, **batch):
        self.at -= 1
        if self.at == 0:
            signal.raise_signal(self.number)
        return super().forward(**batch)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_finishes_the_step_saves_and_says_how_to_go_on(tmp_path, number):
    whole = Line()
    history = fit(whole, points(5), folder=tmp_path / "whole", **GIVEN)
    host = Pressing(5, number)
    with pytest.raises(KeyboardInterrupt, match=r"after step 5 and saved.*goes on.*step-000005"):
        fit(host, points(5), folder=tmp_path / "parts", **GIVEN)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    resumed = fit(host, points(5), folder=tmp_path / "parts", **GIVEN)
    assert resumed.resumed_from == 5
    assert resumed.losses == history.losses
    assert same(whole, host)
    with pytest.raises(KeyboardInterrupt, match="nothing is kept, since fit has no folder="):
        fit(Pressing(2, number), points(5), **GIVEN)


def test_a_handler_that_the_program_has_set_is_left_alone():
    found = []
    before = signal.signal(signal.SIGTERM, lambda *_: found.append("mine"))
    try:
        fit(Pressing(3, signal.SIGTERM), points(5), **GIVEN)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert found == ["mine"]


@pytest.mark.parametrize("at", [1, 4])  # the last one: nothing but the evaluation is left to do
def test_ctrl_c_in_an_evaluation_stops_at_once_and_repeats_it(tmp_path, at):
    scores = {"calls": 0}

    def evaluate(host):
        scores["calls"] += 1
        if scores["calls"] == at:
            signal.raise_signal(signal.SIGINT)
        return {"loss": host.linear.weight.sum().item()}

    host = Line()
    given = GIVEN | {"evaluate": evaluate, "evaluate_every": 3}
    with pytest.raises(KeyboardInterrupt, match=f"after step {3 * at} and saved"):
        fit(host, points(5), folder=tmp_path / "parts", **given)
    assert host.training
    fit(host, points(5), folder=tmp_path / "parts", **given)
    fit(whole := Line(), points(5), folder=tmp_path / "whole", **given)
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    assert same(whole, host)
    calls = scores["calls"]
    fit(host, points(5), folder=tmp_path / "parts", **given)
    assert scores["calls"] == calls  # it was finished


def test_a_thread_trains_without_touching_signals(tmp_path):
    found = []
    thread = threading.Thread(target=lambda: found.append(fit(Line(), points(5), **GIVEN).last))
    thread.start()
    thread.join()
    assert found == [fit(Line(), points(5), **GIVEN).last]


def crashed(folder: Path, way: str) -> dict:
    """Train in ways that are killed; see `crash`."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error"}
    command = [sys.executable, str(Path(__file__).with_name("crash.py")), str(folder), way]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)  # the moments differ in every run
    return json.loads(done.stdout)


@pytest.mark.parametrize("way", ["t5", "adamw", "lion", "muon"])
def test_killed_again_and_again_it_is_the_uninterrupted_run(tmp_path, way):
    report = crashed(tmp_path, way)
    whole, runs = tmp_path / "whole", [name for name in report if name != "seconds"]
    assert sum(len(report[name]["moments"]) for name in runs) >= 10
    for parts in (tmp_path / name for name in runs):
        first, second = (load_file(f / "final.safetensors") for f in (whole, parts))
        assert all(torch.equal(first[name], second[name]) for name in first)
        for run in sorted(path.parent for path in whole.rglob("metrics.jsonl")):
            again = parts / run.relative_to(whole)
            assert curve(again) == curve(run)
            assert saved(again) == saved(run)
        if parts.name != "timed":  # in which a fast machine may have been faster
            assert not all(report[parts.name]["ended"])  # kills did happen
