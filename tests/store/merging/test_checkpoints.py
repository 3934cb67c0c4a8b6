"""Whole checkpoints merged: on real hosts, beyond memory, killed at any moment, from bad input."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.merging_memory import within
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForMaskedLM

from contract.hosts import HOSTS
from modgraft.core.errors import CheckpointError, ModgraftError
from modgraft.core.files import new_folder
from modgraft.store.merging import streamed
from modgraft.store.merging.checkpoints import merge_checkpoints
from modgraft.store.merging.streamed import RECORD
from modgraft.store.merging.table import METHODS
from store.merging.test_methods import merged

KILLS = int(os.environ.get("KILLS", "20"))
TEN_KB = {"max_shard_size": "10KB"}


def saved(folder: Path, name: str = "bert", seed: int = 0, sharded: bool = False) -> Path:
    model: Any = HOSTS[name].model(seed)
    model.save_pretrained(folder, **(TEN_KB if sharded else {}))
    return folder


def three(tmp_path: Path, name: str = "bert", sharded: bool = False) -> list[Path]:
    return [saved(tmp_path / f"m{i}", name, i, sharded and i != 1) for i in range(3)]


def weights(folder: Path) -> dict[str, Tensor]:
    return {k: t for file in folder.glob("*.safetensors") for k, t in load_file(file).items()}


def left_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# -- what comes out ------------------------------------------------------------------------------


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_merge_is_the_formula_at_every_tensor(
    method: str, sharded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of 100 numbers, one file or shards; a base, and for two methods none."""
    monkeypatch.setattr(streamed, "BLOCK", 100)
    base, *models = three(tmp_path, sharded=sharded)
    origin, *several = map(weights, (base, *models))
    out = merge_checkpoints(models, tmp_path / "out", method, base=base)
    found = weights(out)
    assert found.keys() == origin.keys()
    if method != "dare":
        for name, tensor in found.items():
            deltas = [(each[name] - origin[name]).double() for each in several]
            expected = origin[name].double() + merged(method, deltas)
            torch.testing.assert_close(tensor.double(), expected, rtol=1e-4, atol=1e-4, msg=name)
    assert len(list(out.glob("*.safetensors"))) == (len(list(base.glob("*.safetensors"))))
    model = AutoModelForMaskedLM.from_pretrained(out)
    for name, tensor in model.state_dict().items():
        if name in found:
            assert torch.equal(tensor, found[name])
    record = json.loads((out / RECORD).read_text())
    assert record["method"] == method
    assert [each["name"] for each in record["parents"]] == [str(m) for m in models]
    if not METHODS[method].needs_base:
        out = merge_checkpoints(models, tmp_path / "bare", method)
        for name, tensor in weights(out).items():
            expected = merged(method, [each[name].double() for each in several])
            torch.testing.assert_close(tensor.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "llama", "vit"])
def test_a_soup_of_real_hosts_loads(name: str, tmp_path: Path) -> None:
    models = three(tmp_path, name, sharded=True)
    out = merge_checkpoints(models, tmp_path / "out", weights=[2, 1, 1])
    kind: Any = type(HOSTS[name].model())
    model = kind.from_pretrained(out).eval()
    loaded = [kind.from_pretrained(path).state_dict() for path in models]
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            expected = (2 * loaded[0][key] + loaded[1][key] + loaded[2][key]) / 4
            torch.testing.assert_close(tensor, expected)
    with torch.no_grad():
        assert torch.isfinite(model(**HOSTS[name].batch())[0]).all()
    assert left_in(tmp_path) == {"m0", "m1", "m2", "out"}


def test_types_and_other_files_are_those_of_the_first(tmp_path: Path) -> None:
    """Half precision is summed in float32 and rounded once; whole numbers stay."""
    a = {"w": torch.tensor([1.0, 1.0]), "n": torch.tensor([3, 4]), "e": torch.zeros(0, 3)}
    b = {"w": torch.tensor([1.0 + 2**-7, 3.0]), "n": torch.tensor([3, 4]), "e": torch.zeros(0, 3)}
    for name, tensors in (("a", a), ("b", b)):
        (tmp_path / name).mkdir()
        half = {k: t.bfloat16() if t.is_floating_point() else t for k, t in tensors.items()}
        save_file(half, tmp_path / name / "model.safetensors")
        (tmp_path / name / "tokenizer.json").write_text(f'{{"version": "{name}"}}')
        (tmp_path / name / "README.md").write_text("of the parent")
        (tmp_path / name / "training_args.bin").write_text("a pickle")
        (tmp_path / name / "config.json").write_text("{}")
    out = merge_checkpoints([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    found = weights(out)
    assert found["w"].tolist() == [1.0, 2.0]  # 1 + 2⁻⁸ is no bfloat16
    assert found["w"].dtype == torch.bfloat16
    assert found["n"].tolist() == [3, 4]
    assert found["e"].shape == (0, 3)
    names = {"model.safetensors", "tokenizer.json", "config.json", RECORD}
    assert left_in(out) == names
    assert (out / "tokenizer.json").read_text() == '{"version": "a"}'
    assert out.stat().st_mode & 0o777 == (tmp_path / "a").stat().st_mode & 0o777


def test_progress_is_told_to_the_end(tmp_path: Path) -> None:
    said: list[tuple[int, int]] = []
    merge_checkpoints(three(tmp_path), tmp_path / "out", progress=lambda *a: said.append(a))
    assert said[-1][0] == said[-1][1]
    assert said == sorted(said)


def test_a_greedy_soup_of_checkpoints(tmp_path: Path) -> None:
    """The score is the closeness of one weight to a goal; candidates leave nothing behind."""
    models = three(tmp_path)
    key = next(k for k, t in weights(models[0]).items() if t.dim() == 2)
    goal = (weights(models[0])[key] + weights(models[2])[key]) / 2

    def validate(folder: Path) -> float:
        AutoModel.from_pretrained(folder)
        return -float((weights(folder)[key] - goal).norm())

    out = merge_checkpoints(models, tmp_path / "out", "greedy_soup", validate=validate)
    torch.testing.assert_close(weights(out)[key], goal)
    record = json.loads((out / RECORD).read_text())
    assert sorted(each["name"] for each in record["parents"]) == [str(models[0]), str(models[2])]
    assert left_in(tmp_path) == {"m0", "m1", "m2", "out"}
    assert not any(path.is_dir() for path in out.iterdir())


# -- bad input -----------------------------------------------------------------------------------


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1)


def other(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return apply


def wider(tensors: dict[str, Tensor]) -> None:
    name = sorted(tensors)[3]
    tensors[name] = torch.cat([tensors[name], tensors[name]])


def infinite(tensors: dict[str, Tensor]) -> None:
    tensors[sorted(tensors)[3]].fill_(torch.inf)


BAD: list[tuple[Callable[[Path], object], str]] = [
    (pickled, "holds pytorch_model.bin, a pickle, which may run anything"),
    (without_weights, "holds no weights: neither model.safetensors nor"),
    (shutil.rmtree, "is no folder"),
    (cut, "its header speaks of"),
    (other(wider), "checkpoints of one shape are merged"),
    (other(lambda t: t.pop(sorted(t)[3])), "are not of one architecture: 1 tensors are in one"),
    (other(lambda t: t.update(new=torch.zeros(1))), "new is in .*m1 and not in"),
    (other(infinite), "holds NaN or infinity: .*m1 does"),
    (lambda f: saved(f, "gpt2"), "are not of one architecture"),
]


@pytest.mark.parametrize(("spoil", "said"), BAD)
def test_a_bad_model_is_refused(spoil: Any, said: str, tmp_path: Path) -> None:
    models = three(tmp_path)
    spoil(models[1])
    before = left_in(tmp_path)
    with pytest.raises(CheckpointError, match=said):
        merge_checkpoints(models, tmp_path / "out")
    assert left_in(tmp_path) == before


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda m: m.pop(sorted(m)[0]), "do not agree about"),
        (lambda m: m.update({"x": m[sorted(m)[0]]}), "do not agree about 'x'"),
        (lambda m: m.update(dict.fromkeys(list(m), "../m0/model.safetensors")), "no file's name"),
        (lambda m: m.update(dict.fromkeys(list(m), 3)), "no file's name"),
        (lambda m: m.clear(), "has no weight_map"),
        (lambda m: m.update({sorted(m)[0]: "model-9.safetensors"}), "1 of .* shards are missing"),
    ],
)
def test_a_bad_index_is_refused(edit: Any, said: str, tmp_path: Path) -> None:
    models = three(tmp_path, sharded=True)
    index = models[0] / "model.safetensors.index.json"
    text = json.loads(index.read_text())
    edit(text["weight_map"])
    index.write_text(json.dumps(text))
    with pytest.raises(CheckpointError, match=said):
        merge_checkpoints(models, tmp_path / "out")
    assert left_in(tmp_path) == {"m0", "m1", "m2"}


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    models = three(tmp_path, sharded=True)
    gone = sorted(models[2].glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(CheckpointError, match=f"1 of .* shards are missing, {gone.name}"):
        merge_checkpoints(models, tmp_path / "out")


def test_whole_numbers_have_to_be_the_same(tmp_path: Path) -> None:
    for name, value in (("a", torch.tensor([1])), ("b", torch.tensor([2])), ("c", torch.ones(1))):
        (tmp_path / name).mkdir()
        save_file({"n": value}, tmp_path / name / "model.safetensors")
    for second, said in (("b", "holds whole numbers"), ("c", "torch.int64 .* torch.float32")):
        with pytest.raises(CheckpointError, match=said):
            merge_checkpoints([tmp_path / "a", tmp_path / second], tmp_path / "out")
    assert left_in(tmp_path) == {"a", "b", "c"}


def test_what_is_too_large_for_the_type_is_refused(tmp_path: Path) -> None:
    for name, value in (("a", 6e4), ("b", -6e4)):
        (tmp_path / name).mkdir()
        save_file({"w": torch.tensor([value]).half()}, tmp_path / name / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"too large for torch\.float16"):
        merge_checkpoints([tmp_path / "a", tmp_path / "b"], tmp_path / "out", weights=[3, -1])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "ties"}, "name that one: base='folder'"),
        ({"method": "fisher"}, "there are average"),
        ({"method": "greedy_soup"}, "takes validate="),
        ({"method": "greedy_soup", "validate": len, "weights": [1, 1]}, "no weights and no base"),
        ({"validate": len}, "takes validate="),
        ({"method": "slerp", "t": 2.0}, "t=2.0"),
        ({"weights": [1]}, "one finite number for each of 2"),
        ({"base": "nowhere"}, "nowhere is no folder"),
    ],
)
def test_what_was_asked_wrongly_is_refused(options: Any, said: str, tmp_path: Path) -> None:
    models = three(tmp_path)[:2]
    with pytest.raises(ModgraftError, match=said):
        merge_checkpoints(models, tmp_path / "out", **options)
    with pytest.raises(ModgraftError, match="is named twice"):
        merge_checkpoints([models[0]] * 2, tmp_path / "out")
    assert "out" not in left_in(tmp_path)


def test_other_configurations_are_warned_of(tmp_path: Path) -> None:
    models = three(tmp_path)
    config = models[1] / "config.json"
    config.write_text(
        config.read_text().replace('"num_attention_heads": 2', '"num_attention_heads": 4')
    )
    with pytest.warns(UserWarning, match="differ in num_attention_heads"):
        merge_checkpoints(models, tmp_path / "out")


# -- where it is written -------------------------------------------------------------------------


def test_a_place_that_is_taken_is_left_alone(tmp_path: Path) -> None:
    models = three(tmp_path)
    full, empty, file = (tmp_path / name for name in ("full", "empty", "file"))
    full.mkdir()
    empty.mkdir()
    (full / "mine").write_text("mine")
    file.write_text("mine")
    with pytest.raises(ModgraftError, match="is there and not empty"):
        merge_checkpoints(models, full)
    with pytest.raises(ModgraftError, match="is a file"):
        merge_checkpoints(models, file)
    with pytest.raises(ModgraftError, match="path of a folder"):
        merge_checkpoints(models, "a\0b")
    merge_checkpoints(models, empty)
    assert left_in(full) == {"mine"}
    assert "model.safetensors" in left_in(empty)
    assert left_in(tmp_path) == {"m0", "m1", "m2", "full", "empty", "file"}


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = three(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 9))  # type: ignore[attr-defined]
        with pytest.raises(CheckpointError, match="and its disk has 9; make room"):
            merge_checkpoints(models, tmp_path / "out")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(ModgraftError, match=r"out cannot be written to .* as it was"):
            merge_checkpoints(models, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert left_in(tmp_path) == {"m0", "m1", "m2"}


def test_no_permission_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may write anywhere: the system's answer is given in its place."""
    models = three(tmp_path)

    def refused(path: Path, *args: Any, **more: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "mkdir", refused)
        with pytest.raises(ModgraftError, match=r"out cannot be written to \(Permission denied\)"):
            merge_checkpoints(models, tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", refused)
        with pytest.raises(
            CheckpointError, match=r"safetensors cannot be read \(Permission denied"
        ):
            merge_checkpoints(models, tmp_path / "out")
    assert left_in(tmp_path) == {"m0", "m1", "m2"}


def test_two_at_one_place_do_not_mix(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out") as part:
        (part / "a").write_text("a")
        with pytest.raises(ModgraftError, match="another process is writing"):
            merge_checkpoints(three(tmp_path), tmp_path / "out")
    assert left_in(tmp_path / "out") == {"a"}


# -- beyond memory -------------------------------------------------------------------------------


def test_a_checkpoint_twice_the_memory_limit_is_merged(tmp_path: Path) -> None:
    """One tensor of it alone is larger than the limit; the peak of resident memory is below it."""
    found = within(tmp_path)
    assert found.size > 2 * found.limit
    assert found.resident < found.limit
    assert found.data < found.limit
    assert found.last == 1 + (1 + 2) / 2
    shutil.rmtree(tmp_path)


# -- killed --------------------------------------------------------------------------------------

MERGING = """
import os, sys
from modgraft.store.merging import checkpoints, streamed
streamed.BLOCK = 500
for line in sys.stdin:
    *models, out = line.split()
    if (child := os.fork()) == 0:
        checkpoints.merge_checkpoints(models, out)
        os._exit(0)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


def killed_merges(folder: Path, count: int, seed: int = 0) -> int:
    """Kill a merge at ``count`` random moments; return how often the new folder was there already.

    It is there whole, or not at all, and the next merge removes what was left.
    """
    models = three(folder, sharded=True)
    expected: dict[str, bytes] = {}
    chosen, longest, finished = random.Random(seed), 0.0, 0
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", MERGING], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=env,
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        for number in range(count + 1):
            out = folder / f"out{number}"
            print(*models, out, file=process.stdin, flush=True)
            child = int(process.stdout.readline())
            start = time.perf_counter()
            if number:
                time.sleep(chosen.uniform(0, 1.1 * longest))
                with suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            process.stdout.readline()
            if number == 0:
                longest = time.perf_counter() - start
                expected = {path.name: path.read_bytes() for path in out.iterdir()}
            elif out.exists():
                finished += 1
            else:
                merge_checkpoints(models, out)
            assert {path.name: path.read_bytes() for path in out.iterdir()} == expected
            assert left_in(folder) == {"m0", "m1", "m2", out.name}
            shutil.rmtree(out)
        process.stdin.close()
    return finished


def test_a_killed_merge_is_whole_or_not_there(tmp_path: Path) -> None:
    assert killed_merges(tmp_path, KILLS) < KILLS
