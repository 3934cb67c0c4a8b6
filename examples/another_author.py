"""A pretrained language model stays as it is, and a LoRA beside it learns another author.

    modgraft data fetch glassllm
    python examples/another_author.py shakespeare.txt modules/shakespeare

The model is a Llama of 0.85 M parameters that has read Lewis Carroll. The last tenth of your text
is kept apart, to see what was learned; characters that the model has no token for are left out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

import modgraft as mg
from modgraft.data.corpus import read_corpus, split
from modgraft.data.shards import Windows, tokens_of
from modgraft.models.glassllm import load
from modgraft.models.pretrained import from_transformers

LENGTH = 128  # what the model sees


@torch.no_grad()
def loss_on(host: mg.Host, tokens: np.ndarray) -> float:
    """Return the mean loss over all of a text, in nats a token."""
    windows, total = Windows(tokens, LENGTH), 0.0
    for at in range(0, len(windows), 32):
        some = range(at, min(at + 32, len(windows)))
        total += float(host(**windows.__getitems__(some)).loss) * len(some)
    return total / len(windows)


def learn(file: Path, folder: Path, steps: int = 400) -> tuple[float, float]:
    """Train a LoRA on a text and save it; return the loss on the rest without it, and with it."""
    model, tokenizer = load("en")
    text, known = read_corpus(file), {c for c in tokenizer.get_vocab() if len(c) == 1} | {" "}
    kept = "".join(c for c in text if c in known)
    print(f"{len(text) - len(kept):,} of {len(text):,} characters are left out")
    training, held = split(tokens_of(tokenizer, kept, str(file)))

    host = mg.Host(from_transformers(model)).eval()
    before = loss_on(host, held)
    host.implant("author", mg.LoRA(rank=8), at=["query", "key", "value", "output", "up", "down"])
    loader = Windows(training, LENGTH).loader(16)
    host.fit(loader, train="author", steps=steps, lr=5e-3, warmup=0.05, schedule="cosine")
    host.eval()
    after = loss_on(host, held)
    print(f"loss on what it has not seen: {before:.3f} without the module, {after:.3f} with it")

    begin = torch.tensor([tokenizer.encode(kept[:40]).ids])
    for modules in (None, "author"):
        ids = host.generate(input_ids=begin, max_new_tokens=60, do_sample=False, modules=modules)
        print(f"\n{modules or 'the model itself'}: {tokenizer.decode(ids[0].tolist())}")
    host.save("author", folder, metrics={"loss": after})
    return before, after


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path, help="a text in UTF-8")
    parser.add_argument("folder", type=Path, help="where the module is saved")
    parser.add_argument("--steps", type=int, default=400)
    learn(**vars(parser.parse_args()))
