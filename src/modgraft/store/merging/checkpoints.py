"""Merges whole checkpoints, the folders that ``save_pretrained`` writes, of any size.

The new folder appears with one rename, when all of it is on the disk: until then there is none.
How its tensors are made, in blocks, is :mod:`modgraft.store.merging.streamed`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from modgraft.core.errors import CheckpointError, ModgraftError
from modgraft.core.files import folder_path, new_folder, write_json
from modgraft.store.merging.alike import check_alike
from modgraft.store.merging.soup import greedy
from modgraft.store.merging.streamed import RECORD, Merging, Progress
from modgraft.store.merging.table import METHODS, SOUP, Asked, asked
from modgraft.store.merging.vocabularies import check_vocabularies
from modgraft.store.merging.weights import Checkpoint


def merge_checkpoints(
    models: Sequence[str | Path],
    out: str | Path,
    method: str = "average",
    *,
    base: str | Path | None = None,
    weights: Sequence[float] | None = None,
    validate: Callable[[Path], float] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Path:
    """Merge checkpoints of one architecture into a new one, which ``from_pretrained`` loads.

    With a base, Δᵢ = θᵢ − θ₀ is merged and added to θ₀; without, ``average``, ``slerp`` and
    ``greedy_soup`` merge the weights θᵢ themselves. It is computed in float32 and rounded once, to
    the types of the base, or else of the first model, whose configuration and tokenizer come along.

    Args:
        models: the folders.
        out: the new folder; one that is there must be empty.
        method: see :func:`modgraft.merge`.
        base: the folder of the checkpoint that they were all trained from.
        weights: one for each model; None: 1.
        validate: the score of a candidate's folder, for ``greedy_soup``; higher is better.
        progress: told how many numbers are merged, and how many there are.
        **options: those of the method.

    Returns:
        ``out``. Its ``modgraft_merge.json`` says what it was made of, and which tensors a method of
        matrices has averaged because they are none.

    Raises:
        CheckpointError: for a folder of pickles, a missing shard, checkpoints of other tensors or
            shapes, tokenizers that have another word for an id, a disk that is full. There is no
            ``out`` then.
        ModgraftError: for an unknown method or option, or a missing base.
    """
    target = folder_path(out, "merge_checkpoints")
    if isinstance(models, str | Path):
        raise ModgraftError(f"merge_checkpoints({str(models)!r:.80}, …): give a list of folders")
    how = _asked(method, len(models), base, weights, validate, options)
    with ExitStack() as opened:
        paths = [Path(each) for each in (*([] if base is None else [base]), *models)]
        several = _opened(paths, opened)
        start = None if base is None else several.pop(0)
        with new_folder(target) as folder:
            _check_room(folder, target, (start or several[0]).nbytes)
            said: dict[str, Any] = {"method": method, "options": dict(how.options)}
            if validate is not None:
                several, scores = _chosen(several, folder, validate)
                how = asked("average", len(several), None, {})
                said |= scores
            said["averaged"] = Merging(how, start, several).write(folder, progress)
            said["base"] = start and {"name": str(start.folder), "files": start.digests()}
            said["parents"] = [
                {"name": str(model.folder), "weight": weight, "files": model.digests()}
                for model, weight in zip(several, how.weights, strict=True)
            ]
            write_json(folder / RECORD, said)
    return target


def _asked(
    method: str,
    count: int,
    base: str | Path | None,
    weights: Sequence[float] | None,
    validate: Callable[[Path], float] | None,
    options: Mapping[str, Any],
) -> Asked:
    """Return the method as it was asked for; of a greedy soup, the average that it is."""
    if (validate is not None) != (method == SOUP):
        raise ModgraftError(
            f"method={SOUP!r} takes validate=, a function of a checkpoint's folder that returns "
            f"its score, and no other method does"
        )
    if method == SOUP and (weights is not None or base is not None):
        raise ModgraftError(f"method={SOUP!r} takes no weights and no base: it is an average")
    how = asked("average" if method == SOUP else method, count, weights, options)
    if base is None and METHODS[how.name].needs_base:
        raise ModgraftError(
            f"{method} merges what models have learned since they were one; name that one: "
            f"base='folder'"
        )
    return how


def _opened(paths: Sequence[Path], opened: ExitStack) -> list[Checkpoint]:
    """Open checkpoints of one architecture, until ``opened`` is left."""
    if twice := [path for path in paths if paths.count(path) > 1]:
        raise ModgraftError(f"{twice[0]} is named twice; give it twice the weight instead")
    several = [opened.enter_context(closing(Checkpoint(path))) for path in paths]
    check_alike(several)
    check_vocabularies(paths)
    return several


def _check_room(folder: Path, target: Path, size: int) -> None:
    if (free := shutil.disk_usage(folder).free) < size:
        raise CheckpointError(
            f"{target} takes {size:,} bytes, and its disk has {free:,}; make room, or choose "
            f"another disk"
        )


def _chosen(
    models: Sequence[Checkpoint], part: Path, validate: Callable[[Path], float]
) -> tuple[list[Checkpoint], dict[str, Any]]:
    """Choose the models of a greedy soup; return them, and the scores."""
    named = {str(model.folder): model for model in models}

    def score(names: Sequence[str]) -> float:
        some = [named[name] for name in names]
        if len(some) == 1:
            return validate(some[0].folder)
        with TemporaryDirectory(dir=part) as folder:
            Merging(asked("average", len(some), None, {}), None, some).write(Path(folder))
            return validate(Path(folder))

    soup = greedy(list(named), score)
    return [named[name] for name in soup.chosen], {"alone": soup.alone, "score": soup.score}
