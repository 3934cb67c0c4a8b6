"""The contract: what DESIGN calls "what must always hold", for every module on every host.

A new module is one row of ``MODULES``; a new host one row of ``tests/hosts.py``.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from scipy.linalg import hadamard
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import modgraft as mg
from common import counted
from hosts import BATCH, FEATURES, HOSTS, HostCase, side, tensor_of
from written_out import before_input, prepend


@dataclass(frozen=True)
class ModuleCase:
    """A module, where it goes, what it needs, and a reference written from the paper's equation.

    ``reference(host)`` changes a float64 copy of the bare model so that it computes what the host
    with the module does, with tensors taken from ``host["m"]``; it returns the tensors by key.
    ``adds`` says that its effect does not depend on the site's output, so that ``a >> b`` equals
    ``a + b``; ``refused`` names the hosts where it is not defined, and what the error says there.
    ``chains_only`` says that it can neither be added nor scaled, and that ``m >> n`` is both, one
    reference after the other.
    ``prepare(host, name)`` does what the method's own training procedure does beside the
    parameters, such as choosing a mask. ``task`` follows a name in a composition as it is printed.
    """

    name: str
    make: Callable[[], mg.Computation]
    at: Callable[[HostCase], Any]
    reference: Callable[[mg.Host, nn.Module, dict[str, Tensor]], None]
    needs_side: bool = False
    merges: bool = False
    adds: bool = False
    chains_only: bool = False
    refused: Mapping[str, str] = field(default_factory=dict)
    prepare: Callable[[mg.Host, str], None] = lambda host, name: None
    task: str = ""

    @property
    def before_input(self) -> bool:
        """Whether it puts tokens before the input, which changes the shapes of all that follows."""
        return isinstance(self.make(), mg.TokenComposition)


def _weights(
    rule: Callable[..., Tensor],
    bias: Callable[..., Tensor] | None = None,
    group: Callable[[str], str] = lambda label: label,
) -> Any:
    """A reference that puts W' = rule(W, the site's tensors, its place) in, W [out, in].

    ``bias`` does the same to the bias [out] beside it, where there is one. What a site does not
    have itself, it has from the first one of its ``group``.
    """

    def change(host: mg.Host, plain: nn.Module, tensors: dict[str, Tensor]) -> None:
        for label, place in zip(host["m"].paths, host["m"].places, strict=True):
            first = next(one for one in host["m"].paths if group(one) == group(label))
            own = {**_of_site(first, tensors), **_of_site(label, tensors)}
            layer, *named = _where(plain, label)
            for (name, i, n), rewrite in zip(named, (rule, bias), strict=True):
                old = getattr(layer, name, None)
                if old is None or rewrite is None:
                    continue
                turned = isinstance(layer, Conv1D) and name == "weight"  # GPT-2's, [in, 3·d]
                stored = old.T if turned else old
                rows = list(stored.split(len(stored) // n))
                matrix = rows[i] if old.dim() == 1 else rows[i].reshape(len(rows[i]), -1)
                rows[i] = rewrite(matrix, own, place).reshape(rows[i].shape)
                delattr(layer, name)
                setattr(layer, name, torch.cat(rows).T if turned else torch.cat(rows))

    return change


def _of_site(label: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.rpartition(":")[2]: t for k, t in tensors.items() if k.startswith(label + ":")}


def _where(plain: nn.Module, label: str) -> tuple[nn.Module, tuple, tuple]:
    """The layer that a label means; its weight and bias there: name, and the i-th of n parts."""
    path, _, part = label.partition("[")
    i, n = (int(part[0]), int(part[2])) if part else (0, 1)
    if path in dict(plain.named_modules()):
        return plain.get_submodule(path), ("weight", i, n), ("bias", i, n)
    above, _, name = path.rpartition(".")
    bias = (name.replace("weight", "bias"), i, n)
    if name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
        bias = ("in_proj_bias", "qkv".index(name[0]), 3)
    return plain.get_submodule(above), (name, i, n), bias


def _lora(weight: Tensor, t: dict[str, Tensor], place: Any) -> Tensor:
    return weight + 3.0 / 4 * t["B"] @ t["A"]


def _rslora(weight: Tensor, t: dict[str, Tensor], place: Any) -> Tensor:
    return weight + 3.0 / math.sqrt(4) * t["B"] @ t["A"]


def _dora(weight: Tensor, t: dict[str, Tensor], place: Any) -> Tensor:
    """W' = m V / ‖V‖, row by row, the norm a constant (section 4.3 of the paper)."""
    v = weight + 3.0 / 4 * t["B"] @ t["A"]
    rows = []
    for w, row, change in zip(weight, v, t["magnitude"], strict=True):
        m = w.square().sum().sqrt() + change
        rows.append(m * row / row.detach().square().sum().sqrt())
    return torch.stack(rows)


def _subnetwork(weight: Tensor, t: dict[str, Tensor], place: Any) -> Tensor:
    assert 0 < t["mask"].sum() < t["mask"].numel()
    return t["mask"] * (weight + t["phi"])


def _supermask(weight: Tensor, t: dict[str, Tensor], place: Any) -> Tensor:
    """W' = W ⊙ b; the gradient of b goes to the scores as it is."""
    s = t["scores"]
    least = s.detach().flatten().sort(descending=True).values[math.ceil(0.7 * s.numel()) - 1]
    b = (s.detach() >= least).to(s.dtype)
    return weight * (b + (s - s.detach()))


def _sparse(weight: Tensor, t: dict[str, Tensor], place: Any) -> Tensor:
    assert t["indices"].shape == t["values"].shape
    new = [list(row) for row in weight]
    for index, value in zip(t["indices"].tolist(), t["values"], strict=True):
        row, column = divmod(index, weight.shape[1])
        new[row][column] = new[row][column] + value
    return torch.stack([torch.stack(row) for row in new])


def _dense(weight: Tensor, t: dict[str, Tensor], place: Any) -> Tensor:
    return weight + t["values"].reshape(weight.shape)


def _intrinsic(weight: Tensor, t: dict[str, Tensor], place: Any) -> Tensor:
    """W' = W + φM, M written out: a Hadamard, a diagonal, a permutation … matrix a block."""
    d, wide = 6, 8
    H = torch.tensor(hadamard(wide), dtype=torch.float64)
    pad = torch.eye(wide, dtype=torch.float64)[:, :d]
    blocks = []
    for i, (b, p, g) in enumerate(zip(place.signs, place.order, place.gauss, strict=True)):
        P = torch.eye(wide, dtype=torch.float64)[p - i * wide]
        blocks.append(H @ g.double().diag() @ P @ H @ b.double().diag() @ pad)
    n = weight.numel()
    M = torch.cat(blocks)[:n] / math.sqrt(wide * n)  # [n, d]
    return weight + (M @ t["phi"]).reshape(weight.shape)


def _scaled_input(weight: Tensor, t: dict[str, Tensor], place: Any) -> Tensor:
    """Every column times the φ of its input; a convolution has k·k columns of each."""
    taps = weight.shape[1] // len(t["phi"])
    return torch.stack([weight[:, j] * t["phi"][j // taps] for j in range(weight.shape[1])], dim=1)


def _prune(host: mg.Host, name: str) -> None:
    for i, place in enumerate(host[name].places):
        chance = torch.rand(place.phi.shape, generator=torch.Generator().manual_seed(i))
        place.prune(chance < 0.8)


def _keep(host: mg.Host, name: str) -> None:
    for i, place in enumerate(host[name].places):  # as many as it happens to be, at each site
        size = place.values.numel()
        order = torch.randperm(size, generator=torch.Generator().manual_seed(i))
        place.keep(order[: size // 10 + i])


def _fusion_reference(form: str) -> Callable[..., None]:
    """H' = (1 − G) ⊙ H + G ⊙ A, token by token, for the examples that have an image."""

    def paper(h: Tensor, v: Tensor, t: dict[str, Tensor]) -> Tensor:  # h [d], v [m, d]
        scores = torch.stack([h @ row for row in v]) / math.sqrt(h.numel())
        a = (scores.exp() / scores.exp().sum()) @ v
        g = 1 / (1 + torch.exp(-(t["W_l.weight"] @ h + t["W_v.weight"] @ a)))
        return (1 - g) * h + g * a

    def released(h: Tensor, v: Tensor, t: dict[str, Tensor]) -> Tensor:
        wq, wk, wv = t["attention.in_proj_weight"].chunk(3)
        bq, bk, bv = t["attention.in_proj_bias"].chunk(3)
        q, k, u = wq @ h + bq, v @ wk.T + bk, v @ wv.T + bv
        a = (k @ q / math.sqrt(h.numel())).softmax(0) @ u
        a = t["attention.out_proj.weight"] @ a + t["attention.out_proj.bias"]
        g = torch.sigmoid(t["gate.weight"] @ torch.cat([h, a]) + t["gate.bias"])
        return (1 - g) * h + g * a

    def change(host: mg.Host, plain: nn.Module, tensors: dict[str, Tensor]) -> None:
        t = {key.split(":")[1]: value for key, value in tensors.items()}
        given = side(dtype=torch.float64)
        token = paper if form == "paper" else released

        def hook(module: nn.Module, args: Any, out: Any) -> Any:
            h = out if isinstance(out, Tensor) else out[0]
            rows = []
            for row, features, mask in zip(h, given.tensor, given.mask, strict=True):
                v = features[mask] @ t["W_h.weight"].T + t.get("W_h.bias", 0.0)
                rows.append(torch.stack([token(x, v, t) for x in row]) if mask.any() else row)
            new = torch.stack(rows)
            if isinstance(out, Tensor | tuple):
                return new if isinstance(out, Tensor) else (new, *out[1:])
            out.last_hidden_state = new
            return out

        plain.get_submodule(host["m"].paths[0]).register_forward_hook(hook)

    return change


Change = Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor]  # y, x, φ → the new y


def _at_each_site(
    change: Change, where: Callable[[str], bool] = lambda label: True
) -> Callable[..., None]:
    """The layer's output replaced, with what the site's own tensors make of it.

    A tensor that only the first site has is shared by all.
    """

    def reference(host: mg.Host, plain: nn.Module, tensors: dict[str, Tensor]) -> None:
        labels = host["m"].paths

        def own(label: str) -> dict[str, Tensor]:
            keys = [key.rpartition(":") for key in tensors]
            return {name: tensors[f"{at}:{name}"] for at, _, name in keys if at == label}

        for label in filter(where, labels):
            path, _, part = label.partition("[")
            t = {**own(labels[0]), **own(label)}

            def after(m: nn.Module, args: Any, kw: Any, out: Any, t: Any = t, part: str = part):
                x = next(v for v in (*args, *kw.values()) if isinstance(v, Tensor))
                y = out if isinstance(out, Tensor) else out[0]
                if part:  # "1/3]"
                    i, d = int(part[0]), y.shape[-1] // int(part[2])
                    pieces = list(y.split(d, dim=-1))
                    pieces[i] = change(pieces[i], x, t)
                    return torch.cat(pieces, dim=-1)
                new = change(y, x, t)
                if isinstance(out, Tensor | tuple):
                    return new if isinstance(out, Tensor) else (new, *out[1:])
                out.last_hidden_state = new
                return out

            plain.get_submodule(path).register_forward_hook(after, with_kwargs=True)

    return reference


def _in_the_residual(change: Change) -> Callable[..., None]:
    """f(…, r + c(f(…, r), r)) with c what the site's own tensors add, r the first argument here."""

    def reference(host: mg.Host, plain: nn.Module, tensors: dict[str, Tensor]) -> None:
        for label in host["m"].paths:
            t = {k.rpartition(":")[2]: v for k, v in tensors.items() if k.startswith(label + ":")}

            def after(m: nn.Module, args: Any, kw: Any, out: Any, t: Any = t) -> Any:
                y = out if isinstance(out, Tensor) else out[0]
                if not args:
                    (name,) = [k for k, v in kw.items() if k == "hidden_states"]
                    args, kw = (kw[name],), {k: v for k, v in kw.items() if k != name}
                return m.forward(args[0] + change(y, args[0], t), *args[1:], **kw)

            layer = plain.get_submodule(label.removesuffix("[residual]"))
            layer.register_forward_hook(after, with_kwargs=True)

    return reference


def _bottleneck(v: Tensor, t: dict[str, Tensor]) -> Tensor:
    """W_u relu(W_d v + b_d) + b_u."""
    hidden = v @ t["down.weight"].T + t["down.bias"]
    return (hidden * (hidden > 0)) @ t["up.weight"].T + t["up.bias"]


def _compacter(y: Tensor, x: Tensor, t: dict[str, Tensor]) -> Tensor:
    """y + 0.7·(W_u gelu(W_d y + b_d) + b_u), W = Σ_j A_j ⊗ S_j T_jᵀ."""
    w = {
        k: sum(
            torch.kron(A, S @ T.T)
            for A, S, T in zip(t.get("A", t.get(f"A_{k}")), t[f"S_{k}"], t[f"T_{k}"], strict=True)
        )
        for k in ("down", "up")
    }
    v = y @ w["down"].T + t["b_down"]
    hidden = 0.5 * v * (1 + torch.erf(v / math.sqrt(2)))
    return y + 0.7 * (hidden @ w["up"].T + t["b_up"])


def _convolved(v: Tensor, F: Tensor, depthwise: bool) -> Tensor:
    """F ∗ v for v ``[B, n, d]`` or ``[B, C, H, W]``: a shifted copy of v for each tap of F."""
    tokens = v.dim() == 3
    if tokens:
        v, F = v.transpose(1, 2)[:, :, None], F[:, :, None]  # [B, d, 1, n], [d, d, 1, k]
    (h, w), (rows, columns) = v.shape[2:], F.shape[2:]
    wide = torch.zeros(*v.shape[:2], h + rows - 1, w + columns - 1, dtype=v.dtype)
    wide[:, :, rows // 2 : rows // 2 + h, columns // 2 : columns // 2 + w] = v
    out = torch.zeros_like(v)
    for i in range(rows):
        for j in range(columns):
            tap, shifted = F[:, :, i, j], wide[:, :, i : i + h, j : j + w]
            mix = tap[None, :, :, None] * shifted if depthwise else None
            out = out + (torch.einsum("ec,bchw->behw", tap, shifted) if mix is None else mix)
    return out[:, :, 0].transpose(1, 2) if tokens else out


def _prefixed(host: mg.Host, plain: nn.Module, tensors: dict[str, Tensor]) -> None:
    """[P_k; K] and [P_v; V] at every site; P = W_2 tanh(W_1 E + b_1) + b_2 with an MLP."""
    labels = host["m"].paths
    for label, place in zip(labels, host["m"].places, strict=True):
        keys, values = (tensors.get(f"{label}:{name}") for name in ("keys", "values"))
        if keys is None:
            E, W_1, b_1 = (
                tensors[f"{labels[0]}:{name}"]
                for name in ("embedding", "hidden.weight", "hidden.bias")
            )
            W_2, b_2 = (tensors[f"{label}:out.{name}"] for name in ("weight", "bias"))
            both = torch.stack([W_2 @ torch.tanh(W_1 @ row + b_1) + b_2 for row in E])
            shape, half = (len(E), place.heads, place.width), both.shape[1] // 2
            keys, values = both[:, :half].reshape(shape), both[:, half:].reshape(shape)
        prepend(plain, label, keys, values)


def _tokens(phi: Callable[[dict[str, Tensor], nn.Module, Any, Any], Tensor]) -> Callable[..., None]:
    """φ [k, d] before each example's input: of the tensors, the model, the config, the side."""

    def change(host: mg.Host, plain: nn.Module, tensors: dict[str, Tensor]) -> None:
        t = {key.rpartition(":")[2]: value for key, value in tensors.items()}
        given = side(dtype=torch.float64)
        made = [
            phi(t, plain, host["m"].method, features[mask])
            for features, mask in zip(given.tensor, given.mask, strict=True)
        ]
        before_input(plain, 1 if hasattr(plain, "bert") or hasattr(plain, "vit") else 0, made)

    return change


NO_TOKENS = dict.fromkeys(("plain", "cnn", "mha", "rnn"), "reads no token embeddings")


def _drawn(t: dict[str, Tensor], name: str, *shape: int) -> Tensor:
    """φ = H z + b, z = [t; s] or W₂ relu(W₁ [t; s] + b₁) + b₂, of the first and only task."""
    z = torch.cat([t["generator.tasks.0"], t["site"]])
    if "generator.project.0.weight" in t:
        hidden = t["generator.project.0.weight"] @ z + t["generator.project.0.bias"]
        hidden = hidden * (hidden > 0)
        z = t["generator.project.2.weight"] @ hidden + t["generator.project.2.bias"]
    head = f"generator.heads.{name.replace('.', '-')}-{'x'.join(map(str, shape))}"
    return (t[f"{head}.weight"] @ z + t[f"{head}.bias"]).reshape(shape)


def _drawn_lora(weight: Tensor, t: dict[str, Tensor], place: Any) -> Tensor:
    rows, columns = weight.shape
    return weight + 3.0 / 4 * _drawn(t, "B", rows, 4) @ _drawn(t, "A", 4, columns)


def _drawn_adapter(y: Tensor, x: Tensor, t: dict[str, Tensor]) -> Tensor:
    d, m = y.shape[-1], 4
    shapes = {"down.weight": (m, d), "down.bias": (m,), "up.weight": (d, m), "up.bias": (d,)}
    return y + 0.7 * _bottleneck(y, {name: _drawn(t, name, *s) for name, s in shapes.items()})


def _relu_layers(v: Tensor, t: dict[str, Tensor], name: str) -> Tensor:
    hidden = v @ t[f"D_{name}.weight"].T + t[f"D_{name}.bias"]
    return (hidden * (hidden > 0)) @ t[f"U_{name}.weight"].T + t[f"U_{name}.bias"]


def _coupled(y: Tensor, x: Tensor, t: dict[str, Tensor]) -> Tensor:
    e1, e2 = y[..., : y.shape[-1] // 2], y[..., y.shape[-1] // 2 :]
    o1 = _relu_layers(e2, t, "F") + e1
    return torch.cat([o1, _relu_layers(o1, t, "G") + e2], -1)


def _uncoupled(y: Tensor, x: Tensor, t: dict[str, Tensor]) -> Tensor:
    o1, o2 = y[..., : y.shape[-1] // 2], y[..., y.shape[-1] // 2 :]
    e2 = o2 - _relu_layers(o1, t, "G")
    return torch.cat([o1 - _relu_layers(e2, t, "F"), e2], -1)


def _embeds(label: str) -> bool:
    return label.endswith(("embed_tokens", "word_embeddings", "wte", "vit.embeddings"))


def _invertible(host: mg.Host, plain: nn.Module, tensors: dict[str, Tensor]) -> None:
    _at_each_site(_coupled, where=_embeds)(host, plain, tensors)
    _at_each_site(_uncoupled, where=lambda label: not _embeds(label))(host, plain, tensors)


EMBEDDED = ("t5", "bert", "gpt2", "llama", "vit")
UNEQUAL = dict.fromkeys(("plain", "cnn", "mha", "rnn"), "are to share A, which is")
NO_MAP = dict.fromkeys(
    ("t5", "bert", "gpt2", "llama", "plain", "mha", "rnn"), "not known to put out a map"
)
NO_ATTENTION = {
    **dict.fromkeys(("plain", "cnn", "rnn"), "nor does any other layer of this host"),
    "mha": "it computes its attention by itself",
}
ONE_BY_ONE = dict.fromkeys(("gpt2", "llama"), "one at a time")

MODULES = {
    case.name: case
    for case in (
        ModuleCase(
            "lora", lambda: mg.LoRA(rank=4, alpha=3.0), lambda h: h.lora_at, _weights(_lora),
            merges=True,
        ),
        ModuleCase(
            "rslora", lambda: mg.LoRA(rank=4, alpha=3.0, rslora=True), lambda h: h.lora_at,
            _weights(_rslora), merges=True,
        ),
        ModuleCase(
            "dora", lambda: mg.LoRA(rank=4, alpha=3.0, dora=True), lambda h: h.lora_at,
            _weights(_dora), merges=True,
        ),
        ModuleCase(
            "subnetwork", mg.SparseSubnetwork, lambda h: h.lora_at, _weights(_subnetwork),
            merges=True, prepare=_prune,
        ),
        ModuleCase(
            "supermask", lambda: mg.Supermask(density=0.7), lambda h: h.lora_at,
            _weights(_supermask), merges=True,
        ),
        ModuleCase(
            "sparse", lambda: mg.SparseDelta(density=0.1), lambda h: h.lora_at, _weights(_sparse),
            merges=True, prepare=_keep,
        ),
        ModuleCase(
            "sparse_first_phase", lambda: mg.SparseDelta(density=0.1), lambda h: h.lora_at,
            _weights(_dense), merges=True,
        ),
        ModuleCase(
            "intrinsic", lambda: mg.IntrinsicDimension(dim=6, seed=3), lambda h: h.lora_at,
            _weights(_intrinsic), merges=True,
        ),
        ModuleCase(
            "fusion", lambda: mg.GatedFusion(dim=FEATURES), lambda h: h.output_at,
            _fusion_reference("paper"), needs_side=True,
        ),
        ModuleCase(
            "fusion_released", lambda: mg.GatedFusion(dim=FEATURES, form="released"),
            lambda h: h.output_at, _fusion_reference("released"), needs_side=True,
        ),
        ModuleCase(
            "adapter", lambda: mg.Adapter(reduction=4, scale=0.7), lambda h: h.adapter_at,
            _at_each_site(lambda y, x, t: y + 0.7 * _bottleneck(y, t)),
        ),
        ModuleCase(
            "adapter_residual", lambda: mg.Adapter(reduction=4),
            lambda h: f"{h.parallel_at}[residual]",
            _in_the_residual(lambda y, x, t: _bottleneck(y, t)),
        ),
        ModuleCase(
            "parallel", lambda: mg.ParallelAdapter(width=5), lambda h: h.parallel_at,
            _at_each_site(lambda y, x, t: y + 4 * _bottleneck(x, t)), adds=True,
        ),
        ModuleCase(
            "compacter", lambda: mg.Compacter(width=8, rank=2, scale=0.7), lambda h: h.adapter_at,
            _at_each_site(_compacter),
        ),
        ModuleCase(
            "compacter_apart", lambda: mg.Compacter(width=8, n=2, shared=False, scale=0.7),
            lambda h: h.output_at, _at_each_site(_compacter),
        ),
        ModuleCase(
            "conv", lambda: mg.ConvAdapter(), lambda h: h.adapter_at,
            _at_each_site(lambda y, x, t: y + _convolved(y, t["F"], False)),
        ),
        ModuleCase(
            "conv_parallel", lambda: mg.ConvAdapter(form="parallel", depthwise=True),
            lambda h: h.parallel_at,
            _at_each_site(lambda y, x, t: y + _convolved(x, t["F"], True)), adds=True,
        ),
        ModuleCase(
            "conv_tokens", lambda: mg.ConvAdapter(kernel=3, depthwise=True), lambda h: h.output_at,
            _at_each_site(lambda y, x, t: y + _convolved(y, t["F"], True)), refused=ONE_BY_ONE,
        ),
        ModuleCase(
            "conv_map", lambda: mg.ConvAdapter(over="map", kernel=3),
            lambda h: h.map_at or h.output_at,
            _at_each_site(lambda y, x, t: y + _convolved(y, t["F"], False)), refused=NO_MAP,
        ),
        ModuleCase(
            "rescale", lambda: mg.Rescale(), lambda h: h.keys_at,
            _weights(lambda w, t, _: t["phi"][:, None] * w, lambda b, t, _: t["phi"] * b),
            merges=True,
        ),
        ModuleCase(
            "rescale_input", lambda: mg.Rescale(where="input"), lambda h: h.inner_at,
            _weights(_scaled_input), merges=True,
        ),
        ModuleCase(
            "prefix", lambda: mg.Prefix(length=3), lambda h: h.attention_at, _prefixed,
            chains_only=True, refused=NO_ATTENTION,
        ),
        ModuleCase(
            "prefix_mlp", lambda: mg.Prefix(length=2, reparametrise=5), lambda h: h.attention_at,
            _prefixed, chains_only=True, refused=NO_ATTENTION,
        ),
        ModuleCase(
            "soft_prompt", lambda: mg.SoftPrompt(length=3), lambda h: None,
            _tokens(lambda t, model, prompt, v: t["phi"]), chains_only=True, refused=NO_TOKENS,
        ),
        ModuleCase(
            "prompt", lambda: mg.Prompt("two words", ids=(7, 30)), lambda h: None,
            _tokens(lambda t, model, prompt, v: model.get_input_embeddings().weight[[7, 30]]),
            chains_only=True, refused={**NO_TOKENS, "vit": "reads no text"},
        ),
        ModuleCase(
            "linear_map", lambda: mg.LinearMap(dim=FEATURES), lambda h: None,
            _tokens(lambda t, model, prompt, v: v @ t["map.weight"].T + t["map.bias"]),
            needs_side=True, chains_only=True, refused=NO_TOKENS,
        ),
        ModuleCase(
            "shared", lambda: mg.Shared(mg.LoRA(rank=4, alpha=3.0), group="name"),
            lambda h: h.lora_at, _weights(_lora, group=lambda label: label.rpartition(".")[2]),
            merges=True,
        ),
        ModuleCase(
            "shared_a", lambda: mg.Shared(mg.LoRA(rank=4, alpha=3.0), only=("A",)),
            lambda h: h.lora_at, _weights(_lora, group=lambda label: ""), merges=True,
            refused=UNEQUAL,
        ),
        ModuleCase(
            "shared_adapter", lambda: mg.Shared(mg.Adapter(reduction=4, scale=0.7)),
            lambda h: h.adapter_at,
            _at_each_site(lambda y, x, t: y + 0.7 * _bottleneck(y, t)),
        ),
        ModuleCase(
            "hyper",
            lambda: mg.HyperNetwork(
                mg.LoRA(rank=4, alpha=3.0), tasks=("fr",), embedding=3, hidden=7
            ),
            lambda h: h.lora_at, _weights(_drawn_lora, group=lambda label: ""), merges=True,
            task="['fr']",
        ),
        ModuleCase(
            "hyper_adapter",
            lambda: mg.HyperNetwork(
                mg.Adapter(reduction=4, scale=0.7), tasks=("fr",), embedding=4
            ),
            lambda h: h.adapter_at, _at_each_site(_drawn_adapter), task="['fr']",
        ),
        ModuleCase(
            "invertible", lambda: mg.InvertibleAdapter(),
            lambda h: ["embedding", h.output_at] if h.name in EMBEDDED else h.output_at,
            _invertible,
        ),
    )
}  # fmt: skip

DEFINED = [
    pytest.param(case, module, id=f"{module.name}-{case.name}")
    for module in MODULES.values()
    for case in HOSTS.values()
    if case.name not in module.refused
]  # that the others are refused is in tests/test_function.py
pytestmark = [
    pytest.mark.parametrize(("case", "module"), DEFINED),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]


def implanted(
    case: HostCase, module: ModuleCase, stir: bool = True, shallow: bool = False, **kw: Any
) -> mg.Host:
    """A host with the module under the name ``m``, its tensors away from their start."""
    host = mg.Host(case.model(shallow=shallow), **kw).eval()
    host.implant("m", module.make(), at=module.at(case))
    module.prepare(host, "m")
    if stir:
        with torch.no_grad():
            for p in host["m"].parameters():
                p.normal_(0.0, 0.3)
    return host


def extra(module: ModuleCase, rows: int = BATCH, **kw: Any) -> dict[str, Any]:
    return {"side": {"image": side(rows, **kw)}} if module.needs_side else {}


def run(host: nn.Module, case: HostCase, **kw: Any) -> Tensor:
    with torch.no_grad():
        return tensor_of(host(**case.batch(), **kw))


# 1 -- the host is untouched --------------------------------------------------------------------


def test_host_tree_is_untouched(case: HostCase, module: ModuleCase) -> None:
    model = case.model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    kinds = {path: (type(m), str(type(m))) for path, m in model.named_modules()}
    attributes = {path: set(m.__dict__) for path, m in model.named_modules()}
    host = mg.Host(model).eval()
    bare = run(host, case)

    def same_tree() -> None:
        after = model.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[k], before[k]) for k in before)
        assert [p for p, _ in model.named_modules()] == list(kinds)
        for path, sub in model.named_modules():
            assert isinstance(sub, kinds[path][0])
            assert str(type(sub)) == kinds[path][1]

    host.implant("m", module.make(), at=module.at(case))
    same_tree()
    run(host, case, **extra(module))
    same_tree()
    with pytest.raises(mg.ModgraftError, match="implanted already"):
        host.implant("m", module.make(), at=module.at(case))
    host.remove("m")
    same_tree()
    for path, sub in model.named_modules():
        assert type(sub) is kinds[path][0]
        assert set(sub.__dict__) == attributes[path]
    assert torch.equal(run(host, case), bare)
    assert not list(host.implants.parameters())


# 2 -- identity at birth ------------------------------------------------------------------------


def test_identity_at_birth(case: HostCase, module: ModuleCase) -> None:
    host = mg.Host(case.model()).eval()
    bare = run(host, case)
    host.implant("m", module.make(), at=module.at(case))
    if module.make().identity:
        assert torch.equal(run(host, case, **extra(module)), bare)
    else:
        assert not torch.equal(run(host, case, **extra(module)), bare)
    if module.needs_side:  # absent everywhere: exactly the host, trained or not
        nothing = mg.Side(side().tensor, torch.zeros(BATCH, 4, dtype=torch.bool))
        absent = run(host, case, side={"image": nothing})
        some = run(host, case, **extra(module))
        if module.before_input:  # tokens that nobody sees change how sums are rounded, no more
            seen = case.seen()
            torch.testing.assert_close(absent[seen], bare[seen], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(some[1][seen[1]], bare[1][seen[1]], rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(absent, bare)
            assert torch.equal(some[1], bare[1])
        assert not torch.allclose(some[0], bare[0])
    host.use(None)
    assert torch.equal(run(host, case), bare)


# 3 -- only what was asked to train trains ------------------------------------------------------


def test_only_what_was_asked_trains(case: HostCase, module: ModuleCase) -> None:
    host = implanted(case, module)
    if not host["m"].size:
        for train in ("m", ["host", "m"]):
            with pytest.raises(mg.ModgraftError, match="has no parameters"):
                host.fit([case.batch()], train=train, steps=1)
        assert not any(p.requires_grad for p in host.parameters())
        return
    host.implant("m2", module.make(), at=module.at(case))  # a name that begins with the other
    frozen = {k: v.clone() for k, v in host.state_dict().items()}
    with host.training_only("m"):
        learn = [p for p in host.parameters() if p.requires_grad]
        assert {id(p) for p in learn} == {id(p) for p in host["m"].parameters()}
        optimiser = torch.optim.SGD(host.parameters(), lr=0.5)
        tensor_of(host(**case.batch(), **extra(module))).square().mean().backward()
        optimiser.step()
    own = {id(p) for p in host["m"].parameters()}
    changed = [k for k, v in host.state_dict().items() if not torch.equal(v, frozen[k])]
    names = {k for k, p in host.named_parameters() if id(p) in own}
    assert changed
    assert set(changed) <= names
    assert len(changed) >= len(names) - 3  # a gradient may vanish (softmax ignores a key's bias)


# 4 -- the mathematics is the published one -----------------------------------------------------


def test_forward_and_gradient_equal_the_written_out_equation(
    case: HostCase, module: ModuleCase
) -> None:
    host = implanted(case, module).double()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in case.batch().items()}
    plain = copy.deepcopy(case.model()).double().requires_grad_(False)
    learn = {id(p) for p in host["m"].parameters()}
    tensors = {
        f"{path}:{name}": value.detach().clone().requires_grad_(id(value) in learn)
        for path, place in zip(host["m"].paths, host["m"].places, strict=True)
        for name, value in place.state_dict(keep_vars=True).items()
    }
    for sub in list(plain.modules()):  # so that a reference may put a computed weight in place
        for name in list(sub._parameters):
            value = sub._parameters.pop(name)
            setattr(sub, name, None if value is None else value.detach())
    module.reference(host, plain, tensors)
    expected = tensor_of(plain(**batch))
    out = tensor_of(host(**batch, **extra(module, dtype=torch.float64)))
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-11)

    if not learn:
        return
    probe = torch.randn(out.shape, dtype=out.dtype)
    (out * probe).sum().backward()
    (expected * probe).sum().backward()
    for key, value in tensors.items():
        if not value.requires_grad:  # a mask
            continue
        path, _, name = key.rpartition(":")
        own = host["m"].places[host["m"].paths.index(path)].get_parameter(name).grad
        torch.testing.assert_close(own, value.grad, rtol=1e-7, atol=1e-10)


# 5 -- merged equals unmerged -------------------------------------------------------------------


def test_merged_equals_unmerged_or_is_refused(case: HostCase, module: ModuleCase) -> None:
    host = implanted(case, module).double()
    if not module.merges:
        does = "puts vectors before" if module.chains_only else "computes on activations"
        with pytest.raises(mg.ModgraftError, match=f"cannot be merged: .* {does}"):
            host.merge("m")
        return
    batch = {k: v.double() if v.is_floating_point() else v for k, v in case.batch().items()}
    before = copy.deepcopy(host.model.state_dict())
    plain = host.merge("-0.5*m")
    assert type(plain) is type(case.model())
    assert not any("_modgraft_state" in sub.__dict__ for sub in plain.modules())
    assert all(torch.equal(v, before[k]) for k, v in host.model.state_dict().items())
    expected = tensor_of(host(**batch, modules="-0.5*m"))
    torch.testing.assert_close(tensor_of(plain(**batch)), expected, rtol=1e-9, atol=1e-11)
    twin = copy.deepcopy(host)  # two: each one's Δ is of the host's weight, not of what one left
    twin.implant("n", module.make(), at=module.at(case))
    with torch.no_grad():
        for p in twin["n"].parameters():
            p.normal_(0.0, 0.3)
    expected = tensor_of(twin(**batch, modules="m + 2*n"))
    plain = twin.merge("m + 2*n")
    torch.testing.assert_close(tensor_of(plain(**batch)), expected, rtol=1e-9, atol=1e-11)


# 6 -- it keeps working where people work -------------------------------------------------------


def test_generate_greedy_sampled_and_beam(case: HostCase, module: ModuleCase) -> None:
    if not case.generates:
        pytest.skip(f"{case.name} does not generate")
    host = implanted(case, module)
    batch = case.batch()
    batch.pop("labels", None)
    settings = {"max_new_tokens": 6, "min_new_tokens": 6}
    if module.merges:
        plain = host.merge("m")
        for how in ({}, {"num_beams": 3}):
            assert torch.equal(
                host.generate(**batch, **how, **settings),
                plain.generate(**batch, **how, **settings),
            )
    ways = ({}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2})
    for how in ways:
        cached = host.generate(**batch, **extra(module), **how, **settings)
        again = host.generate(**batch, **extra(module), **how, use_cache=False, **settings)
        assert torch.equal(cached, again)
        returned = how.get("num_return_sequences", 1)
        for i in range(BATCH):  # each example alone: its side input followed its beams
            one = {k: v[i : i + 1] for k, v in batch.items()}
            kw = extra(module)
            if kw:
                full = kw["side"]["image"]
                kw = {"side": {"image": mg.Side(full.tensor[i : i + 1], full.mask[i : i + 1])}}
            alone = host.generate(**one, **kw, **how, **settings)
            assert torch.equal(alone, cached[i * returned : (i + 1) * returned])
    torch.manual_seed(7)
    first = host.generate(**batch, **extra(module), do_sample=True, **settings)
    torch.manual_seed(7)
    assert torch.equal(first, host.generate(**batch, **extra(module), do_sample=True, **settings))


def test_gradient_checkpointing_recomputes_under_the_same_call(
    case: HostCase, module: ModuleCase
) -> None:
    host = implanted(case, module)
    if not getattr(host.model, "supports_gradient_checkpointing", False):
        pytest.skip(f"{case.name} has no gradient checkpointing")

    if not host["m"].size:
        host.model.requires_grad_(True)
    learn = list(host["m"].parameters()) or list(host.model.parameters())
    under = "0.5*m"
    if module.chains_only:
        under = "m"
        host.use(None)

    def gradients() -> list[Tensor]:
        host.zero_grad()
        with host.using(under):
            loss = tensor_of(host(**case.batch(), **extra(module))).square().mean()
        loss.backward()  # the composition in force is another one by now
        return [p.grad.clone() for p in learn]

    host.train()
    expected = gradients()
    host.model.activation_checkpointing_enable()
    for one, other in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(one, other)


def test_bf16_autocast(case: HostCase, module: ModuleCase) -> None:
    host = implanted(case, module)
    exact = run(host, case, **extra(module))
    if not host["m"].size:
        host.model.requires_grad_(True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = tensor_of(host(**case.batch(), **extra(module)))
        half.float().square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in host["m"].parameters())
    assert (half.float() - exact).abs().mean() < 0.1 * exact.abs().mean()


@torch._dynamo.config.patch(allow_rnn=True)  # it would break the graph there
def test_compiled_once_for_every_composition(case: HostCase, module: ModuleCase) -> None:
    host = implanted(case, module, shallow=True)  # a layer more is traced in the same way
    host.implant("n", module.make(), at=module.at(case))
    compiled, graphs = counted(host)
    scaled = () if module.chains_only else ("0.3*n", "m >> 2*n")
    shapes = [None, "m", "n", "m >> n", "n >> m"]  # tokens before the input: a graph for each
    kinds = [*shapes, *shapes[::-1]] if module.before_input else ["m", None, "n", "m >> n"]
    for composition in (*kinds, *scaled):
        host.use(composition)
        torch.testing.assert_close(
            run(compiled, case, **extra(module)), run(host, case, **extra(module)),
            rtol=1e-4, atol=1e-5,
        )  # fmt: skip
    assert len(graphs) == (len(shapes) if module.before_input else 1)


def test_deepcopy_is_another_host(case: HostCase, module: ModuleCase) -> None:
    host = implanted(case, module)
    expected = run(host, case, **extra(module))
    twin = copy.deepcopy(host)
    assert torch.equal(run(twin, case, **extra(module)), expected)
    with torch.no_grad():
        for p in twin["m"].parameters():
            p.mul_(2)
    twin.use(None)
    assert torch.equal(run(host, case, **extra(module)), expected)
    twin.remove("m")
    assert torch.equal(run(host, case, **extra(module)), expected)


def test_save_pretrained_writes_the_bare_host(
    case: HostCase, module: ModuleCase, tmp_path: Any
) -> None:
    host = implanted(case, module)
    if not hasattr(host.model, "save_pretrained"):
        pytest.skip(f"{case.name} is no transformers model")
    host.model.save_pretrained(tmp_path)
    original = type(case.model())
    again = original.from_pretrained(tmp_path).eval()
    assert again.config.architectures == [original.__name__]
    host.use(None)
    assert torch.equal(run(again, case), run(host, case))


def test_state_dict_round_trip(case: HostCase, module: ModuleCase) -> None:
    host, other = implanted(case, module), implanted(case, module, stir=False)
    other.load_state_dict(host.state_dict())
    assert torch.equal(run(other, case, **extra(module)), run(host, case, **extra(module)))


# 7 -- loud, never silent -----------------------------------------------------------------------


def test_saved_and_loaded_strictly(case: HostCase, module: ModuleCase, tmp_path: Any) -> None:
    host = implanted(case, module)
    expected = run(host, case, **extra(module))
    host.save("m", tmp_path / "m")
    fresh = mg.Host(case.model()).eval()
    fresh.load(tmp_path / "m")
    assert torch.equal(run(fresh, case, **extra(module)), expected)
    fresh.load(tmp_path / "m", name="twice")
    assert list(fresh.implants) == ["m", "twice"]

    stranger = mg.Host(case.model(seed=5)).eval()
    with pytest.raises(mg.ModgraftError, match="another host"):
        stranger.load(tmp_path / "m")
    assert "m" not in stranger
    stranger.load(tmp_path / "m", strict=False)


def test_bad_calls_are_refused_and_leave_the_host(case: HostCase, module: ModuleCase) -> None:
    host = mg.Host(case.model()).eval()
    bare = run(host, case)
    nowhere = "acts at the host's input" if module.before_input else "matches no site"
    with pytest.raises(mg.ModgraftError, match=nowhere):
        host.implant("m", module.make(), at="encoder.blok.*.nothing")
    with pytest.raises(mg.ModgraftError, match="where 77 were expected"):
        host.implant("m", module.make(), at=module.at(case), expect=77)
    for name in ("a b", "host", "if", "1st"):
        with pytest.raises(mg.ModgraftError, match="cannot name a module"):
            host.implant(name, module.make(), at=module.at(case))
    assert torch.equal(run(host, case), bare)
    assert not any("_modgraft_state" in sub.__dict__ for sub in host.model.modules())

    host.implant("mod", module.make(), at=module.at(case))
    with pytest.raises(mg.ModgraftError, match="did you mean 'mod'"):
        host.use("mdo")
    with pytest.raises(mg.ModgraftError, match="means nothing"):
        host.use("mod @ mod")
    if module.needs_side:
        with pytest.raises(mg.ModgraftError, match="needs the side input 'image'"):
            run(host, case)
        wide = mg.Side(torch.randn(BATCH, 4, FEATURES + 1))
        with pytest.raises(mg.ModgraftError, match=f"{FEATURES + 1} wide"):
            run(host, case, side={"image": wide})
        with pytest.raises(mg.ModgraftError, match="examples where the host works on"):
            run(host, case, side={"image": side(BATCH + 1)})
        with pytest.raises(mg.ModgraftError, match=r"mg\.Side"):
            run(host, case, side={"image": torch.randn(BATCH, 4, FEATURES)})
    host.use(None)
    assert torch.equal(run(host, case), bare)


def test_two_at_once_equal_the_sum_of_effects(case: HostCase, module: ModuleCase) -> None:
    """``m + n`` adds effects on one output; ``m >> n`` lets n see what m left."""
    host = implanted(case, module).double()
    host.implant("n", module.make(), at=module.at(case))
    with torch.no_grad():
        for p in host["n"].parameters():
            p.normal_(0.0, 0.3).to(torch.float64)
    assert str(host.composition) == f"m{module.task} >> n{module.task}"
    batch = {k: v.double() if v.is_floating_point() else v for k, v in case.batch().items()}
    kw = extra(module, dtype=torch.float64)

    def at(composition: Any) -> Tensor:
        with torch.no_grad():
            return tensor_of(host(**batch, **kw, modules=composition))

    if module.chains_only:
        for refused in ("m + n", "m - n", "2*m", "m >> 0.5*n"):
            with pytest.raises(mg.ModgraftError, match="cannot be added or scaled"):
                at(refused)
        plain = copy.deepcopy(case.model()).double()
        for name in ("m", "n"):
            one = {"m": host[name]}
            module.reference(one, plain, host[name].tensors())  # type: ignore[arg-type]
        with torch.no_grad():
            expected = tensor_of(plain(**batch))
        torch.testing.assert_close(at("m >> n"), expected, rtol=1e-9, atol=1e-11)
        return
    torch.testing.assert_close(at("m + n"), at("n + m"), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(at("2*(m + n) - m - n"), at("m + n"), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(at("m - m"), at(None), rtol=1e-9, atol=1e-11)
    if module.merges or module.adds:
        torch.testing.assert_close(at("m >> n"), at("m + n"), rtol=1e-9, atol=1e-11)
    else:
        assert not torch.allclose(at("m >> n"), at("m + n"))
