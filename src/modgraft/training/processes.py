"""The processes and threads of a run: device, number, what they share, and an interruption."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from accelerate import Accelerator
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from modgraft.core.errors import ModgraftError, listed
from modgraft.core.patterns import joined
from modgraft.core.sharded import sharded_parts
from modgraft.engine.frozen import is_frozen, parts_of
from modgraft.training.malloc import keep_freed_memory
from modgraft.training.stream import Batch

#: where launchers say how many processes they start
ANNOUNCED = ("WORLD_SIZE", "ACCELERATE_NUM_PROCESSES")
#: the signals that interrupt a run, and the handler that each has where the program set none
INTERRUPTING = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}

_trained_by: dict[int, list[int]] = {}  # the id of a host that trains → [the thread that does]


def accelerator_for() -> Accelerator:
    """Make the `Accelerator`, which knows the processes and the device.

    It does no autocast, since that would patch the host's forward; `Forward` does. On a CPU the
    process keeps the memory that a step frees for the next, see `malloc`.

    Raises:
        ModgraftError: an `Accelerator` with mixed precision already exists in this process, or
            accelerate was set to train in another way than DDP.
    """
    try:
        accelerator = Accelerator(mixed_precision="no")
    except ValueError as error:
        raise ModgraftError(
            "an accelerate.Accelerator with mixed precision was already made in this process; "
            f'leave it out and give fit(..., precision="bf16"). accelerate says: {error}'
        ) from error
    kind = str(accelerator.distributed_type.value)
    if not kind.startswith(("NO", "MULTI_")):
        raise ModgraftError(
            f"accelerate is set to {kind}, and fit trains by DDP: start it without; a host that is "
            f"too large for one device is sharded by fully_shard, see docs/training.md"
        )
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


class _Losses(nn.Module):
    """A host as DDP sees it: of what it returns, only the losses.

    DDP is to look for parameters that a step does not use, since a composition may leave modules
    out; where it finds none, it warns of the time. It finds the number ``unused`` always.
    """

    def __init__(self, host: nn.Module, losses: Callable[[Batch], Tensor]) -> None:
        super().__init__()
        self.host, self.losses = host, losses
        like = next(p for p in host.parameters() if p.requires_grad)
        self.unused = nn.Parameter(like.new_zeros(()))

    def forward(self, batch: Batch) -> Tensor:
        return self.losses(batch)


def check_learns_whole(host: nn.Module) -> None:
    """Refuse to train weights that ``fully_shard`` has spread over processes.

    Raises:
        ModgraftError: with their names.
    """
    for path, part in sharded_parts(host):
        if learns := [joined(path, n) for n, p in part.named_parameters() if p.requires_grad]:
            raise ModgraftError(
                f"{listed(learns, 4)} would train in parts, as fully_shard has spread them over "
                f"processes: in a sharded host fit trains modules, train='qa', and what of the "
                f"host fully_shard was not called for"
            )


def in_parallel(host: nn.Module, losses: Callable[[Batch], Tensor]) -> DistributedDataParallel:
    """Wrap the losses of a host so that `backward` averages gradients over all processes.

    What trains begins as it is in the first process. Nothing else is sent: neither frozen weights,
    nor the buffers of frozen parts. What no process has used in a step gets no gradient there.

    Args:
        host: the host; its frozen weights may be sharded by ``fully_shard``.
        losses: of a batch, by the host.
    """
    model = _Losses(host, losses)
    moving = {joined("host", name) for name in moving_buffers(host)}
    stay = [name for name, p in model.named_parameters() if not p.requires_grad]
    stay += [name for name, _ in model.named_buffers() if name not in moving]
    model._ddp_params_and_buffers_to_ignore = stay  # type: ignore[assignment]
    return DistributedDataParallel(model, find_unused_parameters=True)


@contextmanager
def beside_others() -> Iterator[None]:
    """Say in a ``with`` block what it means that another process is no longer there.

    Raises:
        ModgraftError: instead of what the network says of it.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, distributed.DistError) or "gloo" in str(error):
            raise ModgraftError(
                "another process of this run has ended, so this one cannot go on; why, is what "
                "that process says. The same command goes on from the last checkpoint"
            ) from error
        raise


def moving_buffers(host: nn.Module) -> dict[str, Tensor]:
    """Return the buffers of parts that train, such as running statistics, by name."""
    found = {}
    for path, layer, part in parts_of(host):
        if part is host and next(layer.parameters(), None) is not None:
            part = layer  # the model in it, beside the modules
        if not is_frozen(part):
            found |= {joined(path, n): b for n, b in layer._buffers.items() if b is not None}
    return found


@contextmanager
def alone(host: nn.Module) -> Iterator[None]:
    """Let no other thread train ``host`` in a ``with`` block: what requires a gradient is one for
    all.

    Raises:
        ModgraftError: another thread trains it.
    """
    mine = [threading.get_ident()]
    found = _trained_by.setdefault(id(host), mine)
    if found != mine:
        raise ModgraftError(
            f"this {type(host).__name__} is being trained in another thread: wait for that fit, or "
            f"train several modules in one pass, mg.fit_side_by_side(host, {{name: loader, …}})"
        )
    try:
        yield
    finally:
        if found is mine:  # else it is within another fit of the same thread
            del _trained_by[id(host)]


class Interrupt:
    """Hold a Ctrl-C or a SIGTERM back until the step is complete; a second one stops at once.

    Outside the main thread, or where the program has set a handler, it does nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self.hold = True  # False during evaluation, which may be interrupted anywhere
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for number, default in INTERRUPTING.items():
                if signal.getsignal(number) == default:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested or not self.hold:
            raise KeyboardInterrupt
        self.requested = True
