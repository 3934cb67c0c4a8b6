"""ScienceQA (Lu et al. 2022) as published: problems, splits, captions, images, vision features."""

from __future__ import annotations

from modgraft.data.records import LETTERS, Questions, Record, Skipped

__all__ = ["LETTERS", "Questions", "Record", "Skipped"]
