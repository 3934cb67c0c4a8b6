"""What a row of the zoo is: a small host, a batch for it, and what is known of both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

EXAMPLES = TOKENS = 5
"""As many tokens as examples: an axis that is mistaken for the other raises nothing."""

VOCABULARY = 48
IMAGE, PROMPT = 44, (45, 46, 47)
"""The id that stands for an image, and ids that no text has, in whose place prompts are put."""

SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZE = {
    **SPECIAL,
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
DECODER = {**SIZE, "num_key_value_heads": 1, "head_dim": 8}

Batch = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """A host of the zoo.

    Attributes:
        name: what the matrix calls it.
        kind: the kind of host, by which the matrix is ordered.
        make: makes the model.
        batch: makes a batch of ``EXAMPLES`` examples for it.
        axis: the axis of the examples in the batch and in what the host puts out.
        class_token: whether the class is read at position 0, which stays first before prompts.
    """

    name: str
    kind: str
    make: Callable[[], nn.Module]
    batch: Callable[[], Batch]
    axis: int = 0
    class_token: bool = False

    def model(self) -> nn.Module:
        """Make the model, frozen, with weights by which everything shows and without dropout."""
        torch.manual_seed(0)
        model = self.make().eval().requires_grad_(False)
        _without_chance(model)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if parameter.dim() > 1:  # so that outputs are about as large as inputs
                    parameter.copy_(noise * parameter[0].numel() ** -0.5)
                else:
                    parameter.copy_(parameter.nan_to_num().clamp(-2, 2) + 0.1 * noise)
        return model


def _without_chance(model: nn.Module) -> None:
    """Set every dropout, jitter and masking of a model to 0, also those of its configs."""
    configs = [getattr(m, "config", None) for m in model.modules()]
    for owner in [*model.modules(), *configs, *(c for o in configs for c in _inside(o))]:
        for name, value in list(vars(owner).items()) if owner is not None else ():
            if isinstance(value, float) and any(w in name for w in ("drop", "jitter")):
                setattr(owner, name, 0.0)
            elif name == "apply_spec_augment":
                setattr(owner, name, False)
        if isinstance(owner, nn.Dropout):
            owner.p = 0.0


def _inside(config: Any) -> list[Any]:
    return [] if config is None else [c for c in vars(config).values() if hasattr(c, "to_dict")]


def hf(name: str, kind: str, model: str, batch: Callable[[], Batch], **config: Any) -> Row:
    """Make a row of a transformers class by its config; ``class_token`` is the row's own."""
    known = config.pop("class_token", False)

    def make() -> nn.Module:
        of = getattr(transformers, model)
        return of(of.config_class(**config))

    return Row(name, kind, make, batch, class_token=known)


# -- batches --------------------------------------------------------------------------------------


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ids(length: int = TOKENS, seed: int = 2) -> Tensor:
    return torch.randint(5, 40, (EXAMPLES, length), generator=_generator(seed))


def values(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(EXAMPLES, *shape, generator=_generator(seed))


def text() -> Batch:
    """Texts; the first is shorter, and padded on the right."""
    mask = torch.ones(EXAMPLES, TOKENS, dtype=torch.long)
    mask[0, -1] = 0
    return {"input_ids": ids() * mask, "attention_mask": mask}


def whole() -> Batch:
    """Texts without padding, for hosts that take no mask."""
    return {"input_ids": ids()}


def continued() -> Batch:
    """Texts to be continued: the first is padded on the left."""
    mask = torch.ones(EXAMPLES, TOKENS, dtype=torch.long)
    mask[0, 0] = 0
    return {"input_ids": ids() * mask, "attention_mask": mask}


def pairs() -> Batch:
    return {**text(), "decoder_input_ids": ids(seed=4)}


def image(size: int = 8) -> Callable[[], Batch]:
    return lambda: {"pixel_values": values(3, size, size)}


def sound(length: int = 80) -> Callable[[], Batch]:
    return lambda: {"input_values": values(length)}


def spoken(*shape: int) -> Callable[[], Batch]:
    return lambda: {"input_features": values(*shape), "decoder_input_ids": ids(seed=4)}


def seen(count: int, size: int = 8) -> Callable[[], Batch]:
    """Texts about an image, each of which begins with the places of the image's tokens."""

    def batch() -> Batch:
        places = torch.full((EXAMPLES, count), IMAGE)
        words = torch.cat([ids(1, 5), places, ids(3)], dim=1)
        return {
            "input_ids": words,
            "attention_mask": torch.ones_like(words),
            "pixel_values": values(3, size, size),
        }

    return batch
