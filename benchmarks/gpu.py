"""What a machine without a GPU cannot show: the contract suite, a step and decoding on one.

The contract suite runs on the device, in the precisions of its tests. A LoRA step on every linear
layer of a Llama-shaped host, and decoding of 64 sequences with a module of its own each, run in
bf16 and fp16: first what they compute is compared (the step with float32, each sequence with itself
alone), then they are timed beside the bare host's. A row that does not hold says so, and the exit
code is 1. Without a GPU it is one line.

    make gpu
    python -m benchmarks.gpu --device cpu --only step      # the same, small, on any machine
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from xml.etree import ElementTree

import torch
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import modgraft as mg
from benchmarks import multi_module as many
from benchmarks.show import add_output, show
from benchmarks.timing import in_turn

HALVES = (torch.bfloat16, torch.float16)
LINEAR = "*.{q,k,v,o,gate,up,down}_proj"
TESTS = [f"tests/contract/test_{name}.py" for name in ("contract", "composition", "kinds_together")]
SECONDS = 240
"""How long the contract suite may take; the rest takes about one minute."""


class Row(NamedTuple):
    """One thing that was looked at; ``holds`` is None where nothing was asked of it."""

    what: str
    found: str
    holds: bool | None = None


def contract(device: torch.device) -> Iterator[Row]:
    """Run the contract suite in as many processes as there are cores, at most 8."""
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        workers = str(min(8, os.cpu_count() or 1))
        command = [sys.executable, "-m", "pytest", "-q", "-n", workers, f"--junitxml={report}"]
        environment = {**os.environ, "MODGRAFT_TEST_DEVICE": str(device)}
        quiet = subprocess.DEVNULL
        try:
            subprocess.run([*command, *TESTS], env=environment, stdout=quiet, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            yield Row("the contract suite", f"did not end in {SECONDS} s", False)
            return
        suite = next(ElementTree.parse(report).iter("testsuite"))
    wrong = [
        case for case in suite.iter("testcase") if {"failure", "error"} & {e.tag for e in case}
    ]
    for case in wrong:
        print(f"{case.get('classname')}::{case.get('name')}", file=sys.stderr)
    found = f"{suite.get('tests')} tests, {len(wrong)} failed, {float(suite.get('time', 0)):.0f} s"
    yield Row("the contract suite", found, not wrong)


def moved(device: torch.device) -> Iterator[Row]:
    """Compile a host that was moved to the device after its modules were implanted."""
    host = many.ours(2, list(many.KINDS)).to(device)
    inputs = {key: value[:2].to(device) for key, value in many.prompts().items()}
    compiled = torch.compile(host, backend="eager", fullgraph=True)
    with torch.no_grad():
        for composition in ("lora_0 >> adapter_1", "0.5*ia3_0 >> prefix_1"):
            host.use(composition)
            apart = (compiled(**inputs).logits - host(**inputs).logits).abs().max().item()
            yield Row(f"{composition}, compiled after moving", f"{apart:.0e} apart", apart < 1e-3)


def step(device: torch.device, dtype: torch.dtype) -> Iterator[Row]:
    """Train LoRA in half precision, beside float32 and beside the bare host's step."""
    width, layers, rows, length = (64, 2, 2, 16) if device.type == "cpu" else (1024, 8, 8, 512)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=width, intermediate_size=11 * width // 4,
        num_hidden_layers=layers, num_attention_heads=width // 64, num_key_value_heads=width // 64,
    )  # fmt: skip
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, (rows, length), generator=draw).to(device)
    batch = {"input_ids": ids, "labels": ids}

    def model(dtype: torch.dtype) -> Any:
        torch.manual_seed(0)
        return LlamaForCausalLM(config).to(device, dtype)

    def host_in(dtype: torch.dtype) -> mg.Host:
        host = mg.Host(model(dtype))
        host.implant("m", mg.LoRA(rank=16), LINEAR, expect=7 * layers)
        many.draw(host["m"].parameters(), 0, 0.0)
        return host

    exact, host = host_in(torch.float32), host_in(dtype)
    with torch.no_grad():
        wanted, found = (h(**batch).loss.item() for h in (exact, host))
    near = abs(found - wanted) <= 0.02 * wanted
    yield Row("a step's loss, beside float32", f"{found:.4f}, {wanted:.4f}", near)

    run, parameters = trained(host, batch), list(host["m"].parameters())
    start = [p.detach().clone() for p in parameters]
    losses = [run() for _ in range(8)]
    yield Row("eight steps", f"{losses[0]:.4f} to {losses[-1]:.4f}", losses[-1] < losses[0])
    share = min((a != b).float().mean().item() for a, b in zip(parameters, start, strict=True))
    yield Row("entries that they move", f"{100 * share:.0f} % or more of each tensor", share > 0.9)

    bare = model(dtype).requires_grad_(False)
    bare.get_input_embeddings().register_forward_hook(lambda m, args, out: out.requires_grad_())
    yield timed("a step / the bare host's", lambda: bare(**batch).loss.backward(), run, device)


def trained(host: mg.Host, batch: dict[str, Tensor]) -> Callable[[], float]:
    """A step of AdamW, with scaled gradients in fp16, that returns the loss before it."""
    learn = [p for p in host.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(learn, lr=1e-3, eps=1e-6)
    scaled = host.model.dtype is torch.float16 and learn[0].dtype is torch.float32
    scaler = torch.amp.GradScaler(learn[0].device.type, enabled=scaled)

    def run() -> float:
        optimiser.zero_grad()
        loss = host(**batch).loss
        scaler.scale(loss).backward()
        scaler.step(optimiser)
        scaler.update()
        return loss.item()

    return run


def decoding(device: torch.device, dtype: torch.dtype) -> Iterator[Row]:
    """Decode sequences with a module of its own each: 64, or 8 on the CPU."""
    rows, new = (8, 4) if device.type == "cpu" else (many.ROWS, many.NEW)
    bare, model = (many.bare_model().to(device, dtype) for _ in range(2))  # type: ignore[arg-type]
    host = many.ours(rows, list(many.KINDS), model)
    inputs = {key: value[:rows].to(device) for key, value in many.prompts().items()}
    length = {"max_new_tokens": new, "min_new_tokens": new}
    lists = {kind: [f"{kind}_{i}" for i in range(rows)] for kind in many.KINDS}
    lists["mixed"] = [
        own[i] for i, own in zip(range(rows), 16 * list(lists.values()), strict=False)
    ]
    for kind, modules in lists.items():
        with torch.no_grad():
            together = host(**inputs, modules=modules).logits[:, -1].float()
            alone = []
            for i, name in enumerate(modules):
                own = {key: value[i : i + 1] for key, value in inputs.items()}
                alone.append(host(**own, modules=name).logits[0, -1].float())
        apart = ((together - torch.stack(alone)).norm() / together.norm()).item()
        yield Row(f"{many.TITLES[kind]}: each as alone", f"{apart:.0e} apart", apart < 0.03)
        without = partial(many.write, bare, inputs, **length)
        having = partial(many.write, host, inputs, modules=modules, **length)
        yield timed(f"{many.TITLES[kind]} / the bare host", without, having, device)


def timed(
    what: str, without: Callable[[], object], having: Callable[[], object], device: torch.device
) -> Row:
    """Time what is done with modules by the same without."""

    def whole(way: Callable[[], object]) -> None:
        way()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    first, second = in_turn([partial(whole, without), partial(whole, having)], 5)
    ratio = median(b / a for a, b in zip(first, second, strict=True))
    return Row(what, f"{1e3 * median(second):.1f} ms, {ratio:.2f} times")


PARTS: dict[str, tuple[Callable[..., Iterator[Row]], tuple[torch.dtype, ...]]] = {
    "contract": (contract, ()),
    "moved": (moved, ()),
    "step": (step, HALVES),
    "decoding": (decoding, HALVES),
}


def main() -> int:
    """Run what is asked for, and print one table."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", action="append", choices=PARTS, help="one of them; repeat")
    add_output(parser)
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no GPU here: nothing was run")
        return 0
    on = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU, small"
    table = Table("", "in", "found", "", title=f"modgraft on {on}, torch {torch.__version__}")
    held = True
    for part in options.only or PARTS:
        run, dtypes = PARTS[part]
        for dtype in dtypes or (None,):
            for row in run(device) if dtype is None else run(device, dtype):
                name = "" if dtype is None else str(dtype).removeprefix("torch.")
                says = {None: "", True: "holds", False: "DOES NOT HOLD"}[row.holds]
                table.add_row(row.what, name, row.found, says)
                held = held and row.holds is not False
    show([table], options=options)
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
