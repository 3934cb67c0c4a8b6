"""Input modules at work: the tokens of those that act, put into a call of the host.

They act where the host is called, so that one change of the arguments does. A host that reads no
text takes them inside instead: in at its first sequence of tokens, out at its last.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from modgraft.computation.base import Computation, TokenComposition
from modgraft.core.architectures import base_path, family_of
from modgraft.core.context import Call, missing_side, switched
from modgraft.core.errors import CompositionError, ModgraftError
from modgraft.core.expression import Average, Chain, Concat, Expression, Name
from modgraft.core.per_example import Each
from modgraft.core.sites import Site
from modgraft.engine.inputs.splice import Source, Tokens, splice

if TYPE_CHECKING:
    from modgraft.engine.plan import Entry
    from modgraft.engine.run import State

T = TypeVar("T")


def inner_sites(site: Site) -> list[Site]:
    """Where tokens go in and out inside the host at ``site``, for one that reads no text."""
    family = family_of(site.module)
    if family is None or family.embedded is None:
        return []
    base = base_path(site.module)
    paths = [f"{base}.{path}" if base else path for path in family.embedded]
    return [Site(p, site.module.get_submodule(p), None, site.root) for p in paths]


def active_inputs(state: State, names: Sequence[str]) -> list[Entry]:
    """The token modules at a site among ``names``, in their order."""
    return [e for name in names for e in state.of(TokenComposition) if e.name == name]


def check_inputs(expression: Expression, inputs: Mapping[str, Computation]) -> None:
    """Refuse what vectors before an input cannot do: be added, scaled, or joined with effects.

    Args:
        expression: a composition.
        inputs: the input modules in it by name.

    Raises:
        CompositionError: with what can be done.
    """
    names = [n for n in expression.names() if n in inputs]
    match expression:
        case Each(rows):
            for row in rows:
                if row is not None:
                    check_inputs(row, inputs)
        case Name():
            return
        case Chain(parts) | Average(parts):
            others = [n for n in expression.names() if n not in inputs]
            if type(expression) is Average and names:
                kind = isinstance(inputs[names[0]], TokenComposition)
                others += [n for n in names if isinstance(inputs[n], TokenComposition) != kind]
            if type(expression) is Concat and others:
                raise CompositionError(
                    f"{expression}: concat puts tokens together before the input, and "
                    f"{others[0]!r} has none; write {' >> '.join(map(str, parts))}"
                )
            if type(expression) is Average and names and others:
                raise CompositionError(
                    f"{expression}: {names[0]!r} puts vectors before the input, where "
                    f"{others[0]!r} puts none, so there is no mean of both; average one kind, and "
                    f"stack them by >>"
                )
            if type(expression) is Average and names:
                for part in parts:
                    if not isinstance(part, Name | Average):
                        raise CompositionError(
                            f"{expression}: the mean is of single prompts or prefixes, which "
                            f"{str(part)!r} is not; write {part} >> average(…)"
                        )
            for part in parts:
                check_inputs(part, inputs)
        case _ if names:
            raise CompositionError(
                f"{names[0]!r} puts vectors before the input, which cannot be added or scaled in "
                f"{str(expression)!r}; they follow one another as in 'a >> b' or 'concat(a, b)', "
                f"and 'average(a, b)' is their mean"
            )


def fold(
    expression: Expression, one: Callable[[str], list[T]], mean: Callable[[list[T]], T]
) -> list[T]:
    """What the input modules of ``expression`` put there, in order.

    Args:
        expression: one that :func:`check_inputs` lets pass.
        one: what is put there under a name; nothing, for one that is no input module here.
        mean: of several.
    """
    if isinstance(expression, Name):
        return one(expression.name)
    found: list[T] = []
    if isinstance(expression, Average):
        for part in expression.parts:
            if made := fold(part, one, mean):
                found.append(_single(made, expression))
        return [mean(found)] if found else []
    if isinstance(expression, Chain):
        for part in expression.parts:
            found += fold(part, one, mean)
        return found
    for name in expression.names():  # a switch of compiled code, or nothing but effects
        found += one(name)
    return found


def _single(made: list[T], expression: Expression) -> T:
    if len(made) != 1:
        raise CompositionError(
            f"{expression}: the mean is of single prompts or prefixes, and one of its parts is "
            f"{len(made)} of them"
        )
    return made[0]


def call_with_tokens(
    host: nn.Module,
    state: State,
    call: Call,
    entries: Sequence[Entry],
    run: Callable[[tuple, dict[str, Any]], Any],
    args: tuple,
    kwargs: dict[str, Any],
) -> Any:
    """``run(args, kwargs)`` with the tokens of ``entries`` before the host's input.

    Raises:
        ModgraftError: for a part of a host that was called alone, or a call they do not fit.
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
    """``generate`` with the tokens of ``entries`` before the text; what it returns has none."""
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
    family = family_of(host)
    first = 0 if family is None else family.prompt_at

    def made(entry: Entry, batch: int, rows: Tensor | None) -> Tokens:
        module = entry.module
        assert isinstance(module, TokenComposition)  # noqa: S101
        side = None if module.side_source is None else call.side_input(module.side_source, batch)
        if side is None and module.side_source is not None:
            raise missing_side(entry.name, module.side_source)
        if side is not None and rows is not None:
            side, batch = side.picked(rows), len(rows)
        embeddings, seen = module.tokens(batch if rows is None else len(rows), side)
        return Tokens(entry.name, embeddings, seen, module.after(first), side is not None)

    named = {entry.name: entry for entry in entries}

    def tokens(batch: int) -> list[Tokens]:
        composition = call.composition
        if composition is None or switched(composition):
            return [made(entry, batch, None) for entry in entries]

        def of(expression: Expression, rows: Tensor | None) -> list[Tokens]:
            return fold(
                expression,
                lambda name: [made(named[name], batch, rows)] if name in named else [],
                _mean,
            )

        if not isinstance(composition, Each):
            return of(composition, None)
        times = max(1, batch // len(composition.rows))
        some = []
        for row, examples in composition.different.items():
            rows = torch.tensor([i * times + k for i in examples for k in range(times)])
            some.append((rows, [] if row is None else of(row, rows)))
        return _together(batch, some)

    return tokens


def _mean(several: list[Tokens]) -> Tokens:
    """The mean of tokens, one by one.

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


def _together(batch: int, some: list[tuple[Tensor, list[Tokens]]]) -> list[Tokens]:
    """Tokens that differ between examples as one for all: who has fewer does not see the rest."""
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
