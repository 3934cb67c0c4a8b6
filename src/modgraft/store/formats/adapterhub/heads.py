"""The head that ``adapters`` saves beside an adapter: weights of the host that trained with it.

It is the head of a host's own class, saved as a whole, or one that ``AutoAdapterModel`` adds to a
model. The latter is a row of layers, numbered with the dropouts and non-linearities between them;
where a class of transformers computes the same, its head is read into a host of that class.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from modgraft.core.errors import CheckpointError, ModgraftError, an, warn
from modgraft.engine.implant import moving_buffers
from modgraft.store.file import TensorFile
from modgraft.store.formats.adapterhub.layout import (
    HEAD,
    HEAD_TENSORS,
    content,
    kind_of,
    prefix,
    type_of,
)
from modgraft.store.formats.found import Waiting


@dataclass(frozen=True)
class Kind:
    """A head of ``AutoAdapterModel`` that a class of transformers has too.

    Attributes:
        name: what it is called, ``head_type``.
        layers: our layers by the numbers of theirs.
        options: what of its configuration changes what it computes.
    """

    name: str
    layers: Mapping[int, str]
    options: Mapping[str, Any]


def _classes(first: str, last: str, activation: str = "tanh") -> Kind:
    options = {"layers": 2, "activation_function": activation, "use_pooler": False}
    return Kind("classification", {1: first, 4: last}, options)


def _last_token(name: str) -> Kind:
    return Kind("classification", {1: name}, {"layers": 1, "use_pooler": False})


def _words(kind: str, layers: Mapping[int, str], shift: bool = False) -> Kind:
    options: dict[str, Any] = {"layers": 1, "layer_norm": False, "shift_labels": shift}
    if len(layers) > 1:
        options |= {"layers": 2, "layer_norm": True, "activation_function": "gelu"}
    return Kind(kind, layers, options)


_BERT = "cls.predictions."
_TAGS = Kind("tagging", {1: "classifier"}, {"layers": 1})
_SPANS = Kind("question_answering", {1: "qa_outputs"}, {"layers": 1})
_ENCODERS = ("Bert", "Roberta", "DistilBert")
_KINDS: dict[str, tuple[Kind, ...]] = {
    "BertForSequenceClassification": (
        _classes("bert.pooler.dense", "classifier"),  # BERT's pooler is the first of two layers
        Kind("classification", {1: "classifier"}, {"layers": 1, "use_pooler": True}),
    ),
    "BertForMaskedLM": (
        _words("masked_lm", {0: f"{_BERT}transform.dense", 2: f"{_BERT}transform.LayerNorm",
                             3: f"{_BERT}decoder"}),
    ),
    "RobertaForSequenceClassification": (_classes("classifier.dense", "classifier.out_proj"),),
    "DistilBertForSequenceClassification": (_classes("pre_classifier", "classifier", "relu"),),
    "BartForSequenceClassification": (
        _classes("classification_head.dense", "classification_head.out_proj"),
    ),
    "GPT2ForSequenceClassification": (_last_token("score"),),
    "LlamaForSequenceClassification": (_last_token("score"),),
    "ViTForImageClassification": (
        Kind("image_classification", {1: "classifier"}, {"layers": 1, "use_pooler": False}),
    ),
    "LlamaForTokenClassification": (Kind("tagging", {1: "score"}, {"layers": 1}),),
    "GPT2LMHeadModel": (_words("causal_lm", {0: "lm_head"}, shift=True),),
    "LlamaForCausalLM": (_words("causal_lm", {0: "lm_head"}, shift=True),),
    "T5ForConditionalGeneration": (_words("seq2seq_lm", {0: "lm_head"}),),
    "BartForConditionalGeneration": (_words("seq2seq_lm", {0: "lm_head"}),),
    **{f"{each}ForTokenClassification": (_TAGS,) for each in (*_ENCODERS, "GPT2")},
    **{f"{each}ForQuestionAnswering": (_SPANS,) for each in (*_ENCODERS, "Bart")},
}  # fmt: skip
_KNOWN: dict[str, Any] = {
    "head_type": "", "layers": 1, "activation_function": "", "use_pooler": False,
    "layer_norm": False, "shift_labels": False, "bias": True, "num_labels": 2, "vocab_size": 2,
    "embedding_size": 2, "dropout_prob": None, "label2id": None, "multilabel": False,
}  # fmt: skip
_MAY_BE_NONE = {"activation_function"}
_STACKS = {"t5": ("shared.", "encoder.", "decoder.")}
"""What begins the names of a base model that is not a part by itself in all classes of its type."""


@dataclass(frozen=True)
class Head:
    """What is read of a head; without a file there is none.

    Attributes:
        file: its tensors.
        names: the name of theirs, by the name of the host's weight.
        tied: what more is in the file, and must be what the host, or another name there, has.
        undoes: whether an invertible adapter is undone before it.
    """

    file: TensorFile | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    tied: Mapping[str, Tensor | str] = field(default_factory=dict)
    undoes: bool = False

    @property
    def beside(self) -> Waiting:
        """The tensors by the names of the host's weights."""
        if (file := self.file) is None:
            return {}
        return {
            own: (file.entries[key], partial(file.tensor, key)) for own, key in self.names.items()
        }

    def verify(self) -> None:
        """Raise a CheckpointError for words unlike those that the host reads."""
        if self.file is None:
            return
        for key, same in self.tied.items():
            own = self.file.tensor(same) if isinstance(same, str) else same
            if not torch.equal(self.file.tensor(key).to(own), own):
                of = (
                    same
                    if isinstance(same, str)
                    else "the table of words (or the buffer) that this host has"
                )
                raise CheckpointError(
                    f"{self.file.path}: {key} is not {of}, to which it is tied; load it into the "
                    f"model it was trained in"
                )


def read(folder: Path, model: nn.Module) -> Head:
    """Return the head in a folder.

    Raises:
        CheckpointError: for a head that is not computed in a host of this class, or with other
            tensors than it has.
    """
    if not (folder / HEAD).exists():
        return Head()
    path, here = folder / HEAD, type(model).__name__
    said = content(path, "a head's")
    if not said.keys() >= {"config", "model_class"}:
        raise CheckpointError(f"{path} is not a head's: it says no config and model_class")
    config, of, name = said["config"], str(said["model_class"]), said.get("name")
    flexible = of.endswith(("AdapterModel", "ModelWithHeads"))
    whole = config is None and of == here
    if not (flexible and isinstance(config, dict)) and not whole:
        raise CheckpointError(
            f"{path}: the head is of a {of!r:.60}, and this host is a {here}; a head is "
            f"read into a host of its own class (save one from there with adapters.init(model)), "
            f"or leave {HEAD} and {HEAD_TENSORS} out of the folder to load the adapter alone"
        )
    if not (folder / HEAD_TENSORS).exists():
        raise CheckpointError(
            f"{folder}: {HEAD_TENSORS} is not there (pytorch_model_head.bin is a pickle, which is "
            f"never read); save it anew with use_safetensors=True"
        )
    kind = None if config is None else _kind(path, config, model)
    keys = _parts(model) if kind is None else _layers(kind, str(name), model)
    file = TensorFile(folder / HEAD_TENSORS)
    names, tied = _sorted({k: keys[k] for k in keys if k in file.entries}, model)
    wanted, _ = _sorted(keys, model)
    lacking = {wanted[name] for name in wanted.keys() - names.keys()}
    extra = file.entries.keys() - keys.keys()
    if kind is not None and extra and extra <= {f"{_stem(k)}.bias" for k in keys}:
        number = int(_stem(min(extra)).rpartition(".")[2])
        raise CheckpointError(
            f"{file.path}: {min(extra)} is a bias, and {kind.layers[number]} of this {here} has "
            f"none; train the head with bias=False, or leave {HEAD} and {HEAD_TENSORS} out of the "
            f"folder to load the adapter alone"
        )
    if unlike := sorted(lacking | extra):
        raise CheckpointError(
            f"{file.path}: {unlike[:3]} are in the head or in this {here}, and not in both"
        )
    return Head(file, names, tied, kind is None or kind.name.endswith("_lm"))


def _kind(path: Path, config: Mapping[str, Any], model: nn.Module) -> Kind:
    """Return the head of the host's class that computes what a configuration says.

    Raises:
        CheckpointError: where there is none, or what is set is not understood.
    """
    for key, value in config.items():
        like = _KNOWN.get(key)
        known = key in _KNOWN and (like is None or kind_of(value) == kind_of(like))
        if not known and not (value is None and key in _MAY_BE_NONE):
            raise CheckpointError(f"{path}: {key}={value!r:.60} is not understood")
    kinds = _KINDS.get(type(model).__name__, ())
    name = str(config.get("head_type")).removeprefix("multilabel_")
    fits = [k for k in kinds if k.name == name and k.options.items() <= config.items()]
    if not fits:
        has = " or ".join(f"{k.name} of {dict(k.options)}" for k in kinds) or "none of theirs"
        said = {key: config.get(key) for kind in kinds for key in kind.options}
        raise CheckpointError(
            f"{path}: a head of head_type={config.get('head_type')!r:.40} and {said} is not what "
            f"this host computes: a {type(model).__name__} has {has}; load it into a class that "
            f"has it, or leave {HEAD} out of the folder to load the adapter alone"
        )
    _check_training(path, config, model)
    _check_labels(path, config.get("label2id"), model.config)
    return fits[0]


def _check_training(path: Path, config: Mapping[str, Any], model: nn.Module) -> None:
    """Raise a CheckpointError for a head that would train otherwise in the host."""
    several = config["head_type"] == "multilabel_classification" or config.get("multilabel")
    loss = "single_label_classification" if config.get("num_labels") != 1 else "regression"
    may_be = ("multi_label_classification",) if several else (None, loss)
    if (here := getattr(model.config, "problem_type", None)) not in may_be:
        raise CheckpointError(
            f"{path}: head_type={config['head_type']!r} has another loss than this host, of "
            f"problem_type={here!r}; make the host with problem_type={may_be[-1]!r}"
        )
    dropouts = sorted({m.p for m in model.modules() if isinstance(m, nn.Dropout)})
    if config.get("dropout_prob") not in (None, *dropouts):
        raise CheckpointError(
            f"{path}: dropout_prob={config['dropout_prob']!r:.40} is none of this host's "
            f"({dropouts}); make the host with that dropout"
        )


def _check_labels(path: Path, labels: Any, of: Any) -> None:
    """Warn of labels that the host calls otherwise.

    Raises:
        CheckpointError: for what are no labels.
    """
    if labels is None:
        return
    if not isinstance(labels, dict) or {kind_of(one) for one in labels.values()} - {int}:
        raise CheckpointError(f"{path}: label2id={labels!r:.60} is not understood")
    if labels != of.label2id:
        warn(
            f"{path}: its labels are {labels!r:.200}, and the host's {of.label2id!r:.200}; say "
            f"host.model.config.label2id = … to have its names",
        )


def _layers(kind: Kind, name: str, model: nn.Module) -> dict[str, Tensor]:
    """Return the host's weights by the names of theirs, in a head of an AdapterModel."""
    return {
        f"heads.{name}.{number}.{part}": parameter
        for number, path in kind.layers.items()
        for part, parameter in model.get_submodule(path).named_parameters()
    }


def _stem(key: str) -> str:
    """Return the layer that a key is of."""
    return key.rpartition(".")[0]


def _parts(model: nn.Module) -> dict[str, Tensor]:
    """Return what a host has beside its base model, by all its names."""
    base = prefix(model) or _STACKS.get(type_of(model), "")
    every = model.state_dict(keep_vars=True).items()
    return {n: t for n, t in every if base and not n.startswith(base)}


def _sorted(
    keys: Mapping[str, Tensor], model: nn.Module
) -> tuple[dict[str, str], dict[str, Tensor | str]]:
    """Return the key of each weight of the host by its name, and the keys of what is tied."""
    called = {id(p): n for n, p in model.named_parameters()}
    called |= {id(buffer): n for n, buffer, _ in moving_buffers(model)}
    words = None
    with suppress(AttributeError, NotImplementedError):  # no model of texts
        words = model.get_input_embeddings().weight  # type: ignore[operator,union-attr]
    names: dict[str, str] = {}
    tied: dict[str, Tensor | str] = {}
    for key, tensor in keys.items():
        name = called.get(id(tensor))
        if name is None or tensor is words:
            tied[key] = tensor
        elif name in names:
            tied[key] = names[name]
        else:
            names[name] = key
    return names, tied


def written(
    model: nn.Module, beside: Set[str], name: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a head and what ``head_config.json`` says of it alone; none of nothing.

    Args:
        model: the host's.
        beside: the weights of the host that trained.
        name: the adapter's name.

    Raises:
        ModgraftError: for weights that are part of no head.
    """
    if not beside:
        return {}, {}
    if not hasattr(getattr(model, "config", None), "label2id"):
        raise ModgraftError(
            f"{name!r} trained together with the host's {min(beside)}, and adapters has heads of "
            f"models of transformers alone, not of {an(type(model).__name__)}; save it as "
            f"modgraft's"
        )
    own, config = _parts(model), cast(Any, model.config)
    if beside <= _sorted(own, model)[0].keys():
        return {key: tensor.detach().clone() for key, tensor in own.items()}, {
            "config": None, "label2id": config.label2id, "name": None,
            "num_labels": config.num_labels,
        }  # fmt: skip
    for kind in _KINDS.get(type(model).__name__, ()):
        made = _layers(kind, name, model)
        if beside <= _sorted(made, model)[0].keys():
            bias = any(key.endswith(".bias") for key in made)
            said = {"head_type": kind.name, "dropout_prob": None, **kind.options, "bias": bias}
            said |= {"num_labels": config.num_labels, "label2id": config.label2id}
            stem = type(model).__name__.partition("For")[0]
            return made, {"config": said, "model_class": f"{stem}AdapterModel", "name": name}
    raise ModgraftError(
        f"{name!r} trained together with the host's {min(beside - own.keys())}, which is no part "
        f"of its head and is not written in this format; save it as modgraft's"
    )
