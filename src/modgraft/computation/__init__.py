"""Computation functions: what a module does at a site. Importing it makes every one of them known
by name, for modules that are loaded."""

from modgraft.computation import (
    base,
    compacter,
    convolution,
    function,
    fusion,
    hyper,
    inputs,
    intrinsic,
    invertible,
    parameter,
    prefix,
    prompts,
    rescale,
    shared,
    sparse,
)

__all__ = [
    "base",
    "compacter",
    "convolution",
    "function",
    "fusion",
    "hyper",
    "inputs",
    "intrinsic",
    "invertible",
    "parameter",
    "prefix",
    "prompts",
    "rescale",
    "shared",
    "sparse",
]
