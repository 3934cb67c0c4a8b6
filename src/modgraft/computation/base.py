"""The computation function f'(x; θ, φ): what a module does at a site, apart from where.

A computation is written once, by hyper-parameters alone (``LoRA(rank=8)``); implanting makes a
fresh copy for each site and calls its ``build``. It never sees the host's tree.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Self

from torch import Tensor, nn

from modgraft.core.config import Configured
from modgraft.core.context import Side
from modgraft.core.embeddings import token_width
from modgraft.core.errors import SiteError
from modgraft.core.layers import check_features, check_weight, linear_map
from modgraft.core.sites import Site


class Computation(Configured):
    """One way for a module to change what a site computes.

    A subclass declares its hyper-parameters as annotated fields: the constructor's signature is
    the configuration, and what is saved is derived from it.
    """

    identity: ClassVar[bool] = False
    """Whether the method leaves the host's output exactly equal at birth."""

    by_row: ClassVar[bool] = False
    """Whether it computes as written where each example of ``[g, n, d]`` has tensors of its own: a
    vector stands as ``[g, 1, d]``, and an ``nn.Linear`` of each is called and not looked into."""

    default_at: ClassVar[str | None] = None
    """The selection of sites that is meant when none is given; None: one has to be given."""

    @property
    def side_source(self) -> str | None:
        """The name of the side input it reads, None if it reads none."""
        return None

    @property
    def by_token(self) -> bool:
        """Whether what it does to one token depends on that token alone: tokens can be routed."""
        return self.side_source is None

    @property
    def can_batch(self) -> bool:
        """Whether many of one shape run as one over stacked tensors, one for each example of a
        batch, and each still costs what it is: a dense Δ for each would be a weight for each."""
        return False

    @property
    def members(self) -> tuple[str, ...]:
        """The names of other modules that it is over; most are over none."""
        return ()

    @property
    def inner(self) -> Computation:
        """The computation that acts at the sites: itself, or what a method over others wraps."""
        return self

    def task_names(self, name: str) -> list[str]:
        """What compositions call it under ``name``: that, or ``"name['task']"`` for each task."""
        return [name]

    def per_task(self) -> list[Computation]:
        """Of a built place: what acts there under each of the :meth:`named`."""
        return [self]

    def at(self, site: Site) -> Self:
        """A fresh copy built for ``site``, on its device and in its floating type.

        Raises:
            ModgraftError: where the method is not defined at such a site.
        """
        if site.residual and isinstance(site.module, nn.MultiheadAttention):
            raise SiteError(
                f"{type(self).__name__} at {site.label}: an nn.MultiheadAttention takes query, key "
                f"and value, and sums no residual; leave out [residual]"
            )
        if site.residual and not isinstance(self, FunctionComposition):
            raise SiteError(
                f"{type(self).__name__} at {site.label}: only a function of activations, such as "
                f"Adapter, can act in a residual; leave out [residual]"
            )
        built = type(self)(**self.config())
        built.build(site)
        like = next((p for p in site.module.parameters() if p.is_floating_point()), None)
        if like is None and site.root is not None:
            like = next((p for p in site.root.parameters() if p.is_floating_point()), None)
        return built if like is None else built.to(device=like.device, dtype=like.dtype)

    @abstractmethod
    def build(self, site: Site) -> None:
        """Make the parameters for ``site``.

        Raises:
            ModgraftError: where the method is not defined at such a site.
        """

    def build_all(self, sites: Sequence[Site]) -> list[Computation]:
        """The module built over all its sites: a place for each."""
        places: list[Computation] = [self.at(site) for site in sites]
        for place in places[1:]:
            place.share_with(places[0])
        return places

    def share_with(self, first: Computation) -> None:
        """Use the parameters of ``first``, built for the module's first site, where the method
        shares some over all its sites; ``first`` alone owns them. Most share none.
        """

    def resize_to(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the sizes that stored ``tensors`` (by name) have, where training decided them.

        Most methods' sizes follow from the configuration and the site, and nothing is done.

        Raises:
            ModgraftError: where they are not tensors of this method at this site.
        """


class ParameterComposition(Computation):
    """f'(x) = f(x; θ + Δ(θ)): the module is a change of the site's weight."""

    def at(self, site: Site) -> Self:  # noqa: D102
        check_weight(type(self).__name__, site)
        return super().at(site)

    @abstractmethod
    def delta(self, weight: Tensor) -> Tensor:
        """Δ for ``weight`` ``[out, in]`` (an embedding: ``[entries, width]``), of its shape."""

    def bias_delta(self, bias: Tensor | None) -> Tensor | None:
        """The change ``[out]`` of the site's ``bias`` (None: it has none, or the change does not
        depend on it), None where there is no change."""
        return None

    @property
    def is_weight_change(self) -> bool:
        """Whether it is f at θ + Δ now; False while it treats the input in a way of its own."""
        return True

    def factors(self) -> tuple[Tensor, Tensor, float] | None:
        """B ``[out, r]``, A ``[r, in]`` and s with Δ = s·BA for a Δ of low rank, else None."""
        return None

    def fused_forward(self, f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor | None:
        """f(x; θ + Δ) by the layer's own f, where that is all it takes; None where it is not."""
        return None

    def effect(
        self, x: Tensor, layer: nn.Module, weight: Tensor, y: Tensor | None = None
    ) -> Tensor:
        """f(x; θ + Δ) − f(x; θ): for a layer linear in its weight, f at Δ and the bias's Δ.

        Args:
            x: ``[B, …, in]``, the layer's input.
            layer: the site.
            weight: its own, or the rows of one part of it.
            y: f(x; θ) ``[B, …, out]``, where it is known.
        """
        return linear_map(layer, x, self.delta(weight), self.bias_delta(None))


class FunctionComposition(Computation):
    """f'(x) = g(f(x; θ), x; φ): the module is a function of the site's output (and input)."""

    def at(self, site: Site) -> Self:  # noqa: D102
        check_features(type(self).__name__, site)
        if self.side_source is not None and site.time_first:
            raise SiteError(
                f"{type(self).__name__} at {site.label or 'the host itself'}: this "
                f"{type(site.module).__name__} puts out [n, B, d], where an example's side input "
                f"{self.side_source!r} cannot be told from a step's; make it with batch_first=True"
            )
        return super().at(site)

    @property
    def by_token(self) -> bool:
        """Whether what it does to one token depends on that token alone: tokens can be routed."""
        return self.side_source is None

    @property
    def can_batch(self) -> bool:  # noqa: D102
        return self.side_source is None

    @abstractmethod
    def forward(self, y: Tensor, x: Tensor | None, side: Side | None) -> Tensor:
        """The new output.

        Args:
            y: ``[B, …, d]``, the site's output (the part's, for a part of a fused projection).
            x: the site's input, None where it has no tensor input.
            side: the side input it needs, with the batch of ``y``.
        """


class InputComposition(Computation):
    """f'(x) = f([φ, x]): the module puts vectors before what the host reads.

    What one module puts there can follow another's (``a >> b``) and cannot be added or scaled.
    """

    @property
    def by_token(self) -> bool:  # noqa: D102
        return False


class TokenComposition(InputComposition):
    """f([φ, x]) at the first layer: tokens before the host's input."""

    default_at: ClassVar[str | None] = ""

    def at(self, site: Site) -> Self:
        """A fresh copy built for the host at ``site``.

        Raises:
            ModgraftError: for a host that reads no tokens.
        """
        token_width(site.module)
        return super().at(site)

    @abstractmethod
    def tokens(self, batch: int, side: Side | None) -> tuple[Tensor, Tensor]:
        """``[batch, k, d]`` embeddings and ``[batch, k]`` bool, True where a token is seen."""

    def after(self, first: int) -> int:
        """How many of the input's positions stay before the tokens; the host keeps ``first``
        there, 1 where it reads a class token."""
        return first


class KeyValueComposition(InputComposition):
    """softmax(Q [P_k; K]ᵀ) [P_v; V] at an attention layer: keys and values before its own."""

    default_at: ClassVar[str | None] = "self_attention"

    @abstractmethod
    def keys_values(self, batch: int, side: Side | None) -> tuple[Tensor, Tensor]:
        """P_k and P_v, each ``[batch, kv_heads, k, head_dim]``; every query sees them."""
