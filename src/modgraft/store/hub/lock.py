"""A lock file: the modules of a composition by exact hash, so that it is the same everywhere.

    {"format": 1,
     "composition": "0.5*qa + style",
     "modules": [{"name": "qa", "asked": "hub:qa", "address": "hub:qa@2", "sha256": "9f2c…"}, …]}

``asked`` is what the address was found from, and an update asks again. ``hub`` is there where
``hub:`` means another hub than your own: a URL, or a folder. Relative paths in the file start from
the folder that it is in.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError

from modgraft.core.errors import CheckpointError, ModgraftError
from modgraft.core.expression import module_of
from modgraft.core.files import read_json, write_json, writing
from modgraft.core.parse import parse
from modgraft.engine.implant import Implant
from modgraft.store.folder import load as load_folder
from modgraft.store.folder import stored
from modgraft.store.hub.address import Found, find, is_address, written
from modgraft.store.hub.hub import Hub
from modgraft.training.host_like import HostLike


class Locked(BaseModel):
    """One module.

    Attributes:
        name: what the composition calls it.
        asked: the address that was asked for.
        address: with the version or commit that was found.
        sha256: what it is known by; see :func:`~modgraft.store.hub.remote.identity`.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    name: str
    asked: str
    address: str
    sha256: str

    def found(self, base: Path, hub: Hub | None = None) -> Found:
        """Return exactly this module; relative paths start from ``base``.

        Raises:
            CheckpointError: for another one at its address.
            ModgraftError: for what cannot be fetched.
        """
        found = find(self.address, base, hub)
        if found.sha256 != self.sha256:
            raise CheckpointError(
                f"{self.name!r} is locked to {self.address} with hash {self.sha256[:12]}, and "
                f"{found.sha256[:12]} is there; get that version back, or lock the composition anew"
            )
        return found


class Lock(BaseModel):
    """What a lock file says.

    Attributes:
        format: the version of this format.
        composition: of the modules.
        hub: what ``hub:`` means in it; None: the hub of whoever loads it.
        modules: each of them.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    format: Literal[1] = 1
    composition: str
    hub: str | None = None
    modules: list[Locked]
    _base: Path = PrivateAttr(default_factory=Path.cwd)

    @property
    def base(self) -> Path:
        """The folder from which relative paths in it start."""
        return self._base

    def write(self, path: str | Path) -> None:
        """Write the lock file, whole or not at all; relative paths start from its folder then."""
        path = Path(path)
        said = self.in_folder(path.parent).model_dump(exclude_defaults=True)
        with writing(path):
            write_json(path, {"format": self.format, **said})

    def in_folder(self, folder: Path) -> Lock:
        """Return it as a file in a folder says it: relative paths start from there."""
        old, new = self._base.resolve(), folder.resolve()

        def moved(place: str) -> str:
            if old == new or is_address(place) or Path(place).is_absolute():
                return place
            return written(Path(os.path.relpath(old / place, new)))

        modules = [
            Locked(name=m.name, asked=moved(m.asked), address=moved(m.address), sha256=m.sha256)
            for m in self.modules
        ]
        hub = None if self.hub is None else moved(self.hub)
        return Lock(composition=self.composition, hub=hub, modules=modules).starting(new)

    def starting(self, base: Path) -> Lock:
        """Let relative paths start from ``base``; return this lock."""
        self._base = base.absolute()
        return self

    def named_hub(self) -> Hub | None:
        """Return the hub that it names."""
        if self.hub is None:
            return None
        return Hub(self.hub if is_address(self.hub) else self._base / self.hub)

    def found(self, hub: Hub | None = None) -> dict[str, Found]:
        """Return exactly its modules, by name.

        Args:
            hub: what ``hub:`` means; None: the hub that it names, else yours.

        Raises:
            CheckpointError: for another module at one of its addresses.
            ModgraftError: for what cannot be fetched.
        """
        hub = hub or self.named_hub()
        return {module.name: module.found(self._base, hub) for module in self.modules}

    @classmethod
    def read(cls, path: str | Path) -> Lock:
        """Read a lock file.

        Raises:
            DataError: for what is no JSON.
            CheckpointError: for what is no lock file.
        """
        remedy = "host.load takes a module's folder, an address, or a file of `modgraft hub lock`"
        path = Path(path)
        if path.suffix == ".safetensors":
            raise CheckpointError(f"{path} is a file: give the folder that it is in, {path.parent}")
        said = read_json(path, what="a lock file", remedy=remedy)
        try:
            lock = cls.model_validate(said)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise CheckpointError(
                f"{path} is no lock file ({where}: {first['msg']}); {remedy}"
            ) from error
        names = [module.name for module in lock.modules]
        if sorted(names) != sorted(names_in(lock.composition)):
            raise CheckpointError(
                f"{path}: the composition {lock.composition!r} is not one of the modules "
                f"{', '.join(names)}; lock it anew"
            )
        return lock.starting(path.parent)


def lock(
    composition: str,
    addresses: Mapping[str, str | Path] | None = None,
    base: str | Path = "",
    hub: Hub | str | Path | None = None,
) -> Lock:
    """Find the modules that a composition names; ``.write(file)`` writes the lock file.

    >>> mg.lock("0.5*qa + style", {"style": "modules/style"}).write("mix.lock.json")
    >>> host.load("mix.lock.json")

    Args:
        composition: it.
        addresses: of modules by name; of one that is not here, ``hub:NAME``.
        base: the folder from which relative paths in ``addresses`` start; left out, the current
            one. Wherever the lock file is written, its paths lead from there to the same folders.
        hub: what ``hub:`` means, a hub or its address; None: your hub. Another one is named in the
            lock file.

    Returns:
        What the lock file is to say.

    Raises:
        CompositionError: for what is no composition.
        ModgraftError: for an address whose module is not in the composition, or several in one.
    """
    composition, addresses, base = str(composition), addresses or {}, Path(base)
    if hub is not None and not isinstance(hub, Hub):
        hub = Hub(hub)
    names = names_in(composition)
    if unused := addresses.keys() - set(names):
        raise ModgraftError(f"{', '.join(sorted(unused))} is not in {composition!r}; leave it out")
    modules = []
    for name in names:
        asked = written(addresses.get(name, f"hub:{name}"))
        found = find(asked, base, hub)
        if found.card is not None and len(found.card.names) > 1:
            raise ModgraftError(
                f"{found.address} holds {', '.join(found.card.names)}; a lock names modules that "
                f"were saved one by one"
            )
        modules.append(Locked(name=name, asked=asked, address=found.address, sha256=found.sha256))
    where = None if hub is None or hub.yours else _from(base, hub)
    return Lock(composition=composition, hub=where, modules=modules).starting(base)


def _from(base: Path, hub: Hub) -> str:
    """Return a hub's address, from ``base`` where it is a relative path."""
    if is_address(hub.address) or Path(hub.address).is_absolute():
        return hub.address
    return os.path.relpath(hub.address, base)


def load(host: HostLike, path: Path, strict: bool, active: bool) -> list[Implant]:
    """Implant the modules of a lock file, and put its composition in force if ``active`` is set.

    Raises:
        CheckpointError: for a module that is not exactly the one that was locked, or that this host
            refuses. The host is then as it was.
    """
    lock, before = Lock.read(path), host.composition
    made: list[Implant] = []
    found = lock.found()
    try:
        for name, each in found.items():
            made += load_folder(host, stored(each.folder, host.model), name, strict, active=False)
        if active:
            host.use(lock.composition)
    except BaseException:
        for implant in reversed(made):
            host.remove(implant.name)
        host.use(before)
        raise
    return made


class _Every:
    """Every name there is."""

    def __contains__(self, name: object) -> bool:
        return True

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


def names_in(composition: str) -> list[str]:
    """Return the modules that a composition names.

    Raises:
        CompositionError: for what is no composition.
    """
    return list(dict.fromkeys(map(module_of, parse(composition, _Every()).names())))
