"""Trainable tokens as PEFT has them, alone or beside a LoRA, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from modgraft.computation.trainable_tokens import TrainableTokens
from modgraft.core.errors import ModgraftError
from modgraft.core.layers import stored
from modgraft.core.sites import Site
from modgraft.store.formats.heads import asked
from modgraft.store.formats.peft.folder import (
    PREFIX,
    Folder,
    Group,
    Piece,
    Written,
    check_whole,
)
from modgraft.store.formats.peft.options import TokensOptions


def read(folder: Folder, said: TokensOptions) -> list[Group]:
    """Return trainable tokens."""
    end = ".trainable_tokens_delta"
    return _tokens(folder, dict.fromkeys(folder.sites(end), said.token_indices), end)


def read_beside(folder: Folder, indices: list[int] | dict[str, list[int]]) -> list[Group]:
    """Return the trainable tokens of a LoRA."""
    end = ".token_adapter.trainable_tokens_delta"
    by_path: dict[str, list[int]] = {}
    for path in folder.sites(end):
        by_name = [ids for name, ids in _items(indices) if path.endswith(name)]
        if not by_name:
            folder.refuse(f"trainable_token_indices says nothing of {path}, which has some")
        by_path[path] = by_name[0]
    if not by_path:
        folder.refuse("trainable_token_indices is set, and the file has no rows of tokens")
    return _tokens(folder, by_path, end)


def _items(indices: list[int] | dict[str, list[int]]) -> Iterator[tuple[str, list[int]]]:
    return iter(indices.items() if isinstance(indices, dict) else [("", indices)])


def _tokens(folder: Folder, by_path: Mapping[str, list[int]], end: str) -> list[Group]:
    """Return a group for each choice of tokens; tied tables hold one set of rows."""
    firsts: dict[int, str] = {}
    groups: dict[tuple[int, ...], tuple[list[str], list[Piece]]] = {}
    for path, ids in by_path.items():
        layer, key = folder.modules[path], f"{PREFIX}{path}{end}"
        if not isinstance(layer, nn.Embedding | nn.Linear):
            folder.refuse(f"trainable tokens at {path}, a {type(layer).__name__}")
        width = layer.weight.shape[1]
        folder.take(key, len(ids), width)
        first = firsts.setdefault(id(stored(layer, None)), key)
        sites, pieces = groups.setdefault(tuple(ids), ([], []))
        if folder.label(path) not in sites:
            sites.append(folder.label(path))
        if first == key:
            name = f"{folder.label(path)}:rows"
            pieces.append(
                Piece(name, (len(ids), width), lambda key=key, own=path: _rows(folder, key, end))
            )
    for sites, _ in groups.values():
        sites += [label for label in _tied(folder.model, sites) if label not in sites]
        for label in sites:
            if why := _loses_bias(folder.modules[label]):
                folder.refuse(
                    f"trainable tokens at {label}: {why}; a host without it computes what PEFT "
                    f"does: model.{label}.bias = None, before it is a host"
                )
    order = list(folder.modules).index
    return [
        Group(TrainableTokens(ids=ids), sorted(sites, key=order), pieces, suffix="_tokens")
        for ids, (sites, pieces) in groups.items()
    ]


def _tied(model: nn.Module, sites: Sequence[str]) -> list[str]:
    """Return the other layers that PEFT changes with the input's embedding, as tied to it."""
    table, config = asked(model, "get_input_embeddings"), getattr(model, "config", None)
    modules = dict(model.named_modules())
    if not getattr(config, "tie_word_embeddings", False) or table is None:
        return []
    if not any(modules[site] is table for site in sites):
        return []
    kinds = (nn.Embedding, nn.Linear)
    own = stored(table, None)
    return [p for p, m in modules.items() if isinstance(m, kinds) and stored(m, None) is own]


def _loses_bias(layer: nn.Module) -> str | None:
    """Say why PEFT's trainable tokens compute something else at a layer, None where they do not."""
    if getattr(layer, "bias", None) is None:
        return None
    return (
        "PEFT leaves out the bias of such a layer (huggingface/peft#3649), so its result is another"
    )


def _rows(folder: Folder, key: str, end: str) -> Tensor:
    """Return rows, which all tables of one weight must have alike."""
    found = folder.tensor(key)
    own = stored(folder.modules[key.removeprefix(PREFIX).removesuffix(end)], None)
    for path, module in folder.modules.items():
        other = f"{PREFIX}{path}{end}"
        again = other in folder.entries and stored(module, None) is own
        if again and not torch.equal(folder.tensor(other), found):
            folder.refuse(f"{key} and {other} are rows of one weight here, and differ")
    return found


def write(
    name: str,
    method: TrainableTokens,
    sites: Sequence[tuple[Site, TrainableTokens]],
    model: nn.Module,
    beside: bool,
) -> Written:
    """Return trainable tokens as PEFT has them, alone or beside a LoRA."""
    for site, _ in sites:
        check_whole(name, "trainable tokens", site, (nn.Embedding, nn.Linear))
    own = [(site, place) for site, place in sites if "rows" in place._parameters]
    here = {site.path for site, _ in sites}
    there = {site.path for site, _ in own} | set(_tied(model, [site.path for site, _ in own]))
    if here != there:
        raise ModgraftError(
            f"{name!r} is at {', '.join(sorted(here))}, and PEFT would change "
            f"{', '.join(sorted(there))}, with what is tied to the embedding of the input; implant "
            f"it there"
        )
    for site, _ in sites:
        if why := _loses_bias(site.module):
            raise ModgraftError(
                f"{name!r} is at {site.label}: {why}; save it without format='peft'"
            )
    kept = own if beside else sites
    end = f"{'.token_adapter' if beside else ''}.trainable_tokens_delta"
    tensors: dict[str, Tensor] = {f"{site.path}{end}": place.rows for site, place in kept}
    paths, ids = [site.path for site, _ in own], list(method.ids)
    if beside:
        return Written(tensors, {"trainable_token_indices": dict.fromkeys(paths, ids)}, [])
    return Written(tensors, {"token_indices": ids}, paths)
