"""What acts inside a host while tokens are in its call: at its tables, or around its image.

A host works out much from its input ids: where its images are, where each text ends, the position
of each token in one dimension or in three. So tokens are not handed over as embeddings instead of
ids. They get ids of their own, beyond any vocabulary, and the host's tables are served for these:
whatever it then does with the ids, it does with the tokens among them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from modgraft.core.tensors import tensor_of, with_tensor

FIRST_ID = 1 << 30
"""The first id that is none of any vocabulary; there is room for as many again in int32."""


@dataclass(frozen=True)
class Tokens:
    """The tokens that one module puts before the input.

    Attributes:
        name: the module's name.
        embeddings: ``[B, k, d]``.
        seen: ``[B, k]`` bool, True where a token is seen.
        words: ``[B, k]`` int64, the ids of those that are words of the host, −1 for others; None:
            there are no words.
        after: how many of the input's own positions stay before them.
        masked: whether some of them may be unseen.
    """

    name: str
    embeddings: Tensor
    seen: Tensor
    words: Tensor | None
    after: int
    masked: bool = False


class Relay(Protocol):
    """Runs a layer at which tokens are put in, or taken out."""

    def __call__(
        self, path: str, run: Callable[[tuple, dict], Any], args: tuple, kwargs: dict[str, Any]
    ) -> Any:
        """Return the output of the layer at ``path``, which ``run(args, kwargs)`` computes."""
        ...


@dataclass
class NewIds:
    """Serves the tables of a host for ids that are none of its vocabulary.

    Attributes:
        tables: the paths of the tables: whether they hold the host's own embeddings.
        rows: ``[n, d]``, the embeddings of the ids from :data:`FIRST_ID` on.
        blank: the id that other tables are read at instead: padding's, as hosts have it where
            there is an image.
        served: the paths of the tables that have read ``rows``.
    """

    tables: Mapping[str, bool]
    rows: Tensor
    blank: int
    served: set[str] = field(default_factory=set)

    def __call__(
        self, path: str, run: Callable[[tuple, dict], Any], args: tuple, kwargs: dict[str, Any]
    ) -> Any:
        """Look known ids up as the table does, and the new ones in ``rows``."""
        (ids,) = args or kwargs.values()
        new = ids >= FIRST_ID
        out = run((ids.masked_fill(new, self.blank),), {})
        if not self.tables[path]:
            return out
        if not torch.compiler.is_dynamo_compiling():
            self.served.add(path)
        y = tensor_of(out)
        at = (ids - FIRST_ID).clamp(min=0)  # any layout: a new id is one token of one example
        return with_tensor(out, torch.where(new[..., None], self.rows.to(y.dtype)[at], y))


@dataclass(frozen=True)
class AroundImage:
    """Puts tokens into a host's first sequence of tokens, and takes them out of its last.

    Attributes:
        enter: the layer whose output is the first sequence ``[B, N, d]``.
        leave: the layer whose input is the last.
        tokens: what the modules put in, in order.
    """

    enter: str
    leave: str
    tokens: tuple[Tokens, ...]

    def __call__(
        self, path: str, run: Callable[[tuple, dict], Any], args: tuple, kwargs: dict[str, Any]
    ) -> Any:
        """Run the layer before the tokens come in, or after they have left."""
        if path == self.leave:
            return run((self._without(args[0]), *args[1:]), kwargs)
        out = run(args, kwargs)
        y = tensor_of(out)
        for own in reversed(self.tokens):
            new = own.embeddings.to(y.dtype)
            y = torch.cat([y[:, : own.after], new, y[:, own.after :]], dim=1)  # [B, k + N, d]
        return with_tensor(out, y)

    def _without(self, y: Tensor) -> Tensor:
        for own in self.tokens:
            end = own.after + own.embeddings.shape[1]
            y = torch.cat([y[:, : own.after], y[:, end:]], dim=1)  # [B, k + N, d] → [B, N, d]
        return y
