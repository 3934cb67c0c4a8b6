"""The computation function f'(x; θ, φ): what a module does at a site.

A computation is given by its hyper-parameters alone (``LoRA(rank=8)``). Implanting makes a copy
for each selected site and calls the copy's ``build``; the method never sees the host's tree.

To add a method, subclass the kind that fits and override its abstract hooks:

- :class:`ParameterComposition`, a change of the layer's weight: ``build`` and ``delta``;
- :class:`FunctionComposition`, a function of the layer's output: ``build`` and ``forward``;
- :class:`TokenComposition`, tokens before the host's input: ``build`` and ``tokens``;
- :class:`KeyValueComposition`, keys and values before an attention layer's: ``build`` and
  ``keys_values``;
- :class:`Wrapper`, a method over any other method: ``build_all``.

All other hooks have a default; each says in which case to override it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from modgraft.computation._checks import check_features, check_weight
from modgraft.core.config import Configured
from modgraft.core.embeddings import token_width
from modgraft.core.errors import ModgraftError, SiteError
from modgraft.core.layers import linear_map
from modgraft.core.precision import parameter_type, wide
from modgraft.core.side import Side
from modgraft.core.sites import Site
from modgraft.core.tensors import device_of


class Computation(Configured):
    """One way for a module to change what a site computes.

    A subclass declares its hyper-parameters as annotated fields: the constructor's signature is
    the configuration, and the saved configuration is derived from it.
    """

    renamed: ClassVar[Mapping[str, str]] = {
        "needs": "side_source", "acts": "unwrapped", "acting": "per_task", "named": "task_names",
        "across": "build_all", "tie": "share_with", "expect": "resize_to",
        "alone": "fused_forward", "in_weights": "is_weight_change", "stacks": "can_batch",
    }  # fmt: skip

    # -- what the method declares about itself

    identity: ClassVar[bool] = False
    """Whether a newly built module leaves the host's output exactly as it was."""

    by_row: ClassVar[bool] = False
    """Whether ``forward`` (or ``fused_forward``) also works with different parameters for each
    example of ``[g, n, d]``: a vector parameter is then ``[g, 1, d]``, and an ``nn.Linear`` child
    is replaced by a batched one, which may be called but has no weight to read."""

    in_residual: ClassVar[bool] = False
    """Whether it acts in a layer's residual too: a function of the output, or of several such."""

    default_at: ClassVar[str | None] = None
    """The selection of sites used when ``at=`` is left out; None makes ``at=`` required."""

    @property
    def side_source(self) -> str | None:
        """Return the name of the side input that the method reads, None if it reads none."""
        return None

    @property
    def by_token(self) -> bool:
        """Return whether each token's result depends on that token alone.

        Only such modules can be routed token by token.
        """
        return self.side_source is None

    @property
    def can_batch(self) -> bool:
        """Return whether several modules of equal shape can run as one, on stacked parameters.

        Leave it False where that would make a dense Δ for every example of the batch.
        """
        return False

    # -- what is built

    @abstractmethod
    def build(self, site: Site) -> None:
        """Create the parameters for ``site``.

        Raises:
            ModgraftError: if the method is not defined at such a site.
        """

    def at(self, site: Site) -> Self:
        """Return a copy built for ``site``, on its device and in its floating type.

        Beside half precision that is float32, see :mod:`modgraft.core.precision`. Override it to
        refuse a site before anything is built.

        Raises:
            ModgraftError: if the method is not defined at such a site.
        """
        if site.residual and isinstance(site.module, nn.MultiheadAttention):
            raise SiteError(
                f"{type(self).__name__} at {site.label}: an nn.MultiheadAttention takes query, key "
                f"and value, and sums no residual; leave out [residual]"
            )
        if site.residual and not self.in_residual:
            raise SiteError(
                f"{type(self).__name__} at {site.label}: only a function of activations, such as "
                f"Adapter, can act in a residual; leave out [residual]"
            )
        built = type(self)(**self.config())
        built.build(site)
        if hidden := [name for name in built._modules if hasattr(type(built), name)]:
            raise ModgraftError(
                f"{type(self).__name__}.build: self.{hidden[0]} is an attribute of every module, "
                f"which a child of this name cannot replace; call the child otherwise"
            )
        like = next((p for p in site.module.parameters() if p.is_floating_point()), None)
        if like is None and site.root is not None:
            like = next((p for p in site.root.parameters() if p.is_floating_point()), None)
        if like is None:
            return built
        device = device_of(site.module) if like.is_meta else like.device
        return built.to(device=device, dtype=parameter_type(like.dtype))

    def build_all(self, sites: Sequence[Site]) -> list[Computation]:
        """Return the module built for all its sites, one computation for each.

        Override it where one site cannot be built without the others.
        """
        places: list[Computation] = [self.at(site) for site in sites]
        for place in places[1:]:
            place.share_with(places[0])
        return places

    def share_with(self, first: Computation) -> None:
        """Read the parameters that all sites share from ``first``, built for the first site.

        ``first`` alone holds and saves them. Override it where the method shares any.
        """

    def resize_to(self, tensors: Mapping[str, Tensor]) -> None:
        """Give the parameters the sizes of the stored ``tensors`` (by name) before they are loaded.

        Override it where training decides a size; elsewhere sizes follow from configuration and
        site.

        Raises:
            ModgraftError: if they are not tensors of this method at this site.
        """

    # -- what a method over other modules, or with several tasks, declares too

    @property
    def members(self) -> tuple[str, ...]:
        """Return the names of the host's modules that this one combines; most combine none."""
        return ()

    @property
    def unwrapped(self) -> Computation:
        """Return the computation that acts at the sites: itself, or the one that it wraps."""
        return self

    def task_names(self, name: str) -> list[str]:
        """Return the names that compositions use: ``name``, or ``"name['task']"`` for each task."""
        return [name]

    def per_task(self) -> list[Computation]:
        """Return what acts at this site under each name of :meth:`task_names`, in their order."""
        return [self]


class _Made:
    """An attribute that is made, empty, when it is asked for."""

    def __init__(self, name: str, kind: type) -> None:
        self.name, self._kind = name, kind

    def __get__(self, module: nn.Module | None, owner: type) -> Any:
        return self if module is None else module.__dict__.setdefault(self.name, self._kind())


_HOOKS = [
    _Made(name, type(value))
    for name, value in vars(nn.Module()).items()
    if isinstance(value, OrderedDict | set)
]


class ParameterComposition(Computation):
    """f'(x) = f(x; θ + Δ(θ)): the module is a change of the site's weight."""

    experts: ClassVar[bool] = False
    """Whether it also changes the weights of experts, a stack of matrices ``[E, out, in]``."""

    def at(self, site: Site) -> Self:
        """Return a copy built for ``site``; refuse a site without a weight matrix."""
        check_weight(type(self).__name__, site, self.experts)
        built = super().at(site)
        for each in _HOOKS:  # 1.6 KB at a site, and a thousand modules have forty thousand sites
            if not built.__dict__[each.name]:
                del built.__dict__[each.name]
        return built

    @abstractmethod
    def delta(self, weight: Tensor) -> Tensor:
        """Return Δ for ``weight`` ``[out, in]`` (an embedding's: ``[entries, width]``).

        A weight in half precision is given in float32.
        """

    def bias_delta(self, bias: Tensor | None) -> Tensor | None:
        """Return the change ``[out]`` of the layer's bias, None if there is no change.

        Args:
            bias: the layer's ``[out]``; None if it has none, or if the caller asks only for a
                change that does not depend on it.
        """
        return None

    @property
    def is_weight_change(self) -> bool:
        """Return whether the module now computes f(x; θ + Δ) exactly.

        It does not while it also changes the input, as dropout on a branch does while training.
        """
        return True

    def factors(self) -> tuple[Tensor, Tensor, float] | None:
        """Return B ``[out, r]``, A ``[r, in]`` and s with Δ = s·BA; None if Δ has no low rank."""
        return None

    def fused_forward(self, f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor | None:
        """Return f(x; θ + Δ) from one call of the layer's own ``f``, None if one is not enough."""
        return None

    def effect(
        self, x: Tensor, layer: nn.Module, weight: Tensor, y: Tensor | None = None
    ) -> Tensor:
        """Return f(x; θ + Δ) − f(x; θ).

        The default applies Δ to ``x``, since f is linear in its weight; override it where the same
        can be had without a dense Δ.

        Args:
            x: ``[B, …, in]``, the layer's input.
            layer: the layer that is changed.
            weight: the layer's weight, or the rows of one part of a fused projection.
            y: f(x; θ) ``[B, …, out]`` if it has been computed already.
        """
        return linear_map(layer, x, self.delta(wide(weight)), self.bias_delta(None))


for _each in _HOOKS:
    setattr(ParameterComposition, _each.name, _each)


class FunctionComposition(Computation):
    """f'(x) = g(f(x; θ), x; φ): the module is a function of the site's output (and input)."""

    in_residual: ClassVar[bool] = True

    def at(self, site: Site) -> Self:
        """Return a copy built for ``site``; refuse a site whose output has no feature axis."""
        check_features(type(self).__name__, site)
        return super().at(site)

    @property
    def can_batch(self) -> bool:
        """Return whether several modules of equal shape can run as one, on stacked parameters."""
        return self.side_source is None

    @abstractmethod
    def forward(self, y: Tensor, x: Tensor | None, side: Side | None) -> Tensor:
        """Return the new output, of the shape of ``y``.

        Args:
            y: ``[B, …, d]``, the layer's output, or one part of a fused projection's.
            x: the layer's first tensor input, None if it has none.
            side: the side input named by ``side_source``, of the batch of ``y``; None if the method
                reads none.
        """


class InputComposition(Computation):
    """f'(x) = f([φ, x]): the module puts vectors before what the host reads.

    The vectors of several modules can follow each other (``a >> b``) but not be added or scaled.
    """

    @property
    def by_token(self) -> bool:
        """Return False: every later token attends to the vectors."""
        return False


class TokenComposition(InputComposition):
    """f([φ, x]) at the first layer: tokens before the host's input."""

    default_at: ClassVar[str | None] = ""

    at_start = False  # not annotated, so that it is no field of every subclass
    """Whether the tokens stand before a class token too; a field where that can be chosen."""

    def at(self, site: Site) -> Self:
        """Return a copy built for the host at ``site``.

        Raises:
            ModgraftError: if the host reads no tokens, or is inside a wrapper.
        """
        if site.path:
            raise SiteError(
                f"{type(self).__name__} at {site.path}: its tokens go before the input of the "
                f"whole host, of which that is a part; of a compiled model, say mg.Host(model), "
                f"and then torch.compile(host)"
            )
        token_width(site.module)
        return super().at(site)

    @abstractmethod
    def tokens(self, batch: int, side: Side | None) -> tuple[Tensor, Tensor]:
        """Return ``[batch, k, d]`` embeddings and a ``[batch, k]`` bool mask, False at padding."""

    @property
    def words(self) -> Tensor | None:
        """The tokens' ids ``[k]``, where they are words of the host; None: they are none."""
        return None

    def after(self, first: int) -> int:
        """Return how many of the input's positions stay before the tokens.

        Args:
            first: how many the host expects at the start: 1 if it reads a class token there.
        """
        return 0 if self.at_start else first


class KeyValueComposition(InputComposition):
    """softmax(Q [P_k; K]ᵀ) [P_v; V]: keys and values before those of an attention layer."""

    default_at: ClassVar[str | None] = "self_attention"

    @property
    def positions(self) -> int:
        """Return how many positions they take up before the text's; most take up none."""
        return 0

    @abstractmethod
    def keys_values(self, batch: int, side: Side | None) -> tuple[Tensor, Tensor]:
        """Return P_k and P_v, each ``[batch, kv_heads, k, head_dim]``; every query sees them."""


class Wrapper(Computation):
    """A method over any other method: it decides where the parameters of ``module`` come from."""

    module: Computation

    def __post_init__(self) -> None:
        if not isinstance(self.module, Computation):
            raise ModgraftError(
                f"{type(self).__name__}({self.module!r}): it takes a computation by its "
                f"hyper-parameters, as {type(self).__name__}(mg.LoRA(rank=8), …)"
            )

    @property
    def identity(self) -> bool:  # type: ignore[override]
        """Return whether the wrapped method, newly built, leaves the host's output as it was."""
        return self.module.identity

    @property
    def side_source(self) -> str | None:
        """Return the side input that the wrapped method reads."""
        return self.module.side_source

    @property
    def unwrapped(self) -> Computation:
        """Return the wrapped method, out of all its wrappers."""
        return self.module.unwrapped

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"
