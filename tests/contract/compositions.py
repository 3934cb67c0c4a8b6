"""The reference of compositions: trees of tuples, evaluated by hand at every site of a bare host.

A tree is a name, or ``("+", a, b)``, ``("-", a, b)``, ``("neg", a)``, ``("*", number, a)``,
``(">>", a, b)``, ``("average", a, …)`` or ``("concat", a, …)``. Nothing here calls the library's
own reading or folding of expressions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import modgraft as mg
from contract.references import bottleneck, compacter, convolved, dora, lora, scaled_input, sparse
from contract.written_out import before_input, prepend

Tree = Any
Leaf = Callable[[str, Tensor], Tensor]  # a module's name, y → its result on y


def text(tree: Tree) -> str:
    """Write the tree as a user does, with brackets around everything."""
    match tree:
        case str():
            return tree
        case ("neg", a):
            return f"-({text(a)})"
        case ("*", number, a):
            return f"{number}*({text(a)})"
        case ("average" | "concat" as kind, *parts):
            return f"{kind}({', '.join(map(text, parts))})"
        case (sign, a, b):
            return f"({text(a)}) {sign} ({text(b)})"
    raise AssertionError(tree)


def of_handles(tree: Tree, host: mg.Host) -> Any:
    """Build the same composition with the operators of handles."""
    match tree:
        case str():
            return host[tree]
        case ("neg", a):
            return -of_handles(a, host)
        case ("*", number, a):
            return number * of_handles(a, host)
        case ("average" | "concat" as kind, *parts):
            function = mg.average if kind == "average" else mg.concat
            return function(*(of_handles(part, host) for part in parts))
        case ("+", a, b):
            return of_handles(a, host) + of_handles(b, host)
        case ("-", a, b):
            return of_handles(a, host) - of_handles(b, host)
        case (">>", a, b):
            return of_handles(a, host) >> of_handles(b, host)
    raise AssertionError(tree)


def value(tree: Tree, leaf: Leaf, y: Any) -> Any:
    """Evaluate a composition on ``y``; a module's effect is its result minus ``y``."""
    match tree:
        case str():
            return leaf(tree, y)
        case ("+", a, b):
            return y + (value(a, leaf, y) - y) + (value(b, leaf, y) - y)
        case ("-", a, b):
            return y + (value(a, leaf, y) - y) - (value(b, leaf, y) - y)
        case ("neg", a):
            return y - (value(a, leaf, y) - y)
        case ("*", number, a):
            return y + number * (value(a, leaf, y) - y)
        case (">>", a, b):
            return value(b, leaf, value(a, leaf, y))
        case ("average", *parts):
            return y + sum(value(part, leaf, y) - y for part in parts) / len(parts)
        case ("concat", *parts):
            for part in parts:
                y = value(part, leaf, y)
            return y
    raise AssertionError(tree)


def vectors(tree: Tree, own: Callable[[str], Tensor | None]) -> Tensor | None:
    """Join or average the vectors ``[k, …]`` that input modules put before the input."""
    match tree:
        case str():
            return own(tree)
        case ("average", *parts):
            some = [v for part in parts if (v := vectors(part, own)) is not None]
            return sum(some[1:], some[0]) / len(some) if some else None
        case (">>" | "concat", *parts):
            some = [v for part in parts if (v := vectors(part, own)) is not None]
            return torch.cat(some) if some else None
    return None  # sums and multiples are of effects alone


# -- one module at one site ------------------------------------------------------------------------

RULES = {"lora": lora, "dora": dora, "sparse": sparse, "scale_in": scaled_input}


def result(kind: str, y: Tensor, x: Tensor, W: Tensor, b: Tensor | None, t: dict, site: Any):
    """Compute a site's output with one module from ``y`` without it; W ``[out, in]`` and b."""
    match kind:
        case "adapter":
            return y + 0.7 * bottleneck(y, t)
        case "parallel":
            return y + 4 * bottleneck(x, t)
        case "compacter":
            return compacter(y, x, t)
        case "conv":
            return y + convolved(y, t["F"], False)
        case "scale":  # φ ⊙ (x Wᵀ + b) − (x Wᵀ + b)
            bare = x @ W.T if b is None else x @ W.T + b
            return y + (t["phi"] - 1) * bare
    return y + x @ (RULES[kind](W, t, site) - W).T


MODULES: dict[str, tuple[Callable[[], mg.Computation], Any]] = {
    "lora": (lambda: mg.LoRA(rank=4, alpha=3.0), ["query", "value", "down"]),
    "dora": (lambda: mg.LoRA(rank=4, alpha=3.0, dora=True), ["query", "down"]),
    "sparse": (lambda: mg.SparseDelta(density=0.1), ["value", "down"]),
    "scale": (mg.Rescale, ["key", "value"]),
    "scale_in": (lambda: mg.Rescale(where="input"), "down"),
    "adapter": (lambda: mg.Adapter(width=4, scale=0.7), ["output", "down"]),
    "parallel": (lambda: mg.ParallelAdapter(width=5), "feedforward"),
    "compacter": (lambda: mg.Compacter(width=8, rank=2, scale=0.7), ["output", "down"]),
    "conv": (mg.ConvAdapter, ["output", "down"]),
    "prefix": (lambda: mg.Prefix(length=2), "self_attention"),
    "prompt": (lambda: mg.SoftPrompt(length=2), None),
}
EFFECTS = [kind for kind in MODULES if kind not in ("prefix", "prompt")]


def implanted(model: nn.Module, kinds: list[str], copies: int = 2) -> mg.Host:
    """Make a host with ``copies`` inactive modules of each kind: ``lora_0``, ``lora_1``, …."""
    host = mg.Host(model).eval()
    for kind in kinds:
        make, at = MODULES[kind]
        if kind == "parallel" and hasattr(model, "bert"):
            at = "attention"  # which takes what it puts out: the feed-forward sums two inputs
        for i in range(copies):
            name = f"{kind}_{i}"
            host.implant(name, make(), at, active=False)
            if kind == "sparse":
                for place in host[name].places:
                    place.keep(torch.randperm(place.values.numel())[:20])  # type: ignore[operator]
            with torch.no_grad():
                for p in host[name].parameters():
                    p.normal_(0, 0.2)
    return host


def bare(model: nn.Module) -> nn.Module:
    """Copy the model in float64."""
    return copy.deepcopy(model).double().requires_grad_(False)


def composed(plain: nn.Module, host: mg.Host, tree: Tree) -> nn.Module:
    """Write ``tree`` into ``plain``: by hooks at every site, and by hand at its input.

    Gradients reach the parameters of ``host``.
    """
    sites: dict[str, list[tuple[str, str, dict[str, Tensor], Any]]] = {}
    for name, implant in host.implants.items():
        tensors = {
            f"{label}:{k}": t.double() if t.is_floating_point() else t
            for label, place in zip(implant.paths, implant.places, strict=True)  # type: ignore[arg-type]
            for k, t in place.state_dict(keep_vars=True).items()
        }
        first = implant.paths[0]  # type: ignore[index]
        for label, place in zip(implant.paths, implant.places, strict=True):  # type: ignore[arg-type]
            path, _, part = label.partition("[")
            t = {**_own(tensors, first), **_own(tensors, label)}
            sites.setdefault(path, []).append((name, part, t, place))
    for path, some in sites.items():
        layer = plain.get_submodule(path)
        own = {name: (t["keys"], t["values"]) for name, _, t, _ in some if "keys" in t}
        tokens = {name: t["phi"] for name, _, t, _ in some if not path}
        if own:
            keys = vectors(tree, lambda n, own=own: own[n][0] if n in own else None)
            values = vectors(tree, lambda n, own=own: own[n][1] if n in own else None)
            if keys is not None and values is not None:
                prepend(plain, path, keys, values)
        elif tokens:
            phi = vectors(tree, tokens.get)
            if phi is not None:
                before_input(plain, 1 if hasattr(plain, "bert") else 0, [phi] * 3)
        else:
            _hook(layer, tree, some)
    return plain


def _own(tensors: dict[str, Tensor], label: str) -> dict[str, Tensor]:
    return {k.rpartition(":")[2]: t for k, t in tensors.items() if k.rpartition(":")[0] == label}


def _hook(layer: nn.Module, tree: Tree, some: list) -> None:
    here = {}
    for name, part, t, place in some:
        here.setdefault(name, []).append((part, t, place))

    def after(m: nn.Module, args: Any, out: Any) -> Any:
        x, y = args[0], out if isinstance(out, Tensor) else out[0]

        def leaf(name: str, y: Tensor) -> Tensor:
            for part, t, place in here.get(name, []):
                i, n = (int(part[0]), int(part[2])) if part else (0, 1)
                W, b = _weight(m)
                pieces = list(y.split(y.shape[-1] // n, dim=-1))
                W = None if W is None else W.split(len(W) // n)[i]
                b = None if b is None else b.split(len(b) // n)[i]
                kind = name.rpartition("_")[0]
                pieces[i] = result(kind, pieces[i], x, W, b, t, place)  # type: ignore[arg-type]
                y = torch.cat(pieces, dim=-1)
            return y

        new = value(tree, leaf, y)
        return new if isinstance(out, Tensor) else (new, *out[1:])

    layer.register_forward_hook(after)


def _weight(layer: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    if isinstance(layer, Conv1D):  # GPT-2's, [in, out]
        return layer.weight.T, layer.bias
    return (layer.weight, layer.bias) if isinstance(layer, nn.Linear) else (None, None)
