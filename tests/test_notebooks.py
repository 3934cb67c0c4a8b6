"""The notebook runs from top to bottom, and a reader sees tables, a picture and a bar in it."""

from __future__ import annotations

import base64
import os
from pathlib import Path
from typing import Any

import pytest

import modgraft as mg

nbformat = pytest.importorskip("nbformat", reason="the notebook tools are not installed")
nbclient = pytest.importorskip("nbclient", reason="the notebook tools are not installed")
pytest.importorskip("ipykernel", reason="the notebook tools are not installed")

NOTEBOOK = Path(__file__).parents[1] / "examples" / "first_module.ipynb"


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The notebook, run in an empty folder by a kernel of its own."""
    book = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in book.cells)  # committed without outputs
    home = tmp_path_factory.mktemp("notebook")
    # The kernel imports the modgraft under test, and leaves no files in the reader's home.
    env = os.environ | {
        "PYTHONPATH": str(Path(mg.__file__).parents[1]),
        "IPYTHONDIR": str(home / "ipython"),
        "JUPYTER_PLATFORM_DIRS": "1",
    }
    client = nbclient.NotebookClient(
        book, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(home)}}
    )
    client.execute(env=env)
    return book


def outputs(book: Any, ends_with: str) -> list[Any]:
    """Return the outputs of the one cell whose code ends so."""
    (cell,) = [
        c for c in book.cells if c.cell_type == "code" and c.source.rstrip().endswith(ends_with)
    ]
    return cell.outputs


def printed(book: Any, ends_with: str) -> str:
    """Return what a cell prints, which comes in one piece or in several."""
    found = outputs(book, ends_with)
    assert {each.output_type for each in found} == {"stream"}
    return "".join(each.text for each in found)


def shown(book: Any, ends_with: str) -> Any:
    """Return what a cell's last expression shows, by type."""
    (output,) = [o for o in outputs(book, ends_with) if o.output_type == "execute_result"]
    return output.data


def test_nothing_is_printed_as_an_error(ran: Any) -> None:
    streams = [o for c in ran.cells for o in c.get("outputs", []) if o.output_type == "stream"]
    errors = [o.text for o in streams if o.name != "stdout"]
    # what transformers' own import says where there is no ipywidgets
    assert not [text for text in errors if "TqdmWarning: IProgress not found" not in text]


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        ("\nhost", ("LoRA(rank=2)", "sites at", "BertForMaskedLM")),
        ("code\")", ("sites at", "without gradients")),
        ("\nhistory", ("40 steps", "step", "loss")),
        ("routing_table(uses)", ("Use of 2 modules", "entropy", "math")),
        ("host.probe(batch(0))", ("learns", "Nothing is wrong.")),
    ],
)  # fmt: skip
def test_a_table_is_html_and_its_text_is_whole(ran: Any, cell: str, words: tuple[str, ...]) -> None:
    data = shown(ran, cell)
    assert "<table>" in data["text/html"]
    assert all(word in data["text/html"] for word in words)
    assert "<pre" not in data["text/html"]


def test_text_returns_its_tables_and_shows_nothing_beside(ran: Any) -> None:
    text = printed(ran, "print(text)")
    for words in ("math    LoRA(rank=2)", "sites at", "query"):
        assert words in text


def test_a_history_is_short(ran: Any) -> None:
    lines = printed(ran, "print(history)").splitlines()
    assert len(lines) < 16
    assert lines[0].startswith("History: 40 steps in ")
    assert "The last 8 of 10 evaluations:" in lines
    assert lines[-1].split()[0] == "40"


def test_a_figure_is_a_picture(ran: Any) -> None:
    (output,) = outputs(ran, "routing_figure(uses)")
    assert base64.b64decode(output.data["image/png"]).startswith(b"\x89PNG")
    assert output.metadata["image/png"]["width"] > 300
    assert len(output.data["text/plain"]) < 300  # no bytes


def test_progress_is_a_bar(ran: Any) -> None:
    (bar,) = [o for o in outputs(ran, "\nhistory") if o.output_type == "display_data"]
    assert "<progress value='40' max='40'" in bar.data["text/html"]
    assert "loss " in bar.data["text/html"]
