"""Where the real notes lie, and notes as people write them, generated."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import strategies as st

from modgraft.log import Note, parse

NOTES = Path(__file__).parents[3] / "shared" / "data" / "notes"
NAMES = ("2023w9", "2023w9_draft", "gpt", "modular_deep_learning", "multimodal_cot")
needs_notes = pytest.mark.skipif(
    not (NOTES / "2023w9.md").is_file(), reason=f"no research notes at {NOTES}"
)


def real(name: str) -> Note:
    """One of the five real notes."""
    return parse((NOTES / f"{name}.md").read_bytes(), f"{name}.md")


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
