"""All checks of the zoo, by name: a function a column of the matrix. None knows a host by name."""

from __future__ import annotations

from zoo import (  # noqa: F401 each puts its own into the list
    check_examples,
    check_functions,
    check_prompts,
    check_stored,
    check_training,
    check_weights,
)
from zoo.check import CHECKS as FOUND

ORDER = (
    "birth", "layers", "merged", "weights", "peft", "adapters", "blocks", "residual", "gradient",
    "checkpoint", "reentrant", "frozen", "each", "weighted", "mixture", "tokens", "fusion",
    "convolution", "prompt", "prompted", "generate", "prefix", "saved", "half", "compiled",
    "probed",
)  # fmt: skip
CHECKS = {name: FOUND[name] for name in ORDER}
