"""What routers have chosen, shown: the table says the numbers, the figure is drawn."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from modgraft.core.errors import ModgraftError
from modgraft.report import figures, routing_figure, routing_table
from modgraft.routing.stats import Usage

PATH = "bert.encoder.layer.{}.intermediate.dense"
NAMES = ("math", "code", "law", "poetry")
USES = [
    Usage(PATH.format(0), NAMES, 1920, (0.3, 0.28, 0.24, 0.18), (0.6, 0.5, 0.5, 0.4), 0.6, 1.97),
    Usage(PATH.format(1), NAMES, 1920, (0.62, 0.05, 0.33, 0.0), (0.9, 0.2, 0.9, 0.0), 0.9, 1.2),
    Usage(PATH.format(2), NAMES, 1920, (0.0, 0.97, 0.03, 0.0), (0.0, 1.0, 0.1, 0.0), 0.05, 0.2),
    Usage(PATH.format(3), NAMES, 0, (0.0,) * 4, (0.0,) * 4, 0.0, 0.0),
]


def test_the_table_says_what_was_counted() -> None:
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(routing_table(USES))
    rows = [line.split() for line in console.export_text().splitlines() if "encoder" in line]
    assert rows[0] == [PATH.format(0), "30", "28", "24", "18", "1,920", "0.60", "1.97"]
    assert rows[1][-2:] == ["dead:", "poetry"]
    assert rows[2][8:] == ["collapsed;", "dead:", "math,", "poetry"]
    assert rows[3] == [PATH.format(3), "–", "–", "–", "–", "0", "–", "–"]
    console.print(routing_table([replace(USES[0], path="")]))
    assert "the network" in console.export_text()


def test_the_figure_is_drawn() -> None:
    picture = routing_figure(USES)
    assert picture.dark is not None
    for png in (picture.light, picture.dark):
        image = Image.open(io.BytesIO(png)).convert("RGB")
        assert image.width > image.height
        assert len(image.getcolors(1 << 24) or []) > 50
    png, shown = picture._repr_png_()
    assert png == picture.light
    assert shown == {"width": picture.width, "height": picture.height, "alt": picture.alt}
    assert len(repr(picture)) < 200  # no bytes
    assert picture.alt == "Use of math, code, law, poetry at 4 sites; 1 collapsed"
    assert routing_figure([replace(USES[0], path="")]).light != picture.light


def test_nothing_to_show() -> None:
    with pytest.raises(ModgraftError, match="nothing has been routed yet"):
        routing_figure(USES[3:])
    with pytest.raises(ModgraftError, match="run the host first"):
        routing_table([])


class Mix:
    """A module as ``host["mix"]`` is: it has tasks to be asked for, and statistics."""

    def __getitem__(self, task: str) -> None:
        raise KeyError(task)

    def stats(self) -> list[Usage]:
        return USES


def test_a_module_is_shown_by_its_statistics() -> None:
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(routing_table(Mix()))
    assert "collapsed" in console.export_text()
    assert routing_figure(Mix()).light == routing_figure(USES).light


@pytest.mark.parametrize("names", [("a", "b"), NAMES])
def test_titles_stand_apart(names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    boxes = []

    class Spy(Figure):
        def savefig(self, *args: object, **more: object) -> None:
            super().savefig(*args, **more)
            drawn = [
                axes.title if axes.title.get_text() else axes._left_title for axes in self.axes
            ]
            boxes.append([title.get_window_extent() for title in drawn])

    monkeypatch.setattr(figures, "Canvas", Spy)
    some = tuple(1 / len(names) for _ in names)
    routing_figure([replace(USES[0], names=names, share=some, picked=some)])
    for first, second in boxes:
        assert first.x1 < second.x0


def test_what_has_counted_nothing_is_refused_in_a_line() -> None:
    with pytest.raises(ModgraftError, match=r"^a str \(skills\) counts no choices; give"):
        routing_table("skills")  # type: ignore[arg-type]
