"""How much memory a function takes: the peak of what torch allocates while it runs.

A process's resident size says little of a step on the CPU: freed pages stay, and neighbours share
them. torch reports each allocation and release of a tensor to its profiler, and the peak of their
running sum is the same in every run. Scratch space inside a library's product is not seen.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(function: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Return the largest sum of bytes that tensors made inside ``function`` hold at one time.

    Args:
        function: is called once.
        device: whose memory is looked at, ``"cpu"`` or a GPU's, whose allocator counts itself.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # it would say so on standard error each time
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function()
    results: Any = record.profiler.kineto_results  # type: ignore[union-attr]
    changes = [e for e in results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(changes, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
