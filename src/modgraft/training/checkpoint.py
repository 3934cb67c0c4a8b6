"""Checkpoints of a run: written whole or not at all, and refused where they do not belong.

    folder/checkpoints/step-000123/
        state.json                  position, early stopping, settings, size and hash of the rest,
                                    and the hash of all this
        fingerprint.json            every tensor of the host: shape, dtype, whether it trains, hash;
                                    what its modules are, and the composition in force
        tensors.safetensors         the trainable parameters, and the buffers that changed
        optimizer.safetensors       the optimiser's state, "<parameter>#<entry>"

JSON and safetensors only. No state of a random generator is saved: `fit` seeds every step from
(seed, step). A folder is written under a temporary name, synchronised to disk and renamed; it
therefore exists complete or not at all.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from modgraft.core.errors import ModgraftError, warn
from modgraft.core.files import sync
from modgraft.core.sharded import whole
from modgraft.engine.implant import Implant
from modgraft.training.history import METRICS

FORMAT = "modgraft.checkpoint/3"
FORMER = "modgraft.checkpoint/2"
"""It tells the host by its tensors alone, and nothing of the data."""
_NAME = re.compile(r"step-(\d{6,})")
_TEMPORARY = (".tmp-", ".old-")
SHOWN = 4  # differences that an error lists
_UNREADABLE = (OSError, ValueError, KeyError, AttributeError, SafetensorError)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One checkpoint read back: `state` as saved, tensors on the CPU under their names."""

    path: Path
    state: dict[str, Any]
    fingerprint: dict[str, Any]
    tensors: dict[str, Tensor]
    optimizer: dict[str, Tensor]


def fingerprint(host: nn.Module) -> dict[str, Any]:
    """Identify a host: name → {"shape", "dtype", "trains"} and a hash of the content.

    Trainable parameters and buffers have no hash, since a checkpoint restores their content. All
    frozen weights are read once. What computes without tensors is there as text: layers such as
    dropout by their arguments, the numbers of the model's config, implanted modules with their
    hyper-parameters and sites, and the composition in force.
    """
    found: dict[str, Any] = {}
    for name, p in host.named_parameters():
        found[name] = _describe(p) | {"trains": p.requires_grad}
        if not p.requires_grad:
            found[name]["sha256"] = _digest(p)
    for name, buffer in host.named_buffers():
        found[name] = _describe(buffer)
    for name, module in host.named_modules():
        if isinstance(module, Implant):
            found[name] = f"{module.method!r} at {', '.join(module.paths)}"
            found["composition"] = str(getattr(host, "acting", None))
        elif not module._parameters and not module._buffers and (text := module.extra_repr()):
            found[name] = f"{type(module).__name__}({text})"
    config: Any = getattr(host, "config", None)
    said: Any = config.to_dict() if hasattr(config, "to_dict") else {}
    found |= _numbers(said, "config")
    return found


def _numbers(config: Mapping[str, Any], path: str) -> dict[str, float]:
    """Return the numbers with a fraction in a config: rates of dropout, scales, epsilons."""
    found: dict[str, float] = {}
    for key, value in config.items():
        if isinstance(value, float):
            found[f"{path}.{key}"] = value
        elif isinstance(value, Mapping):
            found |= _numbers(value, f"{path}.{key}")
    return found


def _describe(tensor: Tensor) -> dict[str, Any]:
    return {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}


def _digest(tensor: Tensor) -> str:
    flat = whole(tensor.detach()).cpu().contiguous().reshape(-1)
    return sha256(flat.view(torch.uint8).numpy().data if flat.numel() else b"").hexdigest()


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Write a line for every entry that differs, "name: a there, b here"."""
    lines = []
    for name in dict.fromkeys([*there, *here]):
        if name not in here:
            lines.append(f"{name}: only there")
        elif name not in there:
            lines.append(f"{name}: only here")
        elif there[name] != here[name]:
            lines.append(_difference(name, there[name], here[name]))
    return lines


def _difference(name: str, there: Any, here: Any) -> str:
    if isinstance(there, dict) and isinstance(here, dict):
        key = next(k for k in [*there, *here] if there.get(k) != here.get(k))
        if key == "sha256" and key in there and key in here:
            return f"{name}: other weights"
        if key == "sha256":
            key = "trains"
        return f"{name}: {key} {there.get(key)} there, {here.get(key)} here"
    return f"{name}: {there!r} there, {here!r} here"


def refuse_other(path: Path, what: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Refuse a checkpoint with another fingerprint or other settings than the present ones.

    Raises:
        ModgraftError: naming the folder, the first differences and the remedy.
    """
    lines = differences(there, here)
    if not lines:
        return
    more = f"; and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
    raise ModgraftError(
        f"{path} was made with {what} ({len(lines)} differ): {'; '.join(lines[:SHOWN])}{more}. "
        "Use what it was made with to go on, or another folder=, or resume=False to start over, "
        "which deletes the run in this folder"
    )


def check_goes_on(found: Checkpoint, here: Mapping[str, Any]) -> None:
    """Refuse to go on with another host than that of a checkpoint.

    Args:
        found: the checkpoint.
        here: the host's fingerprint.

    Raises:
        ModgraftError: with what differs.
    """
    if found.state["format"] == FORMER:
        warn(
            f"{found.path} was written by an earlier version of modgraft, which kept nothing of "
            f"the data, the modules' hyper-parameters and the composition: that they are the same "
            f"cannot be told",
        )
        here = {name: said for name, said in here.items() if isinstance(said, dict)}
    refuse_other(found.path, "another model", found.fingerprint, here)


class Checkpoints:
    """The checkpoints of one run's folder.

    Args:
        folder: the run's folder.
        keep: how many of the latest stay, besides the best.
    """

    def __init__(self, folder: Path, *, keep: int = 2) -> None:
        if keep < 1:
            raise ModgraftError(f"keep={keep}: at least the latest checkpoint must stay")
        self.folder, self.root, self.keep = folder, folder / "checkpoints", keep

    def open(self, *, resume: bool) -> None:
        """Remove what a killed process left unfinished, from a folder that is held.

        With `resume=False` the run in the folder is deleted.

        Raises:
            ModgraftError: the folder's metrics are not ours.
        """
        if resume and (self.folder / METRICS).exists() and not self.root.is_dir():
            raise ModgraftError(
                f"{self.folder} holds a {METRICS} and no checkpoints/, so it cannot be resumed: "
                "give another folder=, or resume=False to overwrite it"
            )
        self.root.mkdir(parents=True, exist_ok=True)
        sync(self.folder)
        for path in self.root.iterdir():
            if path.name.startswith(_TEMPORARY):
                shutil.rmtree(path)
        if not resume:
            for path in self.paths():
                self._remove(path)
            (self.folder / METRICS).unlink(missing_ok=True)

    def paths(self, until: float = math.inf) -> list[Path]:
        """Return the checkpoints, oldest first, up to that of step `until`."""
        found = {step_of(p): p for p in self.root.iterdir() if _NAME.fullmatch(p.name)}
        return [path for step, path in sorted(found.items()) if step <= until]

    def path(self, step: int) -> Path:
        """Return where the checkpoint of a step is or would be."""
        return self.root / f"step-{step:06d}"

    def save(
        self,
        step: int,
        state: dict[str, Any],
        fingerprint: dict[str, Any],
        tensors: dict[str, Tensor],
        optimizer: dict[str, Tensor],
    ) -> Path:
        """Write the checkpoint of a step, safe against a crash at any moment; return its folder."""
        path = self.path(step)
        temporary = self.root / f".tmp-{path.name}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        save_file(tensors, temporary / "tensors.safetensors")
        save_file(optimizer, temporary / "optimizer.safetensors")
        (temporary / "fingerprint.json").write_text(json.dumps(fingerprint))
        files = {}
        for file in sorted(temporary.iterdir()):
            sync(file)
            files[file.name] = {"bytes": file.stat().st_size, "sha256": _file_digest(file)}
        state = {"format": FORMAT, "step": step} | state | {"files": files}
        state["sha256"] = _state_digest(state)
        (temporary / "state.json").write_text(json.dumps(state, indent=1))
        sync(temporary / "state.json")
        sync(temporary)
        if path.exists():  # saved before its evaluation was complete
            self._remove(path)
        temporary.rename(path)
        sync(self.root)
        self.prune()
        return path

    def prune(self) -> None:
        """Remove all but the latest `keep` checkpoints and those that they name as the best.

        `save` does it last. A process that is killed just before leaves one checkpoint too many, so
        resuming prunes as well.

        Raises:
            ModgraftError: one of the latest is damaged, so that its best is unknown.
        """
        paths = self.paths()
        latest, older = paths[-self.keep :], paths[: -self.keep]
        if not older:
            return
        best = [self._state(path)["best"] for path in latest]
        stay = {self.path(line["step"]) for line in best if line is not None}
        for path in older:
            if path not in stay:
                self._remove(path)

    def _remove(self, path: Path) -> None:
        # renamed first: a kill half-way must not leave something that looks like a checkpoint
        old = self.root / f".old-{path.name}"
        path.rename(old)
        shutil.rmtree(old)

    def load(self, path: Path) -> Checkpoint:
        """Read a checkpoint and verify every byte of it.

        Raises:
            ModgraftError: a file is missing, cut, changed, or of another format.
        """
        state = self._state(path)
        try:
            for name, file in state["files"].items():
                size = (path / name).stat().st_size
                if size != file["bytes"]:
                    raise ValueError(f"{name} has {size} bytes of {file['bytes']}")
                if _file_digest(path / name) != file["sha256"]:
                    raise ValueError(f"{name} was changed after it was written")
            return Checkpoint(
                path,
                state,
                json.loads((path / "fingerprint.json").read_text()),
                load_file(path / "tensors.safetensors"),
                load_file(path / "optimizer.safetensors"),
            )
        except _UNREADABLE as error:
            raise self._damaged(path, error) from error

    def _state(self, path: Path) -> dict[str, Any]:
        try:
            state = json.loads((path / "state.json").read_text())
            made_as = str(state.get("format"))
            if not made_as.startswith("modgraft.checkpoint/"):
                raise ValueError(f"state.json has format {made_as!r}, not {FORMAT!r}")
            if state.get("sha256") != _state_digest(state):
                raise ValueError("state.json was changed after it was written")
        except _UNREADABLE as error:
            raise self._damaged(path, error) from error
        if made_as not in (FORMAT, FORMER):
            raise ModgraftError(
                f"{path} was written by another version of modgraft, in the format {made_as!r} "
                f"(here {FORMAT!r}); go on with that version, or start over with resume=False"
            )
        return state

    def _damaged(self, path: Path, error: Exception) -> ModgraftError:
        later = [p.name for p in self.paths() if step_of(p) > step_of(path)]
        earlier = [p.name for p in self.paths(step_of(path) - 1)]
        last = (later or earlier)[-1:]
        goes_on = f"the run then goes on from {last[0]}" if last else "the run restarts"
        return ModgraftError(
            f"the checkpoint {path} is damaged: {error}. Delete this folder ({goes_on}), or "
            "start over with resume=False"
        )


def step_of(path: Path) -> int:
    """Return the step of a checkpoint."""
    return int(path.name.removeprefix("step-"))


def _state_digest(state: Mapping[str, Any]) -> str:
    """Hash the content of `state.json` without its hash."""
    said = {key: value for key, value in state.items() if key != "sha256"}
    return sha256(json.dumps(said).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def snapshot(host: nn.Module, buffers: Iterable[str]) -> dict[str, Tensor]:
    """Copy the trainable parameters and the named buffers to the CPU."""
    wanted = set(buffers)
    tensors = {n: p for n, p in host.named_parameters() if p.requires_grad}
    tensors |= {n: b for n, b in host.named_buffers() if n in wanted}
    return {name: _copy(tensor) for name, tensor in tensors.items()}


def restore(host: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into the parameters and buffers of the same names."""
    targets = dict(host.named_parameters()) | dict(host.named_buffers())
    with torch.no_grad():
        for name, tensor in tensors.items():
            targets[name].copy_(tensor)


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: Mapping[int, str]
) -> dict[str, Tensor]:
    """Return the optimiser's state as flat tensors, "<parameter>#<entry>".

    `names` maps id → name.
    """
    return {
        f"{names[id(p)]}#{key}": _copy(torch.as_tensor(value))
        for p, entries in optimizer.state.items()
        for key, value in entries.items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, names: Mapping[int, str], tensors: Mapping[str, Tensor]
) -> None:
    """Restore the state that `optimizer_tensors` saved."""
    entries: dict[str, dict[str, Tensor | int]] = {}
    for name, tensor in tensors.items():
        parameter, _, key = name.rpartition("#")
        counts = tensor.dim() == 0 and tensor.dtype == torch.int64  # SparseAdam's steps, an int
        entries.setdefault(parameter, {})[key] = int(tensor) if counts else tensor
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {i: e for i, p in enumerate(parameters) if (e := entries.get(names[id(p)]))}
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()
