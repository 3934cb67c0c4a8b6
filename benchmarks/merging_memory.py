"""Checkpoints of twice the memory that a process may have, merged by it.

The limit is set for the process itself (RLIMIT_DATA), to what it has after it has imported
everything, and 40 MiB; its peaks are read from the system. Two checkpoints and their base, of two
tensors that are each larger than the limit, are merged by TIES.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

CHILD = """
import re, resource
from pathlib import Path
from modgraft.store.merging.checkpoints import merge_checkpoints

def read(name):
    return 1024 * int(re.search(rf"{name}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

limit = read("VmHWM") + 40 * 2**20
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
print(limit, flush=True)
base, one, two, out = input().split("\\t")
merge_checkpoints([one, two], out, "ties", base=base)
print(read("VmHWM"), read("VmData"))
"""


@dataclass(frozen=True)
class Within:
    """What was measured.

    Attributes:
        limit: the bytes that the process might have.
        size: the bytes of each checkpoint.
        resident: the peak of the process's resident memory.
        data: its private memory at the end, which RLIMIT_DATA limits.
        seconds: how long it took.
        last: the last number of the result, whose parents have 1 (the base), 2 and 3.
    """

    limit: int
    size: int
    resident: int
    data: int
    seconds: float
    last: float


def within(folder: Path) -> Within:
    """Make three checkpoints in ``folder``, and merge them in a process under the limit."""
    folders = [folder / name for name in ("base", "one", "two", "out")]
    with subprocess.Popen(
        [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as process:  # fmt: skip
        assert process.stdout is not None
        limit = int(process.stdout.readline())
        size = 8 * (limit // 8 + 1000)  # of each of two tensors
        for number, each in enumerate(folders[:3], 1):
            each.mkdir()
            _write(each / "model.safetensors", size, float(number))
        start = time.perf_counter()
        answer, _ = process.communicate("\t".join(map(str, folders)) + "\n")
        seconds = time.perf_counter() - start
    resident, data = map(int, answer.split())
    with (folders[3] / "model.safetensors").open("rb") as file:
        file.seek(-8, os.SEEK_END)
        (last,) = struct.unpack("<d", file.read())
    return Within(limit, 2 * size, resident, data, seconds, last)


def _write(path: Path, size: int, last: float) -> None:
    """Write two tensors of ``size`` bytes, of zeros but the last number."""
    places = {"a": [0, size], "b": [size, 2 * size]}
    entry = {"dtype": "F64", "shape": [size // 8]}
    text = json.dumps({name: {**entry, "data_offsets": at} for name, at in places.items()})
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text.encode())
        file.seek(2 * size - 8, os.SEEK_CUR)  # zeros, which take no room on the disk
        file.write(struct.pack("<d", last))
