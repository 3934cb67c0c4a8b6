"""For references: attention computed query by query, and tokens put before the input by hand."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

import modgraft as mg
from contract.hosts import BATCH, HostCase, side

_PREPENDED, _BEFORE = "written_out", "written_out_before"


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """softmax(q [P_k; K]ᵀ s + b) [P_v; V]; the bias and the mask b are those of the own keys."""
    batch, heads, length, width = query.shape
    group, n = heads // key.shape[1], key.shape[2]
    scale = width**-0.5 if scaling is None else scaling
    bias = query.new_zeros(batch, heads, length, n)
    for each in (attention_mask, position_bias):
        bias = bias if each is None else bias + each
    rows = []
    for b in range(batch):
        for h in range(heads):
            given = module.__dict__.get(_PREPENDED, [])
            K = torch.cat([*(keys[:, h // group] for keys, _, _ in given), key[b, h // group]])
            V = torch.cat([*(vals[:, h // group] for _, vals, _ in given), value[b, h // group]])
            for i in range(length):
                added = [
                    K.new_zeros(len(keys)) if more is None else more[h, i]
                    for keys, _, more in given
                ]
                scores = scale * K @ query[b, h, i] + torch.cat([*added, bias[b, h, i]])
                weights = (scores - scores.max()).exp()
                rows.append((weights / weights.sum()) @ V)
    out = torch.stack(rows).reshape(batch, heads, length, V.shape[1])
    return out.transpose(1, 2), None


AttentionInterface.register("written_out", _attention)
AttentionMaskInterface.register("written_out", eager_mask)


def prepend(
    model: nn.Module, path: str, keys: Tensor, values: Tensor, bias: Tensor | None = None
) -> None:
    """Put keys and values ``[k, heads, d]`` before a layer's own, after any prepended earlier.

    ``model`` then computes its attention query by query; ``bias`` ``[heads, q, k]`` is added to the
    scores of these keys. A text's rotations begin at its own first token, as without padding.
    """
    model.set_attn_implementation("written_out")  # type: ignore[operator]
    layer = model.get_submodule(path)
    layer.__dict__.setdefault(_PREPENDED, []).append((keys, values, bias))
    if hasattr(model.config, "rope_parameters") and "forward" not in model.__dict__:
        model.forward = partial(_from_the_text, model.forward)


def _from_the_text(forward: Callable[..., Any], **batch: Tensor) -> Any:
    """Call a model with the tokens that the mask ``[B, n]`` shows, if there is one, from 0 on."""
    mask = batch.get("attention_mask")
    places = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
    return forward(**batch, position_ids=places)


def before_input(plain: nn.Module, at: int, made: list[Tensor]) -> None:
    """Let ``plain`` run on [φ, x], joined outside the model, one example at a time.

    ``made`` holds each example's tokens [k, d], without masked ones. A second call puts its tokens
    after the first's. The first ``at`` tokens of the input, such as a class token, stay first.
    """
    if _BEFORE in plain.__dict__:
        plain.__dict__[_BEFORE].append(made)
        return
    plain.__dict__[_BEFORE] = [made]
    forward = plain.forward

    def by_hand(**batch: Any) -> SimpleNamespace:
        logits = []
        for b in range(len(made)):
            one = {key: value[b : b + 1] for key, value in batch.items()}
            phi = torch.cat([tokens[b] for tokens in plain.__dict__[_BEFORE]])
            join = _before_image if "pixel_values" in one else _before_text
            logits.append(join(plain, forward, one, phi, at))
        return SimpleNamespace(logits=torch.stack(logits))

    plain.forward = by_hand


def _before_text(plain: Any, forward: Any, one: dict[str, Tensor], phi: Tensor, at: int) -> Tensor:
    x, mask = plain.get_input_embeddings()(one.pop("input_ids"))[0], one["attention_mask"][0]
    place, k = int(mask.nonzero()[0]) + at, len(phi)
    one["inputs_embeds"] = torch.cat([x[:place], phi, x[place:]])[None]
    one["attention_mask"] = torch.cat([mask[:place], mask.new_ones(k), mask[place:]])[None]
    out = forward(**one).logits[0]
    return out if "labels" in one else torch.cat([out[:place], out[place + k :]])


def _before_image(plain: Any, forward: Any, one: dict[str, Tensor], phi: Tensor, at: int) -> Tensor:
    def joined(module: nn.Module, args: Any, x: Tensor) -> Tensor:
        return torch.cat([x[0, :at], phi, x[0, at:]])[None]

    hook = plain.vit.embeddings.register_forward_hook(joined)
    logits = forward(**one).logits[0]
    hook.remove()
    return logits


def linear_map_by_hand(host: mg.Host, case: HostCase, at: int) -> Tensor:
    """Compute the host's output with the tokens of the LinearMap ``eye`` joined by hand."""
    batch, given = case.batch(), side()
    place = host["eye"].places[0]
    tokens = (given.tensor @ place.map.weight.T + place.map.bias).reshape(BATCH, 4, 2, -1)
    made = [own[mask].flatten(0, 1) for own, mask in zip(tokens, given.mask, strict=True)]
    plain = host.merge(None)
    before_input(plain, at, made)
    return plain(**batch).logits
