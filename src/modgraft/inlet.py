"""Input modules at work: the tokens of those that act, put into a call of the host.

They act where the host is called, so that one change of the arguments does. A host that reads no
text takes them inside instead: in at its first sequence of tokens, out at its last.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from modgraft.anatomy import base_path, family_of
from modgraft.computation.base import TokenComposition
from modgraft.context import Call
from modgraft.errors import ModgraftError, SideError
from modgraft.sites import Site
from modgraft.splice import Source, Tokens, splice

if TYPE_CHECKING:
    from modgraft.running import Entry, State


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


def missing_side(name: str, source: str) -> SideError:
    """The error of a call without a side input that an active module needs."""
    return SideError(
        f"module {name!r} needs the side input {source!r} and this call has none; pass "
        f"host(..., side={{{source!r}: mg.Side(tensor, mask)}}), with an all-False mask row for an "
        f"example without one, or leave the module out with host.use(None)"
    )


def _source(host: nn.Module, entries: Sequence[Entry], call: Call) -> Source:
    family = family_of(host)
    first = 0 if family is None else family.prompt_at

    def tokens(batch: int) -> list[Tokens]:
        made = []
        for entry in entries:
            module = entry.module
            assert isinstance(module, TokenComposition)  # noqa: S101
            side = None if module.needs is None else call.side_input(module.needs, batch)
            if side is None and module.needs is not None:
                raise missing_side(entry.name, module.needs)
            embeddings, seen = module.tokens(batch, side)
            made.append(Tokens(entry.name, embeddings, seen, module.after(first), side is not None))
        return made

    return tokens


def _named(host: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    if not args:
        return kwargs
    names = list(inspect.signature(type(host).forward).parameters)[1:]  # the first is self
    return {**dict(zip(names, args, strict=False)), **kwargs}
