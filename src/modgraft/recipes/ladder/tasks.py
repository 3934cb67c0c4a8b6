"""What a ladder is climbed for: texts of one's own, docstrings, or questions about digits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from modgraft.core.errors import DataError
from modgraft.core.tensors import device_of
from modgraft.data import library_topics
from modgraft.data.labelled import Batches, Labelled
from modgraft.host.host import Host
from modgraft.models import minilm
from modgraft.training.stream import Batch, to_device

MEASURED = 64
"""Texts in a batch that is measured."""


@dataclass(frozen=True)
class Task:
    """A host and what it is to learn.

    Attributes:
        title: what people read.
        host: the host.
        loader: its batches.
        evaluate, test: whether the host is right on each example of these splits.
        beside: what trains with every rung.
        settings: of ``fit``.
    """

    title: str
    host: Host
    loader: Iterable[Batch]
    evaluate: Callable[[Host], Tensor]
    test: Callable[[Host], Tensor]
    beside: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)


def text_task(
    title: str, splits: Mapping[str, Sequence[Labelled]], classes: int, *,
    model: str | Path | None = None, batch: int = 16, longest: int = 64, seed: int = 0,
) -> Task:  # fmt: skip
    """Make a task of texts that have a class each.

    Args:
        title: the task's.
        splits: the texts of ``train``, ``validation`` and ``test``.
        classes: how many there are.
        model: a pretrained model of transformers for classifying sequences, a folder or a hub
            name, whose head is new; None: all-MiniLM-L6-v2, which comes in a package.
        batch: texts in a batch.
        longest: the most tokens of a text.
        seed: of the head's first weights.

    Raises:
        DataError: there is no such model.
        ModgraftError: the package is not installed.
    """
    torch.manual_seed(seed)
    if model is None:
        net: nn.Module = minilm.classifier(classes, seed)
        tokenizer, beside = minilm.tokenizer(), ("host.head",)
    else:
        net, tokenizer, beside = _pretrained(str(model), classes)
    loaders = {
        name: Batches(rows, tokenizer, longest).loader(
            batch if name == "train" else MEASURED, shuffle=name == "train"
        )
        for name, rows in splits.items()
    }
    return Task(
        title, Host(net), loaders["train"], right(loaders["validation"]), right(loaders["test"]),
        beside, {"warmup": 0.1, "weight_decay": 0.0},
    )  # fmt: skip


def docstrings(*, share: float = 1.0, batch: int = 16, seed: int = 0) -> Task:
    """Make the task of docstrings: which part of the standard library one describes.

    Args:
        share: of the docstrings of each split.
        batch: docstrings in a batch.
        seed: of the split and of the head's first weights.
    """
    splits = library_topics.split(seed)
    some = {name: rows[: max(2, round(share * len(rows)))] for name, rows in splits.items()}
    title = "which part of the standard library a docstring describes, all-MiniLM-L6-v2"
    classes = len(library_topics.NAMES)
    return text_task(title, some, classes, batch=batch, longest=32, seed=seed)


def right(loader: Iterable[Batch]) -> Callable[[Host], Tensor]:
    """Return what says of each example of a loader whether a classifier is right, ``[n]``."""

    def evaluate(host: Host) -> Tensor:
        found, device = [], device_of(host)
        for batch in loader:
            inputs = to_device({k: v for k, v in batch.items() if k != "labels"}, device)
            found.append(host(**inputs).logits.argmax(-1).cpu() == batch["labels"])
        return torch.cat(found).double()

    return evaluate


def _pretrained(model: str, classes: int) -> tuple[nn.Module, Any, tuple[str, ...]]:
    """Load a model under a new head, its tokenizer, and the names of the head's parts."""
    local = Path(model).is_dir()
    try:
        net, info = AutoModelForSequenceClassification.from_pretrained(
            model, num_labels=classes, ignore_mismatched_sizes=True, output_loading_info=True,
            local_files_only=local,
        )  # fmt: skip
        tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=local)
    except (OSError, ValueError, ImportError) as error:
        reason = f"no pretrained model with a tokenizer ({str(error).splitlines()[0]})"
        remedy = "Give --model a folder of save_pretrained, model and tokenizer, or a hub name"
        raise DataError(reason, file=model, remedy=remedy) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    net.config.pad_token_id = tokenizer.pad_token_id
    heads = [
        name
        for name, part in net.named_children()
        if name != net.base_model_prefix and next(part.parameters(), None) is not None
    ]
    new = [key.rpartition(".")[0] for key in info["missing_keys"]]
    return net.eval(), tokenizer, tuple(f"host.{name}" for name in dict.fromkeys([*heads, *new]))
