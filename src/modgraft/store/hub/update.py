"""Newer versions of modules: what would change, and how it is brought."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from modgraft.core.errors import CheckpointError, ModgraftError, UnknownNameError
from modgraft.store.card import Card
from modgraft.store.hub.address import find, pull
from modgraft.store.hub.hub import Hub
from modgraft.store.hub.lock import Lock, lock
from modgraft.store.hub.remote import identity


@dataclass(frozen=True)
class Update:
    """What is there instead of a module.

    Attributes:
        name: the module's.
        old: its address.
        new: that of the newest version; the same where it is that.
        changes: what differs, for people.
    """

    name: str
    old: str
    new: str
    changes: list[str]


def update(path: str | Path, hub: Hub | None = None, dry_run: bool = False) -> list[Update]:
    """Bring newer versions of modules.

    Args:
        path: a lock file, whose modules are asked for again and which is written anew; or a folder
            of a module, which is found on the hub by its hash and replaced.
        hub: what ``hub:`` means; None: the hub that the lock file names, else yours.
        dry_run: whether to change nothing.

    Raises:
        CheckpointError: where nothing is there.
        UnknownNameError: for a folder whose module is not on the hub.
        ModgraftError: for a module that cannot be fetched.
    """
    path = Path(path)
    if path.is_file():
        return _of_lock(path, hub, dry_run)
    if not path.is_dir():
        raise CheckpointError(
            f"{path} is not there; give a lock file that `modgraft hub lock` wrote, or the folder "
            f"of a module"
        )
    return [_of_folder(path, hub or Hub(), dry_run)]


def _of_lock(path: Path, hub: Hub | None, dry_run: bool) -> list[Update]:
    old, base = Lock.read(path), path.parent
    was_at = old.named_hub()
    hub = hub or was_at
    new = lock(old.composition, {m.name: m.asked for m in old.modules}, base, hub)
    rows = []
    for now in new.modules:
        was = next(m for m in old.modules if m.name == now.name)
        if now.sha256 == was.sha256:
            now.address = was.address
            rows.append(Update(now.name, was.address, was.address, []))
            continue
        try:
            before = was.found(base, was_at).card
        except ModgraftError:  # it is gone, or was replaced where it was
            before = None
        address = now.address if now.address != was.address else f"{now.address} as it is now"
        after = now.found(base, hub).card
        rows.append(Update(now.name, was.address, address, changes(before, after)))
    if hub is was_at:
        new.hub = old.hub  # as it was written
    if not dry_run:
        new.write(path)
    return rows


def _of_folder(path: Path, hub: Hub, dry_run: bool) -> Update:
    sha, card = identity(path)
    rows = [row for row in hub.listed() if row.card.sha256 == sha]
    if not rows:
        raise UnknownNameError(
            f"the module in {path}, {sha[:12]}, is not on the hub {hub.address}; pull it again "
            f"from where it came from, or give another hub"
        )
    row = rows[-1]  # a number, if it has one
    new = find(f"hub:{row.name}", hub=hub)
    if new.sha256 == sha:
        return Update(row.name, new.address, new.address, [])
    if not dry_run:
        pull(new, path)
    return Update(row.name, row.address, new.address, changes(card, new.card))


def changes(old: Card | None, new: Card | None) -> list[str]:
    """Say what differs between two cards; of one that nobody has, only that it is another."""
    if old is None or new is None:
        return ["another hash"]
    said = []
    for name in sorted(old.metrics.keys() | new.metrics.keys()):
        was, now = (f"{c.metrics[name]:g}" if name in c.metrics else "–" for c in (old, new))
        if was != now:
            said.append(f"{name} {was} → {now}")
    before = {m.name: m.model_dump() for m in old.modules}
    for m in new.modules:
        if before.pop(m.name, None) != m.model_dump():
            said.append(f"{m.name}: {m.type} {m.config} at {len(m.sites)} sites")
    said += [f"{name} is gone" for name in before]
    for field in ("composition", "task", "data", "licence", "description", "command"):
        if (now := getattr(new, field)) != getattr(old, field):
            said.append(f"{field}: {now or '–'}")
    return (
        said
        + ["another host"] * (old.host != new.host)
        + (["other tensors"] * (old.tensors != new.tensors))
    )
