"""What the command line says where something cannot be done: a line, and none of its source."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from command import modgraft

LONG = "n" * 300


@pytest.mark.parametrize(
    "command",
    [
        ("report", LONG),
        ("mmcot", "evaluate", "--run", LONG),
        ("mmcot", "ask", "-", "Which?", "1", "2", "--run", LONG),
        ("mmcot", "train", "--run", LONG),
        ("inspect", LONG),
    ],
)
def test_a_name_that_is_too_long_for_a_file(command: tuple[str, ...]) -> None:
    result = modgraft(*command)
    assert result.code == 1
    assert result.err.startswith("error:")
    assert result.err.count("\n") == 1
    assert LONG[:80] in result.err


@pytest.mark.parametrize("command", [("report",), ("mmcot", "evaluate", "--run")])
def test_a_file_in_place_of_a_runs_folder(tmp_path: Path, command: tuple[str, ...]) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("no run")
    result = modgraft(*command, file)
    assert result.code == 1
    assert "notes.txt is a file, and no folder" in result.err


def test_a_run_without_what_every_run_has(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"settings": {}}')
    result = modgraft("mmcot", "evaluate", "--run", tmp_path)
    assert result.code == 1
    assert "lacks 'rows'" in result.err


def test_a_warning_is_one_line_and_any_terminal_has_letters_for_it(tmp_path: Path) -> None:
    """In a process of its own: the one here makes errors of warnings."""
    code = "import warnings; from modgraft.cli import app; app.app = lambda: "
    code += "(warnings.warn('twice ≤ once'), print('½')); app.entry()"
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert said.stdout == "\\xbd\n"
    assert said.stderr == "warning: twice \\u2264 once\n"


def test_an_unreadable_picture_of_a_long_name(tmp_path: Path) -> None:
    from modgraft.core.errors import MissingFileError
    from modgraft.data.picture import open_picture

    with pytest.raises(MissingFileError, match="the image is missing"):
        open_picture(tmp_path / (LONG + ".png"))
    path = tmp_path / "a.png"
    Image.new("L", (2, 2)).save(path)
    with pytest.raises(ValueError, match="ground=5: a colour is a text"):
        open_picture(path, ground=5)  # type: ignore[arg-type]
