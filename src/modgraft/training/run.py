"""The loop behind `fit`: its state, one step, evaluation, saving and resuming."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import cached_property
from itertools import islice
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list, gather_object
from torch import Tensor, nn

from modgraft.core.errors import ModgraftError, listed, warn
from modgraft.core.files import folder_path, held
from modgraft.core.offloaded import is_offloaded
from modgraft.core.tensors import device_of
from modgraft.training import checkpoint as disk
from modgraft.training import stream as data
from modgraft.training.forward import Forward, mean_loss, mean_parts, own_modes
from modgraft.training.history import History, Metrics, check_monitor, numbers
from modgraft.training.multitask import mean_of_tasks
from modgraft.training.optim import (
    clip_gradients,
    gradient_norm,
    learning_rate,
    trainable,
    warmup_steps,
)
from modgraft.training.optimizers import Several, described, make_optimizer
from modgraft.training.parts import PARTS
from modgraft.training.processes import (
    Interrupt,
    beside_others,
    check_learns_whole,
    in_parallel,
    moving_buffers,
)
from modgraft.training.progress import Show
from modgraft.training.randomness import generators_in, own_randomness, seed_everything
from modgraft.training.settings import Decided
from modgraft.training.stream import Batch, Repeated, Stream


class Run:
    """One run of training, whose steps are counted once they are complete.

    Args:
        host: what runs.
        stream: the batches.
        settings: of `fit`, decided for this run.
        accelerator: device and processes.
        part: the part of the host that trains and is saved; None: all that requires a gradient.
        first: the digest of the stream's first batch.
    """

    def __init__(
        self,
        host: nn.Module,
        stream: Stream,
        settings: Decided,
        accelerator: Accelerator,
        part: nn.Module | None = None,
        first: str = "",
    ) -> None:
        self.host, self.stream, self.first = host, stream, first
        self.part = host if part is None else part
        self.settings, self.accelerator = settings, accelerator
        self.store: disk.Checkpoints | None = None
        if settings.folder is not None:
            self.store = disk.Checkpoints(
                folder_path(settings.folder, "fit(folder=)"), keep=settings.keep
            )
        self.noted: Callable[[], AbstractContextManager[None]] = nullcontext  # writes the note

        self.step, self.place = 0, (0, 0)  # completed steps, and the next (epoch, batch)
        self.at = (0, 0)  # the (epoch, batch) at which the step under way began
        self.batch: Batch | None = None  # the one that is there
        self.evaluated = 0  # the last step that was evaluated
        self.worse = 0  # evaluations since the best one
        self.best_tensors: dict[str, Tensor] | None = None
        self.history = History(monitor=settings.monitor)
        self.metrics = Metrics(None)
        self.interrupt = Interrupt()
        self.complete = True  # False in the middle of a step
        self.lr = settings.lr  # of the last step
        self.seconds_before = 0.0  # of training before it was interrupted and resumed
        self.began = time.monotonic()

    @property
    def many(self) -> bool:
        """Whether several processes train."""
        return self.accelerator.num_processes > 1

    # --- the run --------------------------------------------------------------------------------

    @cached_property
    def own(self) -> list[Any]:
        """The random generators that the host and its evaluation have of their own."""
        return generators_in(self.host, self.settings.evaluate, self.settings.weigh)

    def start(self) -> History:
        """Set up, resume, train, and restore modes."""
        with ExitStack() as stack:
            stack.enter_context(own_modes(self.host.modules()))
            if self.many:
                stack.enter_context(beside_others())
            self.prepare(stack)
            self.open(stack)
            self.resume()
            self.check_alike()
            if self.history.stopped is None:
                stack.enter_context(self.noted())
                self._train(stack)
            self.finish()
        return self.history

    def prepare(self, stack: ExitStack) -> None:
        """Make the optimiser; no gradient is left when `stack` closes."""
        self.device = self.accelerator.device
        if is_offloaded(self.host):  # hooks move the layers, one by one
            self.device = device_of(self.host)
        else:
            self.host.to(self.device)
        check_learns_whole(self.host)
        self.parameters = trainable(self.part)
        self.names = {id(p): name for name, p in self.parameters.items()}
        s = self.settings
        adam = {"betas": s.betas, "eps": s.eps, "weight_decay": s.weight_decay, "fused": s.fused}
        self.optimizer = make_optimizer(s.optimizer, self.part, lr=s.lr, **adam)
        self.optimizer.zero_grad(set_to_none=True)
        stack.callback(self.optimizer.zero_grad, set_to_none=True)
        self.buffers = {name: b.detach().cpu().clone() for name, b in self.part.named_buffers()}
        self.changed: set[str] = set()  # buffers that have changed, which a checkpoint has to save
        self.forward = Forward(self.host, frozenset(s.ignore), self.device, s.precision)

    def open(self, stack: ExitStack, fingerprint: Mapping[str, Any] | None = None) -> None:
        """Take the folder until `stack` closes; the host's fingerprint is computed unless given."""
        if self.store is not None:
            if self.accelerator.is_main_process:
                stack.enter_context(held(self.store.folder, "training"))
                self.store.open(resume=self.settings.resume)
            self.accelerator.wait_for_everyone()
            self.metrics = Metrics(self.store.folder, write=self.accelerator.is_main_process)
            stack.callback(self.metrics.close)
        if self.store is not None or self.many:
            self.fingerprint = dict(fingerprint or disk.fingerprint(self.host))

    def resume(self, until: float = math.inf) -> None:
        """Resume from the last checkpoint up to step `until`, if there is one.

        Raises:
            ModgraftError: it is damaged, or of another host, other data or other settings.
        """
        paths = [] if self.store is None else self.store.paths(until)
        if self.store is None or not paths:
            self.metrics.start(0)
            return
        found = self.store.load(paths[-1])
        settings = self.settings.record()
        disk.refuse_other(
            found.path, "other data", found.state.get("made_by", {}), self.stream.made_by
        )
        disk.refuse_other(found.path, "other settings", found.state["settings"], settings)
        disk.check_goes_on(found, self.fingerprint)
        state, history = found.state, self.history
        self.step = state["step"]
        if "rows" in state:
            self.at = state["at"][0], state["at"][1]
            self._check_rows(found)
        for line in self.metrics.start(state["metrics_bytes"]):
            history.add(line)
        disk.restore(self.part, found.tensors)
        disk.restore_optimizer(self.optimizer, self.names, found.optimizer)
        self.place = (state["epoch"], state["batch"])
        self.evaluated, self.worse = state["evaluated"], state["worse"]
        self.changed |= found.tensors.keys() - self.parameters.keys()
        history.resumed_from, history.stopped = self.step, state["stopped"]
        if history.stopped == "until" and self.step < self.last:
            history.stopped = None
        history.best, history.untouched = state["best"], state["untouched"]
        history.error = state.get("error")
        history.seconds = self.seconds_before = state["seconds"]
        if history.best is not None:
            path = self.store.path(history.best["step"])
            best = found if path == found.path else self.store.load(path)
            self.best_tensors = best.tensors
        if self.accelerator.is_main_process:
            self.store.prune()

    def _check_rows(self, found: disk.Checkpoint) -> None:
        """Refuse to go on with other data, and warn where rows differ at every reading."""
        there, here = found.state["rows"], self._rows()
        if there == here:
            return
        if data.digest(self.stream.first()) == self.first and self._rows() == here:
            disk.refuse_other(found.path, "other data", there, here)
        warn(
            f"{found.path}: rows that were read before it stopped are others when they are read "
            f"again, by random numbers that are not kept with the run: the resumed run is not the "
            f"uninterrupted one to the bit"
        )

    def check_alike(self) -> None:
        """Refuse processes that differ in the host, the data, the settings or the step.

        Raises:
            ModgraftError: in each of them, with what differs.
        """
        if not self.many:
            return
        mine = {"the first batch": self.first, "the step to go on from": self.step}
        every = gather_object([self.fingerprint | self.settings.record() | mine])
        for rank, other in enumerate(every):
            if lines := disk.differences(other, every[0]):
                raise ModgraftError(
                    f"process {rank} (there) differs from process 0 (here): "
                    f"{listed(lines, disk.SHOWN)}. Each process makes the same host with the same "
                    f"modules, after the same torch.manual_seed, and gives fit the same loader, "
                    f"settings and folder; fit itself gives each its own share of the batches"
                )

    def finish(self) -> None:
        """Restore the best weights, where that was asked for."""
        if self.settings.restore_best and self.best_tensors is not None:
            disk.restore(self.part, self.best_tensors)

    def _train(self, stack: ExitStack) -> None:
        self.losses = in_parallel(self.host, self.forward.losses) if self.many else None
        self.host.train()
        self.began = time.monotonic()
        stack.enter_context(self.interrupt)
        s = self.settings
        enabled = s.progress and self.accelerator.is_main_process
        show = Show(s.label, s.steps, start=self.step, enabled=enabled)
        with show:
            if self.step and self.store is not None:
                show.say(f"resumed from step {self.step}, {self.store.folder}")
            if isinstance(self.optimizer, Several):
                show.say(described(self.optimizer, self.names))
            try:
                self._loop(show)
            except KeyboardInterrupt:
                raise KeyboardInterrupt(self._interrupted(show)) from None
        if self.history.untouched:
            names = ", ".join(self.history.untouched[:4])
            show.say(f"{len(self.history.untouched)} tensors never had a gradient: {names} …")
        if self.optimizer.state and not self._has_learned():
            warn(
                f"nothing has learned in {self.step} steps: the gradient of all that trains "
                f"({', '.join(list(self.parameters)[:4])}, …) was 0 at each of them, as where a "
                f"composition takes away what it adds, or the loss depends on none of it",
            )

    def _has_learned(self) -> bool:
        """Return whether the optimiser has seen a gradient other than 0."""
        moments = (
            t
            for p, state in self.optimizer.state.items()
            for t in state.values()
            if isinstance(t, Tensor) and t.shape == p.shape
        )
        return any(bool(t.any()) for t in moments)

    def _loop(self, show: Show) -> None:
        groups = self.groups()
        # the run was interrupted between a step and its evaluation, or before its end was saved
        if self.judge_now and self.judge(show):
            self.save()
        while self.history.stopped is None:
            batches, self.at, place = next(groups)
            self.complete = False
            with own_randomness(self.own):
                line = self._take(batches)
            self.record(line, place)
            self.complete = True
            show.step(self.step, self.history.last, self.lr, self.history.parts[-1])
            if self.judge(show):
                self.save()
            if self.interrupt.requested and self.history.stopped is None:
                raise KeyboardInterrupt

    def record(self, line: dict[str, Any], place: tuple[int, int]) -> None:
        """Record a completed step; the next one begins at `place`."""
        self.step, self.place = self.step + 1, place
        line = {"step": self.step, "split": "train"} | line | {"seconds": self._seconds()}
        self.metrics.write(line)
        self.history.add(line)

    @property
    def judge_now(self) -> bool:
        """Whether the last step is to be judged, which an interruption may have prevented."""
        return self._evaluation_due() or self.step >= self.last

    @property
    def last(self) -> int:
        """The step after which this call ends: that of the run, or ``until``."""
        return min(self.settings.steps, self.settings.until or self.settings.steps)

    def judge(self, show: Show) -> bool:
        """Evaluate, decide whether to stop, and return whether to save.

        Resuming relies on this order.
        """
        better = self._evaluate(show) if self._evaluation_due() else False
        s = self.settings
        if s.patience is not None and self.worse >= s.patience:
            self.history.stopped = "patience"
        elif self.step >= s.steps:
            self.history.stopped = "steps"
        elif self.step >= self.last:
            self.history.stopped = "until"
        if self.history.stopped is not None:
            state = self.optimizer.state
            self.history.untouched = [n for n, p in self.parameters.items() if p not in state]
        return bool(better or self.history.stopped or self.step % s.save_every == 0)

    def groups(self) -> Iterator[tuple[list[Batch], tuple[int, int], tuple[int, int]]]:
        """Yield each step's batches, with its (epoch, batch) and that of the next step."""
        epoch, batch = self.place
        while True:
            read = self.stream.read(epoch, batch)
            while group := list(islice(read, self.settings.accumulate)):
                self.batch = group[0]
                yield group, (epoch, batch), (epoch, batch + len(group))
                batch += len(group)
            if batch == 0:
                raise ModgraftError(f"the loader gave no batch in epoch {epoch}")
            epoch, batch = epoch + 1, 0

    def _seconds(self) -> float:
        return round(self.seconds_before + time.monotonic() - self.began, 3)

    # --- one step -------------------------------------------------------------------------------

    def _take(self, batches: list[Batch]) -> dict[str, Any]:
        """Σ_i w_i·loss_i / Σ w over the batches of all processes, its gradient, one update."""
        s, world = self.settings, self.accelerator.num_processes
        epoch, step = self.at[0], self.step + 1
        weights = [self._weight(b) for b in batches]
        (total,) = self._sum([sum(weights)])
        if total <= 0:
            raise ModgraftError(f"step {step}: weigh= counts no targets in {self._where(batches)}")
        losses: list[Tensor] = []
        parts: list[dict[str, float]] = []
        of = self.losses or self.forward.losses
        for i, batch in enumerate(batches):
            rank = self.accelerator.process_index
            seed_everything(s.seed, "step", step, i, rank, own=self.own)
            last = i == len(batches) - 1
            with self.losses.no_sync() if self.losses and not last else nullcontext():
                loss, of_parts = self.forward.training_loss(of, batch, self.parameters)
                # DDP averages over processes, and this is to be summed: hence the factor `world`
                (loss * (weights[i] * world / total)).backward()
            losses.append(loss.detach())
            parts += [of_parts] if of_parts and weights[i] else []
        norm = gradient_norm(self.parameters.values())
        # all numbers in one transfer from the device: unless all are finite, nothing is updated
        wide = torch.promote_types(losses[0].dtype, torch.float32)
        *values, grad_norm = torch.stack([x.to(wide) for x in (*losses, norm)]).tolist()
        mean = sum(w * v for w, v in zip(weights, values, strict=True)) / total
        mean, asked = self._sum([mean, float(self.interrupt.requested)])
        self.interrupt.requested = asked > 0
        if not (math.isfinite(mean) and math.isfinite(grad_norm)):
            raise ModgraftError(self.not_finite(batches, values, grad_norm))
        self.update(norm)
        line = {"loss": mean, "lr": self.lr, "grad_norm": grad_norm, "epoch": epoch}
        if PARTS in batches[0]:
            line["parts"] = mean_parts(gather_object(parts) if self.many else parts)
        return line

    def _weight(self, batch: Batch) -> float:
        if isinstance(batch, Repeated):
            return 0.0
        return 1.0 if self.settings.weigh is None else self.settings.weigh(batch)

    def update(self, norm: Tensor) -> None:
        """Clip the gradients, whose norm is `norm`, and update the parameters."""
        s = self.settings
        if s.clip is not None:
            clip_gradients(self.parameters.values(), norm, s.clip)
        warm = warmup_steps(s.warmup, s.steps)
        self.lr = learning_rate(
            self.step + 1, lr=s.lr, total=s.steps, warmup=warm, schedule=s.schedule
        )
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def not_finite(self, batches: list[Batch], losses: list[float], norm: float) -> str:
        """Return the error message for a loss or gradient that is not finite."""
        what = f"the loss is {losses}"
        bad = [b for b, loss in zip(batches, losses, strict=True) if not math.isfinite(loss)]
        if not bad:
            grads = {n: p.grad for n, p in self.parameters.items() if p.grad is not None}
            names = [n for n, grad in grads.items() if not grad.isfinite().all()][:4]
            what = f"the gradient norm is {norm}" + (f" ({', '.join(names)})" if names else "")
            bad = batches
        return (
            f"step {self.step + 1}: {what} in {self._where(bad)}. Nothing was updated "
            "or written. Look at these examples, lower lr= or clip=, or train in precision='no'"
        )

    def _where(self, batches: list[Batch]) -> str:
        ids = [i for b in batches for i in data.ids_of(b, self.settings.ignore) or ()]
        place = f"epoch {self.at[0]}, batch {self.at[1]}"
        return f"{place} (ids {', '.join(ids[:16])})" if ids else f"{place} (it carries no ids)"

    def _sum(self, values: list[float]) -> list[float]:
        """Sum over all processes."""
        if not self.many:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        return cast(Tensor, self.accelerator.reduce(tensor, "sum")).tolist()

    # --- evaluation -----------------------------------------------------------------------------

    def _evaluation_due(self) -> bool:
        s = self.settings
        due = self.step % s.evaluate_every == 0 or self.step == s.steps
        return s.evaluate is not None and 0 < self.step != self.evaluated and due

    def _evaluate(self, show: Show) -> bool:
        """Measure, record, and return whether it is the best so far."""
        self.host.eval()
        self.interrupt.hold = self.many
        if self.many:
            broadcast(moving_buffers(self.host))
        with torch.no_grad(), own_randomness(self.own):
            seed_everything(self.settings.seed, "evaluate", self.step, own=self.own)
            measured = self._measure()
        self.interrupt.hold = True
        self.host.train()
        values = numbers(measured)
        if self.many:  # all processes decide by the first one's values
            (values,) = broadcast_object_list([values])
        value = check_monitor(values, self.settings.monitor, self.step)
        line = {"step": self.step, "split": "eval"} | values | {"seconds": self._seconds()}
        self.metrics.write(line)
        self.history.add(line)
        self.evaluated = self.step
        best, monitor = self.history.best, self.settings.monitor
        sign = -1 if self.settings.mode == "min" else 1
        better = best is None or sign * value > sign * best[monitor]
        self.worse = 0 if better else self.worse + 1
        if better:
            self.history.best = self.history.evaluations[-1]
            if self.settings.restore_best:
                self.best_tensors = disk.snapshot(self.part, self._changed_buffers())
        text = "  ".join(f"{k} {v:.4f}" for k, v in values.items() if v is not None)
        show.say(f"step {self.step}  evaluation  {text}{'  (best)' if better else ''}")
        return better

    def _measure(self) -> Mapping[str, float]:
        """Measure by `evaluate`; of a loader the mean loss, weighted by `weigh` or by examples."""
        evaluate, weigh = self.settings.evaluate, self.settings.weigh
        if callable(evaluate):
            return evaluate(self.host)
        given = weigh, self._sum, self.accelerator.process_index, self.accelerator.num_processes
        return mean_of_tasks(evaluate, lambda loader: mean_loss(self.forward, loader, *given))

    # --- saving ---------------------------------------------------------------------------------

    def _changed_buffers(self) -> set[str]:
        for name, buffer in self.part.named_buffers():
            if not torch.equal(buffer.detach().cpu(), self.buffers[name]):
                self.changed.add(name)
        return self.changed

    def _rows(self) -> dict[str, str]:
        """Return what tells the data from others: digests of the first batch and the last one."""
        rows = {"the first batch": self.first}
        if self.stream.rereads:
            last = self.stream.reread(*self.at) if self.batch is None else self.batch
            rows[f"the batch of step {self.step}"] = data.digest(last)
        return rows

    def save(self) -> None:
        """Write a checkpoint of the last completed step, in the main process."""
        self.history.seconds = self._seconds()
        if self.store is not None and self.accelerator.is_main_process:
            best = self.history.best
            state = {
                "epoch": self.place[0],
                "batch": self.place[1],
                "metrics_bytes": self.metrics.size(),
                "seconds": self.history.seconds,
                "stopped": self.history.stopped,
                "evaluated": self.evaluated,
                "worse": self.worse,
                "best": best,
                "untouched": self.history.untouched,
                "error": self.history.error,
                "settings": self.settings.record(),
                "at": list(self.at),
                "made_by": dict(self.stream.made_by),
                "rows": self._rows(),
            }
            self.store.save(
                self.step,
                state,
                self.fingerprint,
                disk.snapshot(self.part, self._changed_buffers()),
                disk.optimizer_tensors(self.optimizer, self.names),
            )
        self.accelerator.wait_for_everyone()

    def _interrupted(self, show: Show) -> str:
        """Save if that is possible, and return how to go on."""
        # several processes can only save at a moment that all of them agree on: after a step
        possible = not self.many or self.interrupt.requested
        if self.store is None:
            text = f"interrupted after step {self.step}; nothing is kept, since fit has no folder="
        elif not (self.complete and possible and self.step):
            text = (
                f"interrupted in step {self.step + 1}; {self.store.folder} keeps the steps before"
            )
        else:
            self.save()
            text = (
                f"interrupted after step {self.step} and saved; the same call of fit goes on from "
                f"there: {self.store.path(self.step)}"
            )
        show.say(text)
        return text
