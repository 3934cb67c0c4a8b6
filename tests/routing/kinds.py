"""A host with tokens of several kinds, each solved by known modules: the right routing is known."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import modgraft as mg
from modgraft.routing.base import Routing

CONTENT = 9  # how many contents a token of a kind can have


class Tagger(nn.Module):
    """One layer of zero weight that reads tokens [kind, content].

    Token ids are kind · CONTENT + content; an embedding is both as one-hot vectors.
    """

    def __init__(self, kinds: int) -> None:
        super().__init__()
        self.words = nn.Embedding(kinds * CONTENT, kinds + CONTENT)
        self.read = nn.Linear(kinds + CONTENT, CONTENT)
        ids = torch.arange(kinds * CONTENT)
        with torch.no_grad():
            self.words.weight.zero_()
            self.words.weight[ids, ids // CONTENT] = 1
            self.words.weight[ids, kinds + ids % CONTENT] = 1
            self.read.weight.zero_()
            self.read.bias.zero_()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.words

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Any:
        logits = self.read(self.words(input_ids) if inputs_embeds is None else inputs_embeds)
        if labels is not None and labels.dim() == 1:  # the first token's, [B, n, C] → [B, C]
            logits = logits[:, 0]
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits.reshape(-1, CONTENT), labels.reshape(-1))
        return SimpleNamespace(loss=loss, logits=logits)


def host_of(kinds: int, each: int = 1, strength: float = 6.0) -> tuple[mg.Host, list[str]]:
    """Make a host and its modules; kind k is solved by ``each`` modules from k · each on.

    The answer to content c of kind k is c + k modulo CONTENT. Where ``each`` is 2, a module also
    scores a wrong answer as high as the right one, which the other cancels: both are needed.
    """
    host = mg.Host(Tagger(kinds)).eval()
    names = [f"m{j}" for j in range(kinds * each)]
    for j, name in enumerate(names):
        place: Any = host.implant(name, mg.LoRA(rank=CONTENT), "read", active=False).places[0]
        with torch.no_grad():
            place.A.zero_()
            place.A[:, kinds:] = torch.eye(CONTENT)
            k, side = j // each, 1 - 2 * (j % each)
            place.B.add_(torch.eye(CONTENT).roll(k, 0))  # [answer, content]
            for decoy in (kinds + 2 * k, kinds + 2 * k + 1) if each == 2 else ():
                place.B.add_(torch.eye(CONTENT).roll(decoy, 0), alpha=side)
                side = -side
            place.B.mul_(strength)
    return host, names


def batches(kinds: int, level: str, count: int, seed: int, rows: int = 32) -> list[dict[str, Any]]:
    """Make batches for a router: one kind for each task, each example or each token."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=generator)

    made: list[dict[str, Any]] = []
    for i in range(count):
        kind = {
            "task": torch.full((rows, 1), i % kinds),
            "example": draw(kinds, rows, 1),
            "token": draw(kinds, rows, 3),
        }[level].expand(rows, 3)
        content = draw(CONTENT, rows, 3)
        labels = (content + kind) % CONTENT
        batch: dict[str, Any] = {"input_ids": kind * CONTENT + content}
        batch["labels"] = labels if level == "token" else labels[:, 0]
        if level == "task":
            batch["modules"] = f"m['k{i % kinds}']"
        made.append(batch)
    return made


def routings(host: mg.Host, batch: dict[str, Any]) -> Iterator[Routing]:
    """Yield what the router of the mixture ``m`` chooses inside the host for one batch."""
    found: list[Routing] = []
    places: Any = host["m"].places
    hooks = [p.route.register_forward_hook(lambda *a: found.append(a[2])) for p in places]
    host.eval()
    with torch.no_grad():
        host(**batch)
    for hook in hooks:
        hook.remove()
    yield from found
