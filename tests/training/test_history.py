"""What ``print(history)`` shows of a run: a line, and the last evaluations."""

from __future__ import annotations

from common import lines
from modgraft.training.history import SHOWN, History


def history(evaluations: int) -> History:
    made = History(seconds=3.21, resumed_from=40)
    for step in range(1, 101):
        made.add({"split": "train", "step": step, "loss": 5 / step})
    for number in range(1, evaluations + 1):
        loss = None if number == 2 else 1 / number
        made.add({"split": "eval", "step": 10 * number, "seconds": 0.5 * number, "loss": loss})
    if evaluations:
        made.best = made.evaluations[-1]
    made.stopped = "steps"
    return made


def test_a_long_run_is_short_to_print() -> None:
    made = history(SHOWN + 2)
    text = str(made).splitlines()
    assert len(text) == SHOWN + 6
    assert text[0] == (
        "History: 100 steps in 3.2 s; loss 5 at first, 0.05 at last; best loss 0.1 at step 100; "
        "resumed from step 40"
    )
    assert text[2] == f"The last {SHOWN} of {SHOWN + 2} evaluations:"
    assert lines(str(made))["100"] == ["100", "5", "0.1"]
    assert repr(made) == text[0]  # one line, as in a dictionary of histories
    assert len(repr({"a": made})) < 200


def test_what_was_not_measured_and_how_it_ended() -> None:
    made = history(2)
    made.stopped, made.error, made.untouched = "diverged", "a loss of nan", ["a", "b"]
    made.best = None
    assert lines(str(made))["20"] == ["20", "1", "–"]
    assert "2 tensors never had a gradient; stopped: diverged (a loss of nan)" in str(made)
    assert "The last" not in str(made)
    assert "<table>" in made._repr_html_()


def test_a_run_without_steps_or_evaluations() -> None:
    assert str(History()) == repr(History()) == "History: no step was taken"
    assert len(str(history(0)).splitlines()) == 1
