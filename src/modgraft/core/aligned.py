"""Which arguments of a model's forward hold something for each token of its text.

Their shape is ``[B, T, …]``, as that of others may be by chance: of a decoder's text, or of as many
patches. So what the forward's documentation says of a shape counts, and what it is said of: where
``encoder_hidden_states`` or ``visual_feats`` is taken too, all with that first word is no text's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from modgraft.core.errors import ModgraftError

_ANOTHER = re.compile(r"(\w+_)(input_ids|hidden_states|feats|features)")
_SHAPE = r"^ *{} \(.*?\bshape `?\(+([^)]*)\)"
_KNOWN = {
    "input_ids", "inputs_embeds", "attention_mask", "position_ids", "labels", "shift_labels",
    "targets",
}  # fmt: skip
_LENGTH = re.compile(r"(token_)?seq(uence)?_?len(gth)?")


@dataclass(frozen=True)
class Aligned:
    """What is known of a forward's arguments.

    Attributes:
        told: those that are documented to be ``[B, T, …]``.
        apart: those that are something else.
        square: those that have the text's length on another axis than the second, too.
    """

    told: frozenset[str]
    apart: frozenset[str]
    square: frozenset[str]

    def among(self, kwargs: Mapping[str, Any], shape: Sequence[int]) -> dict[str, Tensor]:
        """Return those arguments of a call that hold something for each token, beside the text, its
        mask, positions and labels.

        What no documentation speaks of does if it is of integers, or of bools.

        Args:
            kwargs: the arguments.
            shape: ``[B, T]``, of the text.

        Raises:
            ModgraftError: for one that no token could be put into.
        """
        found = {}
        for name, value in kwargs.items():
            if not isinstance(value, Tensor) or name in self.apart or name in _KNOWN:
                continue
            if name.startswith("negative_"):  # of generate: a text of its own
                continue
            beyond = value.shape[2:3] == shape[1:] and name not in self.told
            same = value.shape[:2] == shape
            if name in self.square or (same and beyond and not value.is_floating_point()):
                raise ModgraftError(
                    f"an input module puts tokens into the text, and {name} {list(value.shape)} "
                    f"says of each pair of tokens what these would have to be told; leave it out, "
                    f"or implant a Prefix, which takes no place in a text"
                )
            if same and (name in self.told or not value.is_floating_point()):
                found[name] = value
        return found


def aligned(forward: Any, arguments: Sequence[str]) -> Aligned:
    """Work out what is known of the ``arguments`` of a ``forward``.

    Args:
        forward: of a class of models.
        arguments: their names.
    """
    others = tuple(m[1] for name in arguments if (m := _ANOTHER.fullmatch(name)))
    told, apart, square = set(), set(), set()
    for name in arguments:
        found = re.search(_SHAPE.format(re.escape(name)), forward.__doc__ or "", re.MULTILINE)
        axes = [axis.strip() for axis in found[1].split(",")] if found else []
        of_text = [bool(_LENGTH.fullmatch(axis)) for axis in axes]
        if name.startswith(others):
            apart.add(name)
        elif any(of_text[2:]):
            square.add(name)
        elif any(of_text[1:2]) or name == "bbox":  # of which UDOP and BROS say nothing
            told.add(name)
        elif found and "{" not in axes[0]:
            apart.add(name)
    return Aligned(frozenset(told), frozenset(apart), frozenset(square))
