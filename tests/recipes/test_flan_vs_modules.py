"""The recipe at a tiny size: its arms are what they are called, and nothing forgets by accident."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from modgraft.core.files import write_json
from modgraft.data.families import FAMILIES
from modgraft.log import parse
from modgraft.log.check import check
from modgraft.log.record.runs import plain
from modgraft.recipes import trials
from modgraft.recipes.flan_vs_modules.experiment import Experiment
from modgraft.recipes.flan_vs_modules.recipe import (
    NEW,
    RECIPE,
    ROWS,
    TRAINED,
    add_module,
    fine_tune,
    implant_router,
    known_families,
    lora_per_family,
    routed_shares,
    with_rehearsal,
)

TINY = replace(
    RECIPE.settings, train=60, val=2, test=4, shots=8, vocabulary=300, d_model=32, d_ff=32,
    heads=2, layers=1, steps_pretrain=3, steps=2, steps_few=2, batch=8, longest=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run of one seed, trained in this process."""
    folder = tmp_path_factory.mktemp("run")
    asked = {"recipe": "flan_vs_modules", "settings": asdict(TINY), "seeds": [0]}
    write_json(folder / "run.json", asked)
    trials.run_seed("flan_vs_modules", folder, 0)
    return folder, trials.run(trials.find_recipe("flan_vs_modules"), folder, TINY, [0], jobs=1)


@pytest.fixture(scope="module")
def experiment(
    run: tuple[Path, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Experiment:
    """Of the same seed: what was trained there is read."""
    folder = tmp_path_factory.mktemp("lab") / "seed0"
    return Experiment(shutil.copytree(run[0] / "seed0", folder), TINY, 0, TRAINED, NEW)


def test_a_run_measures_every_arm(run: tuple[Path, dict[str, Any]]) -> None:
    folder, results = run
    assert list(results["rows"]) == list(ROWS)
    for key, seeds in results["rows"].items():
        row = seeds["0"]
        assert all(0 <= row[f] <= 100 for f in TRAINED)
        assert (NEW in row) == (key not in ("oracle", "alone"))
        assert ("sent" in row) == ("routed" in ROWS[key])
    cost = {key: seeds["0"]["steps"] for key, seeds in results["rows"].items()}
    assert cost["one"] == cost["lora"] == cost["routed"] == cost["alone"] == 4 * TINY.steps
    assert cost["all_again"] == 5 * TINY.steps
    assert cost["all_one"] == cost["all_module"] == TINY.steps
    assert (folder / "plot.png").stat().st_size > 10_000
    console = Console(width=240, record=True)
    trials.show(folder, console)
    assert "A LoRA a family, routed" in console.export_text()


def test_a_run_writes_one_note_with_its_table(
    run: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(run[0], tmp_path / "flan"))
    for path in [folder / "seed0" / "figures.json", *folder.rglob("note.md")]:
        path.unlink()
    trials.run(trials.find_recipe("flan_vs_modules"), folder, TINY, [0], jobs=1)
    assert list(folder.rglob("note.md")) == [folder / "note.md"]  # the nets' trainings write none
    note = parse((folder / "note.md").read_bytes())
    assert not [p for p in check(folder / "note.md") if p.severity != "info"]
    assert [f.target for f in note.figures] == ["plot.png"]
    for title in ROWS.values():
        assert f"\n- {plain(title)}: " in note.text
    assert [e.action for e in note.events] == ["start", "return"]
    before = note.data
    trials.run(trials.find_recipe("flan_vs_modules"), folder, TINY, [0], jobs=1)
    assert (folder / "note.md").read_bytes() == before


def test_a_finished_seed_is_read_and_not_trained(
    run: tuple[Path, dict[str, Any]], experiment: Experiment
) -> None:
    before = {p: p.stat().st_mtime_ns for p in experiment.folder.rglob("*.safetensors")}
    assert len(before) >= 1 + 2 + 4 + 4 + 8
    torch.manual_seed(0)
    arms = known_families(experiment)
    for key, arm in arms.items():
        first = run[1]["rows"][key]["0"]
        assert (arm.cost["trained"], arm.cost["steps"]) == (first["trained"], first["steps"])
        assert experiment.accuracy(arm, "signatures") == first["signatures"]
    assert before == {p: p.stat().st_mtime_ns for p in experiment.folder.rglob("*.safetensors")}


def test_a_module_more_leaves_the_others_to_the_bit(experiment: Experiment) -> None:
    torch.manual_seed(0)
    arm = lora_per_family(experiment)
    asked = experiment.tokenizer(["which day is it ?"], return_tensors="pt")
    batch = {**asked, "labels": torch.tensor([[7, 8, 1]])}

    def read(name: str) -> torch.Tensor:
        with torch.no_grad():
            return arm.host(**batch, modules=name).logits

    before = {f: read(f) for f in TRAINED}
    examples = experiment.splits[NEW].train[:32]
    more = add_module(experiment, arm.host, "more", examples, 2, begin="words")
    assert more.trained == arm.host["words"].size
    assert more.modules == "more_router"
    assert all(torch.equal(read(f), before[f]) for f in TRAINED)
    assert not torch.equal(read("more"), before["words"])

    implant_router(experiment, arm.host, "before", {f: experiment.splits[f].train for f in TRAINED})
    old, new = (arm.host[n].places[0].route.embeddings for n in ("before", "more_router"))
    assert torch.equal(old, new[:-1])  # a family more leaves the others' embeddings as they are

    shares = routed_shares(experiment, arm.host, "more_router", examples[:16])
    assert list(shares) == [*TRAINED, "more"]
    assert sum(shares.values()) == pytest.approx(100)
    assert max(shares, key=lambda n: shares[n]) == "more"


def test_a_copy_is_tuned_and_its_origin_is_not(experiment: Experiment) -> None:
    begin = experiment.host()
    before = {k: v.clone() for k, v in begin.model.state_dict().items()}
    arm = fine_tune(experiment, "copy", begin, experiment.splits[NEW].train, 2)
    after = begin.model.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert not torch.equal(arm.host.model.shared.weight, after["shared.weight"])  # type: ignore[union-attr]


def test_rehearsal_has_as_much_of_the_old(experiment: Experiment) -> None:
    few = experiment.splits[NEW].train[:8]
    mixed = with_rehearsal(experiment, few)
    assert sum(e.family == NEW for e in mixed) == sum(e.family != NEW for e in mixed) == 32
    assert {e.family for e in mixed} == set(FAMILIES)


def test_only_the_whole_target_with_its_end_is_right(experiment: Experiment) -> None:
    labels = torch.tensor([9, 8, 1, -100, -100])
    wrong = ([0, 9, 8, 7, 1], [0, 9, 1], [0, 9, 8, 8], [0, 1])
    assert experiment._writes(torch.tensor([0, 9, 8, 1, 0, 0]), labels)
    assert not any(experiment._writes(torch.tensor(w), labels) for w in wrong)
