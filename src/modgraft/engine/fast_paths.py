"""Keeps PyTorch from two shortcuts, by hooks that do nothing else.

Fused inference of encoder layers: without gradients ``nn.TransformerEncoderLayer`` hands its
weights to one kernel and calls none of its sub-modules, so that modules in them would have no
effect. It calls them while a hook is attached to it or to any of them.

Logits example by example: where the weights are frozen, ``linear`` of a slice (the last token of
each example, ``hidden[:, -1:]``) runs as one product for each example. Each product reads the whole
vocabulary's weights; together they take many times as long as one product of the slice copied.

The hooks stay for the whole life of a host, so that implanting changes no bit of what it computes.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from modgraft.core.errors import ModgraftError


class _Unfused:
    """A forward pre-hook that only has to be there; it remembers what else was changed."""

    def __init__(self, nested: bool | None = None) -> None:
        self.nested = nested

    def __call__(self, module: nn.Module, args: Any) -> None:
        """Leave the call as it is."""


class _Contiguous:
    """A forward pre-hook that copies the input where it is a slice, so that it is one matrix."""

    def __call__(self, module: nn.Module, args: Any) -> Any:
        """Return the inputs, contiguous in memory."""
        return tuple(a.contiguous() if isinstance(a, Tensor) else a for a in args)


def leave_fast_paths(model: nn.Module) -> None:
    """Have every encoder layer of ``model`` call its sub-modules, and logits be one product."""
    for module in model.modules():
        if _hooks(module):
            continue
        if isinstance(module, nn.TransformerEncoderLayer):
            module.register_forward_pre_hook(_Unfused())
        elif isinstance(module, nn.TransformerEncoder):  # only the kernel reads nested tensors
            module.register_forward_pre_hook(_Unfused(module.use_nested_tensor))
            module.use_nested_tensor = False
    logits = _logits(model)
    if logits is not None and not _hooks(logits):
        logits.register_forward_pre_hook(_Contiguous())


def take_fast_paths(model: nn.Module) -> None:
    """Undo :func:`leave_fast_paths` everywhere in ``model``."""
    for module in model.modules():
        for key, hook in _hooks(module):
            del module._forward_pre_hooks[key]
            if isinstance(module, nn.TransformerEncoder) and getattr(hook, "nested", None):
                module.use_nested_tensor = True


def _logits(model: nn.Module) -> nn.Linear | None:
    """Return the layer that computes a language model's logits."""
    own = getattr(model, "get_output_embeddings", lambda: None)()
    return own if isinstance(own, nn.Linear) else None


def _hooks(module: nn.Module) -> list[tuple[int, _Unfused | _Contiguous]]:
    hooks = module._forward_pre_hooks.items()
    return [(key, hook) for key, hook in hooks if isinstance(hook, _Unfused | _Contiguous)]


def check_weights_stay(model: nn.Module) -> None:
    """Refuse a host that divides weights and activations in evaluation and not in training.

    RWKV does so from layer ``rescale_every`` on, against overflow in half precision: modules would
    act on other numbers than they were trained on.

    Raises:
        ModgraftError: with the setting that turns it off.
    """
    for part in model.modules():
        config = getattr(part, "config", None)
        every = getattr(config, "rescale_every", 0)
        if every and getattr(config, "num_hidden_layers", 0) > every:
            raise ModgraftError(
                f"this {type(model).__name__} divides the weights and activations of its layers "
                f"by 2 in evaluation, from layers.{every} on, and does not in training, so that "
                f"a module would act differently in both; set model.config.rescale_every = 0 "
                f"(the outputs of the host stay the same)"
            )
