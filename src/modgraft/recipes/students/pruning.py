"""Makes a GPT narrower inside: the heads and the inner neurons that matter most stay."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from modgraft.core.errors import ModgraftError
from modgraft.models.gpt import GPT


def narrowed(model: GPT, heads: int, inner: int, batches: Iterable[dict[str, Any]]) -> GPT:
    """Return a GPT with the most important ``heads`` and ``inner`` neurons of each block.

    The importance of a head or a neuron is \\|Σ g θ\\| over the weights that read from it, the
    change of the loss that leaving it out makes, to first order (Michel et al. 2019,
    arXiv:1905.10650; Molchanov et al. 2019, arXiv:1906.10771), on average over batches.

    Args:
        model: a GPT in which no heads share keys; it is left as it is.
        heads, inner: how many stay in each block.
        batches: text to measure with, from what it was trained on.

    Returns:
        A GPT of the same width, whose layers are real smaller ones.

    Raises:
        ModgraftError: for more than there are, for fewer than one, for shared keys, or no batch.
    """
    config = model.config
    if not (1 <= heads <= config.num_attention_heads and 1 <= inner <= config.intermediate_size):
        raise ModgraftError(
            f"heads={heads}, inner={inner}: the model has {config.num_attention_heads} heads and "
            f"{config.intermediate_size} neurons in a block; keep 1 or more of each"
        )
    if config.num_key_value_heads != config.num_attention_heads:
        raise ModgraftError("the heads share keys and values; a head cannot go alone")
    of_heads, of_neurons = importance(model, batches)
    smaller = deepcopy(config)
    smaller.num_attention_heads = smaller.num_key_value_heads = heads
    smaller.intermediate_size = inner
    made = GPT(smaller)
    state = dict(model.state_dict())
    for i in range(config.num_hidden_layers):
        kept = of_heads[i].topk(heads).indices.sort().values
        rows = (kept[:, None] * config.head_dim + torch.arange(config.head_dim)).flatten()
        neurons = of_neurons[i].topk(inner).indices.sort().values
        attention, feedforward = f"blocks.{i}.attention.", f"blocks.{i}.feedforward."
        for layer in ("query", "key", "value"):
            _keep(state, attention + layer, rows, 0)
        _keep(state, attention + "output", rows, 1)
        for layer in ("gate", "up"):
            _keep(state, feedforward + layer, neurons, 0)
        _keep(state, feedforward + "down", neurons, 1)
    made.load_state_dict(state)
    return made.train(model.training)


def importance(model: GPT, batches: Iterable[dict[str, Any]]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the importance of each head ``[h]`` and of each neuron ``[inner]``, block by block.

    Raises:
        ModgraftError: there is no batch.
    """
    mode = model.training
    blocks: Any = model.blocks
    layers: list[nn.Linear] = [x for b in blocks for x in (b.attention.output, b.feedforward.down)]
    totals = [torch.zeros(layer.in_features) for layer in layers]
    count = 0
    for batch in batches:
        loss = model.eval()(**batch).loss
        grads = torch.autograd.grad(loss, [layer.weight for layer in layers])
        for total, layer, grad in zip(totals, layers, grads, strict=True):
            total += (grad * layer.weight.detach()).sum(0)  # [d, inner] → [inner]
        count += 1
    model.train(mode)
    if not count:
        raise ModgraftError("there is no batch to measure importance with")
    heads = [total.view(model.config.num_attention_heads, -1).sum(1).abs() for total in totals[::2]]
    return heads, [total.abs() for total in totals[1::2]]


def _keep(state: dict[str, Tensor], layer: str, which: Tensor, axis: int) -> None:
    """Keep some rows, or columns, of a layer."""
    for name in (f"{layer}.weight", f"{layer}.bias"):
        if name in state and not (axis and name.endswith("bias")):
            state[name] = state[name].index_select(axis, which)
