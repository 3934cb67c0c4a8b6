"""Modules as a folder holds them, in any format, not yet in a host."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from modgraft.core.patterns import bare
from modgraft.store.card import Card
from modgraft.store.file import Entry


@dataclass(frozen=True)
class Stored:
    """What a folder holds.

    Attributes:
        folder: where.
        card: what they are.
        entries: returns type and shape of each tensor, by its name; they are not kept while
            modules wait for their first use.
        read: reads all tensors, and verifies them: ``<module>:<site>:<name>``, and ``:<name>`` for
            weights of the host that trained with the modules.
        stem: what all names begin with where one module of another tool is several here, as
            ``qa`` and ``qa_input``; "" where each has its own.
        within: the path here of the model that they were trained in, and that ``card.host``
            identifies; "" is the whole host.
    """

    folder: Path
    card: Card
    entries: Callable[[], Mapping[str, Entry]]
    read: Callable[[], Mapping[str, Tensor]]
    stem: str = ""
    within: str = ""

    def named(self, label: Callable[[str], str], weight: Callable[[str], str]) -> Stored:
        """Return the same with other names for sites and for weights of the host."""

        def key(text: str) -> str:
            module, _, rest = text.partition(":")
            site, colon, name = rest.rpartition(":")
            if not colon:
                return f":{weight(name)}"
            return f"{module}:{labels.get(bare(site), site)}:{name}"

        labels = {bare(site): label(site) for saved in self.card.modules for site in saved.sites}
        modules = [
            saved.model_copy(
                update={
                    "sites": [labels[bare(site)] for site in saved.sites],
                    "beside": [weight(name) for name in saved.beside],
                }
            )
            for saved in self.card.modules
        ]
        beside = sorted(map(weight, self.card.beside))
        return replace(
            self,
            card=self.card.model_copy(update={"modules": modules, "beside": beside}),
            entries=lambda: {key(text): entry for text, entry in self.entries().items()},
            read=lambda: {key(text): tensor for text, tensor in self.read().items()},
        )
