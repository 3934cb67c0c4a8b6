"""Memory that a step frees is reused by the next: after the first step there are no page faults."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from modgraft.training.malloc import keep_freed_memory

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks glibc's malloc")

FAULTS = """
import resource, sys, torch
from modgraft.training.malloc import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()

def step():  # activations as MiniLM's are, of 1.5 and 6 MiB, all freed at the end
    return len([torch.zeros(1024, 384 * (1 + 3 * (i % 4 == 0))) for i in range(40)])

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

for _ in range(3):
    step()
before = faults()
for _ in range(20):
    step()
print(faults() - before)
"""


def faults(which: str, **said: str) -> int:
    plain = {k: v for k, v in os.environ.items() if "MALLOC" not in k and k != "GLIBC_TUNABLES"}
    plain |= said
    run = [sys.executable, "-c", FAULTS, which]
    return int(subprocess.run(run, env=plain, check=True, capture_output=True, text=True).stdout)


def test_a_step_finds_what_the_last_one_freed() -> None:
    every_step = 20 * 105 * 2**20 // 4096  # a step writes 105 MiB, in pages of 4 KiB
    handed_back = faults("default", MALLOC_TRIM_THRESHOLD_="131072")
    assert handed_back > 0.3 * every_step  # some of it may be huge pages
    # the heap may still grow by a tensor now and then, until its holes fit what is asked for
    assert faults("kept") < 0.02 * every_step


def test_what_the_user_said_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "1000000")
            assert not keep_freed_memory()
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=1000000")
    assert not keep_freed_memory()


@pytest.mark.parametrize("most", [-1, 2**31])
def test_a_size_that_malloc_does_not_take(most: int) -> None:
    with pytest.raises(ValueError, match=f"got {most}"):
        keep_freed_memory(most)
