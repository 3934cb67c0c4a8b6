"""What a folder of PEFT holds: its options, checked one by one, and which layers they mean."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from modgraft.computation.base import Computation
from modgraft.core.errors import CheckpointError, ModgraftError
from modgraft.core.layers import WEIGHTED
from modgraft.store.file import Entry, TensorFile

CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."


# -- options: a field that has one value only is understood at that value alone -------------------


class Options(BaseModel):
    """What ``adapter_config.json`` says of every kind of module."""

    model_config = ConfigDict(strict=True, extra="allow")

    peft_type: str
    peft_version: str | None = None
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    auto_mapping: dict[str, Any] | None = None
    modules_to_save: list[str] | None = None


class Targeted(Options):
    """Options that say which layers are changed."""

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    fan_in_fan_out: bool = False  # said again by the class of the layer


class LoraOptions(Targeted):
    """LoRA's."""

    r: int = 8
    lora_alpha: int | float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    lora_bias: bool = False
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, int | float] | None = None
    target_parameters: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    # how it started; other starts change the host's weights, of which the folder says nothing
    init_lora_weights: bool | Literal["gaussian", "eva", "orthogonal"] = True
    eva_config: dict[str, Any] | None = None
    loftq_config: dict[str, Any] | None = None  # read for init_lora_weights="loftq" alone
    megatron_config: None = None
    megatron_core: str | None = None  # a name, read with megatron_config alone
    corda_config: None = None
    lora_ga_config: None = None
    velora_config: None = None
    monteclora_config: None = None
    kasa_config: None = None
    arrow_config: None = None
    alora_invocation_tokens: None = None
    layer_replication: None = None
    use_bdlora: None = None
    use_qalora: Literal[False] = False
    qalora_group_size: int = 16  # read with use_qalora alone
    ensure_weight_tying: Literal[False] = False


class IA3Options(Targeted):
    """IA³'s."""

    feedforward_modules: list[str] | str | None = None
    init_ia3_weights: bool = True


class VeraOptions(Targeted):
    """VeRA's."""

    r: int = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    bias: Literal["none", "all", "vera_only"] = "none"
    init_weights: bool = True


class OFTOptions(Targeted):
    """OFT's."""

    r: int = 0
    oft_block_size: int = 32
    module_dropout: Literal[0] = 0
    bias: Literal["none", "all", "oft_only"] = "none"
    coft: Literal[False] = False
    eps: float = 6e-5  # read with coft alone
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5
    init_weights: bool = True


class TokensOptions(Targeted):
    """The trainable tokens'."""

    token_indices: list[int]
    init_weights: bool = True


class PromptOptions(Options):
    """Prompt tuning's; how a prompt started says nothing of what it is now."""

    num_virtual_tokens: int
    token_dim: int | None = None
    num_layers: int | None = None
    num_attention_heads: int | None = None
    num_transformer_submodules: int | None = None
    prompt_tuning_init: str | None = None
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None


class PrefixOptions(Options):
    """Prefix tuning's; the MLP that a prefix came from is not saved."""

    num_virtual_tokens: int
    token_dim: int
    num_layers: int
    num_attention_heads: int
    num_transformer_submodules: int | None = None
    encoder_hidden_size: int | None = None
    prefix_projection: bool = False
    init_weights: None = None


O = TypeVar("O", bound=Options)


def options(kind: type[O], said: Mapping[str, Any], path: Path) -> O:
    """Return the options of a folder.

    Raises:
        CheckpointError: for one that is not of its type, or is set to what is not understood.
    """
    try:
        found = kind.model_validate(dict(said))
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        if first["type"] == "missing":
            raise CheckpointError(f"{path} has no {name}; copy the folder again") from error
        raise CheckpointError(
            f"{path} sets {name}={said[name]!r:.80}, which is not understood here "
            f"({first['msg']}); {_remedy(name)}"
        ) from error
    for name, value in (found.model_extra or {}).items():
        if value not in (None, False) and value not in ({}, []):
            raise CheckpointError(
                f"{path} sets {name}={value!r:.80}, an option of {said['peft_type']} that is not "
                f"known here; {_remedy(name)}"
            )
    return found


def _remedy(name: str) -> str:
    if name == "init_lora_weights":
        return (
            "such a start changes the weights of the host: save it in PEFT again with "
            "model.save_pretrained(folder, path_initial_model_for_weight_conversion=…)"
        )
    return "merge it in PEFT, or train it without that"


# -- which layers the options mean -----------------------------------------------------------------


def targets(said: Targeted, paths: Iterable[str]) -> set[str] | None:
    """Return the paths that PEFT would change; None where its pattern is not run.

    A pattern that may take long on some text is not run: a stranger has written it.
    """
    target, excluded = said.target_modules, said.exclude_modules
    if target is None or target == "all-linear":
        return None
    layers = said.layers_pattern or []
    plain = [*(said.modules_to_save or ()), *([layers] if isinstance(layers, str) else layers)]
    if not all(re.fullmatch(r"[\w.]+", text) for text in plain):
        return None
    if not all(is_quick(text) for text in (target, excluded) if isinstance(text, str)):
        return None
    return {path for path in paths if _is_target(said, path)}


def _is_target(said: Targeted, path: str) -> bool:
    if said.exclude_modules and _named(said.exclude_modules, path):
        return False
    if any(re.match(rf"(^|.*\.){m}($|\..*)", path) for m in said.modules_to_save or ()):
        return False
    if not said.target_modules or not _named(said.target_modules, path):
        return False
    which = said.layers_to_transform
    if which is None or which == [] or isinstance(said.target_modules, str):
        return True
    if path in said.target_modules:
        return True
    patterns = said.layers_pattern or [r"[^.]*"]
    patterns = [patterns] if isinstance(patterns, str) else patterns
    matches = (re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", path) for pattern in patterns)
    found = next((match for match in matches if match), None)
    number = None if found is None else int(found[1])
    return number == which if isinstance(which, int) else number in which


def _named(selection: list[str] | str, path: str) -> bool:
    """Return whether a list names a path or its end, or a pattern matches it."""
    if isinstance(selection, str):
        return re.fullmatch(selection, path) is not None
    return path in selection or any(path.endswith(f".{name}") for name in selection)


def ends_in(selection: list[str] | str, path: str) -> bool | None:
    """Return whether a path ends as a list says or matches a pattern; None: that is not run."""
    if isinstance(selection, list):
        return any(path.endswith(name) for name in selection)
    return bool(re.fullmatch(selection, path)) if is_quick(selection) else None


def is_quick(pattern: str, most: int = 3) -> bool:
    """Return whether a regular expression takes little time on any path.

    It repeats no groups, and nothing else more than ``most`` times.
    """
    text = re.sub(r"\\[\w.]|\[[^\]\\\[]*\]", "x", pattern)
    if len(pattern) > 20_000 or re.search(r"[^\w.\-^$|()*+?/]|\)[*+]|\(\?", text):
        return False
    if len(re.findall(r"[*+]", text)) > most:
        return False
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def by_pattern(patterns: Mapping[str, Any], path: str) -> Any:
    """Return what the first pattern that matches the end of a path says, None where none does.

    Raises:
        CheckpointError: for a pattern that is not run.
    """
    for pattern, value in patterns.items():
        if not is_quick(pattern, 2):
            raise CheckpointError(
                f"the pattern {pattern!r:.80} in {CONFIG} is not run, since it may take long; "
                f"write the paths that it matches in its place"
            )
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return None


# -- a folder that is being read -------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """A tensor of ours, ``<site>:<name>``, and how it is made of the file's."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


@dataclass(frozen=True)
class Group:
    """What becomes one module of ours."""

    method: Computation
    sites: Sequence[str]
    pieces: Sequence[Piece]
    suffix: str = ""


@dataclass
class Folder:
    """A folder of PEFT and the host that it is read for.

    Attributes:
        path: the folder's.
        file: its tensors.
        model: the host's.
        left: the tensors that nobody has taken yet.
    """

    path: Path
    file: TensorFile
    model: nn.Module
    left: set[str] = field(init=False)

    def __post_init__(self) -> None:
        self.left = set(self.file.entries)
        # a layer that stands at two paths has the first as its name here
        names: dict[int, str] = {}
        self.modules: dict[str, nn.Module] = {}
        self._names: dict[str, str] = {}
        for path, module in self.model.named_modules(remove_duplicate=False):
            self._names[path] = names.setdefault(id(module), path)
            self.modules[path] = module
        self._order = {path: i for i, path in enumerate(self.modules)}

    def refuse(self, why: str) -> NoReturn:
        """Raise a CheckpointError that begins with the folder."""
        raise CheckpointError(f"{self.path}: {why}")

    def sites(self, suffix: str) -> list[str]:
        """Return the paths of the tensors that end in ``suffix``, in the host's order.

        Raises:
            CheckpointError: for a path that is none in this host.
        """
        found = []
        for key in self.left:
            if key.startswith(PREFIX) and key.endswith(suffix):
                path = key.removeprefix(PREFIX).removesuffix(suffix)
                while path not in self.modules and path.endswith(".base_layer"):
                    path = path.removesuffix(".base_layer")  # of experts: several in one layer
                if path not in self.modules:
                    near = get_close_matches(path, self.modules, n=2, cutoff=0.3)
                    self.refuse(
                        f"{key} belongs to a layer {path!r:.120} that this "
                        f"{type(self.model).__name__} does not have; it has {', '.join(near)} …: "
                        f"make the host with the class that it was trained with"
                    )
                found.append(path)
        return sorted(set(found), key=self._order.__getitem__)

    def label(self, path: str) -> str:
        """Return the first path of the layer at ``path``."""
        return self._names[path]

    def take(self, key: str, *shape: int | None) -> Entry:
        """Take a tensor of the file, of a shape (None: any size on that axis).

        Raises:
            CheckpointError: if it is not there, or another one is.
        """
        entry = self.file.entries.get(key)
        if entry is None:
            self.refuse(f"{key} is missing; the file is cut short, or another one: copy it again")
        if len(entry.shape) != len(shape) or any(
            want not in (None, has) for want, has in zip(shape, entry.shape, strict=True)
        ):
            wanted = ", ".join("any" if n is None else str(n) for n in shape)
            self.refuse(f"{key} is {list(entry.shape)} where this host needs [{wanted}]")
        self.left.discard(key)
        return entry

    def check_targets(self, said: Targeted, sites: Collection[str]) -> None:
        """Compare the layers that have tensors with those that the options mean.

        Raises:
            CheckpointError: for a layer that is meant and has none, or has some and is not meant.
        """
        layers = {path for path, m in self.modules.items() if isinstance(m, WEIGHTED)}
        meant = targets(said, layers)
        if meant is None:
            return
        have = set(sites)
        if lacking := sorted(meant - have):
            self.refuse(
                f"{CONFIG} means {lacking[0]}, and {len(lacking)} such layers have no tensors; "
                f"the file is cut short, or the host has more layers than it was trained with"
            )
        if extra := sorted(have - meant):
            self.refuse(f"there are tensors for {extra[0]}, which {CONFIG} does not mean")

    def tensor(self, key: str) -> Tensor:
        """Read a tensor of the file."""
        return self.file.tensor(key)


def elements(pieces: Iterable[Piece], name: str, dtype: torch.dtype) -> Iterator[tuple[str, Entry]]:
    """Describe pieces as tensors of a file."""
    for piece in pieces:
        size = torch.Size(piece.shape).numel() * dtype.itemsize
        yield f"{name}:{piece.name}", Entry(dtype, piece.shape, 0, size)


# -- what is written -------------------------------------------------------------------------------


@dataclass
class Written:
    """Modules as PEFT has them.

    Attributes:
        tensors: by key, without the beginning that all have.
        options: of ``adapter_config.json``, beside those of every kind.
        paths: the layers that ``target_modules`` has to mean.
        shared: tensors that stand beside the host's, such as VeRA's matrices.
    """

    tensors: dict[str, Tensor]
    options: dict[str, Any]
    paths: list[str]
    shared: dict[str, Tensor] = field(default_factory=dict)


def aim(paths: Sequence[str], modules: Collection[str], said: dict[str, Any]) -> None:
    """Write ``target_modules`` so that it means these layers and no others.

    It is the last names of their paths if that is so, or the paths, or a pattern of them.
    """
    short = sorted({path.rpartition(".")[2] for path in paths})
    pattern = "|".join(re.escape(path) for path in paths)
    for target in (short, list(paths), pattern):
        tried = Targeted.model_validate({**said, "target_modules": target})
        if {path for path in modules if _is_target(tried, path)} == set(paths):
            said["target_modules"] = target
            return
    raise ModgraftError(
        f"PEFT cannot change {paths[0]} and others, since modules_to_save="
        f"{said.get('modules_to_save')} holds one of them whole"
    )
