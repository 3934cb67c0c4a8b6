"""What a host that is written for modules gains: ours beside the same model of transformers.

Each pair has the same weights and the same modules, whose losses and gradients are compared before
anything is timed: LoRA and an adapter, of which there are two each to switch between. A step is
forward, backward and AdamW on 12 × 64 tokens; a switch is ``host.use`` of the other two and one
forward of one text; a compiled forward is that of ``torch.compile(host)``, whose first call is
timed apart. Both take turns, on one thread.

    python -m benchmarks.small_hosts [--rounds 15] [--markdown]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

import modgraft as mg
from benchmarks.show import Claim, add_output, show
from benchmarks.timing import Pair, side_by_side
from modgraft.models.pretrained import from_transformers

WIDTH, LAYERS, HEADS, WORDS, ROWS, LENGTH = 256, 4, 4, 1000, 12, 64
COMPOSITIONS = (["lora_0", "adapter_0"], ["lora_1", "adapter_1"])


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=WORDS, n_positions=LENGTH, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS,
            embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0, bos_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=WORDS, hidden_size=WIDTH, intermediate_size=3 * WIDTH,
            num_hidden_layers=LAYERS, num_attention_heads=HEADS, max_position_embeddings=LENGTH,
        )
    )  # fmt: skip


def t5() -> PreTrainedModel:
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=WORDS, d_model=WIDTH, d_kv=WIDTH // HEADS, d_ff=3 * WIDTH,
            num_layers=LAYERS // 2, num_heads=HEADS, dropout_rate=0.0,
        )
    )  # fmt: skip


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {"GPT-2": gpt2, "Llama": llama, "T5": t5}


def host_of(model: PreTrainedModel) -> mg.Host:
    """Implant the modules, from one seed, none of them born as the identity."""
    host = mg.Host(model)
    torch.manual_seed(1)
    for i, names in enumerate(COMPOSITIONS):
        host.implant(names[0], mg.LoRA(8), at=["query", "value"], active=i == 0)
        host.implant(names[1], mg.Adapter(reduction=16), at="feedforward", active=i == 0)
    return host


def aligned(ours: mg.Host, theirs: mg.Host) -> None:
    """Give both hosts' modules one set of numbers."""
    torch.manual_seed(2)
    for name in (name for names in COMPOSITIONS for name in names):
        for mine, other in zip(ours[name].parameters(), theirs[name].parameters(), strict=True):
            with torch.no_grad():
                mine.copy_(torch.randn_like(mine) * 0.02)
                other.copy_(mine)


@dataclass
class Side:
    """A host with what is timed on it."""

    host: mg.Host
    batch: dict[str, Tensor]

    def __post_init__(self) -> None:
        learn = [p for p in self.host.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(learn, lr=1e-5, fused=True)
        self.turn = 0
        self.short = {name: value[:1, :1] for name, value in self.batch.items()}

    def step(self) -> None:
        """A step of training."""
        self.optimizer.zero_grad()
        self.host(**self.batch).loss.backward()
        self.optimizer.step()

    def forward(self) -> None:
        """A forward of the batch."""
        with torch.no_grad():
            self.host(**self.batch)

    def token(self) -> None:
        """A forward of one token."""
        with torch.no_grad():
            self.host(**self.short)

    def switch(self) -> None:
        """The other modules, and a forward of one token."""
        self.turn = 1 - self.turn
        self.host.use(COMPOSITIONS[self.turn])
        self.token()

    def compile(self) -> float:
        """Seconds of the first call of the compiled host."""
        torch.compiler.reset()
        self.compiled: Any = torch.compile(self.host)
        began = time.perf_counter()
        self.compiled_forward()
        return time.perf_counter() - began

    def compiled_forward(self) -> None:
        """A forward of the compiled host."""
        with torch.no_grad():
            self.compiled(**self.batch)


def pair(make: Callable[[], PreTrainedModel]) -> tuple[Side, Side]:
    """Make both sides; their losses and gradients are the same."""
    torch.manual_seed(0)
    model = make().eval()
    sides = [host_of(from_transformers(model)), host_of(model)]
    aligned(*sides)
    ids = torch.randint(2, WORDS, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids}
    found = []
    for host in sides:
        loss = host(**batch).loss
        loss.backward()
        found.append((loss, [p.grad for p in host.parameters() if p.grad is not None]))
        host.zero_grad()
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)
    return Side(sides[0], batch), Side(sides[1], batch)


TIMED = {
    "step": "a step",
    "forward": "a forward",
    "token": "a forward of one token",
    "switch": "a switch, and a forward of one token",
    "compiled_forward": "a compiled forward",
}


def measured(rounds: int) -> Iterator[tuple[str, str, float, float, str]]:
    """Yield family, what is timed, milliseconds of ours and of theirs, and the ratio."""
    for family, make in FAMILIES.items():
        ours, theirs = pair(make)
        seconds = theirs.compile(), ours.compile()
        for name, title in TIMED.items():
            found: Pair = side_by_side(getattr(theirs, name), getattr(ours, name), rounds)
            low, high = found.spread
            theirs_ms, ours_ms = (1e3 * sorted(x)[len(x) // 2] for x in (found.a, found.b))
            yield family, title, ours_ms, theirs_ms, f"{found.ratio:.2f} ({low:.2f} … {high:.2f})"
        ratio = f"{seconds[1] / seconds[0]:.2f}"
        yield family, "compiling, once", 1e3 * seconds[1], 1e3 * seconds[0], ratio


def main() -> None:
    """Time all pairs."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    add_output(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    title = f"our hosts beside transformers', {WIDTH} wide, {ROWS} × {LENGTH} tokens"
    table = Table(title=f"{title}; milliseconds")
    for column in ("family", "of", "ours", "transformers'", "ratio"):
        table.add_column(column, justify="left" if column in ("family", "of") else "right")
    claims = []
    for family, what, ours, theirs, ratio in measured(options.rounds):
        table.add_row(family, what, f"{ours:.2f}", f"{theirs:.2f}", ratio)
        claims.append(Claim(f"{what}, {family}: ours by transformers'", ratio))
    show([table], claims, options)


if __name__ == "__main__":
    main()
