"""Puts the tokens of prompts into a call of the host.

Prompts act where the host is called, by its arguments (``splice``), and inside it where ids become
embeddings (``relays``). A host that reads no text takes them inside alone: they enter at its first
sequence of tokens and leave at its last.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from modgraft.computation.base import TokenComposition
from modgraft.core.call import Call
from modgraft.core.compiled import switched
from modgraft.core.embeddings import Reading
from modgraft.core.errors import CompositionError, ModgraftError
from modgraft.core.expression import Expression
from modgraft.core.per_example import Each
from modgraft.engine.inputs.caches import Held, check_goes_on, mark, modules_in
from modgraft.engine.inputs.expressions import fold
from modgraft.engine.inputs.generation import on_text, text_alone
from modgraft.engine.inputs.relays import NewIds, Tokens
from modgraft.engine.inputs.splice import Source, Splice, splice
from modgraft.engine.plan import Entry
from modgraft.engine.state import State


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
        ModgraftError: for a call that has no room for tokens, or a host that they did not reach.
    """
    reading = _reading(host, state)
    kwargs = {**dict(zip(reading.arguments, args, strict=False)), **kwargs}
    plan = splice(host, reading, kwargs, _source(reading, state, entries, call))
    held = _held(call, entries, plan)
    with state.context.call(replace(call, spliced=plan)):
        if torch.compiler.is_dynamo_compiling():
            return plan.trim(run((), plan.kwargs))
        out = _explained(reading, plan, lambda: run((), plan.kwargs))
    _check_served(host, plan, entries)
    mark(out, held)
    return plan.trim(out)


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
    if kwargs.get("assistant_model") is not None:
        raise ModgraftError(
            "generate(assistant_model=…) would give the assistant the tokens of this host's input "
            "modules, which it cannot read; leave it out, or pass prompt_lookup_num_tokens="
        )
    names = list(inspect.signature(generate).parameters)[1:]  # the first is self
    kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
    text = kwargs.pop("inputs", None)
    if text is not None:
        kwargs["input_ids"] = text
    reading = _reading(host, state)
    plan = splice(host, reading, kwargs, _source(reading, state, entries, call), generating=True)
    held = _held(call, entries, plan)
    check_goes_on(kwargs, held)
    mark(kwargs, held)
    with state.context.call(replace(call, spliced=plan, generating=True)):
        out = _explained(reading, plan, lambda: generate(host, **on_text(plan)))
    _check_served(host, plan, entries)
    mark(out, held)
    return text_alone(plan, out)


def relayed(
    layer: nn.Module,
    state: State,
    call: Call,
    run: Callable[[tuple, dict[str, Any]], Any],
    args: tuple,
    kwargs: dict[str, Any],
) -> Any:
    """Return the output of a layer at which tokens come in or leave, which ``run`` computes.

    Raises:
        ModgraftError: where a layer that needs them was called without the host.
    """
    plan: Splice | None = call.spliced
    if plan is not None and plan.relay is not None:
        return plan.relay(state.path, run, args, kwargs)
    assert call.composition is not None  # noqa: S101
    names = [n for n in state.context.token_modules_in(call.composition) if n in state.relays]
    if plan is None and names and not isinstance(layer, nn.Embedding):
        raise ModgraftError(
            f"{', '.join(names)}: the tokens are put in where the whole host is called, and "
            f"{state.path} was called without it; call host(...), or host.use(None) first"
        )
    return run(args, kwargs)


def _held(call: Call, entries: Sequence[Entry], plan: Splice) -> Held | None:
    """Return the tokens that a cache holds after the call; None where it has none of them."""
    if plan.keep is None or call.composition is None or torch.compiler.is_dynamo_compiling():
        return None
    return Held(modules_in(call.composition, {entry.name for entry in entries}), plan.keep)


def _reading(host: nn.Module, state: State) -> Reading:
    """Return what the host reads, which is another table after ``resize_token_embeddings``."""
    reading = state.reading
    assert reading is not None  # noqa: S101
    assert state.relink is not None  # noqa: S101
    if torch.compiler.is_dynamo_compiling() or reading.table is None:
        return reading
    if host.get_input_embeddings() is reading.table:  # type: ignore[operator]
        return reading
    return state.relink()


def _explained(reading: Reading, plan: Splice, run: Callable[[], Any]) -> Any:
    """Return ``run()``; say of an error of the host that its input is longer by the tokens.

    Raises:
        ModgraftError: where the tokens are what the host did not run with.
    """
    try:
        return run()
    except (IndexError, RuntimeError) as error:
        text, table, longest = plan.text, reading.table, reading.longest
        if reading.inside and not isinstance(error, ModgraftError):
            raise ModgraftError(
                f"{reading.host} does not run with tokens before its patches ({error!s:.150}): its "
                f"head may fold what it reads into a map. Implant a Prefix, which takes no place "
                f"among them, or a module at its layers"
            ) from error
        if text is None or table is None:
            raise
        length = text.shape[1]
        if longest is not None and length <= longest < plan.total:
            raise reading.no_room(longest, plan.total - length, length) from error
        known = text.dim() == 2 and bool(((text >= 0) & (text < table.num_embeddings)).all())
        if not (known and isinstance(error, IndexError)):
            raise
        raise ModgraftError(
            f"{reading.host} does not run with {plan.total - length} tokens before its text: "
            f"{error}. A label, or a position counted with the tokens, is out of range; or it "
            f"reads ids elsewhere than in its table of {table.num_embeddings} embeddings, and then "
            f"implant a Prefix, which takes no place in a text"
        ) from error


def _check_served(host: nn.Module, plan: Splice, entries: Sequence[Entry]) -> None:
    """Refuse a call in which no table was asked for the tokens' embeddings.

    Raises:
        ModgraftError: with the remedy.
    """
    relay = plan.relay
    made = any(
        not isinstance(e.module, TokenComposition) or e.module.words is None for e in entries
    )
    if made and isinstance(relay, NewIds) and not relay.served:
        names = ", ".join(repr(entry.name) for entry in entries)
        raise ModgraftError(
            f"{names} had no effect: this {type(host).__name__} does not look its ids up in the "
            f"table that its get_input_embeddings() gives; pass inputs_embeds="
        )


def _source(reading: Reading, state: State, entries: Sequence[Entry], call: Call) -> Source:
    """Return what gives, for a batch of so many examples, the tokens that go before each."""
    named = {entry.name: entry for entry in entries}

    def of_module(entry: Entry, batch: int, rows: Tensor | None) -> Tokens:
        module = entry.module
        assert isinstance(module, TokenComposition)  # noqa: S101
        source = module.side_source
        side = None if source is None else call.resolve(source, entry.name, batch, rows)
        embeddings, seen = module.tokens(batch if rows is None else len(rows), side)
        words = module.words
        words = None if words is None else words.expand(seen.shape)
        after = module.after(reading.first)
        return Tokens(entry.name, embeddings, seen, words, after, side is not None)

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
            if row is None:
                some.append((rows, []))
                continue
            with state.context.call(replace(call, composition=row)):  # words are looked up
                some.append((rows, of(row, batch, rows)))
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
    return replace(several[0], embeddings=mean, words=None, name="average")


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
    width, device, dtype = like.embeddings.shape[-1], like.embeddings.device, like.embeddings.dtype
    embeddings = like.embeddings.new_zeros(batch, most, width)
    seen = torch.zeros(batch, most, dtype=torch.bool, device=device)
    words = torch.full_like(seen, -1, dtype=torch.long)
    for rows, tokens in found:
        own = torch.cat([one.embeddings for one in tokens], 1)  # [g, k, d]
        count = own.shape[1]
        unseen = own.new_zeros(len(rows), most - count, width)
        embeddings = embeddings.index_copy(
            0, rows.to(device), torch.cat([own, unseen], 1).to(dtype)
        )
        seen[rows, :count] = torch.cat([one.seen for one in tokens], 1)
        start = 0
        for one in tokens:
            end = start + one.seen.shape[1]
            if one.words is not None:
                words[rows, start:end] = one.words
            start = end
    names = ", ".join(dict.fromkeys(own.name for _, tokens in found for own in tokens))
    return [Tokens(names, embeddings, seen, words, like.after, not bool(seen.all()))]
