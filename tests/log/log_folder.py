"""A small log of our own: two notes, a run, a bibliography and a picture."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

NOTE = """\
## tl;dr
Adapters are enough for now.

## Context
See [the other note](second.md) and https://example.org/a_b.

## Done

## Learned
- [lesson_learned -> keep the host frozen]

## Next?

## Log
- [skim(@dewLichen2021) -> _digging]
  - "a slow paper" ![](asset/lichen.png)
- [read(@fernModular2022)]
  - Routing is the hard part. [question -> who picks the module?]
  - $\\theta' = \\theta_0 + \\varphi$
- [question -> does it hold on small models?]
  - It does, see @dewLichen2021.
- [calculate(6 * 7) -> 42]
"""

SECOND = """\
## tl;dr

## Log
- [eureka -> compare both]
- [skim(@fernModular2022) -> _full_read], as @nobodyMissing2020 says
  1. first
  2. second
"""

BIB = """\
@article{dewLichen2021,
  title = {Lichens {Grow}}, author = {Dew, Ada and Moss, Ben}, date = {2021-03-01},
  url = {https://example.org/lichen}, abstract = {Slowly & surely.}
}
@article{fernModular2022,
  title = {Modular Ferns}, author = {Fern, Cleo}, year = {2022}, url = {javascript:alert(1)}
}
"""


def png(side: int = 8) -> bytes:
    """A small grey picture."""

    def chunk(name: bytes, data: bytes) -> bytes:
        crc = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", crc)

    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    rows = zlib.compress((b"\0" + b"\x80" * side) * side)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def write_log(folder: Path) -> Path:
    """Write the log into `folder`, which is made."""
    (folder / "asset").mkdir(parents=True)
    (folder / "2024-05-03_first.md").write_text(NOTE, "utf-8")
    (folder / "second.md").write_text(SECOND, "utf-8")
    (folder / "sources.bib").write_text(BIB, "utf-8")
    (folder / "asset" / "lichen.png").write_bytes(png())
    return folder
