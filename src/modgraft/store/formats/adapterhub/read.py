"""AdapterHub's folders, as ``adapters`` saves one adapter: a bottleneck, Compacter, LoRA or IA³.

    adapter_config.json    {config, model_type, model_class, model_name, hidden_size, name, version}
    adapter.safetensors    its tensors; its name is a part of theirs

A configuration that is set to what is not computed here in the same way is refused by its name.
Bottlenecks are read and written in BERT, GPT-2, T5 and Llama; LoRA and IA³ wherever the roles of a
host name its layers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from modgraft.computation.adapter import Adapter, ParallelAdapter
from modgraft.computation.base import Computation
from modgraft.computation.compacter import Compacter
from modgraft.computation.lora import LoRA
from modgraft.computation.rescale import Rescale
from modgraft.core.errors import CheckpointError, ModgraftError
from modgraft.core.sites import find
from modgraft.store.card import Card, Saved, to_json
from modgraft.store.file import Entry, TensorFile, read_json
from modgraft.store.stored import Stored

CONFIG, TENSORS = "adapter_config.json", "adapter.safetensors"
KEYS = {"config", "hidden_size", "model_class", "model_name", "model_type", "name", "version"}
OTHERS = ("head_config.json", "adapter_fusion_config.json", "adapter_setup.json")

# What a bottleneck's configuration holds, and the only value understood where it is not read.
BOTTLENECK: dict[str, Any] = {
    "mh_adapter": False, "output_adapter": True, "reduction_factor": 16, "non_linearity": "relu",
    "original_ln_before": False, "original_ln_after": True, "ln_before": False, "ln_after": False,
    "init_weights": "bert", "init_weights_seed": None, "is_parallel": False, "scaling": 1.0,
    "use_gating": False, "residual_before_ln": True, "adapter_residual_before_ln": False,
    "inv_adapter": None, "inv_adapter_reduction_factor": None, "cross_adapter": False,
    "leave_out": [], "dropout": 0.0, "phm_layer": False, "phm_dim": 4, "factorized_phm_W": True,
    "shared_W_phm": False, "shared_phm_rule": True, "factorized_phm_rule": False,
    "phm_c_init": "normal", "phm_init_range": 0.0001, "learn_phm": True,
    "hypercomplex_nonlinearity": "glorot-uniform", "phm_rank": 1, "phm_bias": True,
    "stochastic_depth": 0.0,
}  # fmt: skip
LORA: dict[str, Any] = {
    "architecture": "lora", "selfattn_lora": True, "intermediate_lora": False,
    "output_lora": False, "leave_out": [], "r": 8, "alpha": 8, "dropout": 0.0,
    "attn_matrices": ["q", "v"], "composition_mode": "add", "init_weights": "lora",
    "init_weights_seed": None, "use_gating": False, "use_dora": False, "vera_d": None,
    "vera_b": None, "dtype": None,
}  # fmt: skip
_STARTS = {"init_weights", "init_weights_seed", "phm_c_init", "phm_init_range"}
_STARTS |= {"hypercomplex_nonlinearity"}  # how it was drawn says nothing of what it is now
SIGMA = {"relu": "relu", "gelu": "gelu", "gelu_new": "gelu_tanh", "swish": "silu", "tanh": "tanh"}
_MATRICES = {"q": "query", "k": "key", "v": "value"}


@dataclass(frozen=True)
class _Tensor:
    """A tensor of ours, and where it lies in theirs."""

    ours: str
    theirs: str
    turned: bool = False
    half: tuple[int, int] | None = None  # which of how many rows, where several are one tensor

    def read(self, tensor: Tensor) -> Tensor:
        """Return ours of theirs.

        Raises:
            CheckpointError: for a shape that theirs never has.
        """
        pieces = 1 if self.half is None else self.half[1]
        if (self.turned and tensor.dim() != 3) or not tensor.dim() or len(tensor) % pieces:
            raise CheckpointError(f"{self.theirs} is {list(tensor.shape)}, which it never is")
        if self.half is not None:
            tensor = tensor.chunk(self.half[1])[self.half[0]]
        return tensor.transpose(1, 2) if self.turned else tensor


def holds(folder: Path) -> bool:
    """Return whether a folder looks like one of ``adapters``; PEFT's has a file of that name."""
    if any((folder / name).is_file() for name in OTHERS):
        return True
    path = folder / CONFIG
    return (
        path.is_file() and path.stat().st_size < 2**20 and b'"peft_type"' not in path.read_bytes()
    )


def read(folder: Path, model: nn.Module) -> Stored:
    """Read the adapter in a folder; see :class:`modgraft.store.formats.Format`."""
    for name in (*OTHERS, "embedding.pt"):
        if (folder / name).exists():
            raise CheckpointError(
                f"{folder}: {name} is there, and heads, fusions, setups and embeddings of adapters "
                f"are not read; {CONFIG} and {TENSORS} alone in a folder are the adapter without"
            )
    if not (folder / TENSORS).exists():
        raise CheckpointError(
            f"{folder}: {TENSORS} is not there (pytorch_adapter.bin is a pickle, which is never "
            f"read); save it anew: model.save_adapter(folder, name, use_safetensors=True)"
        )
    try:
        said = read_json((folder / CONFIG).read_bytes())
        config, name, version = dict(said["config"]), said["name"], said["version"]
        if not isinstance(name, str) or not isinstance(version, str):
            raise ValueError("name and version are texts")
        if unknown := said.keys() - KEYS:
            raise ValueError(f"{', '.join(sorted(unknown))} is not understood")
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(f"{folder / CONFIG} is not an adapter's ({error!r:.200})") from error
    here = getattr(getattr(model, "config", None), "model_type", None)
    if said.get("model_type") != here:
        raise CheckpointError(
            f"{folder}: the adapter is of a {said.get('model_type')!r:.40}, and this host is a "
            f"{here}; load it into the model it was trained in"
        )
    found = re.fullmatch(r"adapters\.(\d+)\.(\d+)\.\d+.*", version)
    if found is None or (int(found[1]), int(found[2])) < (1, 1):
        raise CheckpointError(
            f"{folder}: version {version!r:.40}: before adapters 1.1 the scale of a LoRA was "
            f"another one; load it with adapters 1.3 and save it again"
        )
    try:
        method, places = understood(config, model)
    except ModgraftError as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from error
    whole = names(method, places, name, model)
    file = TensorFile(folder / TENSORS)
    own = {bare(key, model): key for key in file.entries}
    expected = {each.theirs for each in whole}
    if own.keys() != expected:
        if any("shared_parameters" in key for key in expected - own.keys()):
            raise CheckpointError(
                f"{file.path}: the rule that its Compacter's layers share is not in it (adapters "
                f"leaves it out in a T5, or a model without a head); save one with "
                f"shared_phm_rule=False, or from a model with a head"
            )
        lacking, extra = sorted(expected - own.keys()), sorted(own.keys() - expected)
        raise CheckpointError(
            f"{file.path}: {len(lacking)} tensors are missing {lacking[:3]} and {len(extra)} are "
            f"not understood {extra[:3]}; the adapter is of another host, or of another kind than "
            f"its configuration says"
        )

    def tensors() -> Mapping[str, Tensor]:
        every = {key: file.tensor(whole) for key, whole in own.items()}
        made = {}
        for each in whole:
            try:
                tensor = each.read(every[each.theirs])
            except CheckpointError as error:
                raise CheckpointError(f"{file.path}: {error}; copy the folder again") from error
            if each.ours.endswith(":phi"):
                tensor = tensor.reshape(-1)
            made[f"{name}:{each.ours}"] = tensor.contiguous()
        return made

    saved = Saved(name=name, **to_json(method), sites=[label for _, label in places])
    card = Card(names=[name], modules=[saved], versions={"adapters": version}, made="")
    entries: Mapping[str, Entry] = {f"{name}:{e.ours}": file.entries[own[e.theirs]] for e in whole}
    return Stored(folder, card, entries, tensors)


# -- configurations ------------------------------------------------------------------------------

Places = list[tuple[str, str]]  # the path of theirs, without the base model's name; our label


def _check(config: Mapping[str, Any], known: Mapping[str, Any], read: set[str]) -> dict[str, Any]:
    """Return the whole configuration, if what is not in ``read`` has the one value we compute."""
    if unknown := config.keys() - known.keys():
        raise ModgraftError(f"{', '.join(sorted(unknown))} is not understood")
    for key in sorted(config.keys() & read):
        if _kind(config[key]) != _kind(known[key]):
            raise ModgraftError(
                f"{key}={config[key]!r:.60} is not understood; it is as {known[key]}"
            )
    for key in sorted(known.keys() - read - _STARTS):
        if key in config and config[key] != known[key]:
            raise ModgraftError(
                f"{key}={config[key]!r:.60} is not computed here (only {known[key]!r} is)"
            )
    return {**known, **config}


def _kind(value: Any) -> object:
    """Return what sort of value stands in a configuration; a list is of texts or of numbers."""
    if isinstance(value, list):
        return list, {_kind(one) for one in value} <= {str} or {_kind(one) for one in value} <= {
            int
        }
    return int if type(value) is float and value == value else type(value)


def understood(config: Mapping[str, Any], model: nn.Module) -> tuple[Computation, Places]:
    """Return the method of a configuration, and where it stands.

    Raises:
        ModgraftError: for what is set and not computed here.
    """
    if config.get("architecture") == "lora":
        return _lora(config, model)
    if "architecture" in config and config["architecture"] is not None:
        raise ModgraftError(
            f"architecture={config['architecture']!r:.40} is not read; bottlenecks, Compacter, "
            f"LoRA and IA³ are"
        )
    known = {k: v for k, v in config.items() if k != "architecture"}
    use = {"mh_adapter", "output_adapter", "reduction_factor", "non_linearity", "is_parallel"}
    use |= {"original_ln_before", "scaling", "phm_layer", "phm_dim", "phm_rank", "shared_phm_rule"}
    c = _check(known, BOTTLENECK, use | {"leave_out"})
    places = bottlenecks(model, c)
    sigma, factor, scale = c["non_linearity"], c["reduction_factor"], c["scaling"]
    if sigma not in (*SIGMA, "silu"):
        raise ModgraftError(f"non_linearity={sigma!r:.40} is not computed here")
    if not 1 <= factor < 2**31 or factor != int(factor):
        raise ModgraftError(f"reduction_factor={factor!r:.60} is no whole number from 1")
    options: dict[str, Any] = {"reduction": int(factor), "scale": float(scale)}
    options["nonlinearity"] = SIGMA.get(sigma, sigma)
    if c["phm_layer"]:
        if c["is_parallel"]:
            raise ModgraftError("phm_layer with is_parallel is not computed here")
        options |= {"n": c["phm_dim"], "rank": c["phm_rank"], "shared": c["shared_phm_rule"]}
        return Compacter(**options), places
    return (ParallelAdapter if c["is_parallel"] else Adapter)(**options), places


def bottlenecks(model: nn.Module, c: Mapping[str, Any]) -> Places:
    """Return where bottlenecks of a configuration stand."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    stream = c["original_ln_before"] or c["is_parallel"]
    if c["original_ln_before"] and c["is_parallel"]:
        raise ModgraftError("original_ln_before with is_parallel is not computed here")
    if stream and (c["mh_adapter"] or not c["output_adapter"]):
        raise ModgraftError(
            "mh_adapter with original_ln_before or is_parallel is not computed here; "
            "output_adapter alone is"
        )
    if c["is_parallel"] and kind not in ("bert", "t5"):
        raise ModgraftError(f"is_parallel is not computed in a {kind} as it is in adapters")
    if c["leave_out"] and kind == "t5":
        raise ModgraftError("leave_out is not understood in a T5")
    base = prefix(model)
    found: Places = []
    for path, _ in model.named_modules():
        path = path.removeprefix(base)
        for attention, theirs, label in _stands(str(kind), path, stream, c["is_parallel"]):
            number = int(re.findall(r"\d+", path)[0])
            wanted = c["mh_adapter"] if attention else c["output_adapter"]
            if wanted and number not in c["leave_out"]:
                found.append((theirs, base + label))
    if not found:
        raise ModgraftError(
            f"bottlenecks are read in BERT, GPT-2, T5 and Llama, or the configuration has none; "
            f"this host is a {kind}"
        )
    return found


def _stands(kind: str, path: str, stream: bool, parallel: bool) -> list[tuple[bool, str, str]]:
    """Return whether it is after attention, the path of theirs and our label, in one layer."""
    if kind == "bert" and re.fullmatch(r"encoder\.layer\.\d+", path):
        end = "[residual]" if stream else ".dense"
        return [
            (True, f"{path}.attention.output", f"{path}.attention.output{end}"),
            (False, f"{path}.output", f"{path}.output{end}"),
        ]
    layer = {"gpt2": (r"h\.\d+", "attn.c_proj", "mlp.c_proj"),
             "llama": (r"layers\.\d+", "self_attn.o_proj", "mlp.down_proj")}  # fmt: skip
    if kind in layer and re.fullmatch(layer[kind][0], path):
        _, attention, last = layer[kind]
        return [
            (True, f"{path}.attention_adapters", f"{path}.{attention}"),
            (False, f"{path}.output_adapters", path if stream else f"{path}.{last}"),
        ]
    if kind == "t5" and (block := re.fullmatch(r"((en|de)coder)\.block\.\d+", path)):
        last = f"{path}.layer.{1 if block[2] == 'en' else 2}"
        on_stream = last if parallel else path
        return [
            (True, f"{path}.layer.0", f"{path}.layer.0.SelfAttention.o"),
            (False, last, on_stream if stream else f"{last}.DenseReluDense.wo"),
        ]
    return []


def _lora(config: Mapping[str, Any], model: nn.Module) -> tuple[Computation, Places]:
    """Read a LoRA or an IA³."""
    scaled = config.get("composition_mode") == "scale"
    use = {"selfattn_lora", "intermediate_lora", "output_lora", "attn_matrices", "r", "alpha"}
    use |= {"leave_out", "composition_mode"} | (set() if scaled else {"dropout"})
    c = _check(config, LORA, use)
    if c["composition_mode"] not in ("add", "scale"):
        raise ModgraftError(f"composition_mode={c['composition_mode']!r:.40} is not understood")
    if scaled and (c["r"], c["alpha"]) != (1, 1):
        raise ModgraftError("composition_mode='scale' is read with r=1 and alpha=1")
    places = weights(model, c)
    if scaled:
        return Rescale(), places
    return LoRA(rank=c["r"], alpha=float(c["alpha"]), dropout=float(c["dropout"])), places


def weights(model: nn.Module, c: Mapping[str, Any]) -> Places:
    """Return the layers whose weights a configuration changes."""
    if unknown := set(c["attn_matrices"]) - _MATRICES.keys():
        raise ModgraftError(f"attn_matrices: {sorted(unknown)} are not understood")
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in ("bert", "gpt2", "t5", "llama"):
        raise ModgraftError(f"LoRA and IA³ are read in BERT, GPT-2, T5 and Llama, not in a {kind}")
    if c["leave_out"] and kind == "t5":
        raise ModgraftError("leave_out is not understood in a T5")
    if kind == "llama" and c["output_lora"]:
        raise ModgraftError("output_lora is not understood in a Llama")
    roles = [_MATRICES[m] for m in _MATRICES if c["selfattn_lora"] and m in c["attn_matrices"]]
    roles += ["down" if kind == "llama" else "up"] * bool(c["intermediate_lora"])
    roles += ["down"] * bool(c["output_lora"])
    if not roles:
        raise ModgraftError("the configuration changes no weight")
    base = prefix(model)
    found = [(site.path.removeprefix(base), site.label) for site in find(model, roles)]
    if untold := [p for p, _ in found if "crossattention" in p or p.endswith(".wi_0")]:
        raise ModgraftError(f"LoRA and IA³ are not understood where a {kind} has {untold[0]}")
    return [f for f in found if int(re.findall(r"\d+", f[0])[0]) not in c["leave_out"]]


# -- tensors -------------------------------------------------------------------------------------


def prefix(model: nn.Module) -> str:
    """Return the path of the base model in a model, with its point."""
    base = getattr(model, "base_model_prefix", "")
    return f"{base}." if base and isinstance(getattr(model, base, None), nn.Module) else ""


def bare(key: str, model: nn.Module) -> str:
    """Return a key without the base model's name."""
    base = getattr(model, "base_model_prefix", "")
    return key.removeprefix(f"{base}.") if base else key


def names(method: Computation, places: Places, name: str, model: nn.Module) -> list[_Tensor]:
    """Return every tensor of a module at its places."""
    made = []
    if isinstance(method, LoRA | Rescale):
        own = {"phi": "lora_B"} if isinstance(method, Rescale) else {"A": "lora_A", "B": "lora_B"}
        for at, (path, label) in enumerate(places):
            same = [i for i, (other, _) in enumerate(places) if other == path]
            half = (same.index(at), len(same)) if len(same) > 1 else None
            for ours, theirs in own.items():
                key = f"{path}.loras.{name}.{theirs}"
                made.append(_Tensor(f"{label}:{ours}", key, half=half))
        return made
    compact = isinstance(method, Compacter)
    for number, (path, label) in enumerate(places):
        for way, stem in (("down", "adapter_down.0"), ("up", "adapter_up")):
            stem = f"{path}.adapters.{name}.{stem}"
            if not compact:
                for part in ("weight", "bias"):
                    made.append(_Tensor(f"{label}:{way}.{part}", f"{stem}.{part}"))
                continue
            made += [
                _Tensor(f"{label}:S_{way}", f"{stem}.W_right", turned=True),
                _Tensor(f"{label}:T_{way}", f"{stem}.W_left"),
                _Tensor(f"{label}:b_{way}", f"{stem}.b"),
            ]
            if not method.shared:
                made.append(_Tensor(f"{label}:A_{way}", f"{stem}.phm_rule", turned=True))
        if compact and method.shared and number == 0:
            key = f"shared_parameters.{name}.phm_rule"
            made.append(_Tensor(f"{label}:A", key, turned=True))
    return made
