"""One training step of LoRA on every linear layer of MiniLM's encoder, beside its limit and PEFT.

The limit is what no method can go below: the frozen forward, and the gradient of the activations
back to the embeddings, with no gradient of any weight. modgraft and PEFT take a whole step
(forward, backward, AdamW) from the same tensors at the same rank, layers and scaling; their losses
and gradients are compared before anything is timed. All three run in turn, on one thread.

The second table is the rule of thumb of ``modgraft.engine.kernels.linear``: the layer and an
effect beside it, against the layer with changed weights, forward and backward, by number of tokens.

    python -m benchmarks.train_step [--rounds 15] [--markdown]
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import modgraft as mg
from benchmarks.minilm import NAMES, classifier
from benchmarks.show import Claim, add_output, show
from benchmarks.timing import in_turn, side_by_side
from modgraft.engine.kernels.low_rank import LowRank
from modgraft.training.memory import peak_bytes

RANK, ROWS, LENGTH = 8, 16, 64
LINEAR = ["query", "key", "value", "output", "up", "down"]
TOKENS = (1, 16, 64, 128, 256, 512, 1024)


def batch() -> dict[str, Tensor]:
    """16 × 64 tokens: speed does not depend on which."""
    generator = torch.Generator().manual_seed(0)
    return {
        "input_ids": torch.randint(1000, 30000, (ROWS, LENGTH), generator=generator),
        "attention_mask": torch.ones(ROWS, LENGTH, dtype=torch.long),
        "labels": torch.randint(0, len(NAMES), (ROWS,), generator=generator),
    }


def limit(data: dict[str, Tensor]) -> Callable[[], Any]:
    """Frozen forward, and the activations' gradients back to the embeddings' output."""
    model = classifier().requires_grad_(False)
    model.bert.embeddings.register_forward_hook(lambda m, args, out: out.requires_grad_())
    return lambda: model(**data).loss.backward()


def ours(data: dict[str, Tensor]) -> tuple[Callable[[], Any], mg.Host]:
    host = mg.Host(classifier())
    host.implant("m", mg.LoRA(rank=RANK, alpha=2 * RANK), at=LINEAR, expect=36)
    return step_of(host, data), host


def pefts(data: dict[str, Tensor]) -> tuple[Callable[[], Any], Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what transformers has renamed
        import peft

        config = peft.LoraConfig(
            r=RANK, lora_alpha=2 * RANK, target_modules=["query", "key", "value", "dense"]
        )
        model = peft.get_peft_model(classifier(), config).eval()
    return step_of(model, data), model


def step_of(model: nn.Module, data: dict[str, Tensor]) -> Callable[[], Any]:
    learn = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(learn, lr=1e-4, fused=True)

    def run() -> None:
        optimiser.zero_grad()
        model(**data).loss.backward()
        optimiser.step()

    return run


def check(host: mg.Host, peer: Any, data: dict[str, Tensor]) -> None:
    """Both must compute the same from the same tensors: loss and every gradient."""
    layers = {
        name.removeprefix("base_model.model."): layer
        for name, layer in peer.named_modules()
        if hasattr(layer, "lora_A")
    }
    assert set(layers) == set(host["m"].paths)
    pairs: list[tuple[Tensor, Tensor]] = []
    for path, place in zip(host["m"].paths, host["m"].places, strict=True):
        own = place.get_parameter("A"), place.get_parameter("B")
        other = (layers[path].lora_A["default"].weight, layers[path].lora_B["default"].weight)
        with torch.no_grad():
            own[1].normal_(0.0, 0.01)
            for a, b in zip(own, other, strict=True):
                b.copy_(a)
        pairs += zip(own, other, strict=True)
    losses = [model(**data).loss for model in (host, peer)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)
    for loss in losses:
        loss.backward()
    for a, b in pairs:
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-2, atol=1e-5)


def rule(rounds: int) -> Table:
    """What an effect beside the layer costs by what the layer with changed weights does."""
    table = Table(title="time of the layer and an effect beside it / with changed weights")
    table.add_column("layer")
    table.add_column("Δ")
    for tokens in TOKENS:
        table.add_column(f"{tokens} tokens", justify="right")
    table.add_column("rule says from", justify="right")
    for outs, ins in ((384, 384), (1536, 384), (384, 1536)):
        W, b = torch.randn(outs, ins), torch.randn(outs)
        B, A, D = (
            torch.randn(s).requires_grad_() for s in ((outs, RANK), (RANK, ins), (outs, ins))
        )
        ways: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
            f"rank {RANK}": (
                lambda x, W=W, b=b, B=B, A=A: LowRank.apply(x, (2.0,), W, b, B, A)[0],
                lambda x, W=W, b=b, B=B, A=A: F.linear(x, W, b) + 2.0 * F.linear(F.linear(x, A), B),
            ),
            "dense": (
                lambda x, W=W, b=b, D=D: F.linear(x, W + D, b),
                lambda x, W=W, b=b, D=D: F.linear(x, W, b) + F.linear(x, D),
            ),
        }
        for kind, (one, two) in ways.items():
            cells = []
            for tokens in TOKENS:
                x = torch.randn(tokens, ins, requires_grad=True)
                y = torch.randn(tokens, outs)
                steps = [lambda f=f, x=x, y=y: f(x).backward(y) for f in (one, two)]
                cells.append(f"{side_by_side(*steps, rounds=4 * rounds).ratio:.2f}")
            table.add_row(
                f"{ins} → {outs}", kind, *cells, f"{-(-outs * ins // (outs + ins))} tokens"
            )
    return table


def main() -> None:
    """Check, then time and weigh the three, and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    add_output(parser)
    options = parser.parse_args()
    rounds = options.rounds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = batch()
    bare, (own, host), (other, peer) = limit(data), ours(data), pefts(data)
    check(host, peer, data)
    ways = {"the limit": bare, "modgraft": own, "PEFT": other}
    wall = in_turn(list(ways.values()), rounds)
    busy = in_turn(list(ways.values()), rounds, clock=time.process_time)
    peaks = [peak_bytes(step) / 2**20 for step in ways.values()]
    table = Table(
        title=f"a LoRA step, rank {RANK}, 36 linear layers, {ROWS} × {LENGTH} tokens, one thread, "
        f"{rounds} rounds in turn"
    )
    for title in ("", "ms", "of the limit (quartiles)", "in processor time", "peak MiB"):
        table.add_column(title, justify="right" if title else "left")
    shown = []
    for i, name in enumerate(ways):
        ratios = sorted(a / b for a, b in zip(wall[i], wall[0], strict=True))
        low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
        cpu = median(a / b for a, b in zip(busy[i], busy[0], strict=True))
        shown.append(f"{median(ratios):.2f} ({low:.2f} to {high:.2f})")
        table.add_row(
            name, f"{1e3 * median(wall[i]):,.0f}", shown[i], f"{cpu:.2f}", f"{peaks[i]:.0f}"
        )
    claims = [
        Claim("a LoRA step / the limit", shown[1], "≤ 1.15", shown[2]),
        Claim("its peak of memory / PEFT's", f"{peaks[1] / peaks[2]:.2f}", "≤ 1"),
    ]
    show([table, rule(rounds)], claims, options)


if __name__ == "__main__":
    main()
