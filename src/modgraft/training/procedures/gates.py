"""Prepare zero-shot routers: train a gate for each module, or average its examples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from modgraft.core.errors import ModgraftError, UnknownNameError
from modgraft.routing.mixture import Mixture
from modgraft.routing.zero_shot import Phatgoose, Similarity
from modgraft.training.forward import own_modes
from modgraft.training.history import History
from modgraft.training.host_like import HostLike
from modgraft.training.stream import Batch, to_device


def train_gates(
    host: HostLike, mixture: str, loaders: Mapping[str, Iterable[Batch]], **settings: Any
) -> dict[str, History]:
    """Train the gate of each module by itself, everything else frozen.

    h = y + σ(⟨v_j, x⟩) (h_j − y) at every site of module j, and the host's own loss on the examples
    that j was trained on (Muqeeth et al. 2024, arXiv:2402.05859). A gate does not depend on the
    other modules, so the gates of a mixture can be trained at different times: ``loaders`` may name
    some of the modules.

    Args:
        host: where everything is implanted.
        mixture: the name of a ``Mixture`` whose router is ``Phatgoose``.
        loaders: the training batches of each module, by its name.
        **settings: of :func:`modgraft.training.fit.fit`; the defaults are the paper's 100 steps
            with lr 5e-3 and no weight decay.

    Returns:
        The record of each training.

    Raises:
        ModgraftError: for a module without that router, or a name that is not in the mixture.
    """
    places = _places(host, mixture, Phatgoose, loaders)
    settings = {"lr": 5e-3, "weight_decay": 0.0, **settings}
    if "epochs" not in settings:
        settings.setdefault("steps", 100)
    histories = {}
    for name, loader in loaders.items():
        j = host[mixture].method.over.index(name)  # type: ignore[union-attr]
        with host.training_only(mixture), host.using(mixture), _alone(places, j):
            for place in places:
                for i, gate in enumerate(place.route.gates):  # type: ignore[union-attr]
                    gate.requires_grad_(i == j)
            histories[name] = host.fit(loader, **{"label": f"gate of {name}", **settings})
    return histories


def embed_tasks(
    host: HostLike,
    mixture: str,
    loaders: Mapping[str, Iterable[Batch]],
    *,
    ignore: Sequence[str] = ("ids",),
) -> None:
    """Set each module's embedding to the mean query of its examples, in one pass over them.

    Args:
        host: where everything is implanted.
        mixture: the name of a ``Mixture`` whose router is ``Similarity``.
        loaders: the training batches of each module, by its name; those of a module that joins the
            mixture later can be given later.
        ignore: names in a batch that the host's ``forward`` does not take.

    Raises:
        ModgraftError: for a module without that router, a name that is not in the mixture, or a
            loader without examples.
    """
    places = _places(host, mixture, Similarity, loaders)
    device = next(host.parameters()).device
    with own_modes(host.modules()):
        host.eval()
        for name, loader in loaders.items():
            j = host[mixture].method.over.index(name)  # type: ignore[union-attr]
            for place in places:
                place.route.total.zero_()
                place.route.count = 0
            with torch.no_grad(), _alone(places, j), host.using(mixture):
                for batch in loader:
                    given = {k: v for k, v in batch.items() if k not in ignore}
                    host(**to_device(given, device))
            for place in places:
                route = place.route
                if route.count == 0:
                    raise ModgraftError(f"embed_tasks: the loader of {name!r} has no examples")
                embeddings = route.get_buffer("embeddings")
                embeddings[j] = (route.total / route.count).to(embeddings)


def _places(
    host: HostLike, mixture: str, kind: type[Phatgoose | Similarity], loaders: Mapping[str, Any]
) -> list[Any]:
    method = host[mixture].method
    if not isinstance(method, Mixture) or not isinstance(method.router, kind):
        raise ModgraftError(
            f"{mixture!r} is {method}: what is made here belongs to a "
            f"Mixture(…, router={kind.__name__}())"
        )
    if unknown := [name for name in loaders if name not in method.over]:
        raise UnknownNameError(
            f"{unknown[0]!r} is none of the modules of {mixture!r}: {', '.join(method.over)}"
        )
    places: list[Any] = list(host[mixture].places)
    return places if method.level == "token" else places[:1]  # one choice for the whole network


@contextmanager
def _alone(places: Sequence[Any], j: int) -> Iterator[None]:
    """Let module ``j`` act alone and its part of the router learn; its use is not counted."""
    for place in places:
        place.route.only_module = j
    try:
        yield
    finally:
        for place in places:
            place.route.only_module = None
            place.counter.reset()
