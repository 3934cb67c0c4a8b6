"""Whether a host is the one that modules were trained in, and what of it is another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from modgraft.core.errors import CheckpointError, warn
from modgraft.store.fingerprint import (
    are_of_values,
    changed,
    differences,
    is_in_another_precision,
)
from modgraft.store.stored import Stored
from modgraft.store.within import INNER, SKETCHES, beside_within, placed, sketches_of
from modgraft.training.host_like import HostLike


def checked(
    host: HostLike, modules: Stored, strict: bool, told: bool = False
) -> tuple[Stored, dict[str, Any] | None]:
    """Refuse a host that the modules were not trained in, or warn of it.

    What other modules have brought of it, such as a head, counts as what it replaced too, so that
    the order in which modules are loaded does not matter.

    Args:
        host: the host.
        modules: the modules.
        strict: whether its weights must be the same, and not its architecture alone. A host that
            differs by more than its precision is warned of otherwise.
        told: whether that has been said already.

    Returns:
        The modules, named as this host names its layers where it has their model at another path
        (:func:`placed`), and the fingerprint of the host they were trained in, where that is
        another one.

    Raises:
        CheckpointError: with what differs.
    """
    if not modules.card.host:  # another tool's, which says nothing of it
        return modules, None
    there, model, beside, differs = _compared(host, modules)
    if not are_of_values(differs) and not modules.within:
        modules = placed(modules, host.model)
        there, model, beside, differs = _compared(host, modules)
    if not differs:
        return modules, None
    of_values = are_of_values(differs)
    if of_values and any(implant.replaced for implant in host._implants.values()):
        with host._implants.taken_back_for_now(host.model):
            if not differences(model, there, beside):
                return modules, None
    rounded = is_in_another_precision(model, there, differs, beside)
    if of_values and not strict:
        if not told and not rounded:
            warn(_another(modules, model, differs))
        known = {key: said for key, said in there.items() if key not in (SKETCHES, INNER)}
        return modules, known
    other = "this host in another precision" if rounded else "another host"
    remedy = ", or say strict=False to try it all the same" if of_values else ""
    which = f"; {_which(modules, model, differs)}" if of_values and not rounded else ""
    raise CheckpointError(
        f"{modules.folder}: the module was trained in {other} ({', '.join(differs)[:300]} differ: "
        f"{there.get('architecture')} there, {type(model).__name__} here{which}); load it into the "
        f"host it was trained in{remedy}"
    )


def _compared(
    host: HostLike, modules: Stored
) -> tuple[Mapping[str, Any], nn.Module, list[str], list[str]]:
    """Return what modules say of their host, the model here that is to be it, what of it came with
    them, and what differs."""
    there = modules.card.host
    model, beside = host.model.get_submodule(modules.within), beside_within(modules)
    return there, model, beside, differences(model, there, beside)


def _another(modules: Stored, model: nn.Module, differs: Sequence[str]) -> str:
    """Say that a host is not the one that modules were trained in, and what to do."""
    names = modules.card.names
    remedy = (
        "Load the weights it was trained with into this host. A part that learned too, such as a "
        "head, is in the folder if it was trained with it: "
        f"host.fit(…, train=[{names[0]!r}, 'host.classifier'])"
        if not all(":" in kind for kind in differs)
        else "Make this host as it was there"
    )
    are, they_were = ("is", "it was") if len(names) == 1 else ("are", "they were")
    return (
        f"{modules.folder}: {', '.join(names)} {are} loaded into another host than {they_were} "
        f"trained in ({_which(modules, model, differs)}). {remedy}"
    )


def _which(modules: Stored, model: nn.Module, differs: Sequence[str]) -> str:
    """Say what of a host is other than what modules were trained with, by name and by how much."""
    each = sketches_of(modules.card.host)
    kinds = [kind for kind in differs if ":" not in kind]  # "weights", "buffers"
    rest = [_in_words(*kind.split(": ", 1)) for kind in differs if ":" in kind]
    found = changed(model, each, beside_within(modules)) if kinds else {}
    if found:
        tensors = [
            f"{name} by {f'{100 * much:.3g} %' if much else 'an unknown amount'}"
            for name, much in sorted(found.items(), key=lambda item: -item[1])
        ]
        said = f"{len(found)} of its {len(each)} tensors: {_first_of(tensors)}"
        rest.insert(0, f"{said}; measured on a few values of each")
    elif kinds:
        rest.insert(0, f"its {' and '.join(kinds)}; which and by how much was not saved")
    return _first_of(rest, "; ")


def _in_words(part: str, what: str) -> str:
    """Say a difference of settings, or of what else layers hold."""
    return f"the setting {what[:300]}" if part == "settings" else f"{what}, which a layer holds"


def _first_of(texts: Sequence[str], between: str = ", ") -> str:
    """Join the first few texts, and say how many more there are."""
    more = f" and {len(texts) - 6} more" if len(texts) > 6 else ""
    return between.join(texts[:6]) + more


def labels_of(model: nn.Module) -> list[str]:
    """Return what a host's configuration calls its classes, [] where nobody has named them."""
    names = getattr(getattr(model, "config", None), "id2label", None)
    labels = [str(name) for _, name in sorted(names.items())] if isinstance(names, dict) else []
    return [] if labels == [f"LABEL_{i}" for i in range(len(labels))] else labels


def warn_of_labels(host: HostLike, modules: Stored) -> None:
    """Warn where a head comes with the modules and the host calls its classes otherwise."""
    there, here = modules.card.labels, labels_of(host.model)
    if there and there != here:
        warn(
            f"{modules.folder}: the classes of its head are {there!r:.200}, and this host's are "
            f"{f'{here!r:.200}' if here else 'not named'}; to have those names: "
            f"host.model.config.id2label = dict(enumerate([…]))",
        )
