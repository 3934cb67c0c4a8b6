"""Roles guessed for a host of no known family: by the names of linear layers, confirmed by shapes.

A wrong role is worse than none. Three layers side by side that known families call query, key and
value, of fitting widths, are those; so are layers of a feed-forward that undo each other's width. A
fused projection is left out: nothing tells how its parts lie.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import nn
from transformers.pytorch_utils import Conv1D

from modgraft.core.architectures import FAMILIES
from modgraft.core.attention import asks_registry
from modgraft.core.layers import is_stack, open_modules, weight_labels
from modgraft.core.patterns import joined, pattern, starred


def _last(path: str) -> str:
    return path.rpartition(".")[2]


_ATTENTION = dict.fromkeys([
    ("q_proj", "k_proj", "v_proj"), ("to_q", "to_k", "to_v"), ("wq", "wk", "wv"),
    *((_last(f.query), _last(f.key), _last(f.value)) for f in FAMILIES if f.parts is None),
])  # fmt: skip
_OUTPUT = sorted({"wo", "to_out.0", *(_last(f.output) for f in FAMILIES)})
_FEEDFORWARD = (
    (("gate_proj", "up_proj"), "down_proj"), (("up_proj",), "down_proj"),
    (("gate_up_proj",), "down_proj"),
    (("fc1",), "fc2"), (("wi_0", "wi_1"), "wo"), (("wi",), "wo"), (("lin1",), "lin2"),
    (("linear1",), "linear2"), (("linear_fc1",), "linear_fc2"), (("w1", "w3"), "w2"),
    (("c_fc",), "c_proj"), (("fc_in",), "fc_out"), (("dense_h_to_4h",), "dense_4h_to_h"),
    (("intermediate_dense",), "output_dense"), (("intermediate.dense",), "output.dense"),
)  # fmt: skip


def guess(model: nn.Module, without: Sequence[str] = ()) -> Mapping[str, tuple[str, ...]]:
    """Return role → patterns, of those roles that names and shapes of the layers leave no doubt
    about.

    Args:
        model: the host's.
        without: the paths of parts that are left out.
    """
    every = dict(open_modules(model))
    left_out = tuple(f"{path}." if path else "" for path in without)
    modules = {p: m for p, m in every.items() if not f"{p}.".startswith(left_out)}
    names = (
        "query key value output attention self_attention cross_attention up down block "
        "experts experts.up experts.down"
    )
    found: dict[str, list[str]] = {name: [] for name in names.split()}
    for path, module in modules.items():
        roles = [*_attention(path, module), *_feedforward(path, module), *_experts(path, module)]
        if ("attention", path) not in roles and asks_registry(module):  # whatever it is made of
            roles += _attends(path)
        for role, label in dict.fromkeys(roles):
            found[role].append(label)
    found["block"] += _blocks(modules, found["query"], found["down"])
    labels = [*every, *(label for p, m in every.items() for label, _ in weight_labels(p, m))]
    return {role: _patterns(some, labels) for role, some in found.items() if some}


def _blocks(
    modules: Mapping[str, nn.Module], queries: Sequence[str], downs: Sequence[str]
) -> list[str]:
    """Return the entries of lists, each of which attends and has a feed-forward.

    Stages, whose own entries do, are none.
    """

    def has(block: str, labels: Sequence[str]) -> bool:
        return any(label.startswith(f"{block}.") for label in labels)

    found: list[str] = []
    for path, module in modules.items():
        blocks = [joined(path, name) for name, _ in module.named_children()]
        listed = isinstance(module, nn.ModuleList)
        if listed and all(has(b, queries) and has(b, downs) for b in blocks):
            found += blocks
    return [block for block in found if not has(block, found)]


def _attention(path: str, module: nn.Module) -> list[tuple[str, str]]:
    """Return the roles in a layer that attends."""
    if isinstance(module, nn.MultiheadAttention):
        own = [(what, label) for label, what in weight_labels(path, module) if what]
        return [*own, *_attends(path, module.kdim != module.embed_dim)] if own else []
    for names in _ATTENTION:
        query, key, value = (_linear(module, name) for name in names)
        if query is None or key is None or value is None or key[0] != value[0]:
            continue
        roles = zip(("query", "key", "value"), names, strict=True)
        found = [(role, joined(path, name)) for role, name in roles]
        for name in _OUTPUT:
            output = _linear(module, name)
            if output is not None and output[0] in (query[1], value[1]):
                found.append(("output", joined(path, name)))
        return [*found, *_attends(path, key[0] != query[0])]
    return []


def _attends(path: str, other: bool = False) -> list[tuple[str, str]]:
    """Return the roles of a layer that attends as a whole, by its own name or that of its block.

    Args:
        path: its path.
        other: whether its keys are made of something else than its queries, by their widths.
    """
    name = ".".join(path.split(".")[-2:]).lower()
    crosses = other or any(part in name for part in ("cross", "encoder_attn", "encdec"))
    return [("attention", path), ("cross_attention" if crosses else "self_attention", path)]


def _feedforward(path: str, module: nn.Module) -> list[tuple[str, str]]:
    """Return the roles in a layer that widens its input and narrows it again."""
    for ups, down in _FEEDFORWARD:
        wide, narrow = [_linear(module, name) for name in ups], _linear(module, down)
        if narrow is None or any(
            one is None or one[0] != narrow[1] or one[1] not in (narrow[0], 2 * narrow[0])
            for one in wide
        ):
            continue
        return [*(("up", joined(path, name)) for name in ups), ("down", joined(path, down))]
    return []


def _experts(path: str, module: nn.Module) -> list[tuple[str, str]]:
    """Return the roles of a layer that holds the weights of all experts in stacks."""
    stacks = [n for n, p in module._parameters.items() if p is not None and is_stack(module, n)]
    found = [(kind, joined(path, n)) for n in stacks for kind in ("down", "up") if kind in n]
    if {kind for kind, _ in found} != {"up", "down"}:
        return []
    return [("experts", path), *found, *((f"experts.{kind}", label) for kind, label in found)]


def _linear(module: nn.Module, name: str) -> tuple[int, int] | None:
    """Return the inputs and outputs of the linear layer called ``name`` in ``module``, or in what
    wraps it."""
    try:
        layer = module.get_submodule(name)
    except AttributeError:
        return None
    layer = getattr(layer, "base_layer", layer)  # PEFT's layers are beside the one they change
    match layer:
        case nn.Linear(in_features=ins, out_features=outs) | Conv1D(nx=ins, nf=outs):
            return ins, outs
    return None


def _patterns(labels: list[str], every: Iterable[str]) -> tuple[str, ...]:
    """Return patterns of ``labels`` in which ``*`` is a number, if they mean no others."""
    short = list(dict.fromkeys(starred(label) for label in labels))
    wanted, meant = set(labels), set()
    for each in short:
        meant |= {label for label in every if pattern(each, numbers=True).matches(label)}
    return tuple(short) if meant == wanted else tuple(labels)
