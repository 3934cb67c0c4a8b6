"""What a hub lists, and which of it some conditions hold for."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from modgraft.core.errors import ModgraftError
from modgraft.store.card import Card

_METRIC = re.compile(r"\s*([^<>=]+?)\s*(>=|<=|>|<|=)\s*([-+.\deE]+)\s*")
_COMPARE = {
    ">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le, "=": operator.eq,
}  # fmt: skip


@dataclass(frozen=True)
class Listed:
    """One version of a module on a hub.

    Attributes:
        name: its name there.
        version: the number that the hub gave it.
        size: bytes of its file.
        card: its card.
        tags: what else it is called there.
    """

    name: str
    version: str
    size: int
    card: Card
    tags: tuple[str, ...] = ()

    @property
    def address(self) -> str:
        """``hub:NAME@VERSION``."""
        return f"hub:{self.name}@{self.version}"


def search(
    rows: Iterable[Listed],
    text: str = "",
    *,
    host: str = "",
    task: str = "",
    kind: str = "",
    metrics: Sequence[str] = (),
) -> list[Listed]:
    """Return the versions that all of these hold for.

    Args:
        rows: what a hub lists.
        text: words, each in its name, description, data, task, host or method.
        host: a part of the host's class or name, or the start of a hash in its fingerprint.
        task: a part of its task's name.
        kind: the class of a module, in any case: ``lora``.
        metrics: conditions such as ``f1>0.8``.

    Raises:
        ModgraftError: for a condition that is none.
    """
    conditions = [_condition(each) for each in metrics]

    def fits(row: Listed) -> bool:
        card, about = row.card, row.card.host
        kinds = [saved.type.lower() for saved in card.modules]
        hosts = f"{card.base_model or ''} {about.get('architecture', '')}".lower()
        words = (row.name, card.description, card.data, card.task, hosts, *kinds)
        said = " ".join(word.lower() for word in words if word)
        hashes = [str(about.get(part, "")) for part in ("shape", "weights")]
        return (
            all(word in said for word in text.lower().split())
            and (host.lower() in hosts or any(h.startswith(host) for h in hashes))
            and task.lower() in (card.task or "").lower()
            and kind.lower() in ("", *kinds)
            and all(
                name in card.metrics and _COMPARE[sign](card.metrics[name], value)
                for name, sign, value in conditions
            )
        )

    return [row for row in rows if fits(row)]


def _condition(text: str) -> tuple[str, str, float]:
    try:
        name, sign, value = _METRIC.fullmatch(text).groups()  # type: ignore[union-attr]
        return name, sign, float(value)
    except (AttributeError, ValueError) as error:
        raise ModgraftError(f"{text!r} is no condition; write one as f1>0.8") from error
