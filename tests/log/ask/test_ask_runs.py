"""What a run reached, asked of the note that it wrote; and of runs that did not end."""

from __future__ import annotations

from pathlib import Path

from modgraft.log import Log

RUN = """\
## tl;dr
Run of {name}: accuracy {reached}

## Context
- Run: {name}

## Done
- Duration: 3 min

## Learned
- fused: {reached} ± 0.4
- shuffled, the control: 51.0

## Log
- [start({name})] {day} 10:00:00 UTC: `modgraft {name} train`
  - commit abc
{end}
"""
ENDED = "- [return({name}) -> accuracy {reached}] {day} 10:03:00 UTC, after 3 min"


def run(folder: Path, name: str, day: str, reached: str, end: str = ENDED) -> None:
    folder.mkdir(parents=True)
    end = end.format(name=name, day=day, reached=reached)
    text = RUN.format(name=name, day=day, reached=reached, end=end)
    (folder / "note.md").write_text(text, encoding="utf-8")


def test_the_newest_run_of_that_name_answers_with_its_lines(tmp_path: Path) -> None:
    run(tmp_path / "z", "mmcot", "2026-01-02", "61.5")
    run(tmp_path / "a", "mmcot", "2026-03-04", "72.5")
    run(tmp_path / "b", "madx", "2026-05-06", "33.0")
    with Log.open(tmp_path) as log:
        answer = log.ask("what did the last mmcot run reach?")
        assert answer.refused is None
        assert answer.kind == "structured"
        assert answer.text == "accuracy 72.5 (a/note.md:17, 2026-03-04 10:03 (the note's date))."
        ended = "- [return(mmcot) -> accuracy 72.5] 2026-03-04 10:03:00 UTC, after 3 min"
        assert [(e.note, e.line, e.quote) for e in answer.evidence[:2]] == [
            ("a/note.md", 17, ended),
            ("a/note.md", 11, "- fused: 72.5 ± 0.4"),
        ]
        assert log.ask("how did the latest run end?").text.startswith("accuracy 33.0 (b/note.md:17")
        refused = log.ask("what did the last bigram run reach?")
        assert refused.refused == "no run of 'bigram' is recorded; there are runs of: mmcot, madx"


def test_runs_that_broke_off_or_go_on_reached_nothing(tmp_path: Path) -> None:
    broke = "- [interrupt(ValueError)] {day} 10:01:00 UTC, after 1 min: `no images`"
    run(tmp_path / "a", "mmcot", "2026-03-04", "72.5", broke)
    run(tmp_path / "b", "madx", "2026-03-04", "72.5", "")
    with Log.open(tmp_path) as log:
        answer = log.ask("what did the last mmcot run reach?")
        assert answer.refused is not None
        assert "broke off (a/note.md:17, " in answer.refused
        assert "no images" in answer.refused
        answer = log.ask("what did the last run of madx reach?")
        assert answer.refused is not None
        assert answer.refused.startswith("the run of madx was started (b/note.md:15, ")
        assert answer.refused.endswith("and has not ended")
