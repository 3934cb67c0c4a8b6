"""Read and check a run's folder: results, predictions, loss curves, gates, images."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from modgraft.core.errors import DataError, MissingFileError
from modgraft.data.records import Skipped

Percent = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Key = Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.+-]*$")]
Group = Literal["main", "control", "ablation"]
T = TypeVar("T")
L = TypeVar("L", bound=BaseModel)

REMEDY = "Write the run again, or move this file away to leave it out of the report."


class _Model(BaseModel):
    # Recipes may write more than the report shows: unknown fields are no error.
    model_config = ConfigDict(extra="ignore", frozen=True)


class Metrics(_Model):
    """The results of one row with one seed. Percentages are in 0..100; None is not measured.

    `chance` is the accuracy of guessing by column. `parameters` are all of the models that the row
    trained, `trained` and `fusion` parts of them; a row that tests another one's models has none.
    """

    accuracy: Percent | None = None
    image: Percent | None = None
    columns: dict[str, Percent | None] = Field(default_factory=dict)
    families: dict[str, Percent | None] = Field(default_factory=dict)
    family_sizes: dict[str, int] = Field(default_factory=dict)
    rouge_l: Percent | None = None
    bleu_1: Percent | None = None
    bleu_4: Percent | None = None
    exact: Percent | None = None
    facts: Percent | None = None
    errors: dict[str, int] | None = None
    chance: dict[str, Percent | None] = Field(default_factory=dict)
    parameters: int | None = None
    trained: int | None = None
    fusion: int | None = None
    seconds: float | None = None
    n: int | None = None


class Row(_Model):
    """One row of the result table: a model or a control, measured with some of the seeds."""

    key: Key
    title: str
    group: Group = "main"
    note: str = ""
    leak: bool | None = None
    seeds: dict[int, Metrics] = Field(default_factory=dict)

    @property
    def leaks(self) -> bool:
        """Whether the model saw part of what it had to write, which makes its figures no result."""
        if self.leak is None:
            return "teacher" in self.key and "forced" in self.key
        return self.leak


class Results(_Model):
    """The contents of `results.json`.

    `task` says what is asked of the models; `command`, `commit` and `versions` wrote the results.
    `titles` maps the folders of trained models to their titles; `notes` are for the reader. `split`
    was tested; `scienceqa` is whether its questions have ScienceQA's columns; `not_shown` maps a
    section of the page to why there is nothing to show.
    """

    name: str
    created: str = ""
    task: str = ""
    command: str = ""
    commit: str = ""
    versions: str = ""
    settings: dict[str, Any] = Field(default_factory=dict)
    seeds: list[int] = Field(default_factory=list)
    titles: dict[str, str] = Field(default_factory=dict)
    notes: list[str] = Field(default_factory=list)
    skipped: list[Skipped] = Field(default_factory=list)
    split: str = "test"
    scienceqa: bool = False
    not_shown: dict[str, str] = Field(default_factory=dict)
    rows: list[Row] = Field(default_factory=list)

    @property
    def tested(self) -> str:
        """What was tested: "test questions", or questions of another split."""
        return "test questions" if self.split == "test" else f"questions of the split {self.split}"

    @model_validator(mode="after")
    def _keys_differ(self) -> Self:
        keys = [row.key for row in self.rows]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if twice:
            raise ValueError(f"rows must have different keys; {', '.join(twice)} is there twice")
        return self


class Prediction(_Model):
    """A line of `predictions.jsonl`: what a model answered to one question.

    `text` is what the answering stage wrote, `choice` the option that it states (None if none can
    be read), and `error` the step that failed, if that is known.
    """

    id: str
    category: str = ""
    question: str
    choices: list[str] = Field(min_length=1)
    answer: int
    image: bool
    gold_rationale: str | None = None
    rationale: str | None = None
    text: str | None = None
    choice: int | None = None
    correct: bool
    error: str | None = None

    @model_validator(mode="after")
    def _options_exist(self) -> Self:
        for name, index in (("answer", self.answer), ("choice", self.choice)):
            if index is not None and not 0 <= index < len(self.choices):
                raise ValueError(f"{name} {index} is not one of {len(self.choices)} choices")
        return self


class Gate(_Model):
    """The fusion of one question: `attention` [n tokens][m patches] and `gate` [n tokens]."""

    id: str
    question: str
    choices: list[str] = Field(default_factory=list)
    image: list[list[float]] = Field(min_length=1)
    tokens: list[str] = Field(min_length=1)
    attention: list[list[Share]]
    gate: list[Share]
    grid: tuple[int, int] | None = None
    rationale: str | None = None
    text: str | None = None
    correct: bool | None = None

    @model_validator(mode="after")
    def _sizes_agree(self) -> Self:
        n = len(self.tokens)
        if len(self.attention) != n or len(self.gate) != n:
            raise ValueError(
                f"{n} tokens need {n} gates and {n} rows of attention; "
                f"there are {len(self.gate)} and {len(self.attention)}"
            )
        for name, rows in (("image", self.image), ("attention", self.attention)):
            if len({len(row) for row in rows}) != 1 or not rows[0]:
                raise ValueError(f"{name}: rows of one length, not empty, are needed")
        grid_of(len(self.attention[0]), len(self.image), len(self.image[0]), self.grid)
        return self


class Point(_Model):
    """One line of `metrics.jsonl`; the loss may be NaN or infinite."""

    step: int
    split: str
    loss: float | None = None


def grid_of(
    patches: int, height: int, width: int, grid: tuple[int, int] | None = None
) -> tuple[int, int]:
    """Return the rows and columns of patches in reading order over an image [height, width].

    Without `grid`, patches are as square as possible.

    Raises:
        ValueError: `grid` does not have that many patches.
    """
    if grid is not None:
        if grid[0] * grid[1] != patches or min(grid) < 1:
            raise ValueError(f"a grid of {grid[0]} x {grid[1]} has no room for {patches} patches")
        return grid
    rows = [r for r in range(1, patches + 1) if patches % r == 0]

    def stretch(r: int) -> float:
        ratio = (height / r) / (width / (patches // r))
        return max(ratio, 1 / ratio)

    best = min(rows, key=stretch)
    return best, patches // best


@dataclass(frozen=True)
class Run:
    """The contents of a run's folder, as far as the report shows them.

    Attributes:
        folder: The run's folder.
        results: `results.json`, or None if the run was interrupted before it was written.
        predictions: Row key -> seed -> predictions.
        curves: Model key -> seed -> points in order of their step.
        gates: (seed, gate) for each question whose fusion was recorded.
        images: Question id -> values [height][width] in 0..1, where 1 is ink.
        notes: Sentences for the reader about missing or truncated files.
    """

    folder: Path
    results: Results | None
    predictions: dict[str, dict[int, list[Prediction]]] = field(default_factory=dict)
    curves: dict[str, dict[int, list[Point]]] = field(default_factory=dict)
    gates: list[tuple[int, Gate]] = field(default_factory=list)
    images: dict[str, list[list[float]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_results(path: Path) -> Results:
    """Read a `results.json`; a DataError names the file and the wrong field."""
    return _parse(TypeAdapter(Results), _text(path), path)


def check(results: Mapping[str, Any]) -> Results:
    """Check the content of a `results.json`; a DataError names the wrong field."""
    try:
        return Results.model_validate(dict(results))
    except ValidationError as error:
        raise DataError(
            _reasons(error.errors()), remedy="Pass the content of a results.json."
        ) from error


def read_run(folder: Path) -> Run:
    """Read a run's folder; a missing file becomes a note.

    Raises:
        MissingFileError: The folder does not exist, or holds no run.
        DataError: A file cannot be read; the message names file, line and field.
    """
    if not folder.is_dir():
        raise MissingFileError(
            "there is no such folder", file=folder, remedy="Name a folder under runs/."
        )
    seeds = sorted(_seed_folders(folder))
    has_results = (folder / "results.json").is_file()
    if not has_results and not seeds:
        raise MissingFileError(
            "no run is in this folder: neither results.json nor a seed<k> folder",
            file=folder,
            remedy="Train first: modgraft mmcot train.",
        )
    run = Run(folder, read_results(folder / "results.json") if has_results else None)
    if run.results is None:
        run.notes.append(
            "The run was interrupted: results.json is not written, so there is no table of "
            "results. What was written until then is shown."
        )
    else:
        run.notes.extend(run.results.notes)
        run.notes.extend(
            f"Question {s.id} was left out ({s.file}): {s.reason}" for s in run.results.skipped
        )
    for seed, path in seeds:
        _read_seed(run, seed, path)
    images = folder / "images.json"
    if images.is_file():
        run.images.update(_parse(TypeAdapter(dict[str, list[list[float]]]), _text(images), images))
    for _, gate in run.gates:
        run.images.setdefault(gate.id, gate.image)
    return run


def _seed_folders(folder: Path) -> Iterator[tuple[int, Path]]:
    for path in folder.glob("seed*"):
        number = path.name.removeprefix("seed")
        if path.is_dir() and number.isdecimal():
            yield int(number), path


def _read_seed(run: Run, seed: int, folder: Path) -> None:
    for path in sorted(folder.glob("*/metrics.jsonl")):
        points = sorted(_lines(Point, path, run), key=lambda point: point.step)
        if points:
            run.curves.setdefault(path.parent.name, {})[seed] = points
        else:
            run.notes.append(f"{_name(path, run)} has no line yet.")
    for path in sorted(folder.glob("*/predictions.jsonl")):
        run.predictions.setdefault(path.parent.name, {})[seed] = _lines(Prediction, path, run)
    path = folder / "gates.json"
    if path.is_file():
        gates = _parse(TypeAdapter(list[Gate]), _text(path), path)
        run.gates.extend((seed, gate) for gate in gates)


def _name(path: Path, run: Run) -> str:
    return path.relative_to(run.folder).as_posix()


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 text ({error})", file=path, remedy=REMEDY) from error


def _lines(model: type[L], path: Path, run: Run) -> list[L]:
    """Read one object from each line. An interruption may have cut off the last line."""
    text = _text(path)
    *lines, last = text.split("\n")
    if last.strip():
        try:
            json.loads(last)
        except ValueError:
            run.notes.append(f"The last line of {_name(path, run)} was cut off, and is left out.")
        else:
            lines.append(last)
    adapter = TypeAdapter(model)
    return [
        _parse(adapter, line, path, number) for number, line in enumerate(lines, 1) if line.strip()
    ]


def _parse(adapter: TypeAdapter[T], text: str, path: Path, line: int | None = None) -> T:
    where = f"line {line}: " if line is not None else ""
    try:
        # not pydantic's parser: json also reads the NaN of a diverged training
        raw = json.loads(text)
    except ValueError as error:
        raise DataError(f"{where}not JSON ({error})", file=path, remedy=REMEDY) from error
    try:
        return adapter.validate_python(raw)
    except ValidationError as error:
        raise DataError(where + _reasons(error.errors()), file=path, remedy=REMEDY) from error


def _reasons(errors: Sequence[Any]) -> str:
    shown, most = [], 3
    for error in errors[:most]:
        place = ".".join(str(part) for part in error["loc"]) or "the whole"
        found = repr(error["input"])
        found = found if len(found) <= 60 else found[:57] + "..."
        shown.append(f"{place}: {error['msg']} (found {found})")
    more = f"; and {len(errors) - most} more" if len(errors) > most else ""
    return "; ".join(shown) + more
