"""What each method computes, written from its paper's equation: the references of the contract.

A reference changes a float64 copy of the bare model so that it computes what the host with the
module does. It takes the module's tensors from ``host["m"]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from scipy.linalg import hadamard
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import modgraft as mg
from contract.hosts import side
from contract.written_out import before_input, prepend


def weights(
    rule: Callable[..., Tensor],
    bias: Callable[..., Tensor] | None = None,
    group: Callable[[str], str] = lambda label: label,
) -> Any:
    """Make a reference that sets W' = rule(W, the site's tensors, its place), W [out, in].

    ``bias`` does the same to the bias [out] of the layer, where there is one. A tensor that a site
    does not have is taken from the first site of its ``group``.
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
    """Find the layer of a label, and its weight and bias: each by name, as part i of n."""
    path, _, part = label.partition("[")
    i, n = (int(part[0]), int(part[2])) if part else (0, 1)
    if path in dict(plain.named_modules()):
        return plain.get_submodule(path), ("weight", i, n), ("bias", i, n)
    above, _, name = path.rpartition(".")
    bias = (name.replace("weight", "bias"), i, n)
    if name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
        bias = ("in_proj_bias", "qkv".index(name[0]), 3)
    return plain.get_submodule(above), (name, i, n), bias


def lora(weight: Tensor, t: dict[str, Tensor], place: Any) -> Tensor:
    return weight + 3.0 / 4 * t["B"] @ t["A"]


def rslora(weight: Tensor, t: dict[str, Tensor], place: Any) -> Tensor:
    return weight + 3.0 / math.sqrt(4) * t["B"] @ t["A"]


def dora(weight: Tensor, t: dict[str, Tensor], place: Any) -> Tensor:
    """W' = m V / ‖V‖, row by row, the norm a constant (section 4.3 of the paper)."""
    v = weight + 3.0 / 4 * t["B"] @ t["A"]
    rows = []
    for w, row, change in zip(weight, v, t["magnitude"], strict=True):
        m = w.square().sum().sqrt() + change
        rows.append(m * row / row.detach().square().sum().sqrt())
    return torch.stack(rows)


def vera(weight: Tensor, t: dict[str, Tensor], place: Any) -> Tensor:
    """W' = W + Λ_b B Λ_d A, with the first rows of B and the first columns of A."""
    out, wide = weight.shape
    return weight + t["b"].diag() @ t["B"][:out] @ t["d"].diag() @ t["A"][:, :wide]


def oft(terms: int | None) -> Callable[..., Tensor]:
    """W' = W Rᵀ, R the Cayley transforms of skew matrices, or a series cut off."""

    def rule(weight: Tensor, t: dict[str, Tensor], place: Any) -> Tensor:
        blocks, wide = [], weight.shape[1] // len(t["skew"])
        for numbers in t["skew"]:
            S = torch.zeros(wide, wide, dtype=weight.dtype, device=weight.device)
            above = [(i, j) for i in range(wide) for j in range(i + 1, wide)]
            for (i, j), number in zip(above, numbers, strict=True):
                unit = torch.zeros_like(S)
                unit[i, j], unit[j, i] = 1, -1
                S = S + number * unit
            one = torch.eye(wide, dtype=S.dtype, device=S.device)
            R = (one - S) @ (one + S).inverse()
            if terms is not None:
                R = one + 2 * S + 2 * S @ S + 2 * S @ S @ S + S @ S @ S @ S
            blocks.append(R)
        return weight @ torch.block_diag(*blocks).T

    return rule


def some_rows(weight: Tensor, t: dict[str, Tensor], place: Any) -> Tensor:
    rows = list(weight)
    rows[3], rows[0] = t["rows"]
    return torch.stack(rows)


def subnetwork(weight: Tensor, t: dict[str, Tensor], place: Any) -> Tensor:
    assert 0 < t["mask"].sum() < t["mask"].numel()
    return t["mask"] * (weight + t["phi"])


def supermask(weight: Tensor, t: dict[str, Tensor], place: Any) -> Tensor:
    """W' = W ⊙ b; the gradient of b goes to the scores as it is."""
    s = t["scores"]
    least = s.detach().flatten().sort(descending=True).values[math.ceil(0.7 * s.numel()) - 1]
    b = (s.detach() >= least).to(s.dtype)
    return weight * (b + (s - s.detach()))


def sparse(weight: Tensor, t: dict[str, Tensor], place: Any) -> Tensor:
    assert t["indices"].shape == t["values"].shape
    new = [list(row) for row in weight]
    for index, value in zip(t["indices"].tolist(), t["values"], strict=True):
        row, column = divmod(index, weight.shape[1])
        new[row][column] = new[row][column] + value
    return torch.stack([torch.stack(row) for row in new])


def dense(weight: Tensor, t: dict[str, Tensor], place: Any) -> Tensor:
    return weight + t["values"].reshape(weight.shape)


def intrinsic(weight: Tensor, t: dict[str, Tensor], place: Any) -> Tensor:
    """W' = W + φM, M written out: a Hadamard, a diagonal, a permutation … matrix a block."""
    d, wide = 6, 8
    like = {"dtype": torch.float64, "device": weight.device}
    H = torch.tensor(hadamard(wide), **like)
    pad = torch.eye(wide, **like)[:, :d]
    blocks = []
    for i, (b, p, g) in enumerate(zip(place.signs, place.order, place.gauss, strict=True)):
        P = torch.eye(wide, **like)[p - i * wide]
        blocks.append(H @ g.double().diag() @ P @ H @ b.double().diag() @ pad)
    n = weight.numel()
    M = torch.cat(blocks)[:n] / math.sqrt(wide * n)  # [n, d]
    return weight + (M @ t["phi"]).reshape(weight.shape)


def scaled_input(weight: Tensor, t: dict[str, Tensor], place: Any) -> Tensor:
    """Multiply each column by the φ of its input; a convolution has k·k columns an input."""
    taps = weight.shape[1] // len(t["phi"])
    return torch.stack([weight[:, j] * t["phi"][j // taps] for j in range(weight.shape[1])], dim=1)


def gated_fusion(form: str) -> Callable[..., None]:
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


def at_each_site(
    change: Change, where: Callable[[str], bool] = lambda label: True
) -> Callable[..., None]:
    """Make a reference that replaces each layer's output y by change(y, x, the site's tensors).

    Sites share the tensors that only the first one has.
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


def in_the_residual(change: Change) -> Callable[..., None]:
    """Make a reference of f(…, r + change(f(…, r), r)), where r is the layer's first argument."""

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


def bottleneck(v: Tensor, t: dict[str, Tensor]) -> Tensor:
    """W_u relu(W_d v + b_d) + b_u."""
    hidden = v @ t["down.weight"].T + t["down.bias"]
    return (hidden * (hidden > 0)) @ t["up.weight"].T + t["up.bias"]


def compacter(y: Tensor, x: Tensor, t: dict[str, Tensor]) -> Tensor:
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


def convolved(v: Tensor, F: Tensor, depthwise: bool) -> Tensor:
    """F ∗ v for v ``[B, n, d]`` or ``[B, C, H, W]``: a shifted copy of v for each tap of F."""
    tokens = v.dim() == 3
    if tokens:
        v, F = v.transpose(1, 2)[:, :, None], F[:, :, None]  # [B, d, 1, n], [d, d, 1, k]
    (h, w), (rows, columns) = v.shape[2:], F.shape[2:]
    wide = v.new_zeros(*v.shape[:2], h + rows - 1, w + columns - 1)
    wide[:, :, rows // 2 : rows // 2 + h, columns // 2 : columns // 2 + w] = v
    out = torch.zeros_like(v)
    for i in range(rows):
        for j in range(columns):
            tap, shifted = F[:, :, i, j], wide[:, :, i : i + h, j : j + w]
            mix = tap[None, :, :, None] * shifted if depthwise else None
            out = out + (torch.einsum("ec,bchw->behw", tap, shifted) if mix is None else mix)
    return out[:, :, 0].transpose(1, 2) if tokens else out


def prefixed(host: mg.Host, plain: nn.Module, tensors: dict[str, Tensor]) -> None:
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


def tokens_before(
    phi: Callable[[dict[str, Tensor], nn.Module, Any, Any], Tensor],
) -> Callable[..., None]:
    """Make a reference that puts φ [k, d] before each example's input.

    ``phi(tensors, model, method, side)`` computes φ from the example's side vectors.
    """

    def change(host: mg.Host, plain: nn.Module, tensors: dict[str, Tensor]) -> None:
        t = {key.rpartition(":")[2]: value for key, value in tensors.items()}
        given = side(dtype=torch.float64)
        made = [
            phi(t, plain, host["m"].method, features[mask])
            for features, mask in zip(given.tensor, given.mask, strict=True)
        ]
        before_input(plain, 1 if hasattr(plain, "bert") or hasattr(plain, "vit") else 0, made)

    return change


def _drawn(t: dict[str, Tensor], name: str, *shape: int) -> Tensor:
    """φ = H z + b with z = [t; s] or W₂ relu(W₁ [t; s] + b₁) + b₂, for the only task."""
    z = torch.cat([t["generator.tasks.0"], t["site"]])
    if "generator.project.0.weight" in t:
        hidden = t["generator.project.0.weight"] @ z + t["generator.project.0.bias"]
        hidden = hidden * (hidden > 0)
        z = t["generator.project.2.weight"] @ hidden + t["generator.project.2.bias"]
    head = f"generator.heads.{name.replace('.', '-')}-{'x'.join(map(str, shape))}"
    return (t[f"{head}.weight"] @ z + t[f"{head}.bias"]).reshape(shape)


def drawn_lora(weight: Tensor, t: dict[str, Tensor], place: Any) -> Tensor:
    rows, columns = weight.shape
    return weight + 3.0 / 4 * _drawn(t, "B", rows, 4) @ _drawn(t, "A", 4, columns)


def drawn_adapter(y: Tensor, x: Tensor, t: dict[str, Tensor]) -> Tensor:
    d, m = y.shape[-1], 4
    shapes = {"down.weight": (m, d), "down.bias": (m,), "up.weight": (d, m), "up.bias": (d,)}
    return y + 0.7 * bottleneck(y, {name: _drawn(t, name, *s) for name, s in shapes.items()})


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


def invertible(host: mg.Host, plain: nn.Module, tensors: dict[str, Tensor]) -> None:
    at_each_site(_coupled, where=_embeds)(host, plain, tensors)
    at_each_site(_uncoupled, where=lambda label: not _embeds(label))(host, plain, tensors)
