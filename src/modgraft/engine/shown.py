"""Shows a host two small made-up inputs, to see how wide the output of a part is that does not say.

A part whose class and layers do not tell its width (``core/widths.py``) is seen at work: a copy of
the host, which shares its weights, runs on a short input and on a longer one. An axis that grows
with the input holds tokens or pixels; the last one holds the features if it does not. This is done
only where a method asks for such a width, and says nothing of a host whose inputs cannot be made up
from its config.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from modgraft.core.tensors import device_of
from modgraft.engine.twin import REFUSALS, run_twin, twin_of

Input = dict[str, Any]


class Shown:
    """The widths that a host's parts are seen to have; it is looked once, when one is asked for.

    Args:
        model: the host's model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def width(self, path: str) -> int | None:
        """Return how wide the output of the part at ``path`` is, None where that is not seen."""
        short, long = (seen.get(path) for seen in self._shapes)
        if short is None or long is None or len(short) != len(long) or len(short) < 3:
            return None
        grown = [axis for axis in range(len(short)) if short[axis] != long[axis]]
        return short[-1] if grown and grown[-1] != len(short) - 1 else None

    @cached_property
    def _shapes(self) -> tuple[Mapping[str, torch.Size], Mapping[str, torch.Size]]:
        inputs = _inputs(self._model)
        if inputs is None:
            return {}, {}
        twin = twin_of(self._model)
        try:
            return _seen(twin, inputs[0]), _seen(twin, inputs[1])
        except REFUSALS:
            return {}, {}


def _seen(twin: nn.Module, batch: Input) -> dict[str, torch.Size]:
    """Return the shape of the first tensor that each part puts out; none where it changes."""
    found: dict[str, torch.Size] = {}

    def look(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, out: Any) -> None:
            while not isinstance(out, Tensor):
                values = list(out.values()) if isinstance(out, Mapping) else out
                if not isinstance(values, list | tuple) or not values:
                    return
                out = values[0]
            if found.setdefault(path, out.shape) != out.shape:
                found[path] = torch.Size()

        return hook

    handles = [m.register_forward_hook(look(p)) for p, m in twin.named_modules()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run_twin(twin, (), batch, handles)
    return found


def _inputs(model: nn.Module) -> tuple[Input, Input] | None:
    """Return a short and a long input that a model of its kind may read, if one can be made up."""
    name, config = getattr(model, "main_input_name", None), getattr(model, "config", None)
    like = next((p for p in model.parameters() if p.is_floating_point()), None)
    if not isinstance(name, str) or config is None or like is None:
        return None

    def said(*names: str, otherwise: Any = None) -> Any:
        values = (getattr(config, each, None) for each in names)
        return next((value for value in values if value is not None), otherwise)

    def noise(*shape: int) -> Tensor:
        drawn = torch.rand(1, *shape, generator=torch.Generator().manual_seed(0))
        return (2 * drawn - 1).to(device_of(model), like.dtype)

    def ids(length: int) -> Tensor:
        return (2 + torch.arange(length, device=device_of(model)) % 8)[None]

    beside: dict[str, Any] = {"decoder_input_ids": ids(4)} if said("is_encoder_decoder") else {}
    if "interpolate_pos_encoding" in inspect.signature(model.forward).parameters:
        beside["interpolate_pos_encoding"] = True
    match name:
        case "input_ids":
            sizes = [ids(length) for length in (8, 12)]
        case "pixel_values":
            size = said("image_size", otherwise=32)
            size = (size, size) if isinstance(size, int) else tuple(size)
            shape = (said("num_channels", otherwise=3), *size[-2:])
            sizes = [noise(shape[0], times * shape[1], times * shape[2]) for times in (1, 2)]
        case "input_values" if said("conv_stride"):
            ratio = prod(said("conv_stride"))
            sizes = [noise(ratio * steps) for steps in (24, 36)]
        case "input_features":
            wide = said("input_feat_per_channel", "feature_projection_input_dim", "num_mel_bins")
            sizes = [noise(steps, wide) for steps in (16, 24)] if wide else []
        case _:
            sizes = []
    return ({name: sizes[0], **beside}, {name: sizes[1], **beside}) if sizes else None
