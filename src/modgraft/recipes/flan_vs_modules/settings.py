"""The settings of the recipe ``flan_vs_modules``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """The settings of a run.

    Attributes:
        train, val, test: The number of examples of each family.
        shots: The number of examples of the new family in the few-shot arms.
        vocabulary: The number of word pieces.
        d_model, d_ff, heads, layers: T5's shape.
        steps_pretrain, lr_pretrain: Steps and learning rate of T5's pretraining, without answers.
        steps: Optimiser steps for each family; a model of all families takes as many for each.
        steps_few: Optimiser steps of the few-shot arms.
        lr, lr_module: The peak learning rates of T5's weights and of modules.
        batch: Examples in a batch.
        longest: The most tokens of an answer.
        rank: The rank of a LoRA, at every linear layer of attention and feed-forward.
    """

    train: int = 3200
    val: int = 60
    test: int = 100
    shots: int = 32
    vocabulary: int = 1000
    d_model: int = 96
    d_ff: int = 192
    heads: int = 4
    layers: int = 2
    steps_pretrain: int = 300
    lr_pretrain: float = 2e-3
    steps: int = 120
    steps_few: int = 40
    lr: float = 2e-3
    lr_module: float = 1e-2
    batch: int = 32
    longest: int = 18
    rank: int = 16
