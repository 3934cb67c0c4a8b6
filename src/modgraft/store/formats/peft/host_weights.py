"""What of the host stands in a folder of PEFT beside the module: weights, running statistics."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig

from modgraft.engine.implant import moving_buffers, tensor_at
from modgraft.store.formats.found import Waiting
from modgraft.store.formats.heads import asked
from modgraft.store.formats.peft.folder import PREFIX, Folder, Group
from modgraft.store.formats.peft.options import CONFIG, Options, PrefixOptions, PromptOptions

_TIED_NAMES = {"embed_tokens", "lm_head"}


class HostWeights:
    """The weights of the host, and the buffers that move with them, in a folder beside the module.

    Attributes:
        keys: their keys in the file by their names in the host.
    """

    def __init__(self, folder: Folder, said: Options) -> None:
        self.folder, self.said = folder, said
        model = folder.model
        self._prefix = "base_model." if isinstance(said, PromptOptions | PrefixOptions) else PREFIX
        self._bias = getattr(said, "bias", "none")
        first: dict[int, str] = {}
        own: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        own |= {name: buffer for name, buffer, _ in moving_buffers(model)}
        self._names = {name: first.setdefault(id(tensor), name) for name, tensor in own.items()}
        self._buffers = {name for name, _ in model.named_buffers()} - own.keys()
        self._tables = tables_of(model)
        self.keys: dict[str, str] = {}
        self._again: list[tuple[str, str]] = []  # of one weight: another key, and its name
        for key in sorted(folder.left):
            self._sort(key)

    def _sort(self, key: str) -> None:
        """Take a tensor that is the host's."""
        said = key.removeprefix(self._prefix)
        name = self.folder.unwrapped(said)
        if name == said == key or not self._is_meant(said, name):
            return
        if name in self._names:
            own = self._names[name]
            if re.search(r"\.(original_module|modules_to_save)\.", said) or own in self.keys:
                self._again.append((key, own))
            else:
                self.keys[own] = key
            self.folder.left.discard(key)
        elif name in self._buffers:
            self._again.append((key, name))
            self.folder.left.discard(key)

    def _is_meant(self, said: str, name: str) -> bool:
        """Return whether the options say that a weight of the host is saved."""
        path = name.rpartition(".")[0]
        if self._is_whole(name):
            return True
        if name.endswith(".bias") and (
            self._bias == "all" or (self._bias != "none" and ".base_layer." in said)
        ):
            return True
        return id(self.folder.modules.get(path)) in self._tables  # which PEFT saves by itself

    def check(self, groups: Iterable[Group]) -> None:
        """Check that everything is there that the options say is saved.

        Raises:
            CheckpointError: with what is lacking.
        """
        wanted: set[str] = set()
        for path, module in self.folder.modules.items():
            if path and any(path.endswith(m) for m in self.said.modules_to_save or ()):
                inside = {f"{path}.{name}" for name in module.state_dict()}
                wanted |= {self._names[name] for name in inside & self._names.keys()}
        if self._bias != "none":
            paths = {site for group in groups for site in group.sites}
            wanted |= {
                own
                for name, own in self._names.items()
                if name.endswith(".bias")
                and (self._bias == "all" or name.removesuffix(".bias") in paths)
            }
        if lacking := sorted(wanted - self.keys.keys()):
            self.folder.refuse(
                f"{CONFIG} says that the host's {lacking[0]} is saved too, and it is missing, with "
                f"{len(lacking) - 1} others; the file is cut short, or another one: copy it again"
            )

    @property
    def waiting(self) -> Waiting:
        """The tensors, which wait in the file."""
        entries, read = self.folder.entries, self.folder.tensor
        return {name: (entries[key], partial(read, key)) for name, key in self.keys.items()}

    def verify(self) -> None:
        """Compare what stands there twice.

        Raises:
            CheckpointError: for one that stands there twice, or in a buffer of the host, otherwise.
        """
        found = {name: self.folder.tensor(key) for name, key in self.keys.items()}
        for name, tensor in found.items():
            self._check_alone(name, tensor)
        self._check_head()
        for key, name in self._again:
            if ".original_module." in key:  # as it was before; nothing reads it
                continue
            other = found.get(name)
            if other is None:
                other = tensor_at(self.folder.model, name)
            tensor = self.folder.tensor(key)
            if tensor.shape != other.shape or not torch.equal(tensor.to(other), other):
                both = {
                    self.folder.unwrapped(k.removeprefix(self._prefix))
                    for k in (key, self.keys.get(name, key))
                }
                if len(both) == 2:
                    self.folder.refuse(
                        f"{' and '.join(sorted(both))} are two weights in the file, and in "
                        f"this host they are the same weight; {_untied(min(both - {name}))}"
                    )
                self.folder.refuse(
                    f"{key} is another one than {name} of this host, which it cannot replace: "
                    f"it is a buffer, or another layer's weight too; load it into the host that it "
                    f"was trained in"
                )

    def _check_alone(self, name: str, tensor: Tensor) -> None:
        """Refuse a copy that PEFT puts in place of one layer, where others share its weight."""
        every = [n for n, own in self._names.items() if own == name]
        copied = [n for n in every if self._is_whole(n)]
        others = [n for n in every if n not in copied]
        here = tensor_at(self.folder.model, name)
        if (
            copied
            and others
            and not self._stays_tied(copied)
            and not torch.equal(tensor.to(here), here)
        ):
            self.folder.refuse(
                f"{copied[0]} was trained as a copy (modules_to_save), and in this host "
                f"{others[0]} is the same weight, which PEFT leaves as it was; {_untied(others[0])}"
            )

    def _check_head(self) -> None:
        """Refuse a host whose head was made anew where PEFT's was tied to the words as they were.

        A tied head is in no checkpoint: a host that is made of one with another configuration has
        a random one. Its name says what it was, where the checkpoint is on this machine.
        """
        model = self.folder.model
        words, head = (
            getattr(asked(model, f"get_{side}_embeddings"), "weight", None)
            for side in ("input", "output")
        )
        if not isinstance(words, Tensor) or not isinstance(head, Tensor) or words is head:
            return
        names = {id(p): name for name, p in model.named_parameters()}
        own, other = names.get(id(words), ""), names.get(id(head), "")
        alone = self._is_whole(own) and own in self.keys and other not in self.keys
        if alone and not torch.equal(words, head) and _was_tied(model, self.said):
            self.folder.refuse(
                f"{own} was trained as a copy (modules_to_save), beside a head that was tied to "
                f"the words of {self.said.base_model_name_or_path!r:.120} as they are there, and "
                f"{other} of this host is another (from_pretrained(…, tie_word_embeddings=False) "
                f"makes a random one); make the host without that option, and {_untied(other)}"
            )

    def _stays_tied(self, copied: Iterable[str]) -> bool:
        """Return whether PEFT gives what is tied to the input's embedding the same copy.

        It does so, where that is asked for, with tables of its two names alone.
        """
        model = self.folder.model
        tied = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
        table, modules = asked(model, "get_input_embeddings"), self.folder.modules
        ends = {each.rpartition(".")[2] for each in self.said.modules_to_save or ()}
        if not getattr(self.said, "ensure_weight_tying", False) or not ends & _TIED_NAMES:
            return False
        return bool(tied) and any(modules[name.rpartition(".")[0]] is table for name in copied)

    def _is_whole(self, name: str) -> bool:
        """Return whether a weight is of a layer that is saved whole."""
        path, whole = name.rpartition(".")[0], self.said.modules_to_save or []
        return any(part.endswith(m) for part in _ancestors(path) for m in whole)


def _ancestors(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[: n + 1]) for n in range(len(parts))]


def _untied(name: str) -> str:
    """Return what to do so that a weight is no other's too."""
    path = f"model.{name.rpartition('.')[0]}"
    return (
        f"give it a weight of its own before it is a host: {path} = copy.deepcopy({path}); "
        f"model.config.tie_word_embeddings = False"
    )


def _was_tied(model: nn.Module, said: Options) -> bool:
    """Return whether the checkpoint that PEFT names is on this machine and ties its head."""
    config: Any = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig) or not said.base_model_name_or_path:
        return False
    try:
        there = type(config).from_pretrained(said.base_model_name_or_path, local_files_only=True)
    except (OSError, ValueError, TypeError):  # it is not on this machine
        return False
    return bool(getattr(there, "tie_word_embeddings", False))


def tables_of(model: nn.Module) -> set[int]:
    """Return the ids of the layers that PEFT saves by itself where they are changed or resized."""
    found = [asked(model, name) for name in ("get_input_embeddings", "get_output_embeddings")]
    return {id(table) for table in found if table is not None}
