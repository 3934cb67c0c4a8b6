"""The processes of a run: their device, their number, and Ctrl-C at a safe moment."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

from accelerate import Accelerator

from modgraft.core.errors import ModgraftError
from modgraft.training.malloc import keep_freed_memory

#: where launchers say how many processes they start
ANNOUNCED = ("WORLD_SIZE", "ACCELERATE_NUM_PROCESSES")


def accelerator_for() -> Accelerator:
    """Make the `Accelerator`, which knows the processes and the device.

    It does no autocast, since that would patch the host's forward; `Forward` does. On a CPU the
    process keeps the memory that a step frees for the next, see `malloc`.

    Raises:
        ModgraftError: an `Accelerator` with mixed precision already exists in this process.
    """
    try:
        accelerator = Accelerator(mixed_precision="no")
    except ValueError as error:
        raise ModgraftError(
            "an accelerate.Accelerator with mixed precision was already made in this process; "
            f'leave it out and give fit(..., precision="bf16"). accelerate says: {error}'
        ) from error
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    return accelerator


def check_world(found: int, expected: int | None = None) -> None:
    """Refuse to run with another number of processes than was asked for.

    `accelerate launch --cpu --num_processes 2` silently starts one process. It can be told by the
    environment, which has a MASTER_ADDR and no WORLD_SIZE.

    Args:
        found: the number of processes there are.
        expected: the number there should be; None takes it from the launcher's environment.

    Raises:
        ModgraftError: they differ, or a launcher meant several and started one.
    """
    launch = (
        "ACCELERATE_USE_CPU=1 torchrun --nproc-per-node N script.py (without the variable on GPUs)"
    )
    for name in ANNOUNCED:
        if expected is None and os.environ.get(name, "").isdecimal():
            expected = int(os.environ[name])
    if expected is not None and expected != found:
        raise ModgraftError(f"{expected} processes were asked for and {found} run; use {launch}")
    lost = "MASTER_ADDR" in os.environ and "ACCELERATE_MIXED_PRECISION" in os.environ
    if expected is None and found == 1 and lost:
        raise ModgraftError(
            "accelerate launch was asked for several processes and started one, as it does with "
            f"--cpu; use {launch}. If one is right, say so: fit(..., world=1)"
        )


class Interrupt:
    """Hold a Ctrl-C back until the step is complete; a second one stops at once.

    Outside the main thread, or where the program has set a handler, it does nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self.hold = True  # False during evaluation, which may be interrupted anywhere
        self._before: object = None

    def __enter__(self) -> Interrupt:
        here = threading.current_thread() is threading.main_thread()
        if here and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested or not self.hold:
            raise KeyboardInterrupt
        self.requested = True
