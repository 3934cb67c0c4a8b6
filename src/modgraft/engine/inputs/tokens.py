"""Puts the tokens of prompts into a call of the host.

Prompts act where the host is called, so that changing its arguments is enough. A host that reads no
text takes them inside instead: they enter at its first sequence of tokens and leave at its last.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from modgraft.computation.base import TokenComposition
from modgraft.core.architectures import base_path, family_of
from modgraft.core.compiled import switched
from modgraft.core.context import Call
from modgraft.core.errors import CompositionError, ModgraftError
from modgraft.core.expression import Expression
from modgraft.core.per_example import Each
from modgraft.core.sites import Site
from modgraft.engine.inputs.expressions import fold
from modgraft.engine.inputs.splice import Source, Tokens, splice
from modgraft.engine.plan import Entry
from modgraft.engine.state import State


def inner_sites(site: Site) -> list[Site]:
    """Return where tokens enter and leave inside the host at ``site``, if it reads no text."""
    family = family_of(site.module)
    if family is None or family.embedded is None:
        return []
    base = base_path(site.module)
    paths = [f"{base}.{path}" if base else path for path in family.embedded]
    return [Site(p, site.module.get_submodule(p), None, site.root) for p in paths]


def call_with_tokens(
    host: nn.Module,
    state: State,
    call: Call,
    entries: Sequence[Entry],
    run: Callable[[tuple, dict[str, Any]], Any],
    args: tuple,
    kwargs: dict[str, Any],
) -> Any:
    """Return ``run(args, kwargs)`` with the tokens of ``entries`` before the host's input.

    Raises:
        ModgraftError: for a part of a host that was called alone, or a call that has no room for
            tokens.
    """
    if state.path:
        names = ", ".join(entry.name for entry in entries)
        raise ModgraftError(
            f"{names}: the tokens are put in where the whole host is called, and {state.path} was "
            f"called without it; call host(...), or host.use(None) first"
        )
    plan = splice(host, _named(host, args, kwargs), _source(host, entries, call))
    with state.context.call(replace(call, spliced=True, relay=plan.relay)):
        return plan.trim(run((), plan.kwargs))


def generate_with_tokens(
    host: nn.Module,
    state: State,
    call: Call,
    entries: Sequence[Entry],
    generate: Callable[..., Any],
    args: tuple,
    kwargs: dict[str, Any],
) -> Any:
    """Generate with the tokens of ``entries`` before the text; the result has none of them."""
    if len(args) > 1:
        raise ModgraftError("generate with input modules takes its arguments by name")
    kwargs = {**dict(zip(("inputs",), args, strict=False)), **kwargs}
    text = kwargs.pop("inputs", None)
    if text is not None:
        kwargs["input_ids"] = text
    plan = splice(host, kwargs, _source(host, entries, call), generating=True)
    with state.context.call(replace(call, spliced=True, generating=True)):
        return generate(host, **plan.kwargs)


def _source(host: nn.Module, entries: Sequence[Entry], call: Call) -> Source:
    """Return what gives, for a batch of so many examples, the tokens that go before each."""
    family = family_of(host)
    first = 0 if family is None else family.prompt_at
    named = {entry.name: entry for entry in entries}

    def of_module(entry: Entry, batch: int, rows: Tensor | None) -> Tokens:
        module = entry.module
        assert isinstance(module, TokenComposition)  # noqa: S101
        source = module.side_source
        side = None if source is None else call.resolve(source, entry.name, batch, rows)
        embeddings, seen = module.tokens(batch if rows is None else len(rows), side)
        return Tokens(entry.name, embeddings, seen, module.after(first), side is not None)

    def of(expression: Expression, batch: int, rows: Tensor | None) -> list[Tokens]:
        def one(name: str) -> list[Tokens]:
            return [of_module(named[name], batch, rows)] if name in named else []

        return fold(expression, one, _mean)

    def tokens(batch: int) -> list[Tokens]:
        composition = call.composition
        if composition is None or switched(composition):
            return [of_module(entry, batch, None) for entry in entries]
        if not isinstance(composition, Each):
            return of(composition, batch, None)
        times = max(1, batch // len(composition.rows))
        some = []
        for row, examples in composition.different.items():
            rows = torch.tensor([i * times + k for i in examples for k in range(times)])
            some.append((rows, [] if row is None else of(row, batch, rows)))
        return _padded(batch, some)

    return tokens


def _mean(several: list[Tokens]) -> Tokens:
    """Return the mean of prompts, token by token.

    Raises:
        CompositionError: where there are not as many of each, or not all are seen.
    """
    lengths = [own.embeddings.shape[1] for own in several]
    if len(set(lengths)) > 1 or any(o.masked and not bool(o.seen.all()) for o in several):
        raise CompositionError(
            f"average({', '.join(own.name for own in several)}): the mean of tokens is of as many "
            f"each, and there are {', '.join(map(str, lengths))}"
        )
    mean = torch.stack([own.embeddings for own in several]).mean(0)
    return replace(several[0], embeddings=mean, name="average")


def _padded(batch: int, some: list[tuple[Tensor, list[Tokens]]]) -> list[Tokens]:
    """Pad tokens that differ between examples to the longest, and mask the padding."""
    found = [(rows, own) for rows, own in some if own]
    if not found:
        return []
    like = found[0][1][0]
    if len({own.after for _, tokens in found for own in tokens}) > 1:
        raise CompositionError(
            "one batch has tokens before and behind the class token; call the host once for each"
        )
    most = max(sum(own.seen.shape[1] for own in tokens) for _, tokens in found)
    width, device = like.embeddings.shape[-1], like.embeddings.device
    embeddings = like.embeddings.new_zeros(batch, most, width)
    seen = torch.zeros(batch, most, dtype=torch.bool, device=device)
    for rows, tokens in found:
        own = torch.cat([one.embeddings for one in tokens], 1)  # [g, k, d]
        unseen = own.new_zeros(len(rows), most - own.shape[1], width)
        shown = torch.cat([one.seen for one in tokens], 1)
        hidden = shown.new_zeros(len(rows), most - own.shape[1])
        embeddings = embeddings.index_copy(0, rows, torch.cat([unseen, own], 1))
        seen[rows] = torch.cat([hidden, shown], 1)
    names = ", ".join(dict.fromkeys(own.name for _, tokens in found for own in tokens))
    return [Tokens(names, embeddings, seen, like.after, not bool(seen.all()))]


def _named(host: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    if not args:
        return kwargs
    names = list(inspect.signature(type(host).forward).parameters)[1:]  # the first is self
    return {**dict(zip(names, args, strict=False)), **kwargs}
