"""Bottlenecks, Compacter and invertible adapters as ``adapters`` has them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

from torch import nn

from modgraft.computation.adapter import Adapter, ParallelAdapter
from modgraft.computation.base import Computation
from modgraft.computation.compacter import Compacter
from modgraft.computation.invertible_adapter import InvertibleAdapter
from modgraft.core.errors import ModgraftError
from modgraft.store.formats.adapterhub.layout import Module, Places, Tie, check, prefix, type_of
from modgraft.store.formats.adapterhub.places import EMBEDDED, places

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
LOCATIONS = ("mh_adapter", "output_adapter", "cross_adapter")
_COUPLED = {"inv_adapter": "nice", "inv_adapter_reduction_factor": 2}
SIGMA = {"relu": "relu", "gelu": "gelu", "gelu_new": "gelu_tanh", "swish": "silu", "tanh": "tanh"}


def modules(config: Mapping[str, Any], model: nn.Module, name: str) -> list[Module]:
    """Return the invertible adapter and the bottlenecks of a configuration.

    Raises:
        ModgraftError: for what is set and not computed here.
    """
    known = {k: v for k, v in config.items() if k != "architecture"}
    if isinstance(factors := known.get("reduction_factor"), dict):
        if "default" not in factors or any(f != factors["default"] for f in factors.values()):
            raise ModgraftError(
                f"reduction_factor={factors!r:.80}: layers with widths of their own are not "
                f"computed here (only one factor for all is)"
            )
        known["reduction_factor"] = factors["default"]
    use = {*LOCATIONS, "reduction_factor", "non_linearity", "is_parallel"}
    use |= {"original_ln_before", "scaling", "phm_layer", "phm_dim", "phm_rank", "shared_phm_rule"}
    coupled = known.get("inv_adapter") == "nice"
    use |= {"inv_adapter_reduction_factor"} if coupled else set()
    c = check(known, {**BOTTLENECK, **_COUPLED} if coupled else BOTTLENECK, use | {"leave_out"})
    found = [_invertible(model, c, name)] if coupled else []
    if coupled and not any(c[key] for key in LOCATIONS):
        return found
    method, (stand, left) = _method(c), bottlenecks(model, c)
    labels, ties = [label for _, label in stand], _ties(method, stand, name)
    return [*found, Module("bottleneck", method, labels, ties, left)]


def _method(c: Mapping[str, Any]) -> Computation:
    """Return the bottleneck of a configuration."""
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
        return Compacter(**options)
    return (ParallelAdapter if c["is_parallel"] else Adapter)(**options)


def _invertible(model: nn.Module, c: Mapping[str, Any], name: str) -> Module:
    """Return the invertible adapter of a configuration; no host's own head undoes it."""
    kind, factor = type_of(model), c["inv_adapter_reduction_factor"]
    if kind not in EMBEDDED:
        raise ModgraftError(
            f"inv_adapter in a {kind}: it acts on what no single layer puts out, and is read in "
            f"{', '.join(EMBEDDED)}"
        )
    sigma: Any = SIGMA.get(c["non_linearity"], c["non_linearity"])
    if sigma not in SIGMA.values():
        raise ModgraftError(f"non_linearity={c['non_linearity']!r:.40} is not computed here")
    if not 1 <= factor < 2**31 or factor != int(factor):
        raise ModgraftError(f"inv_adapter_reduction_factor={factor!r:.60} is no whole number")
    label = prefix(model) + EMBEDDED[kind]
    stem = f"{'encoder.' if kind == 'bart' else ''}invertible_adapters.{name}"
    ties = [
        Tie(f"{label}:{ours}_{block}.{part}", f"{stem}.{block}.{theirs}.{part}")
        for block in ("F", "G")
        for ours, theirs in (("D", 0), ("U", 2))
        for part in ("weight", "bias")
    ]
    method = InvertibleAdapter(reduction=int(factor), nonlinearity=sigma, inverse=False)
    return Module("invertible", method, [label], ties)


def _reads(c: Mapping[str, Any]) -> str:
    """Return what bottlenecks of a configuration read; see :mod:`places`."""
    if c["is_parallel"]:  # nothing is read of the stream then, whatever original_ln_before says
        return "parallel"
    return "stream" if c["original_ln_before"] else "output"


def bottlenecks(model: nn.Module, c: Mapping[str, Any]) -> tuple[Places, list[str]]:
    """Return where bottlenecks of a configuration stand, and the paths of theirs left out."""
    every = places(model, {key for key in LOCATIONS if c[key]}, _reads(c))
    found = [(theirs, label) for n, theirs, label in every if n not in c["leave_out"]]
    if not found:
        raise ModgraftError("the configuration has bottlenecks nowhere in this host")
    return found, [theirs for n, theirs, _ in every if n in c["leave_out"]]


def _ties(method: Computation, stand: Places, name: str) -> list[Tie]:
    """Return every tensor of a bottleneck at its places."""
    made = []
    for number, (path, label) in enumerate(stand):
        for way, stem in (("down", "adapter_down.0"), ("up", "adapter_up")):
            stem = f"{path}.adapters.{name}.{stem}"
            if not isinstance(method, Compacter):
                for part in ("weight", "bias"):
                    made.append(Tie(f"{label}:{way}.{part}", f"{stem}.{part}"))
                continue
            made += [
                Tie(f"{label}:S_{way}", f"{stem}.W_right", turned=True),
                Tie(f"{label}:T_{way}", f"{stem}.W_left"),
                Tie(f"{label}:b_{way}", f"{stem}.b"),
            ]
            if not method.shared:
                made.append(Tie(f"{label}:A_{way}", f"{stem}.phm_rule", turned=True))
        if isinstance(method, Compacter) and method.shared and number == 0:
            made.append(Tie(f"{label}:A", f"shared_parameters.{name}.phm_rule", turned=True))
    return made


def tries(name: str, method: Computation) -> Iterator[dict[str, Any]]:
    """Return the configurations that may say a module, whichever fits its sites.

    Raises:
        ModgraftError: for what they cannot say.
    """
    if isinstance(method, InvertibleAdapter):
        words = {ours: theirs for theirs, ours in SIGMA.items()}
        yield {
            **BOTTLENECK, "mh_adapter": False, "output_adapter": False, "inv_adapter": "nice",
            "inv_adapter_reduction_factor": method.reduction,
            "non_linearity": words[method.nonlinearity],
        }  # fmt: skip
        return
    made = {**BOTTLENECK, **_said(name, method)}
    for before in (False,) if isinstance(method, ParallelAdapter) else (False, True):
        for cross, mh, output in product((False, True), repeat=3):
            one = {"mh_adapter": mh, "output_adapter": output, "cross_adapter": cross}
            yield {**made, **one, "original_ln_before": before}


def _said(name: str, method: Any) -> dict[str, Any]:
    factor = 16 if method.reduction is None else method.reduction
    if method.width is not None:
        raise ModgraftError(
            f"{name!r}: adapters says a width by reduction_factor alone; say reduction="
        )
    words = {ours: theirs for theirs, ours in SIGMA.items()}
    said = {"reduction_factor": factor, "non_linearity": words[method.nonlinearity]}
    said |= {"scaling": method.scale, "is_parallel": isinstance(method, ParallelAdapter)}
    if isinstance(method, Compacter):
        said |= {"phm_layer": True, "phm_dim": method.n, "phm_rank": method.rank}
        said["shared_phm_rule"] = method.shared
    if isinstance(method, ParallelAdapter):
        said["init_weights"] = "mam_adapter"
    return said
