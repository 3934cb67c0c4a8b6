"""What ``adapter_config.json`` says: options, checked one by one.

A field that has one value only is understood at that value alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from modgraft.core.errors import CheckpointError

CONFIG = "adapter_config.json"

Task = Literal[
    "SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"
]  # fmt: skip


class Options(BaseModel):
    """What ``adapter_config.json`` says of every kind of module."""

    model_config = ConfigDict(strict=True, extra="allow")

    peft_type: str
    peft_version: str | None = None
    task_type: Task | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    auto_mapping: dict[str, Any] | None = None
    modules_to_save: list[str] | None = None

    def objection(self) -> str | None:
        """Say what is wrong with options that contradict one another, None where nothing is."""
        return None


class Targeted(Options):
    """Options that say which layers are changed."""

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    fan_in_fan_out: bool = False  # said again by the class of the layer

    def objection(self) -> str | None:  # noqa: D102
        if self.layers_pattern and self.layers_to_transform is None:
            return "layers_pattern is set and layers_to_transform is not, which it is of"
        for pattern in (self.target_modules, self.exclude_modules):
            try:
                re.compile(pattern if isinstance(pattern, str) else "")
            except re.error as error:
                return f"{pattern!r:.80} is no regular expression ({error})"
        return None


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
    ensure_weight_tying: bool = False


class IA3Options(Targeted):
    """IA³'s."""

    feedforward_modules: list[str] | str | None = None
    init_ia3_weights: bool = True

    def objection(self) -> str | None:  # noqa: D102
        inner, every = self.feedforward_modules, self.target_modules
        if isinstance(inner, list) and isinstance(every, list) and not set(inner) <= set(every):
            return f"feedforward_modules={inner!r:.80} are not among target_modules"
        return super().objection()


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
    off = {name for name, field in kind.model_fields.items() if field.default is False}
    given = {k: v for k, v in said.items() if v is not None or k not in off}  # null is off there
    try:
        found = kind.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        if first["type"] == "missing":
            raise CheckpointError(f"{path} has no {name}; copy the folder again") from error
        raise CheckpointError(
            f"{path} sets {name}={said[name]!r:.80}, which is not understood here "
            f"({first['msg']}); {_remedy(name)}"
        ) from error
    if why := found.objection():
        raise CheckpointError(f"{path}: {why}; PEFT does not read it either: copy the folder again")
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
