"""64 sequences, each with modules of its own, in one batch: beside the bare host and PEFT.

The host has GPT-2's shape, 6 layers × 384, random weights; 16 tokens of prompt, 32 new ones,
greedy, with the KV cache. LoRA of rank 8 stands on the whole fused projection of attention, PEFT's
default for GPT-2, in both libraries from the same tensors. Before anything is timed every sequence
is compared with itself run alone (its logits, and of the first 8 what they write), and modgraft's
LoRA with PEFT's. All run in turn, on one thread.

A mixture of LoRA modules of the same shape routes every token to two of them at every layer, of 8
and of 256 that are resident; its router is drawn at random, so that all of them are used.

PEFT runs a batch of several adapters for LoRA (``adapter_names=``); it has no such call for the
other kinds, whose cells are empty.

    python -m benchmarks.multi_module [--rounds 8] [--markdown]
"""

from __future__ import annotations

import argparse
import random
import time
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import modgraft as mg
from benchmarks.show import Claim, add_output, show

ROWS, PROMPT, NEW, RESIDENT, SWITCHED = 64, 16, 32, 1000, 200
RANK = 8
KINDS: dict[str, tuple[mg.Computation, Any]] = {
    "lora": (mg.LoRA(rank=RANK), "transformer.h.*.attn.c_attn"),
    "adapter": (mg.Adapter(reduction=16), "block"),
    "ia3": (mg.Rescale(), ["key", "value", "up"]),
    "prefix": (mg.Prefix(length=10), None),
}
TITLES = {
    "lora": f"LoRA({RANK}) on c_attn",
    "adapter": "adapters after each block",
    "ia3": "rescaling (IA³) of key, value, up",
    "prefix": "prefixes of 10",
    "mixed": "16 of each kind in one batch",
}
FEW, LOTS = 8, 256
Modules = Sequence[str]


def bare_model() -> GPT2LMHeadModel:
    """The host, the same one every time."""
    torch.manual_seed(0)
    config = GPT2Config(n_layer=6, n_embd=384, n_head=6, eos_token_id=None, bos_token_id=0)
    return GPT2LMHeadModel(config).eval()


def ours(count: int, kinds: Sequence[str], model: GPT2LMHeadModel | None = None) -> mg.Host:
    """A host with ``count`` modules of each kind, ``lora_0`` and so on; none in force."""
    host = mg.Host(bare_model() if model is None else model)
    for kind in kinds:
        module, at = KINDS[kind]
        for i in range(count):
            implant = host.implant(f"{kind}_{i}", module, at, active=False)
            draw(implant.parameters(), i, 1.0 if kind == "ia3" else 0.0)
    return host.eval()


@torch.no_grad()
def mixed(count: int) -> mg.Host:
    """A host with a mixture of two of ``count`` LoRA modules for each token, ``"mixture"``."""
    host = ours(count, ["lora"])
    router = mg.TopK(2, level="token")
    mixture = mg.Mixture([f"lora_{i}" for i in range(count)], router=router)
    draw(host.implant("mixture", mixture, active=False).parameters(), 0, 0.0)
    return host


@torch.no_grad()
def draw(parameters: Any, seed: int, around: float) -> None:
    """Tensors as far from their start as trained ones are."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1 + around)


def pefts(host: mg.Host) -> Any:
    """PEFT's model with the first 64 LoRA modules of ``host``, from the same tensors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft

        model = peft.get_peft_model(bare_model(), _config(), adapter_name="lora_0")
        for i in range(1, ROWS):
            model.add_adapter(f"lora_{i}", _config())
    layers = dict(model.named_modules())
    with torch.no_grad():
        for i in range(ROWS):
            implant = host[f"lora_{i}"]
            for path, place in zip(implant.paths, implant.places, strict=True):
                layer: Any = layers[f"base_model.model.{path}"]
                layer.lora_A[f"lora_{i}"].weight.copy_(place.get_parameter("A"))
                layer.lora_B[f"lora_{i}"].weight.copy_(place.get_parameter("B"))
    return model.eval()


def _config() -> Any:
    import peft

    return peft.LoraConfig(
        r=RANK, lora_alpha=RANK, target_modules=["c_attn"], fan_in_fan_out=True,
        task_type="CAUSAL_LM",
    )  # fmt: skip


def prompts() -> dict[str, Tensor]:
    """64 × 16 tokens."""
    ids = torch.randint(1, 50257, (ROWS, PROMPT), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def write(model: Any, inputs: dict[str, Tensor], **how: Any) -> Tensor:
    """The prompts with 32 tokens more."""
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, **how}
    with torch.no_grad():
        return model.generate(**inputs, pad_token_id=0, **settings)


@torch.no_grad()
def check(host: mg.Host, inputs: dict[str, Tensor], modules: Modules) -> None:
    """Each sequence must be what it is alone, and another than the bare host's."""
    together = host(**inputs, modules=list(modules)).logits[:, -1]
    texts = write(host, inputs, modules=list(modules))
    for i, name in enumerate(modules):
        own = {key: value[i : i + 1] for key, value in inputs.items()}
        alone = host(**own, modules=name).logits[0, -1]
        torch.testing.assert_close(together[i], alone, rtol=1e-4, atol=1e-4)
        if i < 8:
            assert torch.equal(write(host, own, modules=name)[0], texts[i]), (i, name)
    moved = (together - host(**inputs, modules=None).logits[:, -1]).abs().amax(1).min()
    assert moved > 0.01, "a module does nothing"


@torch.no_grad()
def check_peer(host: mg.Host, peer: Any, inputs: dict[str, Tensor], modules: Modules) -> None:
    """PEFT must compute the same and write the same."""
    names = list(modules)
    ours, theirs = host(**inputs, modules=names), peer(**inputs, adapter_names=names)
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-4, atol=1e-4)
    same = torch.equal(write(host, inputs, modules=names), write(peer, inputs, adapter_names=names))
    assert same, "PEFT writes something else from the same tensors"


def decoding(rounds: int) -> Table:
    """Time of ``generate`` by the bare host's."""
    inputs = prompts()
    host, many = ours(ROWS, list(KINDS)), ours(RESIDENT, ["lora"])
    peer = pefts(host)
    lists: dict[str, Modules] = {k: [f"{k}_{i}" for i in range(ROWS)] for k in KINDS}
    lists["mixed"] = [f"{list(KINDS)[i % len(KINDS)]}_{i}" for i in range(ROWS)]
    for modules in lists.values():
        check(host, inputs, modules)
    check_peer(host, peer, inputs, lists["lora"])
    assert torch.equal(
        write(host, inputs, modules=list(lists["lora"])),
        write(many, inputs, modules=list(lists["lora"])),
    )
    bare = bare_model()
    ways: dict[str, Callable[[], Any]] = {"bare": lambda: write(bare, inputs)}
    for kind, modules in lists.items():
        ways[kind] = lambda m=list(modules): write(host, inputs, modules=m)
    few, lots = mixed(FEW), mixed(LOTS)
    ways["few"] = lambda: write(few, inputs, modules="mixture")
    ways["lots"] = lambda: write(lots, inputs, modules="mixture")
    ways["resident"] = lambda: write(many, inputs, modules=list(lists["lora"]))
    ways["peft"] = lambda: write(peer, inputs, adapter_names=list(lists["lora"]))
    timed(ways, 1)  # uncounted
    wall, cpu = timed(ways, rounds)
    table = Table(
        title=f"{ROWS} sequences of {PROMPT} + {NEW} tokens, each with a module of its own, one "
        f"thread, {rounds} rounds in turn"
    )
    for title in ("", "asked", "modgraft (quartiles)", "in processor time", "PEFT"):
        table.add_column(title, justify="right" if title else "left")
    for kind, title in TITLES.items():
        asked = "≤ 1.05" if kind == "lora" else "≤ 1.25"
        peft = _ratio(wall["peft"], wall["bare"]) if kind == "lora" else "–"
        table.add_row(
            f"{title} / the bare host", asked, _ratio(wall[kind], wall["bare"]),
            f"{_median(cpu[kind], cpu['bare']):.3f}", peft,
        )  # fmt: skip
    table.add_row(
        f"{RESIDENT:,} LoRA modules resident / {ROWS}, the same {ROWS} in use", "≤ 1.05",
        _ratio(wall["resident"], wall["lora"]), f"{_median(cpu['resident'], cpu['lora']):.3f}", "–",
    )  # fmt: skip
    table.add_row(
        f"two of {LOTS} modules for each token / two of {FEW}", "≤ 1.2",
        _ratio(wall["lots"], wall["few"]), f"{_median(cpu['lots'], cpu['few']):.3f}", "–",
    )  # fmt: skip
    for host, count in ((few, FEW), (lots, LOTS)):
        use = host["mixture"].stats()
        assert sum(len(u.dead) for u in use) <= 0.05 * count * len(use), "modules nobody used"
    return switching(table, many, peer)


def timed(
    ways: dict[str, Callable[[], Any]], rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of each, and of the processor's time, over rounds of all in turn."""
    wall: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start, busy = time.perf_counter(), time.process_time()
            way()
            wall[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - busy)
    return wall, cpu


def _median(a: Sequence[float], b: Sequence[float]) -> float:
    return median(x / y for x, y in zip(a, b, strict=True))


def _ratio(a: Sequence[float], b: Sequence[float]) -> str:
    ratios = sorted(x / y for x, y in zip(a, b, strict=True))
    low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
    return f"{median(ratios):.3f} ({low:.3f} to {high:.3f})"


def switching(table: Table, host: mg.Host, peer: Any) -> Table:
    """Milliseconds to put another composition in force, beside PEFT's ``set_adapter``."""
    names = [f"lora_{i}" for i in range(RESIDENT)]
    random.Random(0).shuffle(names)
    texts = [f"{a} >> 0.5*{b}" for a, b in pairwise(names)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i in range(ROWS, SWITCHED):
            peer.add_adapter(f"lora_{i}", _config())
    theirs = [f"lora_{random.Random(i).randrange(SWITCHED)}" for i in range(15)]

    def using(composition: str) -> None:
        with host.using(composition):
            pass

    peft = 1e3 * _each(peer.set_adapter, theirs)
    for title, switch, compositions in (
        ("host.use of a module", host.use, names),
        ("host.use of two, stacked", host.use, texts),
        ("host.using of a module, there and back", using, names),
    ):
        ms = 1e3 * _each(switch, compositions)
        first = title.startswith("host.use of a module")
        note = f"{peft:.1f} ms (of {SWITCHED})" if first else "–"
        table.add_row(f"{title}, {RESIDENT:,} resident", "≤ 0.1 ms", f"{ms:.4f} ms", "", note)
    host.use(None)
    return table


def _each(function: Callable[[str], object], values: Sequence[str]) -> float:
    """Median seconds of one call."""
    times = []
    for value in values:
        start = time.perf_counter()
        function(value)
        times.append(time.perf_counter() - start)
    return median(times)


def graphs(count: int = 50) -> int:
    """How many graphs ``torch.compile`` makes for ``count`` different compositions."""
    host = ours(2, list(KINDS))
    names, chosen = list(host.implants), random.Random(0)
    inputs = {"input_ids": prompts()["input_ids"][:2]}
    made: list[Any] = []

    def counting(graph: Any, example: Any) -> Any:
        made.append(graph)
        return graph

    compiled = torch.compile(host, backend=counting, fullgraph=True)
    compositions = {" >> ".join(names), names[0]}
    while len(compositions) < count:
        some = [n for n in names if chosen.random() < 0.5]
        scaled = [
            n if n.startswith("prefix") else f"{chosen.uniform(0.1, 2):.2f}*{n}" for n in some
        ]
        compositions.add(" >> ".join(scaled or names))
    with torch.no_grad():
        for composition in compositions:
            host.use(composition)
            got, expected = compiled(**inputs).logits, host(**inputs).logits
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    return len(made)


def main() -> None:
    """Check everything, then time, and print one table."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--rounds", type=int, default=8)
    add_output(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = decoding(options.rounds)
    table.add_row("graphs of torch.compile, 50 compositions", "1", f"{graphs()}", "", "–")
    rows = zip(*(column.cells for column in table.columns), strict=True)
    claims = [Claim(row[0], row[2], row[1], row[4]) for row in rows]  # type: ignore[arg-type]
    show([table], claims, options)


if __name__ == "__main__":
    main()
