"""Train several modules side by side, with one forward and backward a step for all of them."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modgraft.core.errors import ModgraftError, warn
from modgraft.core.expression import module_of
from modgraft.engine.implant import check_learns
from modgraft.engine.writes import taken_back
from modgraft.routing.mixture import Mixture
from modgraft.training import checkpoint as disk
from modgraft.training.fit import planned
from modgraft.training.forward import own_modes
from modgraft.training.history import History
from modgraft.training.host_like import HostLike
from modgraft.training.note import noted_together
from modgraft.training.optim import gradient_norm
from modgraft.training.parts import together
from modgraft.training.processes import Interrupt, accelerator_for, alone
from modgraft.training.progress import Show
from modgraft.training.randomness import own_randomness, seed_everything
from modgraft.training.run import Run
from modgraft.training.settings import Settings
from modgraft.training.stream import Batch

SHARED = ("until", "precision", "ignore", "resume", "progress", "label", "fused", "folder", "note")


def fit_side_by_side(
    host: HostLike, loaders: Mapping[str, Iterable[Batch]], **settings: Any
) -> dict[str, History]:
    """Train several modules in one pass, each to the result of `host.fit` for it alone.

    A step takes one batch of each module's loader and runs them as one, every example through its
    own module. Each module has a loss, the mean over its own examples, a gradient norm that is
    clipped, an optimiser, a schedule, evaluations, early stopping and a record. None affects
    another; up to rounding, and up to the randomness in ``forward`` (dropout), it is the same as
    ``with host.using(name): host.fit(loader, train=name, …)`` one after the other.

    A module whose loss or gradient is no longer finite keeps the weights it had and leaves the
    pass, with a warning; its history says ``stopped="diverged"``, and why in ``error``.

    Args:
        host: where the modules are implanted, none of them a mixture.
        loaders: the batches of each module, by its name. A batch is run with its module alone, or
            with the composition that it carries under ``"modules"``, which names it and none of the
            others. Texts of unequal length are padded on the right; other shapes have to agree.
        **settings: of :func:`modgraft.training.fit.fit`, but ``accumulate``. Each may be a dict by
            module, ``lr={"fr": 1e-3, "de": 5e-4}``, but those of the pass: ``precision``,
            ``until``, ``folder``, ``resume``. A module's ``seed`` decides the order of its data;
            what ``forward`` draws (dropout) is decided by the first one's. In ``folder`` each
            module has a folder of its name; the same call goes on where all of them were, bit for
            bit on a CPU.

    Returns:
        The record of each module.

    Raises:
        ModgraftError: for an unknown module or setting, a composition with another module that
            trains, batches that cannot be one, a host whose loss cannot be told apart or is another
            one beside others, or several processes.
        KeyboardInterrupt: after saving all of them.
    """
    names = list(loaders)
    if not names:
        raise ModgraftError("fit_side_by_side(host, {}): give a loader for each module's name")
    for name in names:
        if isinstance(host[name].method, Mixture):
            raise ModgraftError(
                f"{name!r} is a Mixture, whose routers learn from a batch as a whole; train it by "
                f"host.fit(loader, train={name!r})"
            )
        check_learns(name, host[name])
    by_name = {name: _settings_of(name, names, settings) for name in names}
    shared = by_name[names[0]]
    assert isinstance(host, nn.Module)  # noqa: S101
    with alone(host), host.training_only(names):
        runs = _runs(host, loaders, by_name)
        if shared.note:
            runs[names[0]].noted = partial(noted_together, runs, loaders, shared.label)
        return _Pass(host, runs).start()


def _settings_of(name: str, names: list[str], settings: Mapping[str, Any]) -> Settings:
    """Return the settings that `fit` would take for one module."""
    known = [field.name for field in fields(Settings)]
    if unknown := [key for key in settings if key not in known]:
        raise ModgraftError(
            f"{unknown[0]}= is no setting of fit_side_by_side; there are {', '.join(known)}"
        )
    given = {"label": "side by side", **settings}
    for key, value in given.items():
        if not isinstance(value, Mapping):
            continue
        if key in SHARED:
            raise ModgraftError(f"{key}= is one for the pass, not {dict(value)!r:.80}")
        if value.keys() != set(names):
            raise ModgraftError(
                f"{key}={{…}} has {', '.join(value) or 'nothing'}; it has to say one for each of "
                f"{', '.join(names)}"
            )
        given[key] = value[name]
    found = Settings(**given)
    if found.accumulate != 1:
        raise ModgraftError(
            f"accumulate={found.accumulate}: a step of modules side by side takes one batch of "
            f"each; make the batches larger, or train by host.fit"
        )
    if found.keep < 2:
        raise ModgraftError(
            f"keep={found.keep}: modules that train side by side are saved one after the other, "
            f"and go on from the last step that all of them have; keep at least 2"
        )
    return found


def _runs(
    host: HostLike, loaders: Mapping[str, Iterable[Batch]], by_name: Mapping[str, Settings]
) -> dict[str, Run]:
    accelerator = accelerator_for()
    if accelerator.num_processes > 1:
        raise ModgraftError(
            f"{accelerator.num_processes} processes: modules train side by side in one; give each "
            f"process modules of its own"
        )
    assert isinstance(host, nn.Module)  # noqa: S101
    runs = {}
    for name, loader in loaders.items():
        given = by_name[name]
        if given.folder is not None:
            given = replace(given, folder=Path(given.folder) / name)
        runs[name] = planned(host, loader, accelerator, given, host[name], list(loaders))
    return runs


class _Pass:
    """Runs of different modules that share their forward, and are all at the same step."""

    def __init__(self, host: HostLike, runs: dict[str, Run]) -> None:
        self.host, self.runs, self.interrupt = host, runs, Interrupt()
        config = getattr(host.model, "config", None)
        self.padding = getattr(config, "pad_token_id", None) or 0
        self.first = next(iter(runs.values()))
        self.checked: set[bool] = set()  # whether batches are padded in a pass that was checked

    def going(self) -> dict[str, Run]:
        return {name: run for name, run in self.runs.items() if run.history.stopped is None}

    def start(self) -> dict[str, History]:
        with ExitStack() as stack:
            stack.enter_context(own_modes(self.host.modules()))
            self._open(stack)
            if self.going():
                stack.enter_context(self.first.noted())
                self._train(stack)
            for run in self.runs.values():
                run.finish()
        return {name: run.history for name, run in self.runs.items()}

    def _open(self, stack: ExitStack) -> None:
        whole = None if self.first.store is None else disk.fingerprint(self.first.host)
        for run in self.runs.values():
            run.interrupt = self.interrupt
            run.prepare(stack)
            run.open(stack, whole)
        last = min(map(_resumes_from, self.runs.values()))  # the last step that all have saved
        for run in self.runs.values():
            run.resume(last)

    def _train(self, stack: ExitStack) -> None:
        self.host.train()
        stack.enter_context(self.interrupt)
        steps = max(run.settings.steps for run in self.runs.values())
        step = max(run.step for run in self.going().values())
        s = self.first.settings
        show = Show(f"{s.label} ({len(self.runs)})", steps, start=step, enabled=s.progress)
        groups = {name: run.groups() for name, run in self.runs.items()}
        with show:
            if step and self.first.store is not None:
                show.say(f"resumed from step {step}, {self.first.store.folder.parent}")
            self._judge({n: run for n, run in self.going().items() if run.judge_now}, show)
            while going := self.going():
                read = {name: next(groups[name]) for name in going}
                with own_randomness(self.first.own):
                    self._step(going, read, show)
                self._judge(going, show)
                if self.interrupt.requested and self.going():
                    raise KeyboardInterrupt(self._interrupted(show))

    def _step(self, going: dict[str, Run], read: dict[str, Any], show: Show) -> None:
        """Run the batches that were `read` forward and backward once, and update each module."""
        step = next(iter(going.values())).step + 1
        batches: dict[str, Batch] = {name: group[0] for name, (group, _, _) in read.items()}
        tagged = self._tagged(batches)
        whole = together(list(tagged.values()), list(tagged), self.padding)
        self._check(tagged, whole)
        seed_everything(self.first.settings.seed, "step", step, 0, 0, own=self.first.own)
        losses = self.first.forward.losses(whole)  # [N]
        if not losses.requires_grad:
            raise ModgraftError(
                f"the loss depends on no parameter of {', '.join(going)}; do the modules act?"
            )
        good = losses.detach().isfinite()
        losses[good].sum().backward()  # a module that diverged does not stop the others
        norms = [gradient_norm(run.parameters.values()) for run in going.values()]
        wide = torch.promote_types(losses.dtype, torch.float32)
        values = torch.stack([losses.detach().to(wide), torch.stack(norms).to(wide)]).tolist()
        shown = {}
        for (name, run), loss, norm, raw in zip(going.items(), *values, norms, strict=True):
            _, run.at, place = read[name]
            if not (math.isfinite(loss) and math.isfinite(norm)):
                run.history.stopped = "diverged"
                run.history.error = f"{name}: {run.not_finite([batches[name]], [loss], norm)}"
                run.optimizer.zero_grad(set_to_none=True)
                continue
            run.update(raw)
            line = {"loss": loss, "lr": run.lr, "grad_norm": norm, "epoch": run.at[0]}
            run.record(line, place)
            shown[name] = loss
        if shown:
            show.step(step, sum(shown.values()) / len(shown), self.first.lr, shown)

    def _tagged(self, batches: dict[str, Batch]) -> dict[str, Batch]:
        """Return what the host is given of each batch, with its composition."""
        tagged = {}
        for name, batch in batches.items():
            given = {k: v for k, v in batch.items() if k not in self.first.settings.ignore}
            given["modules"] = self._composition(name, given.get("modules", name))
            tagged[name] = given
        return tagged

    @torch.no_grad()
    def _check(self, tagged: dict[str, Batch], whole: Batch) -> None:
        """Refuse a host that gives a module another loss in the pass than alone.

        This is asked before the first step, and again before the first with padded batches or the
        first without, of one module of each kind and of the one that is filled up most: in
        training mode, or in evaluation where training draws random numbers. A host whose loss is
        left to chance then too, as that of a masked autoencoder, cannot be asked.

        Raises:
            ModgraftError: with both losses.
        """
        padded = any(_is_padded(batch, whole) for batch in tagged.values())
        if len(tagged) == 1 or padded in self.checked:
            return
        self.checked.add(padded)
        if not self._compare(tagged, whole, train=True):
            self._compare(tagged, whole, train=False)

    def _compare(self, tagged: dict[str, Batch], whole: Batch, train: bool) -> bool:
        """Compare losses in training mode or in evaluation; return whether nothing random was."""
        forward, host = self.first.forward, self.first.host
        with own_modes(host.modules()), taken_back(host):
            host.train(train)
            before = _drawn_from()
            output, losses = forward.with_losses(whole)
            if not all(map(torch.equal, before, _drawn_from())):
                return False
            near = _rounding(host, losses, self.first.settings.precision)
            found = dict(zip(tagged, losses, strict=True))
            for name in self._differing(tagged):
                loss = found[name]
                own, alone = forward.with_losses(tagged[name])
                parts = {"loss": (alone, loss), **_parts_of_loss(own, output)}
                for what, (one, other) in parts.items():
                    if not torch.isclose(
                        one, other.to(one), rtol=near**0.5, atol=100 * near, equal_nan=True
                    ):
                        raise ModgraftError(_differs(host, name, what, one, other, list(tagged)))
        return True

    def _differing(self, tagged: dict[str, Batch]) -> list[str]:
        """Return one module of each kind, and the one whose examples are filled up most."""

        def size(name: str) -> int:
            tensors = [v for v in tagged[name].values() if isinstance(v, Tensor) and v.dim()]
            return sum(v.shape[1:].numel() for v in tensors)

        def kind(name: str) -> Hashable:
            implant = self.host[name]
            return *map(type, implant.places), *implant.paths

        kinds = {kind(name): name for name in tagged}
        return list(dict.fromkeys([min(tagged, key=size), *kinds.values()]))

    def _composition(self, name: str, modules: Any) -> Any:
        for one in modules if isinstance(modules, list | tuple) else [modules]:
            read = self.host.read(one)
            used = {module_of(n) for n in (() if read is None else read.names())}
            if name not in used or used & self.runs.keys() != {name}:
                raise ModgraftError(
                    f"a batch of {name!r} is to run with {one!r}: it has to go through {name!r}, "
                    f"and through none of the others that train, "
                    f"{', '.join(n for n in self.runs if n != name) or 'of which there are none'}"
                )
        return modules

    def _judge(self, going: dict[str, Run], show: Show) -> None:
        """Evaluate, and save all runs at the same step, those that have ended last."""
        lost = [run for run in going.values() if run.history.stopped == "diverged"]
        due = bool(lost)
        for name, run in going.items():
            if run not in lost:
                alone = self.host[name].names == [name]  # else batches say which of its tasks
                with self.host.using(name) if alone else nullcontext():
                    due = run.judge(show) or due
        if due:
            for run in sorted(going.values(), key=lambda run: run.history.stopped is not None):
                run.save()
        for run in lost:
            show.say(f"{run.history.error}")
            warn(f"{run.history.error}; the others go on")

    def _interrupted(self, show: Show) -> str:
        store = self.first.store
        text = f"interrupted after step {max(run.step for run in self.runs.values())}"
        if store is None:
            text += "; nothing is kept, since fit_side_by_side has no folder="
        else:
            for run in self.going().values():
                run.save()
            text += f" and saved; the same call goes on from there: {store.folder.parent}"
        show.say(text)
        return text


def _is_padded(batch: Batch, whole: Batch) -> bool:
    """Return whether ``batch`` has other shapes than it has in the whole one."""
    tensors = [k for k, v in batch.items() if isinstance(v, Tensor) and v.dim()]
    return any(batch[key].shape[1:] != whole[key].shape[1:] for key in tensors)


def _rounding(host: nn.Module, losses: Tensor, precision: str) -> float:
    """Return the relative rounding of one operation, of the coarsest in a forward of ``host``."""
    types = {p.dtype for p in host.parameters() if p.is_floating_point()} | {losses.dtype}
    types |= {torch.bfloat16} if precision == "bf16" else set()
    tf32 = losses.is_cuda and torch.get_float32_matmul_precision() != "highest"
    return max(torch.finfo(torch.float16).eps if tf32 else 0, *(torch.finfo(t).eps for t in types))


def _parts_of_loss(own: Any, joined: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Return what two outputs say is in their loss for all examples, as a balance of experts."""
    names = [key for key in own if "loss" in key and key != "loss"] if isinstance(own, dict) else []
    return {
        key: (own[key], joined[key])
        for key in names
        if isinstance(own[key], Tensor) and own[key].dim() == 0
    }


def _differs(
    host: nn.Module, name: str, what: str, alone: Tensor, joined: Tensor, names: list[str]
) -> str:
    others = ", ".join(each for each in names if each != name)
    return (
        f"the {what} of {name!r} is {float(alone):.6g} alone and {float(joined):.6g} in one pass "
        f"with {others}: that of a {type(host.get_submodule('model')).__name__} depends on the "
        f"length that texts are padded to, as a softmax over places does, or on all examples, as a "
        f"balance of experts does. Give the texts one length, leave a balance out "
        f"(output_router_logits=False), or train one after the other, by host.fit"
    )


def _drawn_from() -> list[Tensor]:
    """Return the states of the generators that a forward draws from."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *cuda]


def _resumes_from(run: Run) -> float:
    """Return the step that a run resumes from; ∞ if it has ended."""
    paths = [] if run.store is None else run.store.paths()
    if not paths or run.store is None:
        return 0
    ended = run.store.load(paths[-1]).state["stopped"] not in (None, "until")
    return math.inf if ended else disk.step_of(paths[-1])
