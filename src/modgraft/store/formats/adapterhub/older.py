"""Configurations that earlier versions of ``adapters`` wrote, as the one of today says them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from modgraft.core.errors import ModgraftError

_BOTH = {"mh_adapter": True, "output_adapter": True}
_NICE = {"inv_adapter": "nice", "inv_adapter_reduction_factor": 2}
_PHM = {"phm_layer": True, "reduction_factor": 32, "non_linearity": "gelu"}
_SEQ: dict[str, Any] = {"original_ln_before": True}
_DOUBLE: dict[str, Any] = {**_BOTH, "non_linearity": "swish"}
_PAR: dict[str, Any] = {"is_parallel": True, "reduction_factor": 2, "scaling": 4.0}
_LORA: dict[str, Any] = {"architecture": "lora"}
_NAMED: dict[str, dict[str, Any]] = {
    "seq_bn": _SEQ, "pfeiffer": _SEQ, "seq_bn_inv": {**_SEQ, **_NICE},
    "pfeiffer+inv": {**_SEQ, **_NICE}, "double_seq_bn": _DOUBLE, "houlsby": _DOUBLE,
    "double_seq_bn_inv": {**_DOUBLE, **_NICE}, "houlsby+inv": {**_DOUBLE, **_NICE},
    "par_bn": _PAR, "parallel": _PAR, "compacter": {**_BOTH, **_PHM},
    "compacter++": {**_SEQ, **_PHM}, "prefix_tuning": {"architecture": "prefix_tuning"},
    "prefix_tuning_flat": {"architecture": "prefix_tuning", "flat": True}, "lora": _LORA,
    "dora": {**_LORA, "use_dora": True},
    "ia3": {
        **_LORA, "intermediate_lora": True, "attn_matrices": ["k", "v"], "r": 1, "alpha": 1,
        "composition_mode": "scale",
    },
}  # fmt: skip
"""What a name of adapters' own table says, where that differs from a configuration of nothing."""
_RENAMED = {"gelu": "gelu_new", "gelu_orig": "gelu"}
"""Activations in files that say no version."""


def today(said: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    """Return the configuration of an adapter's file as adapters 1.3 understands it.

    Args:
        said: the file's content.
        keys: of its tensors.

    Raises:
        ModgraftError: for what it says otherwise than it was trained, or a name that is not known.
    """
    config, version = said["config"], said["version"]
    if isinstance(config, str):
        if config not in _NAMED:
            raise ModgraftError(
                f"config={config!r:.60} is no name that is read; there are {', '.join(_NAMED)}"
            )
        config = _NAMED[config]
    config = dict(config)
    _check_version(config, version)
    renamed = _RENAMED if version is None and isinstance(said["config"], dict) else {}
    if isinstance(sigma := config.get("non_linearity"), str):
        config["non_linearity"] = renamed.get(sigma, sigma)
    if inverted := config.pop("invertible_adapter", None):
        config |= _inverted(inverted, config, renamed)
    unused = said.get("type") == "text_task" and not any("invertible_adapters." in k for k in keys)
    if unused and config.get("inv_adapter"):  # the first versions named one in every configuration
        config |= {"inv_adapter": None, "inv_adapter_reduction_factor": None}
    return config


def _check_version(config: Mapping[str, Any], version: str | None) -> None:
    """Refuse a version that is none, and a LoRA whose scale was another one then."""
    found = re.fullmatch(r"(adapters\.)?(\d{1,3})\.(\d{1,3})\.\d.*", version or "0.0.0")
    if found is None:
        raise ModgraftError(f"version={version!r:.40} is none of adapters")
    several = config.get("configs")
    every = [config, *(several if isinstance(several, list) else [])]
    loras = [c for c in every if isinstance(c, dict) and c.get("architecture") == "lora"]
    scaled = any(c.get("r", 8) != c.get("alpha", 8) for c in loras)
    if scaled and not (found[1] and (int(found[2]), int(found[3])) >= (1, 1)):
        raise ModgraftError(
            f"version={version!r:.40}, and alpha is not r: before adapters 1.1 the scale of a LoRA "
            f"was another one; load it with adapters 1.3 and save it again"
        )


def _inverted(
    said: Any, config: Mapping[str, Any], renamed: Mapping[str, str]
) -> Mapping[str, Any]:
    """Return an invertible adapter that is a configuration in the other one."""
    keys = {"block_type", "reduction_factor", "non_linearity"}
    if not isinstance(said, dict) or not keys - {"non_linearity"} <= said.keys() <= keys:
        raise ModgraftError(f"invertible_adapter={said!r:.80} is not understood")
    sigma = said.get("non_linearity", config.get("non_linearity"))
    if not isinstance(sigma, str) or renamed.get(sigma, sigma) != config.get("non_linearity"):
        raise ModgraftError(
            f"invertible_adapter has non_linearity={sigma!r:.40}, and adapters 1.3 computes "
            f"{config.get('non_linearity')!r:.40}, that of the bottlenecks, for both"
        )
    if config.get("inv_adapter") not in (None, said["block_type"]):
        raise ModgraftError("inv_adapter and invertible_adapter are not the same")
    factor = said["reduction_factor"]
    return {"inv_adapter": said["block_type"], "inv_adapter_reduction_factor": factor}
