"""Which layers the options of a folder mean; a pattern that may take long is not run."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from modgraft.core.errors import CheckpointError, ModgraftError
from modgraft.core.layers import LINEAR
from modgraft.store.formats.heads import asked
from modgraft.store.formats.peft.options import CONFIG, Targeted


def targets(said: Targeted, layers: Mapping[str, nn.Module], model: nn.Module) -> set[str] | None:
    """Return the paths that PEFT would change; None where its pattern is not run.

    A pattern that may take long on some text is not run: a stranger has written it.

    Args:
        said: the options.
        layers: those that can be changed, by path.
        model: the host's, whose head ``"all-linear"`` leaves out.
    """
    target, excluded = said.target_modules, said.exclude_modules
    if isinstance(target, str) and target.lower() == "all-linear":
        target = _every_linear(said, layers, model)
        said = said.model_copy(update={"target_modules": target})
    above = said.layers_pattern or []
    plain = [*(said.modules_to_save or ()), *([above] if isinstance(above, str) else above)]
    if not all(re.fullmatch(r"[\w.]+", text) for text in plain):
        return None
    if not all(is_quick(text) for text in (target, excluded) if isinstance(text, str)):
        return None
    return {path for path in layers if _is_target(said, path)}


def _every_linear(said: Targeted, layers: Mapping[str, nn.Module], model: nn.Module) -> list[str]:
    """Return the linear layers but the head, as PEFT knows it in a model of transformers."""
    head = None
    if isinstance(model, PreTrainedModel):
        head = asked(model, "get_output_embeddings")
        if head is None and said.task_type == "SEQ_CLS":
            heads = (getattr(model, name, None) for name in ("score", "classifier"))
            head = next((each for each in heads if each is not None), None)
    return [path for path, m in layers.items() if isinstance(m, LINEAR) and m is not head]


def _is_target(said: Targeted, path: str) -> bool:
    if said.exclude_modules and _named(said.exclude_modules, path):
        return False
    if any(re.match(rf"(^|.*\.){m}($|\..*)", path) for m in said.modules_to_save or ()):
        return False
    if not said.target_modules or not _named(said.target_modules, path):
        return False
    which = said.layers_to_transform
    if which is None or which == [] or isinstance(said.target_modules, str):
        return True
    if path in said.target_modules:
        return True
    patterns = said.layers_pattern or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    before = [rf"(?:^|.*?\.){pattern}" for pattern in patterns] or [r".*?\.[^.]*"]
    matches = (re.match(rf"{each}\.(\d+)\.", path) for each in before)
    found = next((match for match in matches if match), None)
    number = None if found is None else int(found[1])
    return number == which if isinstance(which, int) else number in which


def _named(selection: list[str] | str, path: str) -> bool:
    """Return whether a list names a path or its end, or a pattern matches it."""
    if isinstance(selection, str):
        return re.fullmatch(selection, path) is not None
    return path in selection or any(path.endswith(f".{name}") for name in selection)


def ends_in(selection: list[str] | str, path: str) -> bool | None:
    """Return whether a path ends as a list says or matches a pattern; None: that is not run."""
    if isinstance(selection, list):
        return any(path.endswith(name) for name in selection)
    return bool(re.fullmatch(selection, path)) if is_quick(selection) else None


def is_quick(pattern: str, most: int = 3) -> bool:
    """Return whether a regular expression takes little time on any path.

    It repeats no groups, and nothing else more than ``most`` times.
    """
    text = re.sub(r"\\[\w.]|\[[^\]\\\[]*\]", "x", pattern)
    if len(pattern) > 20_000 or re.search(r"[^\w.\-^$|()*+?/]|\)[*+]|\(\?", text):
        return False
    if len(re.findall(r"[*+]", text)) > most:
        return False
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def by_pattern(patterns: Mapping[str, Any], path: str) -> Any:
    """Return what the first pattern that matches the end of a path says, None where none does.

    Raises:
        CheckpointError: for a pattern that is not run.
    """
    for pattern, value in patterns.items():
        if not is_quick(pattern, 2):
            raise CheckpointError(
                f"the pattern {pattern!r:.80} in {CONFIG} is not run, since it may take long; "
                f"write the paths that it matches in its place"
            )
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return None


def aim(paths: Sequence[str], modules: Collection[str], said: dict[str, Any]) -> None:
    """Write ``target_modules`` so that it means these layers and no others.

    It is the last names of their paths if that is so, or the paths, or a pattern of them.
    """
    short = sorted({path.rpartition(".")[2] for path in paths})
    pattern = "|".join(re.escape(path) for path in paths)
    for target in (short, list(paths), pattern):
        tried = Targeted.model_validate({**said, "target_modules": target})
        if {path for path in modules if _is_target(tried, path)} == set(paths):
            said["target_modules"] = target
            return
    raise ModgraftError(
        f"PEFT cannot change {paths[0]} and others, since modules_to_save="
        f"{said.get('modules_to_save')} holds one of them whole"
    )
