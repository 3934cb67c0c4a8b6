"""The loop behind `fit`: its state, one step, evaluation, saving and resuming."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from itertools import islice
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from modgraft.errors import ModgraftError
from modgraft.training import checkpoint as disk
from modgraft.training import stream as data
from modgraft.training.history import History, Metrics, check_monitor, numbers
from modgraft.training.optim import (
    adamw,
    clip_gradients,
    gradient_norm,
    learning_rate,
    trainable,
    warmup_steps,
)
from modgraft.training.processes import Interrupt
from modgraft.training.progress import Show
from modgraft.training.settings import Settings
from modgraft.training.stream import Batch, Stream


class Run:
    """One call of `fit`. `step` counts completed steps; `place` is the next (epoch, batch)."""

    def __init__(
        self, host: nn.Module, stream: Stream, settings: Settings, accelerator: Accelerator
    ) -> None:
        self.host, self.stream = host, stream
        self.settings, self.accelerator = settings, accelerator
        self.evaluate: Any = None
        self.weigh: data.Weigh | None = None
        self.ignore: frozenset[str] = frozenset()
        self.save_every = 1
        self.store: disk.Checkpoints | None = None

        self.step, self.place = 0, (0, 0)
        self.at = (0, 0)  # the (epoch, batch) that the step under way began with
        self.evaluated = 0  # the last step that was evaluated
        self.worse = 0  # evaluations in a row without a better one
        self.best_tensors: dict[str, Tensor] | None = None
        self.history = History(monitor=settings.monitor)
        self.metrics = Metrics(None)
        self.interrupt = Interrupt()
        self.whole = True  # False while a step is half done
        self.before = 0.0  # seconds of the parts before an interruption
        self.began = time.monotonic()

    # --- the run --------------------------------------------------------------------------------

    def start(self, *, resume: bool, progress: bool, label: str) -> History:
        """Set up, resume, train, restore what belongs to the caller."""
        with ExitStack() as stack:
            stack.enter_context(data.own_randomness())
            stack.callback(_set_modes, [(m, m.training) for m in self.host.modules()])
            self._prepare()
            stack.callback(self.optimizer.zero_grad, set_to_none=True)
            found = self._open(resume, stack)
            if found is not None:
                self._resume(found)
            if self.history.stopped is None:
                self._train(stack, progress, label)
            if self.settings.restore_best and self.best_tensors is not None:
                disk.restore(self.host, self.best_tensors)
        return self.history

    def _prepare(self) -> None:
        self.device = self.accelerator.device
        self.host.to(self.device)
        self.parameters = trainable(self.host)
        self.names = {id(p): name for name, p in self.parameters.items()}
        s = self.settings
        adam = {"betas": s.betas, "eps": s.eps, "weight_decay": s.weight_decay, "fused": s.fused}
        self.optimizer = adamw(self.host, lr=s.lr, **adam)
        self.optimizer.zero_grad(set_to_none=True)
        self.buffers = {name: b.detach().cpu().clone() for name, b in self.host.named_buffers()}
        self.changed: set[str] = set()  # buffers that a checkpoint has to bring

    def _open(self, resume: bool, stack: ExitStack) -> disk.Checkpoint | None:
        """The checkpoint to go on from, checked against the host and the settings."""
        if self.store is None:
            return None
        if self.accelerator.is_main_process:
            stack.callback(self.store.close)
            self.store.open(resume=resume)
        self.accelerator.wait_for_everyone()
        self.fingerprint = disk.fingerprint(self.host)
        self.metrics = Metrics(self.store.folder, write=self.accelerator.is_main_process)
        stack.callback(self.metrics.close)
        paths = self.store.paths()
        if not paths:
            self.metrics.start(0)
            return None
        found = self.store.load(paths[-1])
        disk.refuse_other(found.path, "another model", found.fingerprint, self.fingerprint)
        settings = self.settings.record()
        disk.refuse_other(found.path, "other settings", found.state["settings"], settings)
        return found

    def _resume(self, found: disk.Checkpoint) -> None:
        state, history = found.state, self.history
        for line in self.metrics.start(state["metrics_bytes"]):
            history.add(line)
        disk.restore(self.host, found.tensors)
        disk.restore_optimizer(self.optimizer, self.names, found.optimizer)
        self.step, self.place = state["step"], (state["epoch"], state["batch"])
        self.evaluated, self.worse = state["evaluated"], state["worse"]
        self.changed |= found.tensors.keys() - self.parameters.keys()
        history.resumed_from, history.stopped = self.step, state["stopped"]
        history.best, history.untouched = state["best"], state["untouched"]
        history.seconds = self.before = state["seconds"]
        if history.best is not None and self.store is not None:
            path = self.store.path(history.best["step"])
            best = found if path == found.path else self.store.load(path)
            self.best_tensors = best.tensors

    def _train(self, stack: ExitStack, progress: bool, label: str) -> None:
        many = self.accelerator.num_processes > 1
        self.model = self.accelerator.prepare_model(self.host) if many else self.host
        self.host.train()
        self.began = time.monotonic()
        stack.enter_context(self.interrupt)
        enabled = progress and self.accelerator.is_main_process
        show = Show(label, self.settings.steps, start=self.step, enabled=enabled)
        with show:
            if self.step and self.store is not None:
                show.say(f"resumed from step {self.step}, {self.store.folder}")
            try:
                self._loop(show)
            except KeyboardInterrupt:
                raise KeyboardInterrupt(self._interrupted(show)) from None
        if self.history.untouched:
            names = ", ".join(self.history.untouched[:4])
            show.say(f"{len(self.history.untouched)} tensors never had a gradient: {names} …")

    def _loop(self, show: Show) -> None:
        groups = self._groups()
        # interrupted between a step and its evaluation, or before the end was noted
        if self._evaluation_due() or self.step >= self.settings.steps:
            self._after_step(show)
        while self.history.stopped is None:
            batches, self.at, place = next(groups)
            self.whole = False
            line = self._take(batches)
            self.step, self.place = self.step + 1, place
            line = {"step": self.step, "split": "train"} | line | {"seconds": self._seconds()}
            self.metrics.write(line)
            self.history.add(line)
            self.whole = True
            show.step(self.step, line["loss"], line["lr"])
            self._after_step(show)
            if self.interrupt.requested and self.history.stopped is None:
                raise KeyboardInterrupt

    def _after_step(self, show: Show) -> None:
        """Evaluate, decide whether that was all, and save; the order that resuming relies on."""
        better = self._evaluate(show) if self._evaluation_due() else False
        s = self.settings
        if s.patience is not None and self.worse >= s.patience:
            self.history.stopped = "patience"
        elif self.step >= s.steps:
            self.history.stopped = "steps"
        if self.history.stopped is not None:
            state = self.optimizer.state
            self.history.untouched = [n for n, p in self.parameters.items() if p not in state]
        if better or self.history.stopped or self.step % self.save_every == 0:
            self._save()

    def _groups(self) -> Iterator[tuple[list[Batch], tuple[int, int], tuple[int, int]]]:
        """The batches of one step, the (epoch, batch) of the first and that after the last."""
        epoch, batch = self.place
        while True:
            read = self.stream.read(epoch, batch)
            while group := list(islice(read, self.settings.accumulate)):
                yield group, (epoch, batch), (epoch, batch + len(group))
                batch += len(group)
            if batch == 0:
                raise ModgraftError(f"the loader gave no batch in epoch {epoch}")
            epoch, batch = epoch + 1, 0

    def _seconds(self) -> float:
        return round(self.before + time.monotonic() - self.began, 3)

    # --- one step -------------------------------------------------------------------------------

    def _take(self, batches: list[Batch]) -> dict[str, Any]:
        """Σ_i w_i·loss_i / Σ w over the batches of all processes, its gradient, one update."""
        s, world = self.settings, self.accelerator.num_processes
        epoch, step = self.at[0], self.step + 1
        weights = [1.0 if self.weigh is None else self.weigh(b) for b in batches]
        (total,) = self._sum([sum(weights)])
        if total <= 0:
            raise ModgraftError(f"step {step}: weigh= counts no targets in {self._where(batches)}")
        losses: list[Tensor] = []
        for i, batch in enumerate(batches):
            data.seed_everything(s.seed, "step", step, i, self.accelerator.process_index)
            last = i == len(batches) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                loss = self._loss(self.model, batch)
                # DDP averages over processes what is to be summed: hence the factor `world`
                self.accelerator.backward(loss * (weights[i] * world / total))
            losses.append(loss.detach())
        norm = gradient_norm(self.parameters.values())
        # one transfer from the device: everything is finite, or nothing is updated
        wide = torch.promote_types(losses[0].dtype, torch.float32)
        *values, grad_norm = torch.stack([x.to(wide) for x in (*losses, norm)]).tolist()
        mean = sum(w * v for w, v in zip(weights, values, strict=True)) / total
        mean, asked = self._sum([mean, float(self.interrupt.requested)])
        self.interrupt.requested = asked > 0
        if not (math.isfinite(mean) and math.isfinite(grad_norm)):
            self._refuse(batches, values, grad_norm)
        if s.clip is not None:
            clip_gradients(self.parameters.values(), norm, s.clip)
        lr = learning_rate(
            step,
            lr=s.lr,
            total=s.steps,
            warmup=warmup_steps(s.warmup, s.steps),
            schedule=s.schedule,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {"loss": mean, "lr": lr, "grad_norm": grad_norm, "epoch": epoch}

    def _loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """`forward`'s loss, a scalar, computed under autocast where that was asked for."""
        given = {k: v for k, v in batch.items() if k not in self.ignore}
        with self._autocast():
            output = model(**data.to_device(given, self.device))
        loss = getattr(output, "loss", None)
        if not isinstance(loss, Tensor) or loss.ndim != 0:
            raise ModgraftError(
                f"{type(self.host).__name__}.forward({', '.join(given)}) returned no scalar .loss "
                f"(it is {'absent' if loss is None else loss}); does the batch hold labels?"
            )
        if torch.is_grad_enabled() and not loss.requires_grad:
            raise ModgraftError(
                "the loss depends on none of the parameters that train: "
                f"{', '.join(list(self.parameters)[:4])} … Is the module active?"
            )
        return loss

    def _autocast(self) -> Any:
        if self.settings.precision == "bf16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def _refuse(self, batches: list[Batch], losses: list[float], norm: float) -> None:
        """Raise for a loss or gradient that is not finite, before anything was changed."""
        bad = [b for b, v in zip(batches, losses, strict=True) if not math.isfinite(v)]
        named = [(n, p.grad) for n, p in self.parameters.items() if p.grad is not None]
        grads = [n for n, g in named if not g.isfinite().all()]
        self.optimizer.zero_grad(set_to_none=True)
        what = f"the loss is {losses}" if bad else f"the gradient norm is {norm}"
        if not bad and grads:
            what += f" ({', '.join(grads[:4])})"
        raise ModgraftError(
            f"step {self.step + 1}: {what} in {self._where(bad or batches)}. Nothing was updated "
            "or written. Look at these examples, lower lr= or clip=, or train in precision='no'"
        )

    def _where(self, batches: list[Batch]) -> str:
        ids = [i for b in batches for i in data.ids_of(b, tuple(self.ignore)) or ()]
        place = f"epoch {self.at[0]}, batch {self.at[1]}"
        return f"{place} (ids {', '.join(ids[:16])})" if ids else f"{place} (it carries no ids)"

    def _sum(self, values: list[float]) -> list[float]:
        """Sums over all processes."""
        if self.accelerator.num_processes == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        return cast(Tensor, self.accelerator.reduce(tensor, "sum")).tolist()

    # --- evaluation -----------------------------------------------------------------------------

    def _evaluation_due(self) -> bool:
        s = self.settings
        due = self.step % s.evaluate_every == 0 or self.step == s.steps
        return self.evaluate is not None and 0 < self.step != self.evaluated and due

    def _evaluate(self, show: Show) -> bool:
        """Measure, record, and say whether it is the best so far."""
        self.host.eval()
        self.interrupt.hold = self.accelerator.num_processes > 1
        data.seed_everything(self.settings.seed, "evaluate", self.step)
        with torch.no_grad():
            measured = self.evaluate(self.host) if callable(self.evaluate) else self._mean_loss()
        self.interrupt.hold = True
        self.host.train()
        values = numbers(measured)
        if self.accelerator.num_processes > 1:  # the same decision everywhere: the first one's
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
                self.best_tensors = disk.snapshot(self.host, self._changed_buffers())
        text = "  ".join(f"{k} {v:.4f}" for k, v in values.items() if v is not None)
        show.say(f"step {self.step}  evaluation  {text}{'  (best)' if better else ''}")
        return better

    def _mean_loss(self) -> dict[str, float]:
        """The mean loss over the evaluation loader, weighted by `weigh` or by examples."""
        sums = [0.0, 0.0]
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        for batch in Stream(self.evaluate, seed=0, rank=rank, world=world, pad=False).read(0):
            weight = float(_examples(batch)) if self.weigh is None else self.weigh(batch)
            sums[0] += weight * self._loss(self.host, batch).item()
            sums[1] += weight
        total, count = self._sum(sums)
        if count == 0:
            raise ModgraftError("the evaluation loader holds nothing to average over")
        return {"loss": total / count}

    # --- saving ---------------------------------------------------------------------------------

    def _changed_buffers(self) -> set[str]:
        for name, buffer in self.host.named_buffers():
            if not torch.equal(buffer.detach().cpu(), self.buffers[name]):
                self.changed.add(name)
        return self.changed

    def _save(self) -> None:
        """A checkpoint of the last completed step, by the main process."""
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
                "settings": self.settings.record(),
            }
            self.store.save(
                self.step,
                state,
                self.fingerprint,
                disk.snapshot(self.host, self._changed_buffers()),
                disk.optimizer_tensors(self.optimizer, self.names),
            )
        self.accelerator.wait_for_everyone()

    def _interrupted(self, show: Show) -> str:
        """Save if that is possible, and say how to go on."""
        # with several processes only an agreed moment can be saved: after a step, by all of them
        possible = self.accelerator.num_processes == 1 or self.interrupt.requested
        if self.store is None:
            text = f"interrupted after step {self.step}; nothing is kept, since fit has no folder="
        elif not (self.whole and possible and self.step):
            text = (
                f"interrupted in step {self.step + 1}; {self.store.folder} keeps the steps before"
            )
        else:
            self._save()
            text = (
                f"interrupted after step {self.step} and saved; the same call of fit goes on from "
                f"there: {self.store.path(self.step)}"
            )
        show.say(text)
        return text


def _set_modes(modes: list[tuple[nn.Module, bool]]) -> None:
    for module, mode in modes:
        module.training = mode


def _examples(batch: Batch) -> int:
    """Rows of the first tensor in a batch; 1 for a batch without any."""
    return next((v.shape[0] for v in batch.values() if isinstance(v, Tensor) and v.ndim), 1)
