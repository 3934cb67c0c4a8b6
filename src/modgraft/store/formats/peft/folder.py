"""A folder of PEFT: what is taken of one that is read, and what goes into one."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor, nn

from modgraft.computation.base import Computation
from modgraft.core.errors import CheckpointError, ModgraftError
from modgraft.core.layers import WEIGHTED
from modgraft.core.patterns import bare, joined
from modgraft.core.roles import known_models
from modgraft.core.sites import Site
from modgraft.store.file import Entry, TensorFile
from modgraft.store.formats.peft.options import CONFIG, Targeted
from modgraft.store.formats.peft.targets import targets

TENSORS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."

_WRAPPERS = ("base_layer", "original_module", "modules_to_save")
"""What PEFT puts into the path of a layer that it changes or copies."""


ONE_OF_TWO = "and PEFT changes a layer at one path alone, where a module here acts at both"


def another_path(model: nn.Module, path: str) -> str | None:
    """Return another path that leads to the same layer, None where there is none."""
    layer = model.get_submodule(path)
    every = model.named_modules(remove_duplicate=False)
    return next((p for p, m in every if m is layer and p != path), None) if path else None


def _moved(keys: Collection[str], model: nn.Module) -> tuple[str, str]:
    """Return what the paths of layers begin with in a folder, and with what instead in a host.

    A model may be trained by itself and stand under a head in this host, or the other way round.
    """
    paths = [key.removeprefix(PREFIX) for key in keys if key.startswith(PREFIX)]
    modules = {path for path, _ in model.named_modules(remove_duplicate=False)}
    first = paths[0].split(".") if paths else []

    def are_there(before: str, here: str) -> bool:
        moved = [_under(PREFIX + path, before, here).removeprefix(PREFIX) for path in paths]
        own = len(here.split(".")) if here else 0
        starts = {".".join(path.split(".")[: own + 2]) for path in moved if path.startswith(here)}
        return bool(starts) and starts <= modules

    found = [
        (before, path)
        for before in (".".join(first[:n]) for n in range(min(4, len(first))))
        for path, _, _ in known_models(model)
        if are_there(before, path)
    ]
    if len(found) != 1 or are_there("", ""):
        return "", ""
    before, here = found[0]
    # a head beside the model has moved with it where it is within what the host holds
    others = [path.rpartition(".")[0] for path in paths if not path.startswith(f"{before}.")]
    while before and here and before.rpartition(".")[2] == here.rpartition(".")[2]:
        around = before.rpartition(".")[0], here.rpartition(".")[0]
        if not all(_under(PREFIX + o, *around).removeprefix(PREFIX) in modules for o in others):
            break
        before, here = around
    return before, here


def _under(key: str, before: str, here: str) -> str:
    """Return a key of a layer under ``before`` as one of the layer under ``here``."""
    start = joined(PREFIX.removesuffix("."), before) + "."
    if not key.startswith(start):
        return key
    return joined(joined(PREFIX.removesuffix("."), here), key.removeprefix(start))


@dataclass(frozen=True)
class Piece:
    """A tensor of ours, ``<site>:<name>``, and how it is made of the file's."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


@dataclass(frozen=True)
class Group:
    """What becomes one module of ours."""

    method: Computation
    sites: Sequence[str]
    pieces: Sequence[Piece]
    suffix: str = ""


@dataclass
class Folder:
    """A folder of PEFT and the host that it is read for.

    Attributes:
        path: the folder's.
        file: its tensors.
        model: the host's.
        entries: its tensors' types and shapes by their keys, in which ``torch.compile`` and its
            like, around a layer, are not named.
        left: the tensors that nobody has taken yet.
        before: what paths of layers begin with in the folder, where the host has another in place.
    """

    path: Path
    file: TensorFile
    model: nn.Module
    left: set[str] = field(init=False)
    before: str = field(init=False)

    def __post_init__(self) -> None:
        self._keys = {bare(key): key for key in self.file.entries}
        self.before, here = _moved(self._keys, self.model)
        if self.before != here:
            self._keys = {_under(key, self.before, here): own for key, own in self._keys.items()}
        self.entries = {key: self.file.entries[own] for key, own in self._keys.items()}
        if len(self.entries) < len(self.file.entries):
            self.refuse("tensors of a layer stand there with and without torch.compile around it")
        self.left = set(self.entries)
        # a layer that stands at two paths has the first as its name here
        names: dict[int, str] = {}
        self.modules: dict[str, nn.Module] = {}
        self._names: dict[str, str] = {}
        for path, module in self.model.named_modules(remove_duplicate=False):
            self._names[path] = names.setdefault(id(module), path)
            self.modules[path] = module
        self._order = {path: i for i, path in enumerate(self.modules)}

    def refuse(self, why: str) -> NoReturn:
        """Raise a CheckpointError that begins with the folder."""
        raise CheckpointError(f"{self.path}: {why}")

    def sites(self, suffix: str) -> list[str]:
        """Return the paths of the tensors that end in ``suffix``, in the host's order.

        Raises:
            CheckpointError: for a path that is none in this host.
        """
        found = []
        for key in self.left:
            if key.startswith(PREFIX) and key.endswith(suffix):
                path = self.unwrapped(key.removeprefix(PREFIX).removesuffix(suffix))
                if path not in self.modules:
                    near = get_close_matches(path, self.modules, n=2, cutoff=0.3)
                    self.refuse(
                        f"{key} belongs to a layer {path!r:.120} that this "
                        f"{type(self.model).__name__} does not have; it has {', '.join(near)} …: "
                        f"make the host with the class that it was trained with"
                    )
                found.append(path)
        return sorted(set(found), key=self._order.__getitem__)

    def unwrapped(self, name: str) -> str:
        """Return the name in the host of what PEFT has wrapped; a layer may be called so itself."""
        found: list[str] = []
        for part in name.split("."):
            above, here = ".".join(found), ".".join([*found, part])
            if part not in _WRAPPERS or above not in self.modules or here in self.modules:
                found.append(part)
        return ".".join(found)

    def label(self, path: str) -> str:
        """Return the path of the layer at ``path``, which no other path may lead to.

        Raises:
            CheckpointError: for a layer of two paths, one of which PEFT leaves as it was.
        """
        if other := another_path(self.model, path):
            self.refuse(f"{path} is also {other} in this host, {ONE_OF_TWO}")
        return self._names[path]

    def take(self, key: str, *shape: int | None) -> Entry:
        """Take a tensor of the file, of a shape (None: any size on that axis).

        Raises:
            CheckpointError: if it is not there, or another one is.
        """
        entry = self.entries.get(key)
        if entry is None:
            self.refuse(f"{key} is missing; the file is cut short, or another one: copy it again")
        if len(entry.shape) != len(shape) or any(
            want not in (None, has) for want, has in zip(shape, entry.shape, strict=True)
        ):
            wanted = ", ".join("any" if n is None else str(n) for n in shape)
            self.refuse(f"{key} is {list(entry.shape)} where this host needs [{wanted}]")
        self.left.discard(key)
        return entry

    def check_targets(self, said: Targeted, sites: Collection[str]) -> None:
        """Compare the layers that have tensors with those that the options mean.

        Raises:
            CheckpointError: for a layer that is meant and has none, or has some and is not meant.
        """
        if said.target_modules is None and not getattr(said, "target_parameters", None):
            short = json.dumps(sorted({path.rpartition(".")[2] for path in sites}))
            self.refuse(
                f"{CONFIG} has no target_modules, and PEFT takes such layers as it knows the "
                f"architecture; where all that have tensors here are meant, write "
                f'"target_modules": {short:.200} into it'
            )
        layers = {path: m for path, m in self.modules.items() if isinstance(m, WEIGHTED)}
        meant = targets(said, layers, self.model)
        if meant is None:
            return
        have = set(sites)
        if lacking := sorted(meant - have):
            self.refuse(
                f"{CONFIG} means {lacking[0]}, and {len(lacking)} such layers have no tensors; "
                f"the file is cut short, or the host has more layers than it was trained with"
            )
        extra = sorted(have - meant)
        if extra and getattr(said, "ensure_weight_tying", False):
            self.refuse(
                f"ensure_weight_tying gives {extra[0]} what the embedding has that it is tied to, "
                f"which no module here does; train it in PEFT with ensure_weight_tying=False"
            )
        if extra:
            self.refuse(f"there are tensors for {extra[0]}, which {CONFIG} does not mean")

    def tensor(self, key: str) -> Tensor:
        """Read a tensor of the file."""
        return self.file.tensor(self._keys[key])


@dataclass
class Written:
    """Modules as PEFT has them.

    Attributes:
        tensors: by key, without the beginning that all have.
        options: of ``adapter_config.json``, beside those of every kind.
        paths: the layers that ``target_modules`` has to mean.
        shared: tensors that stand beside the host's, such as VeRA's matrices.
    """

    tensors: dict[str, Tensor]
    options: dict[str, Any]
    paths: list[str]
    shared: dict[str, Tensor] = field(default_factory=dict)


def check_whole(name: str, what: str, site: Site, kinds: tuple[type[nn.Module], ...]) -> None:
    """Raise a ModgraftError unless a site is the whole of a layer of one of these kinds."""
    if site.part is not None or site.parameter is not None or not isinstance(site.module, kinds):
        raise ModgraftError(
            f"{name!r} changes {site.label}: PEFT's {what} changes the whole of a "
            f"{' or '.join(k.__name__ for k in kinds)}"
        )
