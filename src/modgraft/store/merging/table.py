"""The table of the methods of merging, and a method as it was asked for, checked."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from modgraft.core.errors import ModgraftError
from modgraft.store.merging.deltas import Blocks, Deltas
from modgraft.store.merging.low_rank import Change
from modgraft.store.merging.methods import (
    arithmetic,
    average,
    dare,
    isotropic,
    knots,
    slerp,
    ties,
    tsv,
)


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        function: merges a tensor.
        of_matrices: whether it is of matrices as wholes, which have singular values; what is no
            matrix, a bias or a norm's weight, is averaged then. The others work number by number.
        needs_base: whether whole checkpoints need the one that they were all trained from.
        weighted: whether it takes weights.
        count: how many it merges; None: any number.
    """

    function: Callable[..., Iterator[Change]]
    of_matrices: bool = False
    needs_base: bool = True
    weighted: bool = True
    count: int | None = None

    @cached_property
    def options(self) -> type[BaseModel]:
        """Its options, as its function declares them: their types, bounds and defaults."""
        given = inspect.signature(self.function, eval_str=True).parameters.values()
        own: Any = {p.name: (p.annotation, p.default) for p in given if p.kind is p.KEYWORD_ONLY}
        return create_model(
            self.function.__name__, __config__=ConfigDict(strict=True, extra="forbid"), **own
        )


METHODS: dict[str, Method] = {
    "average": Method(average, needs_base=False),
    "arithmetic": Method(arithmetic),
    "ties": Method(ties),
    "dare": Method(dare),
    "slerp": Method(slerp, needs_base=False, weighted=False, count=2),
    "isotropic": Method(isotropic, of_matrices=True),
    "tsv": Method(tsv, of_matrices=True),
    "knots": Method(knots, of_matrices=True),
}
"""The methods by name."""

SOUP = "greedy_soup"
"""The average of those that a validation chooses: :func:`modgraft.store.merging.soup.greedy`."""


ELSEWHERE: dict[str, str] = {
    "linear": "'average', or without mergekit's normalize 'arithmetic'",
    "task_arithmetic": "'arithmetic'",
    "cat": "'arithmetic'",
    "svd": "'arithmetic' with rank=",
    "ties_svd": "'ties' with rank=",
    "dare_linear": "'dare', as mergekit's with rescale='l1'",
    "dare_linear_svd": "'dare' with rank=",
    "dare_ties": "'dare' with elect='sum', as mergekit's with rescale='l1'",
    "dare_ties_svd": "'dare' with elect='sum' and rank=",
    "iso_c": "'isotropic'",
    "uniform_soup": "'average'",
    "int8_mask": "left out: the type of a mask changes no number",
    "lambda": "scale=",
    "lambda_": "scale=",
    "weight": "weights=, a number for each",
    "consensus_method": "elect='sum' or 'count'",
    "majority_sign_method": "elect='sum' (PEFT's total) or 'count' (its frequency)",
    "combination_type": "method=",
    "svd_rank": "rank=",
}
"""What the methods and options of mergekit and PEFT are called here."""


@dataclass(frozen=True)
class Asked:
    """A method with its options and weights, checked.

    Attributes:
        name: the method's.
        options: all its options.
        weights: one for each that is merged.
    """

    name: str
    options: Mapping[str, Any]
    weights: Sequence[float]

    @property
    def of_matrices(self) -> bool:
        """Whether a matrix is merged as a whole; see :class:`Method`."""
        return METHODS[self.name].of_matrices

    def merge(
        self, name: str, parents: Sequence[str], shape: Sequence[int], blocks: Blocks
    ) -> Iterator[Change]:
        """Merge one tensor; give the blocks of the result.

        Args:
            name: the tensor's.
            parents: the names of what is merged.
            shape: the tensor's.
            blocks: gives the blocks of Δ₁ … Δₙ.
        """
        method, these = METHODS[self.name], Deltas(name, parents, self.weights, blocks)
        if method.of_matrices and len(shape) != 2:
            return average(these)
        return method.function(these, **self.options)


def asked(
    name: str, count: int, weights: Sequence[float] | None, options: Mapping[str, Any]
) -> Asked:
    """Return a method as it was asked for.

    Args:
        name: the method's.
        count: how many are merged.
        weights: one for each; None: 1.
        options: those that are not to have their default.

    Raises:
        ModgraftError: for an unknown method or option, a value that an option cannot have, or
            another number of weights.
    """
    if name not in METHODS:
        here = f"; that is {ELSEWHERE[name]}" if name in ELSEWHERE else ""
        raise ModgraftError(f"method={name!r:.80}: there are {', '.join([*METHODS, SOUP])}{here}")
    method = METHODS[name]
    try:
        known = method.options(**options).model_dump()
    except ValidationError as error:
        wrong = error.errors()[0]
        has = ", ".join(
            f"{key}={each.default!r}" for key, each in method.options.model_fields.items()
        )
        option = str(wrong["loc"][0])
        here = f" ({option} is here {ELSEWHERE[option]})" if option in ELSEWHERE else ""
        raise ModgraftError(
            f"{name}: {option}={wrong['input']!r:.80}: {wrong['msg']}; its options, with "
            f"their defaults: {has or 'none'}{here}"
        ) from error
    if count < 1 or (method.count is not None and count != method.count):
        wanted = f"{method.count} things" if method.count else "one thing at least"
        raise ModgraftError(f"{name} merges {wanted}, and {count} were given")
    return Asked(name, known, _weights(name, method, count, weights))


def _weights(name: str, method: Method, count: int, weights: Sequence[float] | None) -> list[float]:
    """Return a weight for each that is merged, of those that were given, if any were."""
    if weights is not None and not method.weighted:
        raise ModgraftError(f"{name} takes no weights; say t=0.3, for instance")
    if not isinstance(weights, list | tuple | None):
        raise ModgraftError(f"weights={weights!r:.80}: a list, of one number for each of {count}")
    found = [1.0] * count if weights is None else [*weights]
    numbers = all(isinstance(w, int | float) and math.isfinite(w) for w in found)
    if len(found) != count or not numbers:
        raise ModgraftError(f"weights={found!r:.80}: one finite number for each of {count}")
    if (name == "average" or method.of_matrices) and abs(math.fsum(found)) < 1e-8:
        raise ModgraftError(
            f"weights={found!r:.80}: their sum is 0, by which an average divides; "
            f"method='arithmetic' adds without dividing"
        )
    return [float(w) for w in found]
