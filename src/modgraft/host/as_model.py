"""A host in the eyes of other libraries: its model, which saves what it learns.

transformers asks a model for its class (which losses, labels and pipelines are right for it), for
attributes (its device, its ``generation_config``), and to save itself. A host answers for it:

- ``isinstance(host, type(host.model))`` holds, and ``host.__class__`` is the model's class, as for
  any transparent proxy. ``type(host)`` is ``Host``.
- An attribute that a host does not have is its model's.
- ``save_pretrained``, which the Trainer calls for a checkpoint, writes what learns and no more: the
  modules, and those weights of the host that train. ``load_state_dict`` takes that back.
  accelerate's ``save_state`` does the same, by :mod:`~modgraft.host.accelerate_state`.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from modgraft.core.errors import CheckpointError, ModgraftError
from modgraft.engine.implant import Implants
from modgraft.store.fingerprint import differences, fingerprint

WEIGHTS = "model.safetensors"
"""The file that the Trainer writes a model's weights to, and looks for when it resumes."""

OF_HOST = "host_fingerprint"
"""The entry of that file that identifies the frozen weights, which are not in it."""

NOT_THE_MODELS = {"push_to_hub": "host.model.push_to_hub(…) uploads the bare model"}
"""Attributes of a model that would pass the modules by, and what to write instead."""


class AsModel(nn.Module):
    """What a host answers for its model."""

    model: nn.Module
    _implants: Implants

    @property
    def __class__(self) -> type:  # type: ignore[override]
        """The class of the model, for whoever asks ``isinstance``; ``type(host)`` is ``Host``."""
        model = self.__dict__.get("_modules", {}).get("model")
        return type(self) if model is None else type(model)

    @__class__.setter
    def __class__(self, kind: type) -> None:
        raise ModgraftError(
            f"a host's class was to become {kind.__name__}, as fully_shard does; call that for the "
            f"blocks of host.model, and for host.model itself, whose weights stay frozen, and not "
            f"for the modules, which each process has whole"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        return object.__new__, (type(self),), self.__dict__  # pickle would ask for __class__

    def __dir__(self) -> list[str]:
        return sorted({*dir(type(self)), *dir(self.model)})

    def __getattr__(self, name: str) -> Any:
        modules = self.__dict__.get("_modules", {})
        if name in modules:  # the model itself among them, at every call
            return modules[name]
        model = modules.get("model")
        try:
            return super().__getattr__(name)
        except AttributeError:
            if model is None or name.startswith("__"):
                raise
        if name in NOT_THE_MODELS:
            raise AttributeError(f"a host has no {name}: {NOT_THE_MODELS[name]}")
        try:
            return getattr(model, name)
        except AttributeError as error:
            kind = type(model).__name__
            raise AttributeError(f"neither a host nor its {kind} has {name!r}") from error

    @property
    def generation_config(self) -> Any:
        """The model's settings of ``generate``; a host has none apart."""
        return self.model.generation_config

    @generation_config.setter
    def generation_config(self, value: Any) -> None:
        self.model.generation_config = value

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the model's loss can be divided by the targets of several batches."""
        said = getattr(self.model, "accepts_loss_kwargs", None)
        kinds = [p.kind for p in inspect.signature(self.model.forward).parameters.values()]
        return inspect.Parameter.VAR_KEYWORD in kinds if said is None else said

    # -- saving what learns ---------------------------------------------------------------------

    @property
    def _keys_to_ignore_on_save(self) -> set[str]:
        """The keys of ``state_dict`` that :meth:`save_pretrained` leaves out."""
        state = self.state_dict()
        return state.keys() - self._learnt(state).keys()

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        state_dict: Mapping[str, Tensor] | None = None,
        is_main_process: bool = True,
    ) -> None:
        """Write what learns to ``model.safetensors``: all modules, and the weights that train.

        A whole model is ``host.merge()`` or ``host.model``, which have a ``save_pretrained`` too;
        one module is saved by ``host.save``.

        Args:
            save_directory: the folder; it is made where there is none.
            state_dict: what to take the tensors from; None: ``host.state_dict()``.
            is_main_process: whether to write anything.
        """
        if not is_main_process:
            return
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        kept = self._kept(self.state_dict() if state_dict is None else state_dict)
        save_file(kept, folder / WEIGHTS, metadata={"format": "pt"})

    def _kept(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what is saved of a ``state_dict``: what learns, and which host it belongs to."""
        learnt = self._learnt(state)
        said = json.dumps(fingerprint(self.model, _of_model(learnt))).encode()
        kept = {key: value.detach().cpu().contiguous() for key, value in learnt.items()}
        kept[OF_HOST] = torch.tensor(list(said), dtype=torch.uint8)
        return kept

    def _learnt(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the entries of a ``state_dict`` that training changes; a tied one once."""
        beside = {name for implant in self._implants.values() for name in implant.beside}
        own = {n: p for n, p in self.model.named_parameters() if p.requires_grad or n in beside}
        moved = {id(p) for p in own.values()}
        found = {f"model.{name}" for name in own} | {k for k in state if k.startswith("implants.")}
        for path, layer in self.model.named_modules(prefix="model"):
            parameters = [id(p) for p in layer._parameters.values() if p is not None]
            if own and (not parameters or not moved.isdisjoint(parameters)):
                found |= {f"{path}.{name}" for name in layer._buffers}
        return {key: state[key] for key in state if key in found}

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *rest: Any, **more: Any
    ) -> None:
        said = state_dict.pop(prefix + OF_HOST, None)
        if said is not None:
            there = json.loads(bytes(said.tolist()))
            own = _of_model(k.removeprefix(prefix) for k in state_dict)
            buffers = {name for name, _ in self.model.named_buffers()}  # compared in former files
            differs = differences(self.model, there, own)
            if differs and differences(self.model, there, own - buffers):
                raise CheckpointError(
                    f"these modules were saved in another host ({', '.join(differs)[:300]} differ: "
                    f"{there.get('architecture')} there, {type(self.model).__name__} here), whose "
                    f"frozen weights are not in the file; load them into the host of that run"
                )
        super()._load_from_state_dict(state_dict, prefix, *rest, **more)


def _of_model(keys: Iterable[str]) -> set[str]:
    """Return the model's names for those keys of a host's ``state_dict`` that are its."""
    return {key.removeprefix("model.") for key in keys if key.startswith("model.")}
