"""The settings of the recipe ``flan_vs_modules``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """What decides a run.

    Attributes:
        train, val, test: examples of a family.
        shots: examples of the new family, where there are few.
        vocabulary: pieces of words.
        d_model, d_ff, heads, layers: T5's shape.
        steps_pretrain, lr_pretrain: of T5, on texts without answers.
        steps: optimiser steps for each family; a net of all families takes as many for each.
        steps_few: steps on the few examples.
        lr, lr_module: peak learning rates of T5's own weights, and of modules.
        batch: examples a step.
        longest: tokens of an answer.
        rank: of a LoRA, at every linear layer of attention and feed-forward.
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
