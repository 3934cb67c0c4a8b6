"""Modules of ours as PEFT saves one adapter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from modgraft.computation.base import Computation
from modgraft.computation.lora import LoRA
from modgraft.computation.oft import OFT
from modgraft.computation.prefix import Prefix
from modgraft.computation.prompts import SoftPrompt
from modgraft.computation.rescale import Rescale
from modgraft.computation.trainable_tokens import TrainableTokens
from modgraft.computation.vera import VeRA
from modgraft.core.errors import ModgraftError, an
from modgraft.core.files import together, write_json
from modgraft.core.layers import LINEAR
from modgraft.core.sites import Site, located
from modgraft.engine.implant import learning_parts
from modgraft.store.file import write_tensors
from modgraft.store.formats.peft import ia3, lora_written, oft, prompts, tokens, vera
from modgraft.store.formats.peft.folder import ONE_OF_TWO, PREFIX, TENSORS, Written, another_path
from modgraft.store.formats.peft.host_weights import tables_of
from modgraft.store.formats.peft.options import CONFIG
from modgraft.store.formats.peft.read import holds, name_of
from modgraft.store.formats.peft.targets import aim
from modgraft.training.host_like import HostLike

VERSION = "0.21.2"  # of PEFT, whose format is written

_BEFORE_INPUT = ("PROMPT_TUNING", "PREFIX_TUNING")
"""What changes no layer of the host, so that this is not wrapped, and its keys are others."""

_TASKS = {
    "SequenceClassification": "SEQ_CLS", "TokenClassification": "TOKEN_CLS",
    "QuestionAnswering": "QUESTION_ANS", "ConditionalGeneration": "SEQ_2_SEQ_LM",
    "CausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM",
}  # fmt: skip
_WITH_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"),
               "QUESTION_ANS": ("qa_outputs",)}  # fmt: skip
"""The tasks for which PEFT saves the head by itself, and what it takes for one."""
_MAMBAS = ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h")
_NOT_IN_MAMBA = (".out_proj", ".conv1d")
"""The hosts, and the layers of theirs, for which PEFT refuses LoRA."""
_PASSED = {"input_ids", "inputs_embeds"}
"""What PEFT's class for any task gives to a host by name; a ``forward`` without such an argument
hands it on, to a layer that is given it already (huggingface/peft#1988)."""


def write(host: HostLike, names: Sequence[str], folder: Path) -> None:
    """Write modules of a host as PEFT saves one adapter.

    Raises:
        ModgraftError: for what PEFT has no place for, with the reason, or a folder of other things.
    """
    model, implants = host.model, {name: host._implants[name] for name in names}
    placed = {
        name: list(zip(located(model, implant.paths), implant.places, strict=True))
        for name, implant in implants.items()
    }
    _check_at_one_path(placed, model)
    kind, written = _written({n: i.method for n, i in implants.items()}, placed, model)
    if kind == "LORA":
        _check_not_in_mamba(written.paths, model)
    task, heads = _task(model, kind)
    if kind in _BEFORE_INPUT and task is None:
        raise ModgraftError(
            f"PEFT puts prompts and prefixes before the input of models for {', '.join(_TASKS)}, "
            f"and this host is {an(type(model).__name__)}"
        )
    beside = sorted({n for i in implants.values() for n in i.beside} | learning_parts(model))
    saved = _saved_beside(kind, written, beside, heads, model)
    tensors = _by_key(kind, written, saved)
    said = _options(kind, written, task, heads, model)
    with together(folder, holds, "nothing of PEFT") as part:
        write_tensors({k: t.detach().clone() for k, t in tensors.items()}, part / TENSORS, {})
        write_json(part / CONFIG, dict(sorted(said.items())))


def _check_not_in_mamba(paths: Sequence[str], model: nn.Module) -> None:
    which = getattr(getattr(model, "config", None), "model_type", None)
    if which in _MAMBAS and (not_there := [p for p in paths if p.endswith(_NOT_IN_MAMBA)]):
        raise ModgraftError(
            f"PEFT loads no LoRA at {not_there[0]} of a {which}, whose fast kernels take the "
            f"weight past the layer; save it without format='peft'"
        )


Placed = Mapping[str, list[tuple[Site, Any]]]


def _check_at_one_path(placed: Placed, model: nn.Module) -> None:
    for name, some in placed.items():
        for site, _ in some:
            if other := another_path(model, site.path):
                raise ModgraftError(f"{name!r} is at {site.path}, also {other}, {ONE_OF_TWO}")


def _by_key(kind: str, written: Written, saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return all tensors by the keys of the file; a prompt is the only one without a path."""
    prefix = "base_model." if kind in _BEFORE_INPUT else PREFIX
    return {
        **{k if k == "prompt_embeddings" else prefix + k: t for k, t in written.tensors.items()},
        **{f"base_model.{key}": tensor for key, tensor in written.shared.items()},
        **{prefix + key: tensor for key, tensor in saved.items()},
    }


def _options(
    kind: str, written: Written, task: str | None, heads: Sequence[str], model: nn.Module
) -> dict[str, Any]:
    """Return what ``adapter_config.json`` says."""
    if heads and not set(heads) & set(written.options.get("modules_to_save") or ()):
        task = None  # with which PEFT would look for a head in the folder
    said = {
        "peft_type": kind, "peft_version": VERSION, "task_type": task,
        "base_model_name_or_path": name_of(model), "revision": None, "inference_mode": True,
        "auto_mapping": None, "modules_to_save": None, **written.options,
    }  # fmt: skip
    if kind not in _BEFORE_INPUT:
        _aim(kind, written.paths, said, model)
    return said


def _aim(kind: str, paths: Sequence[str], said: dict[str, Any], model: nn.Module) -> None:
    """Say which layers are changed, and how their weights lie."""
    layers = {path: m for path, m in model.named_modules() if path}
    own = [layers[path] for path in paths if isinstance(layers[path], LINEAR)]
    said["fan_in_fan_out"] = bool(own) and not any(isinstance(m, nn.Linear) for m in own)
    said["target_modules"] = []
    if paths:
        aim(paths, layers, said)
    if kind == "IA3":
        ia3.aim_inner(paths, said)


def _written(
    methods: Mapping[str, Computation], placed: Placed, model: nn.Module
) -> tuple[str, Written]:
    """Return the type that PEFT has for modules, and what it keeps of them."""
    if len(set(map(type, methods.values()))) == 1 and all(
        isinstance(m, Rescale) for m in methods.values()
    ):
        name = " and ".join(methods)
        return "IA3", ia3.write(name, [each for some in placed.values() for each in some])
    by_type = {type(m): n for n, m in methods.items()}
    if len(methods) == 2 and by_type.keys() == {LoRA, TrainableTokens}:
        one, other = by_type[LoRA], by_type[TrainableTokens]
        written = lora_written.write(one, methods[one], placed[one])  # type: ignore[arg-type]
        rows = tokens.write(other, methods[other], placed[other], model, True)  # type: ignore[arg-type]
        both = {s.path for s, _ in placed[one]} & {s.path for s, _ in placed[other]}
        if both:
            raise ModgraftError(f"PEFT has LoRA or trainable tokens at {min(both)}, and not both")
        written.tensors |= rows.tensors
        written.options |= rows.options
        return "LORA", written
    if len(methods) != 1:
        raise ModgraftError(
            f"PEFT keeps one module in a folder, and {', '.join(methods)} are several; save each "
            f"to a folder of its own"
        )
    [(name, method)] = methods.items()
    sites = placed[name]
    match method:
        case LoRA():
            return "LORA", lora_written.write(name, method, sites)
        case VeRA():
            return "VERA", vera.write(name, method, sites)
        case OFT():
            return "OFT", oft.write(name, method, sites)
        case TrainableTokens():
            return "TRAINABLE_TOKENS", tokens.write(name, method, sites, model, False)
        case SoftPrompt():
            return "PROMPT_TUNING", prompts.write_prompt(name, method, model, sites[0][1])
        case Prefix():
            return "PREFIX_TUNING", prompts.write_prefix(name, method, sites, model)
    raise ModgraftError(
        f"{name!r} is {an(type(method).__name__)}, which PEFT's format has no place for; "
        f"save it without format='peft'"
    )


def _saved_beside(
    kind: str, written: Written, beside: Sequence[str], heads: Sequence[str], model: nn.Module
) -> dict[str, Tensor]:
    """Return what PEFT keeps of the host, by key, and set its options accordingly."""
    parameters, modules = dict(model.named_parameters()), dict(model.named_modules())
    biases = _biases(kind, written, set(beside), parameters) if "bias" in written.options else {}
    found: dict[str, Tensor] = {key: parameters[name] for key, name in biases.items()}
    left = set(beside) - set(biases.values())
    tables = tables_of(model)
    for name in sorted(left):
        path, _, parameter = name.rpartition(".")
        if path in written.paths and parameter == "weight" and id(modules[path]) in tables:
            found[f"{path}.base_layer.weight"] = parameters[name]
            left.discard(name)
    owners = {name.rpartition(".")[0] for name in left}
    whole = _whole(owners, heads, every=kind in _BEFORE_INPUT)
    _check_untied(model, whole)
    for path in whole:
        _check_alone(path, whole, written.paths, modules)
        found |= {f"{path}.{name}": t for name, t in modules[path].state_dict().items()}
    if whole:
        written.options["modules_to_save"] = whole
    return found


def _whole(owners: set[str], heads: Sequence[str], every: bool) -> list[str]:
    """Return the layers that PEFT saves whole: a head as one, and others that trained.

    Args:
        owners: the layers whose own weights trained.
        heads: what PEFT takes for heads in this host.
        every: whether it saves all of these.
    """
    trained = {
        head for head in heads if every or any(f"{o}.".startswith(f"{head}.") for o in owners)
    }
    return sorted({o for o in owners if not _is_in(f"{o}.", trained)} | trained)


def _check_alone(
    path: str, whole: Sequence[str], changed: Sequence[str], modules: Mapping[str, nn.Module]
) -> None:
    """Refuse a layer whose name means others too for PEFT, or in which the module changes one."""
    inside = any(f"{p}.".startswith(f"{path}.") for p in changed)
    if not path or inside or any(p.endswith(path) and p not in whole for p in modules):
        raise ModgraftError(
            f"weights of {path or 'the host itself'} trained with the module, and PEFT saves the "
            f"whole of a layer by its name: "
            f"{'it is changed by the module too' if inside else 'others are called so'}; save it "
            f"without format='peft'"
        )


def _biases(
    kind: str, written: Written, beside: set[str], parameters: Mapping[str, Tensor]
) -> dict[str, str]:
    """Return the biases that PEFT has a word for, by key, and say that word in the options."""
    every = {name for name in parameters if name.endswith(".bias")}
    own = {f"{path}.bias" for path in written.paths} & every
    for word, some in (("all", every), (f"{kind.lower()}_only", own)):
        if some and some <= beside:
            written.options["bias"] = word
            return {
                f"{path}.base_layer.bias" if path in written.paths else name: name
                for name in some
                for path in [name.removesuffix(".bias")]
            }
    return {}


def _check_untied(model: nn.Module, whole: Sequence[str]) -> None:
    """Refuse a layer that PEFT would copy, where a layer that it would not has the same weight."""
    names = {id(p): n for n, p in model.named_parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        own = names[id(parameter)]
        if own != name and _is_in(own, whole) != _is_in(name, whole):
            raise ModgraftError(
                f"{own} trained with the module and is also {name}: PEFT would make a copy for one "
                f"of them and leave the other as it was; save it without format='peft'"
            )


def _is_in(name: str, paths: Iterable[str]) -> bool:
    return any(name.startswith(f"{path}.") for path in paths)


def _task(model: nn.Module, kind: str) -> tuple[str | None, list[str]]:
    """Return PEFT's word for what a host is for, and the layers that it then takes for heads.

    It is left out where PEFT's class for the task cannot be made, cannot call the host, or calls it
    otherwise: that for answers in a text keeps ``token_type_ids`` to itself.
    """
    name = type(model).__name__
    task = next((task for end, task in _TASKS.items() if name.endswith(end)), None)
    called = signature(model.forward).parameters.keys() >= _PASSED
    if task and task.endswith("LM"):
        called = called and callable(getattr(model, "prepare_inputs_for_generation", None))
    if not called or (task == "QUESTION_ANS" and kind not in _BEFORE_INPUT):
        return None, []
    ends = _WITH_HEADS.get(task or "", ())
    return task, [p for p, _ in model.named_modules() if ends and p.endswith(ends)]
