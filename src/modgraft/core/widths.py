"""How wide the output of a layer is, as far as it can be told without running it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from transformers.pytorch_utils import Conv1D

from modgraft.core.layers import CONVOLUTIONS, is_stack, keeps_inputs_first


def own_width(layer: nn.Module) -> int | None:
    """Return the number of features that a layer of a known class puts out, None for another."""
    match layer:
        case nn.Linear(out_features=width) | Conv1D(nf=width) | nn.Embedding(embedding_dim=width):
            return int(width)
        case nn.Conv1d() | nn.Conv2d() | nn.Conv3d():
            return int(layer.out_channels)
        case nn.MultiheadAttention(embed_dim=width):
            return int(width)
        case nn.RNNBase():
            return (layer.proj_size or layer.hidden_size) * (2 if layer.bidirectional else 1)
        case nn.TransformerEncoderLayer() | nn.TransformerDecoderLayer():
            return layer.linear2.out_features
        case nn.TransformerEncoder() | nn.TransformerDecoder():
            return own_width(layer.layers[0])
        case nn.Transformer(d_model=width):
            return int(width)
        case nn.BatchNorm2d(num_features=width):
            return int(width)
        case nn.Sequential():
            widths = [w for child in layer if (w := own_width(child)) is not None]
            return widths[-1] if widths else None
    if shape := getattr(layer, "normalized_shape", None):  # any class of LayerNorm
        if getattr(layer, "data_format", "") == "channels_first":
            return None
        return int(shape if isinstance(shape, int) else shape[-1])
    if isinstance(getattr(layer, "in_features", None), int):  # any class of linear layer
        return getattr(layer, "out_features", None)
    if isinstance(layer, nn.GroupNorm | _NormBase):  # [B, C, …]
        return None
    direct = dict(layer.named_parameters(recurse=False))
    sizes = {tuple(p.shape) for p in direct.values()}
    alone = "weight" in direct or not layer._modules
    if alone and len(sizes) == 1 and len(size := sizes.pop()) == 1:  # any other norm, or a scale
        return size[0] if size[0] > 1 else None
    return None


def inner_width(around: Sequence[nn.Module]) -> int | None:
    """Return the width of a layer made of others, such as a block, from what it is made of.

    A model of several stages, or one with towers, has no one width: that of the nearest config
    counts only where the layer's own linear layers agree. Where these neither end in it nor in what
    they begin with, nothing says how wide the output is.

    Args:
        around: the layer, and what it is in, up to the host's model.

    Returns:
        The width, None where it cannot be told.
    """
    layer = around[0]
    config = next((c for m in around if (c := getattr(m, "config", None)) is not None), None)
    if config is None:
        return None
    staged = any(getattr(config, name, None) for name in ("depths", "hidden_sizes"))
    hidden = None if staged else getattr(config, "hidden_size", None)
    maps = list(_linear_maps(layer))
    if not maps:
        return _table_width(layer, hidden)
    first, last = maps[0][0], maps[-1][1]
    end = [m for m in layer.modules() if isinstance(m, nn.Linear | Conv1D | nn.Conv2d)][-1:]
    if any(isinstance(m, nn.Conv2d) and m.out_channels != last for m in end):
        return None
    routed = any(p.dim() == 3 for m in layer.modules() for p in m.parameters(False))
    words = getattr(config, "vocab_size", None) if len(around) > 1 else None  # of a head
    if (len(maps) == 1 and not routed) or last in (hidden, words):
        return last
    inner = hidden in {out for _, out in maps}
    if first == last:
        return hidden if inner else last
    if _is_chain(layer, maps):
        return last
    in_a_stack = any(isinstance(m, nn.ModuleList) for m in around[1:])
    return hidden if inner and first == hidden and in_a_stack else None


def _is_chain(layer: nn.Module, maps: Sequence[tuple[int, int]]) -> bool:
    """Return whether a layer is a list of linear layers, each of which reads the one before."""
    listed = [m for child in layer.children() for m in child.children()]
    own = [m for m in layer.modules() if m._parameters]
    chained = all(one[1] == two[0] for one, two in pairwise(maps))
    return chained and own == listed and all(isinstance(m, nn.Linear | Conv1D) for m in own)


def _linear_maps(layer: nn.Module) -> Iterator[tuple[int, int]]:
    """Yield the inputs and outputs of the linear layers within, in order; a gate is none."""
    for each in layer.modules():
        match each:
            case nn.Linear(in_features=ins, out_features=outs) | Conv1D(nx=ins, nf=outs):
                if outs > 1:
                    yield ins, outs
            case _:
                for name, value in each._parameters.items():
                    if value is not None and is_stack(each, name):
                        one, two = value.shape[1:]
                        yield (one, two) if keeps_inputs_first(each, name) else (two, one)


def _table_width(layer: nn.Module, hidden: int | None) -> int | None:
    """Return the width of what looks its input up, or cuts it into patches."""
    inside = [m for m in layer.modules() if m is not layer]
    patches = [m for m in inside if isinstance(m, CONVOLUTIONS)]
    widths = [w for m in inside if m not in patches and (w := own_width(m)) is not None]
    if patches:
        last = patches[-1]
        known = last.out_channels in (hidden, widths[-1] if widths else None)
        return last.out_channels if known and not isinstance(last, nn.Conv1d) else None
    return widths[-1] if widths else None
