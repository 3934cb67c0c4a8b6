"""The real notes, copies of them in a git repository, and generated notes as people write them."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import strategies as st

from modgraft.log import Note, parse

NOTES = Path(__file__).parents[3] / "shared" / "data" / "notes"
NAMES = ("2023w9", "2023w9_draft", "gpt", "modular_deep_learning", "multimodal_cot")
needs_notes = pytest.mark.skipif(
    not all((NOTES / name).is_file() for name in ("2023w9.md", "zotero.bib")),
    reason=f"no research notes at {NOTES}",
)


def real(name: str) -> Note:
    """One of the five real notes."""
    return parse((NOTES / f"{name}.md").read_bytes(), f"{name}.md")


def copy_notes(folder: Path, *names: str) -> Path:
    """The real notes and their bibliography, or some of them, in a folder of the test's own."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in NOTES.iterdir():
        if path.is_file() and (not names or path.name in names):
            shutil.copyfile(path, folder / path.name)
    return folder


def git(folder: Path, *arguments: str, at: str | None = None) -> str:
    """Run git in ``folder``, as someone, at a given time."""
    own = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    who = {
        f"GIT_{role}_{what}": "a@b.c"
        for role in ("AUTHOR", "COMMITTER")
        for what in ("NAME", "EMAIL")
    }
    when = {"GIT_AUTHOR_DATE": at, "GIT_COMMITTER_DATE": at} if at else {}
    none = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments],
        env=own | who | when | none, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.strip()


def commit(folder: Path, at: str, message: str = "notes") -> None:
    """Commit everything in ``folder`` at a given time."""
    if not (folder / ".git").exists():
        git(folder, "init", "-q", "-b", "main")
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", message, at=at)


_keys = st.from_regex(r"[a-z]{3,8}[A-Z][a-z]{2,8}20[0-2][0-9]", fullmatch=True)
_pieces = [
    *("你們是蟲子。", "naïve", "â†’", "networkâ€™s", "ðŸ’¡", "$1/\\sqrt{d_k}$", "$20/month"),
    *("`wei @ x`", "`[question -> no]`", '"a quote"', "“so”", "[0, 1)", "[x]", "[[wiki]]"),
    *("[last](project/x)", "![](asset/x.png)", "https://a.org/b_(c).", "[read](there)"),
]
_words = st.lists(
    st.one_of(
        st.from_regex(r"[a-z]{1,9}", fullmatch=True),
        st.sampled_from(_pieces),
        _keys.map(lambda key: f"@{key}"),
        _keys,
    ),
    max_size=6,
).map(" ".join)
_names = st.sampled_from(
    [
        *("skim", "Read", "retrieve", "question", "eureka", "lesson_learned", "soliloquy", "QA"),
        *("critique", "ChatGPT", "code", "interrupt", "calculate", "context_switch_to", "unknown"),
    ]
)
_annotation = st.builds(
    "{}{}{}{}{}".format,
    _names.map(lambda name: f"[{name}"),
    st.one_of(st.just(""), _words.map(lambda text: f"({text})"), st.just("("), st.just("()")),
    st.one_of(st.just(""), st.just(" ->"), _words.map(lambda text: f" -> {text}")),
    st.sampled_from(["]", "]", "]", "]:", ""]),
    _words.map(lambda text: f" {text}" if text else ""),
)
_content = st.one_of(
    _words, _annotation, st.lists(_annotation, min_size=2, max_size=2).map(", ".join)
)
_line = st.one_of(
    st.builds(
        "{}{}{}".format,
        st.integers(0, 12).map(lambda width: " " * width) | st.just("\t"),
        st.sampled_from(["- ", "* ", "1. ", "2) ", "> ", "", "-", ">"]),
        _content,
    ),
    st.just(""),
    st.sampled_from(["## Log", "## Next?", "# Title", "### Deep", "---", "```py", "```", "  ~~~"]),
)


@st.composite
def notes(draw: st.DrawFn) -> bytes:
    """A plausible note, with everything that real ones get wrong."""
    ends = draw(st.sampled_from(["\n", "\n", "\r\n", "\r"]))
    lines = draw(st.lists(_line, max_size=25))
    head = draw(st.sampled_from([[], ["---", "tags: [read]", "- [code]", "---"], ["---"]]))
    text = ends.join([*head, "## tl;dr", "", "## Log", *lines])
    data = text.encode()
    if draw(st.booleans()):
        data += ends.encode()
    if draw(st.integers(0, 4)) == 0:
        at = draw(st.integers(0, len(data)))
        data = data[:at] + draw(st.sampled_from([b"\xff", b"\0", b"\xe2\x80", b"\r"])) + data[at:]
    return (b"\xef\xbb\xbf" if draw(st.integers(0, 5)) == 0 else b"") + data
