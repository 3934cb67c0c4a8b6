"""modgraft: implant, compose, train and share modules in a frozen host model.

The public names are imported when they are first used: what needs no torch does not wait for it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modgraft.aggregation.base import Aggregation
    from modgraft.aggregation.representation import Average, Fuse, Sequential
    from modgraft.algebra import average, concat
    from modgraft.computation.attempt import Attempt
    from modgraft.computation.base import (
        Computation,
        FunctionComposition,
        InputComposition,
        KeyValueComposition,
        ParameterComposition,
        TokenComposition,
    )
    from modgraft.computation.compacter import Compacter
    from modgraft.computation.convolution import ConvAdapter
    from modgraft.computation.function import Adapter, ParallelAdapter
    from modgraft.computation.fusion import GatedFusion
    from modgraft.computation.hyper import HyperNetwork
    from modgraft.computation.inputs import LinearMap
    from modgraft.computation.intrinsic import IntrinsicDimension
    from modgraft.computation.invertible import InvertibleAdapter
    from modgraft.computation.parameter import LoRA
    from modgraft.computation.prefix import Prefix
    from modgraft.computation.prompts import Prompt, SoftPrompt
    from modgraft.computation.rescale import Rescale
    from modgraft.computation.shared import Shared
    from modgraft.computation.sparse import SparseDelta, SparseSubnetwork, Supermask
    from modgraft.context import Side
    from modgraft.errors import ModgraftError
    from modgraft.examples import Each, Weighted
    from modgraft.export import own_module
    from modgraft.host import Host, Implant
    from modgraft.mixture import Mixture
    from modgraft.routing.base import Router
    from modgraft.routing.fixed import Fixed
    from modgraft.routing.learned import NoisyTopK, SkillMatrix, Soft, Threshold, Top1, TopK
    from modgraft.routing.zero_shot import Arrow, Phatgoose, Similarity
    from modgraft.sites import Site
    from modgraft.tasks import add_task
    from modgraft.training.continual import Continual, continual
    from modgraft.training.gates import embed_tasks, train_gates
    from modgraft.training.lottery import magnitude_pruning, sparse_finetuning
    from modgraft.training.prefix import fold_prefix, prefix_from_text
    from modgraft.training.side_by_side import fit_side_by_side
    from modgraft.training.tasks import Tasks

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "Aggregation",
    "Arrow",
    "Attempt",
    "Average",
    "Compacter",
    "Computation",
    "Continual",
    "ConvAdapter",
    "Each",
    "Fixed",
    "FunctionComposition",
    "Fuse",
    "GatedFusion",
    "Host",
    "HyperNetwork",
    "Implant",
    "InputComposition",
    "IntrinsicDimension",
    "InvertibleAdapter",
    "KeyValueComposition",
    "LinearMap",
    "LoRA",
    "Mixture",
    "ModgraftError",
    "NoisyTopK",
    "ParallelAdapter",
    "ParameterComposition",
    "Phatgoose",
    "Prefix",
    "Prompt",
    "Rescale",
    "Router",
    "Sequential",
    "Shared",
    "Side",
    "Similarity",
    "Site",
    "SkillMatrix",
    "Soft",
    "SoftPrompt",
    "SparseDelta",
    "SparseSubnetwork",
    "Supermask",
    "Tasks",
    "Threshold",
    "TokenComposition",
    "Top1",
    "TopK",
    "Weighted",
    "add_task",
    "average",
    "concat",
    "continual",
    "embed_tasks",
    "fit_side_by_side",
    "fold_prefix",
    "magnitude_pruning",
    "own_module",
    "prefix_from_text",
    "sparse_finetuning",
    "train_gates",
]

_HOMES = {
    "aggregation.base": ("Aggregation",),
    "aggregation.representation": ("Average", "Fuse", "Sequential"),
    "examples": ("Each", "Weighted"),
    "mixture": ("Mixture",),
    "routing.base": ("Router",),
    "routing.fixed": ("Fixed",),
    "routing.learned": ("NoisyTopK", "SkillMatrix", "Soft", "Threshold", "Top1", "TopK"),
    "algebra": ("average", "concat"),
    "routing.zero_shot": ("Arrow", "Phatgoose", "Similarity"),
    "training.continual": ("Continual", "continual"),
    "training.gates": ("embed_tasks", "train_gates"),
    "training.side_by_side": ("fit_side_by_side",),
    "training.tasks": ("Tasks",),
    "computation.attempt": ("Attempt",),
    "computation.base": (
        "Computation",
        "FunctionComposition",
        "InputComposition",
        "KeyValueComposition",
        "ParameterComposition",
        "TokenComposition",
    ),
    "computation.compacter": ("Compacter",),
    "computation.convolution": ("ConvAdapter",),
    "computation.function": ("Adapter", "ParallelAdapter"),
    "computation.fusion": ("GatedFusion",),
    "computation.hyper": ("HyperNetwork",),
    "computation.inputs": ("LinearMap",),
    "computation.intrinsic": ("IntrinsicDimension",),
    "computation.invertible": ("InvertibleAdapter",),
    "computation.parameter": ("LoRA",),
    "computation.prefix": ("Prefix",),
    "computation.prompts": ("Prompt", "SoftPrompt"),
    "computation.rescale": ("Rescale",),
    "computation.shared": ("Shared",),
    "computation.sparse": ("SparseDelta", "SparseSubnetwork", "Supermask"),
    "context": ("Side",),
    "errors": ("ModgraftError",),
    "export": ("own_module",),
    "host": ("Host", "Implant"),
    "sites": ("Site",),
    "tasks": ("add_task",),
    "training.lottery": ("magnitude_pruning", "sparse_finetuning"),
    "training.prefix": ("fold_prefix", "prefix_from_text"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'modgraft' has no attribute {name!r}")
    value = getattr(import_module(f"modgraft.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
