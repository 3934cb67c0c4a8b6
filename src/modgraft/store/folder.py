"""Save modules to a folder and load them.

    folder/
        module.safetensors   the modules: their tensors, and in its header their card
        module.json          the card for people, written from it
        README.md            the model card of a hub, written from it

The first file is all of it, and it is replaced as a whole: whoever reads finds what was there
before, or what is there now. Tensors are named ``<module>:<site>:<name>``; what of the host
trained with a module, such as a classifier's weights, ``:<name>``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from modgraft.computation.base import Computation
from modgraft.core.errors import CheckpointError, ModgraftError
from modgraft.core.expression import Expression, module_of
from modgraft.core.files import locked, write_text
from modgraft.core.parse import parse
from modgraft.core.patterns import bare
from modgraft.core.plain import full_name
from modgraft.core.sharded import sharded_parts
from modgraft.core.sites import located
from modgraft.engine.implant import Implant, learning_parts, moving_buffers, tensor_at
from modgraft.store import former
from modgraft.store.bounded import Bounded
from modgraft.store.card import CARD_FILE, Card, Saved, to_json
from modgraft.store.file import (
    CARD,
    TensorFile,
    digest_of,
    is_there,
    unreadable,
    write_tensors,
)
from modgraft.store.fingerprint import (
    fingerprint,
    rounded_fingerprints,
    sketches,
)
from modgraft.store.formats.base import found_in
from modgraft.store.readme import WRITTEN, readme
from modgraft.store.same_host import checked, labels_of, warn_of_labels
from modgraft.store.stored import Stored
from modgraft.store.within import (
    SKETCHES,
    inner,
    placed,
)
from modgraft.training.host_like import HostLike

FILE = "module.safetensors"
README = "README.md"


# -- saving --------------------------------------------------------------------------------------


def save(
    host: HostLike, names: Sequence[str], folder: Path, about: Mapping[str, Any], together: bool
) -> Path:
    """Write modules to ``folder``, with those they need and what of the host trained with them.

    Where ``fully_shard`` has spread the host's weights over processes, all of these have to call
    this, and the first one writes.

    Args:
        host: theirs.
        names: the modules' names.
        folder: where to; its other files stay.
        about: fields of :class:`Card` for people: metrics, data, licence, description, command.
        together: whether they are to bring the composition in force when they are loaded.

    Raises:
        ModgraftError: for a folder that another process is writing to.
        CheckpointError: for a folder that holds other things and no module.
    """
    if folder.is_dir() and any(folder.iterdir()) and not holds_module(folder):
        raise CheckpointError(f"{folder} is there and holds no module; choose another folder")
    tensors, card = packed(host, names, about, together)
    if not any(sharded_parts(host.model)):
        write(card, tensors, folder)
        return folder
    if distributed.get_rank() == 0:  # all processes were needed for the fingerprint
        write(card, tensors, folder)
    distributed.barrier()
    return folder


def holds_module(folder: Path) -> bool:
    """Return whether there are modules in a folder, or what a killed save left of them."""
    names = {path.name for path in folder.iterdir()}
    return bool(names & {FILE, CARD_FILE}) or names == temporaries(folder)


def temporaries(folder: Path) -> set[str]:
    """Return the names of the files that saves which were killed have left half-written."""
    files = "|".join(map(re.escape, (FILE, CARD_FILE, README)))
    left = re.compile(rf"\.({files})\.\w{{8}}\.part")
    return {path.name for path in folder.iterdir() if left.fullmatch(path.name)}


def packed(
    host: HostLike, names: Sequence[str], about: Mapping[str, Any], together: bool
) -> tuple[dict[str, Tensor], Card]:
    """Return the tensors and the card of modules; see :func:`save`."""
    implants = [host._implants[name] for name in with_members(host, names)]
    model = host.model
    for implant in implants:
        located(model, implant.paths)  # what is written is found again, or refused now
    learns = learning_parts(model)
    own = {bare(name): name for name in learns.union(*(i.beside for i in implants))}
    beside = sorted(own)
    tensors = {f"{i.name}:{key}": t for i in implants for key, t in i.tensors().items()}
    tensors |= {f":{name}": tensor_at(model, own[name]) for name in beside}
    now = host.composition
    known = {name for implant in implants for name in implant.names}
    is_kept = now is not None and not now.of_batch and known.issuperset(now.names())
    card = Card(
        names=list(names),
        modules=[
            Saved(
                name=i.name,
                **to_json(i.method),
                sites=list(i.paths),
                beside=sorted(map(bare, i.beside | learns)),
                trained_in=i.trained_in,
            )
            for i in implants
        ],
        composition=str(now) if is_kept else None,
        together=together,
        beside=beside,
        labels=labels_of(model) if beside else [],
        host={
            **fingerprint(model, beside),
            **rounded_fingerprints(model, beside),
            SKETCHES: sketches(model, beside),
            **inner(model, [path for i in implants for path in i.paths], beside),
        },
        tensors=digest_of(tensors),
        base_model=_hub_name(model),
    )
    given = {i.name: i.provenance for i in implants if i.provenance}
    more = about.get("provenance", {})
    if given and isinstance(more, Mapping):
        about = {**about, "provenance": {**given, **more}}
    return tensors, card.described(about)


def write(card: Card, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write a card and its tensors to a folder, in place of what is there, whole or not at all.

    Raises:
        CheckpointError: where something else than a file is in the place of one.
        ModgraftError: where the folder cannot be written to, or the module was, and not what people
            read of it.
    """
    text = card.to_text()
    with locked(folder, FILE, CARD_FILE, README):
        for path in (folder / name for name in (FILE, CARD_FILE, README)):
            is_read = path.name == README and path.exists()  # a pipe would be waited for
            if path.is_dir() or (is_read and not path.is_file()):
                raise CheckpointError(
                    f"{path} is no file, and a file is to be written there; move it away, or "
                    f"choose another folder. What was there is as it was"
                )
        write_tensors(tensors, folder / FILE, {CARD: text})
        try:
            write_derived(card, folder)
            (folder / former.HOST_FILE).unlink(missing_ok=True)
        except OSError as error:
            raise ModgraftError(
                f"{folder / FILE} is saved, and that is all of the module; what is written from it "
                f"for people cannot be ({error.strerror or error}, at {error.filename}): see to "
                f"that, and save again"
            ) from error


def write_derived(card: Card, folder: Path) -> None:
    """Write what people read: ``module.json``, and ``README.md`` if it is not their own."""
    said = json.loads(card.to_text())
    write_text(folder / CARD_FILE, json.dumps(said, indent=2, ensure_ascii=False) + "\n")
    page = folder / README
    if not page.exists() or WRITTEN in page.read_text("utf-8", errors="replace"):
        write_text(page, readme(card))


def with_members(host: HostLike, names: Sequence[str]) -> list[str]:
    """Return names of modules, each after those that it is over, as a mixture's."""
    found: dict[str, None] = {}
    for name in names:
        found |= dict.fromkeys(with_members(host, host._implants[name].method.members))
        found[host._implants[name].name] = None
    return list(found)


def _hub_name(model: nn.Module) -> str | None:
    """Return the name under which the host's weights are on a hub, if it is one."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    if not isinstance(name, str) or Path(name).exists():
        return None
    return name if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) else None


# -- reading -------------------------------------------------------------------------------------


def stored(folder: Path, model: nn.Module) -> Stored:
    """Read the card of the modules in a folder as :func:`read` does, and name them as a host does
    that has their model at another path."""
    found = read(folder, model)
    return placed(found, model) if found.card.host else found


def read(folder: Path, model: nn.Module) -> Stored:
    """Read the card of the modules in a folder; the tensors wait in the file.

    Args:
        folder: ours, or another tool's.
        model: the host's, in which another tool's modules are found by its names.

    Raises:
        CheckpointError: for a folder without modules, or a file that is damaged or none of them.
    """
    if is_there(folder / FILE):
        return native(folder)
    try:
        other = found_in(folder)
        if other is not None:
            return other.read(folder, model)
        if inside := _sub_folders(folder):
            raise CheckpointError(
                f"no module in {folder} itself; there are some in {', '.join(inside[:8])}: load "
                f"host.load({str(folder / inside[0])!r}), or another"
            )
        return native(folder)
    except ModgraftError:
        raise
    except OSError as error:
        raise unreadable(folder, error) from error


def _sub_folders(folder: Path) -> list[str]:
    """Return the names of a folder's folders that hold modules, as PEFT keeps several adapters."""
    inside = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    return [p.name for p in inside[:100] if (p / FILE).is_file() or found_in(p) is not None]


def native(folder: Path) -> Stored:
    """Read the card of the modules in a folder that modgraft wrote.

    Raises:
        CheckpointError: for a folder without them, or a file that is damaged or none of them.
    """
    if not is_there(folder / FILE):
        raise CheckpointError(f"no module in {folder}: {FILE} is not there")
    file = TensorFile(folder / FILE)
    card = Card.in_header(file.metadata, file.path)
    if card is None:
        return former.stored(folder, file)

    def read() -> Mapping[str, Tensor]:
        if file.digest() != card.tensors:
            raise CheckpointError(
                f"{file.path}: the tensors were changed after they were written (their hash is "
                f"another one); copy the folder again, and load it again where it waited for a use"
            )
        return file.tensors()

    return Stored(folder, card, lambda: file.entries, read)


# -- loading -------------------------------------------------------------------------------------


def load(
    host: HostLike,
    modules: Stored,
    name: str | None,
    strict: bool,
    active: bool,
    *,
    told: bool = False,
) -> list[Implant]:
    """Implant the modules of a folder; an equal one that is there already is left as it is.

    Args:
        host: where to implant them.
        modules: what :func:`stored` found.
        name: the name in this host of the only module that was asked for, or what the names of
            those begin with that were one module of another tool; None: as saved.
        strict: whether the host must be the one they were trained in, weight for weight.
        active: whether they join the composition in force, or bring the one they were saved with.
        told: whether it was warned of another host already.

    Returns:
        Those that were asked for when they were saved.

    Raises:
        CheckpointError: for tensors that do not fit or hold NaN, weights of the host that another
            module needs otherwise, or modules trained in another host. The host is then as it was.
    """
    with naming(modules.folder):
        return _load(host, modules, name, strict, active, told)


@contextmanager
def naming(folder: Path) -> Iterator[None]:
    """Name the folder in errors of a ``with`` block that do not, such as of a site.

    Raises:
        CheckpointError: with the folder and what was wrong.
    """
    try:
        yield
    except ModgraftError as error:
        if str(folder) in str(error):
            raise
        raise CheckpointError(f"{folder}: {error}") from error


def _load(
    host: HostLike, modules: Stored, name: str | None, strict: bool, active: bool, told: bool
) -> list[Implant]:
    modules, trained_in = checked(host, modules, strict, told)
    if modules.card.beside:  # in this host it may stand in a wrapper, as that of torch.compile
        modules = modules.named(str, partial(full_name, host.model))
    card, before = modules.card, host.composition
    if not told:
        warn_of_labels(host, modules)
    names = names_here(modules, name)
    methods = {saved.name: saved.method(modules.folder) for saved in card.modules}
    tensors = modules.read()
    beside = _beside(host, modules, tensors)
    one = len(card.names) == 1 and not card.together
    made: list[str] = []
    try:
        for saved in card.modules:
            new = names[saved.name]
            own = _of_module(tensors, saved.name)
            method = methods[saved.name]
            if new in host and saved.name not in card.names and _is_there(host, saved, method, own):
                continue
            joins = active and one and saved.name in card.names
            implant = _implant(host, modules, saved, method, new, own, joins)
            implant.trained_in = saved.trained_in or trained_in
            if isinstance(comes_from := card.provenance.get(saved.name), dict):
                implant.provenance = comes_from
            made.append(new)
        here = [host._implants[names[each]] for each in card.names]
        if active and not one and card.composition is not None:
            host.use(_in_force(card.composition, methods, names))
        claimed = {weight for saved in card.modules for weight in saved.beside}
        for saved in card.modules:
            rest = beside.keys() - claimed if saved.name == card.names[-1] else set()
            own = {weight: beside[weight] for weight in rest.union(saved.beside)}
            host._implants.put_beside(host._implants[names[saved.name]], host.model, own)
    except BaseException:
        for new in reversed(made):
            host.remove(new)
        host.use(before)
        raise
    return here


def names_here(modules: Stored, name: str | None) -> dict[str, str]:
    """Return what each module is to be called in a host; see :func:`load`.

    Raises:
        ModgraftError: for one name for several.
    """
    names = {saved.name: saved.name for saved in modules.card.modules}
    if name is not None and modules.stem:
        return {each: name + each.removeprefix(modules.stem) for each in names}
    if name is not None:
        if len(modules.card.names) != 1:
            raise ModgraftError(
                f"{modules.folder} holds {', '.join(modules.card.names)}, which name={name!r} "
                f"cannot all be called; leave it out"
            )
        names[modules.card.names[0]] = name
    return names


def _in_force(
    composition: str, methods: Mapping[str, Computation], names: Mapping[str, str]
) -> Expression | None:
    """Read the composition of a card, with what its modules are called in this host."""

    def here(name: str) -> str:
        module = module_of(name)
        return names[module] + name.removeprefix(module)

    known = [each for name, method in methods.items() for each in method.task_names(name)]
    return parse(composition, known).mapped(here)


def _implant(
    host: HostLike,
    modules: Stored,
    saved: Saved,
    method: Computation,
    name: str,
    tensors: Mapping[str, Tensor],
    active: bool,
) -> Implant:
    """Implant one module, with its tensors."""
    one = len(method.task_names(name)) == 1  # of several tasks none is in force by itself
    room = 8 * max(
        sum(e.end - e.begin for e in modules.entries().values()),
        *(p.nbytes for p in host.model.parameters()),
        2**20,
    )
    try:
        with Bounded(room):
            implant = host._implant(
                name, method, lambda: host._located(name, method, saved.sites), active and one
            )
    except ModgraftError:
        raise
    except Exception as error:  # torch's, of sizes that no memory has
        why = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{modules.folder}: {type(method).__name__} cannot be made as its card says "
            f"({type(error).__name__}: {why:.200}); there is no memory for it here, or the card "
            f"was changed: copy the folder again"
        ) from error
    try:
        _fill(implant, tensors, modules.folder)
    except BaseException:
        host.remove(name)
        raise
    return implant


def _of_module(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    start, found = f"{name}:", {}
    for key, tensor in tensors.items():
        if key.startswith(start):
            site, _, own = key.removeprefix(start).rpartition(":")
            found[f"{bare(site)}:{own}"] = tensor  # of a host that was compiled, once
    return found


def _is_there(
    host: HostLike, saved: Saved, method: Computation, tensors: Mapping[str, Tensor]
) -> bool:
    """Return whether a module of the host is the saved one, to the last bit."""
    own = host[saved.name]
    here = own.tensors()
    return (
        to_json(own.method) == to_json(method)
        and list(own.paths) == saved.sites
        and here.keys() == tensors.keys()
        and all(torch.equal(t.to(here[k]), here[k]) for k, t in tensors.items())
    )


def _beside(host: HostLike, modules: Stored, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what of the host trained with modules, if it can be written into this one.

    Raises:
        CheckpointError: for a weight or buffer that this host has not, or not in that shape, or
            that trained with another of its modules to another value.
    """
    folder, named = modules.folder, modules.card.names
    names = {*modules.card.beside, *(n for saved in modules.card.modules for n in saved.beside)}
    if not names:
        return {}
    own: dict[str, Tensor] = dict(host.model.named_parameters())
    buffers = {name: buffer for name, buffer, _ in moving_buffers(host.model)}
    own |= buffers
    found: dict[str, Tensor] = {}
    for name in sorted(names):
        kept, here = tensors.get(f":{name}"), own.get(name)
        if kept is None or here is None or kept.shape != here.shape:
            said = ["is not there" if t is None else f"is {list(t.shape)}" for t in (kept, here)]
            raise CheckpointError(
                f"{folder}: {named[0]!r} was trained together with the host's {name}, which "
                f"{said[0]} in the folder and {said[1]} in this host; make the host as it was there"
            )
        but = ~torch.isfinite(here) if name in buffers else None  # a mask's infinity
        found[name] = _cast(kept, here, name, folder, but)
        users = [n for n, implant in host._implants.items() if name in implant.beside]
        if users and not torch.equal(found[name].to(here), here):
            raise CheckpointError(
                f"{folder}: {named[0]!r} was trained together with the host's {name}, and so was "
                f"{users[0]!r} here, to another value; one host has room for one of them: "
                f"host.remove({users[0]!r}) first, or load it into another host"
            )
    return found


def _fill(implant: Implant, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Copy saved tensors into a module, which is resized where training decides a size."""
    present = implant.tensors()
    if present.keys() != tensors.keys():
        extra, lacking = tensors.keys() - present.keys(), present.keys() - tensors.keys()
        raise CheckpointError(
            f"{folder}: {len(lacking)} tensors are missing {sorted(lacking)[:3]} and {len(extra)} "
            f"are not the module's {sorted(extra)[:3]}; the file and its card are of two modules"
        )
    for path, place in zip(implant.paths, implant.places, strict=True):
        if stored := {k: tensors[f"{path}:{k}"] for k in place.state_dict()}:
            place.resize_to(stored)  # type: ignore[operator]
    present = implant.tensors()
    with torch.no_grad():
        for key, tensor in tensors.items():
            if tensor.shape != present[key].shape:
                raise CheckpointError(
                    f"{folder}: {key} is {list(tensor.shape)} where this host needs "
                    f"{list(present[key].shape)}"
                )
            present[key].copy_(_cast(tensor, present[key], key, folder))


def _cast(
    tensor: Tensor, like: Tensor, key: str, folder: Path, but: Tensor | None = None
) -> Tensor:
    """Return a saved tensor in the type of ``like``, if that loses nothing but precision.

    It is finite, save where ``but`` is true.
    """
    if tensor.dtype != like.dtype and not (tensor.is_floating_point() and like.is_floating_point()):
        raise CheckpointError(
            f"{folder}: {key} holds {str(tensor.dtype).removeprefix('torch.')} where "
            f"{str(like.dtype).removeprefix('torch.')} is needed; the file was changed: copy the "
            f"folder again"
        )
    cast = tensor.to(like.dtype)
    finite = torch.isfinite(cast)
    if not (finite if but is None else finite | but.to(finite.device)).all():
        raise CheckpointError(
            f"{folder}: {key} holds NaN or infinity; the run that wrote it had diverged, or its "
            f"numbers are too large for {str(like.dtype).removeprefix('torch.')}"
        )
    return cast
