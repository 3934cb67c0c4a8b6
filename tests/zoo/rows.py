"""All rows of the zoo, by name."""

from __future__ import annotations

from zoo import decoders, pairs, plain, several, sights, texts
from zoo.row import Row

ALL: dict[str, Row] = {
    row.name: row for room in (texts, decoders, pairs, sights, several, plain) for row in room.ROWS
}
