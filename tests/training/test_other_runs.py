"""A folder is resumed by the run that it is of: the same rows, modules, dropout and composition."""

from __future__ import annotations

import json
import random
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import modgraft as mg
from training.tiny import Pairs, collate, loader, t5

GIVEN = {"steps": 6, "save_every": 2, "evaluate_every": 5, "progress": False, "ignore": ("ids",)}


class StopError(Exception):
    pass


def stopped(data: Any, folder: Path, **given: Any) -> None:
    """Train until step 5, so that the last checkpoint is that of step 4."""

    def stop(_: Any) -> dict[str, float]:
        raise StopError

    with pytest.raises(StopError):
        host().fit(data, train="a", folder=folder, evaluate=stop, **(GIVEN | given))


def host(alpha: float = 4.0, dropout: float = 0.1, at: str = "query", **lora: Any) -> mg.Host:
    torch.manual_seed(2)
    made = mg.Host(t5(dropout=dropout))
    made.implant("a", mg.LoRA(rank=2, alpha=alpha, **lora), at=at)
    made.implant("b", mg.LoRA(rank=2), at=at, active=False)
    return made


def rows(change: int | None = None) -> DataLoader:
    """Return batches with the same ids, of which one row may be another."""
    data = Pairs(noisy=False)
    if change is not None:
        data.rows[change] = data.rows[change].flip(0)
    return DataLoader(data, batch_size=4, collate_fn=collate)


def using(composition: str) -> mg.Host:
    made = host()
    made.use(composition)
    return made


@pytest.mark.parametrize(
    ("other", "data", "words"),
    [
        (lambda: host(alpha=8.0), rows(), r"implants\.a: .*alpha=4.0.* there, .*alpha=8.0.* here"),
        (lambda: host(dropout=0.5), rows(), r"Dropout\(p=0.1.* there, .*Dropout\(p=0.5.* here"),
        (lambda: host(at="key"), rows(), r"implants\.a: .*SelfAttention\.q.* there, .*SelfAtt.*k"),
        (lambda: using("a >> b"), rows(), "composition: 'a' there, 'a >> b' here"),
        (host, rows(change=0), "other data .*the first batch: '[0-9a-f]+' there, '[0-9a-f]+' here"),
        (host, rows(change=14), "other data .*the batch of step 4: "),
    ],
    ids=["alpha", "dropout", "sites", "composition", "first row", "last row"],
)
def test_another_run_is_refused(other: Any, data: DataLoader, words: str, tmp_path: Path) -> None:
    stopped(rows(), tmp_path)
    with pytest.raises(mg.ModgraftError, match=words):
        other().fit(data, train="a", folder=tmp_path, **GIVEN)
    assert host().fit(rows(), train="a", folder=tmp_path, **GIVEN).resumed_from == 4


def test_lists_of_batches_are_told_apart(tmp_path: Path) -> None:
    batches, others = list(rows()), list(rows(change=14))
    stopped(batches, tmp_path)
    with pytest.raises(mg.ModgraftError, match="the batch of step 4"):
        host().fit(others, train="a", folder=tmp_path, **GIVEN)
    assert host().fit(batches, train="a", folder=tmp_path, **GIVEN).resumed_from == 4


def test_a_run_that_has_ended_refuses_other_rows(tmp_path: Path) -> None:
    first = host().fit(rows(), train="a", folder=tmp_path, **GIVEN)
    with pytest.raises(mg.ModgraftError, match=r"other data .*the first batch"):
        host().fit(rows(change=0), train="a", folder=tmp_path, **GIVEN)
    assert host().fit(rows(), train="a", folder=tmp_path, **GIVEN).losses == first.losses


def rewritten(path: Path, version: int) -> None:
    """Let a checkpoint be one of another version: 2 said nothing of the data and the modules."""
    prints = {
        name: said
        for name, said in _read(path / "fingerprint.json").items()
        if isinstance(said, dict)
    }
    (path / "fingerprint.json").write_text(json.dumps(prints))
    state = _read(path / "state.json")
    file = (path / "fingerprint.json").read_bytes()
    state["files"]["fingerprint.json"] = {"bytes": len(file), "sha256": sha256(file).hexdigest()}
    given = {k: v for k, v in state.items() if k not in ("rows", "at", "sha256")}
    given["format"] = f"modgraft.checkpoint/{version}"
    given["sha256"] = sha256(json.dumps(given).encode()).hexdigest()
    (path / "state.json").write_text(json.dumps(given))


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def test_a_run_of_the_version_before_goes_on(tmp_path: Path) -> None:
    whole = host()
    whole.fit(rows(), train="a", **GIVEN)
    stopped(rows(), tmp_path)
    path = max((tmp_path / "checkpoints").iterdir())
    rewritten(path, 9)
    with pytest.raises(mg.ModgraftError, match=r"another version of modgraft.*resume=False"):
        host().fit(rows(), train="a", folder=tmp_path, **GIVEN)
    rewritten(path, 2)
    resumed = host()
    with pytest.warns(UserWarning, match="an earlier version of modgraft"):
        resumed.fit(rows(), train="a", folder=tmp_path, **GIVEN)
    for a, b in zip(resumed["a"].parameters(), whole["a"].parameters(), strict=True):
        assert torch.equal(a, b)


def test_rows_that_differ_at_every_reading_tell_nothing(tmp_path: Path) -> None:
    class Augmented(Pairs):
        own = random.Random(0)  # a generator that nobody seeds

        def __getitem__(self, i: int) -> dict[str, Any]:
            return super().__getitem__(i) | {"extra": self.own.random()}

    data = DataLoader(
        Augmented(),
        batch_size=4,
        collate_fn=lambda r: collate(r) | {"extra": [o["extra"] for o in r]},
    )
    given = GIVEN | {"ignore": ("ids", "extra")}
    with pytest.warns(UserWarning, match="an Augmented gives other rows at every reading"):
        stopped(data, tmp_path, **given)
    with (
        pytest.warns(UserWarning, match="an Augmented gives other rows at every reading"),
        pytest.warns(UserWarning, match="others when they are read again"),
    ):
        assert host().fit(data, train="a", folder=tmp_path, **given).resumed_from == 4


def test_a_collate_function_that_draws_by_itself_is_named(tmp_path: Path) -> None:
    own = random.SystemRandom()

    def collate_anew(rows: list[Any]) -> dict[str, Any]:
        return collate(rows) | {"extra": own.random()}

    data = DataLoader(Pairs(), batch_size=4, collate_fn=collate_anew)
    with pytest.warns(UserWarning, match="collate_fn makes other batches of the same rows"):
        host().fit(data, train="a", folder=tmp_path, **GIVEN | {"ignore": ("ids", "extra")})


def test_the_loader_of_the_other_tests_is_read_the_same_twice() -> None:
    data = loader()
    assert [b["ids"] for b in data] != [b["ids"] for b in data]  # it shuffles
