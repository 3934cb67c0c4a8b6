"""``accelerator.save_state`` and ``load_state`` with a host: what learns, and no frozen weights.

accelerate saves what ``state_dict`` gives, and asks for all of it when it loads. A host is given to
its hooks for both instead: they leave out of the file what :class:`~modgraft.host.as_model.AsModel`
leaves out of the Trainer's, and take it back.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import wraps
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn

from modgraft.host.as_model import OF_HOST, AsModel


def hook_accelerate() -> None:
    """Hook ``save_state`` and ``load_state`` of every ``Accelerator``, once a process."""
    _hook("save_state", lambda own: own.register_save_state_pre_hook(_leave_out))
    _hook("load_state", lambda own: own.register_load_state_pre_hook(_take_back))


def _hook(name: str, register: Callable[[Accelerator], Any]) -> None:
    method = getattr(Accelerator, name)

    @wraps(method)
    def hooked(self: Accelerator, *args: Any, **kwargs: Any) -> Any:
        handle = register(self)
        try:
            return method(self, *args, **kwargs)
        finally:
            handle.remove()

    setattr(Accelerator, name, hooked)


def _host_in(model: nn.Module) -> tuple[str, AsModel] | None:
    """Return the host that ``model`` is or holds, as DDP does, after the prefix of its keys."""
    for path, module in model.named_modules():
        if isinstance(module, AsModel):
            return f"{path}." if path else "", module
    return None


def _leave_out(models: list[nn.Module], weights: list[dict[str, Tensor]], _: str) -> None:
    """Leave frozen weights out of what is saved."""
    for at, (model, state) in enumerate(zip(models, weights, strict=False)):  # none under FSDP
        if (found := _host_in(model)) is not None:
            prefix, host = found
            own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            kept = {prefix + key: value for key, value in host._kept(own).items()}
            rest = {k: v for k, v in state.items() if not k.startswith(prefix)}
            weights[at] = OrderedDict(rest | kept)


def _take_back(models: list[Any], _: str) -> None:
    """Let each host load what was saved so, or a whole ``state_dict``."""
    for at, model in enumerate(models):
        if (found := _host_in(model)) is not None:
            models[at] = _Loading(model, *found)


class _Loading:
    """A model in accelerate's eyes while it loads: what was left out is not missing.

    Args:
        model: the host, or what it is in.
        prefix: the host's, in the keys of the model.
        host: the host.
    """

    def __init__(self, model: nn.Module, prefix: str, host: AsModel) -> None:
        self._model, self._prefix, self._host = model, prefix, host

    def state_dict(self) -> dict[str, Tensor]:
        """Return no tensors: which of them are tied is known here."""
        return {}

    def load_state_dict(
        self, state: dict[str, Tensor], strict: bool = True
    ) -> tuple[list[str], list[str]]:
        """Load a state into the model.

        Args:
            state: what was saved.
            strict: whether the model has to be what was saved.

        Returns:
            The keys that are missing, and those that mean nothing here.

        Raises:
            RuntimeError: with these, if there are any and ``strict``.
        """
        own, absent = self._model.state_dict(), set()
        if self._prefix + OF_HOST in state:
            absent = {self._prefix + key for key in self._host._keys_to_ignore_on_save}
        given = {own[key].data_ptr() for key in state if key in own}
        found = self._model.load_state_dict(state, strict=False)
        missing = [
            key
            for key in found.missing_keys
            if key not in absent and own[key].data_ptr() not in given  # one of several tied ones
        ]
        if strict and (missing or found.unexpected_keys):
            raise RuntimeError(
                f"this state was saved of other modules: {', '.join(missing) or 'nothing'} is "
                f"missing in it, and {', '.join(found.unexpected_keys) or 'nothing'} not known here"
            )
        return missing, found.unexpected_keys
