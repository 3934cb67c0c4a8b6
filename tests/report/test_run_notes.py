"""What a run says about itself reaches the page."""

from __future__ import annotations

import json
from pathlib import Path

from modgraft.report import write


def test_notes_skipped_questions_and_titles(small_run: Path) -> None:
    path = small_run / "results.json"
    results = json.loads(path.read_text())
    results["notes"] = ["There is no test split: the figures are of val."]
    results["skipped"] = [{"id": "q<7>", "file": "problems.json", "reason": "no choices"}]
    model = next(p.parent.name for p in small_run.glob("seed*/*/metrics.jsonl"))
    results["titles"] = {model: "The net of this test"}
    path.write_text(json.dumps(results))
    page = write(small_run).read_text()
    assert "There is no test split: the figures are of val." in page
    assert "Question q&lt;7&gt; was left out (problems.json): no choices" in page
    assert "The net of this test" in page
