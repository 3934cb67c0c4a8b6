"""A pull, a fetch, a push or a merge that is killed leaves the old or the new, whole.

``KILLS`` says how many are killed of each, at random moments.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from modgraft.store.folder import native
from modgraft.store.hub.address import find, pull
from modgraft.store.hub.hub import Hub
from modgraft.store.hub.remote import cache
from modgraft.store.verify import verify
from store.hub_cases import saved

KILLS = int(os.environ.get("KILLS", "20"))

# For each line that it reads, a process that has imported everything forks a child, which works for
# good; the answer is the child's process and, when it was killed, how.
CODE = """
import os, shutil, sys
from pathlib import Path
import modgraft as mg
from modgraft.store.hub.address import find, pull
from modgraft.store.hub.hub import Hub
from modgraft.store.hub.remote import cache
from store.hub_cases import small_host
at = Path(sys.argv[2])
def pulls():
    for version in (1, 2) if os.getpid() % 2 else (2, 1):
        pull(find(f"hub:qa@{version}"), at / "pulled")
def fetches():
    for n in (1, 2):
        shutil.rmtree(find((at / str(n)).as_uri()).folder)
        find((at / str(n)).as_uri())
host = small_host()
for name in "ab":
    host.load(at / "1", name)
def merges():
    for weight in (1.0, 3.0):
        mg.merge(host, ["a", "b"], "m", "arithmetic", weights=[weight, weight])
        host.save("m", at / "pulled", metrics={"weight": weight})
        host.remove("m")
def pushes():
    for tag in ("a", "b"):
        Hub().push(at / "1", "k", tag)
    Hub().remove("k")
sys.stderr = open(os.devnull, "w")
for line in sys.stdin:
    child = os.fork()
    while not child:
        globals()[sys.argv[1]]()
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


@pytest.mark.parametrize("what", ["pulls", "fetches", "pushes", "merges"])
def test_kills_at_random_moments(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODGRAFT_HUB", str(tmp_path / "hub"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    hashes = {}
    for n in (1, 2):
        Hub().push(saved(tmp_path / f"{n}", float(n)))
        hashes[verify(tmp_path / f"{n}").hash] = n
    pull(find("hub:qa@1"), tmp_path / "pulled")

    def pulled() -> str:
        found = verify(tmp_path / "pulled")
        assert found.whole, found.problems
        return f"version {hashes[found.hash]}"

    def fetched() -> str:
        made = cache().iterdir() if cache().is_dir() else ()  # it may be killed before
        places = [each for each in made if not each.name.startswith(".")]
        for place in places:
            if any(place.iterdir()):  # the child removes them, too
                assert (verify(place).whole, verify(place).hash) == (True, place.name)
        return f"{len(places)} there"

    def pushed() -> str:
        there = Hub().verify()
        assert set(there.values()) == {""}, there
        return ", ".join(there)

    def merged() -> str:
        found = verify(tmp_path / "pulled")
        assert found.whole, found.problems
        return f"merged with {native(tmp_path / 'pulled').card.metrics}"

    look: Callable[[], str] = {
        "pulls": pulled, "fetches": fetched, "pushes": pushed, "merges": merged,
    }[what]  # fmt: skip
    paths = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), *sys.path]))
    seen, draw = Counter[str](), random.Random(0)
    with subprocess.Popen(
        [sys.executable, "-c", CODE, what, str(tmp_path)], env=os.environ | {"PYTHONPATH": paths},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdin
        assert process.stdout
        for _ in range(KILLS):
            process.stdin.write("\n")
            process.stdin.flush()
            child = int(process.stdout.readline())
            time.sleep(draw.uniform(0.005, 0.15))
            os.kill(child, signal.SIGKILL)
            assert int(process.stdout.readline()) == signal.SIGKILL
            seen[look()] += 1
    print(f"{KILLS} kills of {what}: {dict(seen)}")
    assert len(seen) > 1
    for version in (1, 2):  # and the next one works
        pull(find(f"hub:qa@{version}"), tmp_path / "pulled")
        assert verify(tmp_path / "pulled").problems == []
        assert verify(find((tmp_path / f"{version}").as_uri()).folder).hash in hashes
        assert Hub().push(tmp_path / f"{version}", "after").address == f"hub:after@{version}"
    assert not list((tmp_path / "pulled").glob("*.part"))
