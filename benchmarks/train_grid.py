"""One LoRA step on every linear layer of Llama-shaped hosts, over shapes, ranks and threads.

At each point four things are timed in turn, as ratios in one run: the limit (the frozen forward,
and the gradients of the activations back to the embeddings), modgraft, PEFT, and LoRA's own thin
products alone. No step goes below the limit, nor one that computes these products beside it below
both together. modgraft and PEFT start from the same tensors; their losses and gradients are
compared before anything is timed.

    python -m benchmarks.train_grid [--all] [--seconds 20] [--markdown]
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from itertools import product
from statistics import median
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import modgraft as mg
from benchmarks.show import Claim, add_output, show
from benchmarks.timing import in_turn
from benchmarks.train_step import check, step_of

LAYERS, THREADS = 2, (1, 2)
LINEAR = "*.{q,k,v,o,gate,up,down}_proj"
PEFT_NAMES = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
SHAPES = [  # width, tokens, rank
    (384, 32, 8), (384, 2048, 64), (768, 32, 8), (768, 512, 16), (1024, 128, 64), (1024, 512, 16),
]  # fmt: skip
GRID = list(product((384, 768, 1024), (32, 128, 512, 2048), (8, 16, 64)))


def model(width: int) -> LlamaForCausalLM:
    """Llama's shape, two layers, few words; the same one every time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=width, intermediate_size=width * 11 // 4,
        num_hidden_layers=LAYERS, num_attention_heads=width // 64, num_key_value_heads=width // 64,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def batch(tokens: int) -> dict[str, Tensor]:
    """Texts of at most 256 tokens."""
    length = min(tokens, 256)
    ids = torch.randint(256, (tokens // length, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def limit(width: int, data: dict[str, Tensor]) -> Callable[[], Any]:
    """The frozen forward, and the activations' gradients back to the embeddings' output."""
    bare = model(width).requires_grad_(False)
    bare.get_input_embeddings().register_forward_hook(lambda m, args, out: out.requires_grad_())
    return lambda: bare(**data).loss.backward()


def compared(
    width: int, rank: int, data: dict[str, Tensor]
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """A step of modgraft and one of PEFT, which were found to compute the same."""
    host = mg.Host(model(width))
    host.implant("m", mg.LoRA(rank=rank, alpha=2 * rank), at=LINEAR, expect=7 * LAYERS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what transformers has renamed
        import peft

        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=PEFT_NAMES)
        peer = peft.get_peft_model(model(width), config).eval()  # type: ignore[arg-type]
    check(host, peer, data)
    return step_of(host, data), step_of(peer, data)


def thin_products(width: int, tokens: int, rank: int) -> Callable[[], None]:
    """LoRA's own products at every layer: two of the forward, four of the backward.

    x Aᵀ, and (x Aᵀ)Bᵀ added to y; G B, (G B)ᵀx, Gᵀ(x Aᵀ), and (G B)A added to the gradient of x.
    """
    wide = width * 11 // 4
    shapes = [(width, width)] * 4 + [(wide, width)] * 2 + [(width, wide)]
    layers = [
        (
            torch.randn(tokens, ins), torch.randn(tokens, outs),  # x, and y or its gradient
            torch.randn(rank, ins), torch.randn(outs, rank),
        )
        for outs, ins in shapes * LAYERS
    ]  # fmt: skip

    @torch.no_grad()
    def run() -> None:
        hidden = []
        for x, y, A, B in layers:
            hidden.append(x @ A.T)
            y.addmm_(hidden[-1], B.T, alpha=1e-9)
        for x, grad, A, B in reversed(layers):
            thin = grad @ B
            thin.T @ x
            grad.T @ hidden.pop()
            x.addmm_(thin, A, alpha=1e-9)

    return run


def measured(width: int, tokens: int, rank: int, threads: int, seconds: float) -> list[str]:
    """The cells of one point: ms of the limit, then ratios to it with their quartiles."""
    torch.set_num_threads(threads)
    data = batch(tokens)
    ours, pefts = compared(width, rank, data)
    ways = [limit(width, data), ours, pefts, thin_products(width, tokens, rank)]
    start = time.perf_counter()
    for way in ways:
        way()
    rounds = min(200, max(5, int(seconds / (time.perf_counter() - start))))
    bare, own, other, thin = in_turn(ways, rounds)
    both = [a + b for a, b in zip(bare, thin, strict=True)]
    ratios = [sorted(a / b for a, b in zip(way, bare, strict=True)) for way in (own, other, both)]
    return [
        f"{1e3 * median(bare):,.1f}",
        *(
            f"{median(r):.2f} ({r[len(r) // 4]:.2f} to {r[-1 - len(r) // 4]:.2f})"
            for r in ratios
        ),
        str(rounds),
    ]  # fmt: skip


def main() -> None:
    """Check and time every point, and print the table."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--all", action="store_true", help="36 shapes instead of six")
    parser.add_argument("--seconds", type=float, default=20.0, help="of timing at each point")
    add_output(parser)
    options = parser.parse_args()
    table = Table(title=f"a LoRA step on all linear layers of a Llama of {LAYERS} layers, in turn")
    for title in (
        "width", "tokens", "rank", "threads", "the limit, ms", "modgraft / the limit (quartiles)",
        "PEFT", "the limit and LoRA's products", "rounds",
    ):  # fmt: skip
        table.add_column(title, justify="right")
    claims = []
    for threads in THREADS:
        for width, tokens, rank in GRID if options.all else SHAPES:
            cells = measured(width, tokens, rank, threads, options.seconds)
            table.add_row(str(width), str(tokens), str(rank), str(threads), *cells)
            asked = f"≤ {float(cells[3].split()[0]) + 0.05:.2f}" if tokens >= 512 else "≤ PEFT's"
            what = (
                f"{width} wide, {tokens} tokens, rank {rank}, {threads} threads: a step / the limit"
            )
            claims.append(Claim(what, cells[1], asked, cells[2]))
    show([table], claims, options)


if __name__ == "__main__":
    main()
