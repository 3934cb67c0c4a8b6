"""One family of architectures: where a block is, its parts within it, and their roles."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from modgraft.core.parts import Part
from modgraft.core.patterns import joined


@dataclass(frozen=True)
class Family:
    """Models of one layout. Paths are relative: first to the base model, then to a block.

    In a path ``*`` is a layer's number and ``{a,b}`` is either; ``""`` is a part that they lack.

    Attributes:
        types: the ``config.model_type`` values it covers.
        block: a block, relative to the base model.
        attention: its self-attention, relative to a block.
        cross: its cross-attention, relative to a block.
        inner: the layer that attends within either, relative to it.
        query: the layer that makes queries, relative to ``attention``; so ``key``, ``value`` and
            ``output``.
        qkv: the one layer that makes queries, keys and values.
        parts: where one layer makes several of them, which part of it each is, by the config.
        feedforward: relative to a block; so ``up``, ``down``.
        experts: the layer that holds the weights of all experts, relative to a block.
        router: the weight that chooses among them.
        embedding: what embeds the input, relative to the base model; so ``encoder`` and
            ``decoder``, the layers whose output is an encoder's or a decoder's.
        more: further patterns of roles, or further roles, relative to a block.
        sense: what it reads, where that is no text: its roles are apart from those of a language
            model in one host, as ``"vision.query"``.
        one_input: whether query, key and value are called one after another with one input, in
            cross-attention key and value.
    """

    types: tuple[str, ...]
    block: str = "layers.*"
    attention: str = "self_attn"
    cross: str = ""
    inner: str = ""
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    output: str = "o_proj"
    qkv: str = ""
    parts: Callable[[Any], tuple[Part | None, Part, Part]] | None = None
    feedforward: str = "mlp"
    up: str = "mlp.{gate_proj,up_proj,gate_up_proj}"
    down: str = "mlp.down_proj"
    experts: str = ""
    router: str = ""
    embedding: str = "embed_tokens"
    encoder: str = ""
    decoder: str = ""
    more: Mapping[str, str] = field(default_factory=dict)
    sense: str = ""
    one_input: bool = True

    def roles(self, config: Any) -> dict[str, tuple[str, ...]]:
        """Return role → patterns, relative to the base model, of a model with this config."""
        attends = [path for path in (self.attention, self.cross) if path]
        parts = (None, None, None) if self.parts is None else self.parts(config)
        makes = {
            "query": f"{self.qkv or self.query}{parts[0] or ''}",
            "key": f"{self.qkv or self.key}{parts[1] or ''}",
            "value": f"{self.qkv or self.value}{parts[2] or ''}",
            "output": self.output,
        }
        found = {role: [f"{path}.{layer}" for path in attends] for role, layer in makes.items()}
        found |= {
            "attention": attends,
            "self_attention": [joined(self.attention, self.inner)] if self.attention else [],
            "cross_attention": [joined(self.cross, self.inner)] if self.cross else [],
            "feedforward": [self.feedforward],
            "up": [self.up],
            "down": [self.down],
        }
        if self.experts:
            up, down = f"{self.experts}.gate_up_proj", f"{self.experts}.down_proj"
            found["up"].append(up)
            found["down"].append(down)
            found |= {"experts": [self.experts], "experts.up": [up], "experts.down": [down]}
            found["router"] = [self.router]
        for role, path in self.more.items():
            found.setdefault(role, []).append(path)
        roles = {r: [f"{self.block}.{path}" for path in some if path] for r, some in found.items()}
        last = {"encoder.output": self.encoder, "decoder.output": self.decoder}
        if not self.decoder and getattr(config, "is_decoder", False):  # it has an encoder's layers
            last = {"decoder.output": self.encoder}
        whole = {"block": self.block, "embedding": self.embedding, **last}
        roles |= {role: [path] for role, path in whole.items()}
        return {role: tuple(paths) for role, paths in roles.items() if any(paths)}

    def same_input(self) -> list[tuple[str, ...]]:
        """Return patterns of layers; those of one group in one parent read the same input."""
        groups = [(f"{self.block}.{self.up}",)] if self.attention else []
        if self.one_input and self.parts is None:
            own, across = [self.query, self.key, self.value], [self.key, self.value]
            kinds = [(self.attention, own), (self.cross, across)]
            groups += [tuple(f"{self.block}.{a}.{n}" for n in names) for a, names in kinds if a]
        return groups
