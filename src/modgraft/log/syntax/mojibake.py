"""Find UTF-8 text that was read as Windows-1252 and saved again, and repair it.

`networkâ€™s` was `network’s`. A repair is offered only where the characters, encoded back to bytes,
are valid UTF-8 and no one would write them on purpose: `Spaß“` stays.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

# The characters of bytes 80 to ff in Windows-1252, which leaves five bytes undefined.
_HIGH = {
    bytes([byte]).decode("cp1252"): byte
    for byte in range(0x80, 0xA0)
    if byte not in (0x81, 0x8D, 0x8F, 0x90, 0x9D)
} | {chr(byte): byte for byte in (0x81, 0x8D, 0x8F, 0x90, 0x9D, *range(0xA0, 0x100))}
_TAIL = "".join(re.escape(sign) for sign, byte in _HIGH.items() if byte < 0xC0)
# Leads of two bytes only where the sign itself is rare (Â, Ã); of three, what punctuation,
# arrows and signs are made of (â, ï); of four, emoji (ð); others in twos (ä½ å¥½ was 你好).
_BROKEN = re.compile(
    rf"(?:[ÂÃ][{_TAIL}]|[âï][{_TAIL}]{{2}}|ð[{_TAIL}]{{3}}|(?:[ã-é][{_TAIL}]{{2}}){{2,}})+"
)
_HINT = re.compile(rb"\xc3[\x82\x83\xa2-\xa9\xaf\xb0][\xc2\xc5\xc6\xcb\xe2]")


@dataclass(frozen=True, slots=True)
class Mojibake:
    """A run of mojibake: its position in the bytes, its text, and the text that was meant."""

    start: int
    end: int
    broken: str
    repaired: str


def mojibake(data: bytes) -> Iterator[Mojibake]:
    """Yield every run of mojibake in `data`, in order, with its repair."""
    at = 0
    while (hint := _HINT.search(data, at)) is not None:
        start = hint.start()
        # Decode a little at a time: a run is a few characters, the file may be large.
        piece = data[start : start + 4096].decode("utf-8", "ignore")
        found = _BROKEN.match(piece)
        repaired = _repair(found[0]) if found else None
        if found is None or repaired is None:
            at = start + 2
            continue
        end = start + len(found[0].encode())
        yield Mojibake(start, end, found[0], repaired)
        at = end


def _repair(text: str) -> str | None:
    try:
        repaired = bytes(_HIGH[sign] for sign in text).decode("utf-8")
    except UnicodeDecodeError:
        return None
    return repaired if repaired.isprintable() or repaired.isspace() else None
