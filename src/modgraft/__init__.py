"""modgraft: implant, compose, train, store and share modules in a frozen host model."""

from .computation.base import (
    Computation,
    FunctionComposition,
    InputComposition,
    ParameterComposition,
)
from .computation.fusion import GatedFusion
from .computation.inputs import LinearMap
from .computation.parameter import LoRA
from .context import Side
from .errors import ModgraftError
from .host import Host, Implant
from .sites import Site

__version__ = "0.1.0"

__all__ = [
    "Computation",
    "FunctionComposition",
    "GatedFusion",
    "Host",
    "Implant",
    "InputComposition",
    "LinearMap",
    "LoRA",
    "ModgraftError",
    "ParameterComposition",
    "Side",
    "Site",
]
