"""How the library's errors are worded on the command line."""

from __future__ import annotations

from typing import Annotated

import pytest
import typer

import modgraft as mg
from modgraft.cli.options import any_settings, in_options


def command(
    text: str,
    to: str = "",
    into_model: Annotated[bool, typer.Option("--into-model")] = False,
    rank: Annotated[int, typer.Option(help="r")] = 4,
    strict: Annotated[bool, typer.Option("--strict/--no-strict")] = True,
    target: Annotated[str, typer.Option("--to")] = "",
    options: Annotated[list[str] | None, typer.Option("--set")] = None,
) -> str:
    if "LoRA" in text or "=" in text:
        raise mg.ModgraftError(text)
    return text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("say strict=False to try", "say --no-strict to try"),
        ("strict=True is", "--strict is"),
        ("rank=99: from 1 to 8", "--rank 99: from 1 to 8"),
        ("say rank= in place", "say --rank  in place"),
        ("format='onnx': there are", "--to 'onnx': there are"),
        ("LoRA(rank=4) at /a/rank=3x", "LoRA(rank=4) at /a/rank=3x"),
        ("TIES takes none; say density=0.2", "TIES takes none; say --set density=0.2"),
        ("t=1: its options", "t=1: its options"),
    ],
)
def test_arguments_are_worded_as_options(text: str, words: str) -> None:
    with pytest.raises(mg.ModgraftError) as error:
        in_options(command, format="target")(text)
    assert str(error.value) == words


def test_a_command_runs_as_before() -> None:
    assert in_options(command)("done") == "done"


def test_what_is_set_twice_is_refused() -> None:
    assert any_settings(["a=1", "b=x=y", "c=true"]) == {"a": 1, "b": "x=y", "c": True}
    for pairs, said in ((["a=1", "a=1"], "a is set already"), (["a"], "write NAME=VALUE")):
        with pytest.raises(typer.BadParameter, match=said):
            any_settings(pairs)
