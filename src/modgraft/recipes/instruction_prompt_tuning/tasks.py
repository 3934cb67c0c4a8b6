"""Tasks that can be read off examples: things have two attributes, and one of them has labels."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

VALUES = 8
"""The values of an attribute, and the labels that there are."""
VOCABULARY = 3 * VALUES
"""The values of the first attribute, those of the second, and the labels."""
WIDTH = 3
"""The tokens of an example: first, second, label."""

Thing = tuple[int, int]
THINGS: list[Thing] = list(product(range(VALUES), range(VALUES)))


@dataclass(frozen=True)
class Task:
    """Label things by one of their attributes.

    Attributes:
        attribute: which, 0 or 1.
        labels: the label of each value.
    """

    attribute: int
    labels: tuple[int, ...]

    @classmethod
    def draw(cls, rng: random.Random) -> Task:
        """Draw a task: an attribute, and a label for each of its values."""
        return cls(rng.randrange(2), tuple(rng.sample(range(VALUES), VALUES)))

    def label(self, thing: Thing) -> int:
        """Return a thing's label."""
        return self.labels[thing[self.attribute]]

    def text(self, things: Sequence[Thing]) -> list[int]:
        """Write things with their labels, one after another."""
        ids = []
        for thing in things:
            first, second = thing
            ids += [first, VALUES + second, 2 * VALUES + self.label(thing)]
        return ids


def row(task: Task, examples: Sequence[Thing], asked: Sequence[Thing]) -> dict[str, Tensor]:
    """Return a text: examples, and then things whose labels are to be predicted.

    Returns:
        ``input_ids`` and ``targets``, int64 ``[n]``: what comes after each token, −100 where that
        is no label that is asked for.
    """
    ids = torch.tensor(task.text([*examples, *asked]))
    targets = torch.full_like(ids, -100)
    at = torch.arange(len(examples), len(examples) + len(asked)) * WIDTH + 1
    targets[at] = ids[at + 1]
    return {"input_ids": ids[:-1], "targets": targets[:-1]}  # the last label is not read


def similar(thing: Thing, among: Sequence[Thing], count: int, rng: random.Random) -> list[Thing]:
    """Choose examples that share an attribute with a thing, of each as many, in random order."""
    halves = [[x for x in among if x != thing and x[i] == thing[i]] for i in range(2)]
    chosen = [x for half in halves for x in rng.sample(half, min(len(half), count // 2))]
    return rng.sample(chosen, len(chosen))


def unlike(thing: Thing, among: Sequence[Thing], count: int, rng: random.Random) -> list[Thing]:
    """Choose examples that share no attribute with a thing."""
    others = [x for x in among if x[0] != thing[0] and x[1] != thing[1]]
    return rng.sample(others, min(len(others), count))
