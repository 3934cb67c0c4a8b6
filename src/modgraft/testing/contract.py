"""``check(MyMethod())``: the rules that every method keeps, asked of one."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from modgraft.computation.base import Computation
from modgraft.core.errors import ContractError, ModgraftError
from modgraft.core.side import Side
from modgraft.core.sites import At
from modgraft.core.tables import table
from modgraft.host.host import Host
from modgraft.testing.hosts import EXAMPLES, HOSTS, drawn
from modgraft.testing.rules import RULES
from modgraft.testing.trial import NotAsked, Trial

TRAINED = 0.02
"""How far a trained module's parameters are from 0 in a pretrained model, about."""


@dataclass
class Report:
    """What :func:`check` found: ``print`` it.

    Attributes:
        held: the rules that hold, by host.
        not_asked: why a rule was not asked, by host and rule.
        undefined: why the method is not defined on a host, by host.
        broken: how a rule is broken, by host and rule; empty in what :func:`check` returns.
    """

    held: dict[str, list[str]] = field(default_factory=dict)
    not_asked: dict[tuple[str, str], str] = field(default_factory=dict)
    undefined: dict[str, str] = field(default_factory=dict)
    broken: dict[tuple[str, str], str] = field(default_factory=dict)

    def __str__(self) -> str:
        hosts = list(self.held)
        rows = [(_sentence(r), *(self._cell(h, r.__name__) for h in hosts)) for r in RULES]
        whys: dict[str, list[str]] = {}
        for (host, rule), why in self.not_asked.items():
            whys.setdefault(f"{rule}: {why}", []).append(host)
        lines = [f"–  {', '.join(hosts)}, {why}" for why, hosts in whys.items()]
        lines += [f"not defined on {host}: {why}" for host, why in self.undefined.items()]
        return "\n".join([str(table(("rule", *hosts), rows)), *lines])

    def _cell(self, host: str, rule: str) -> str:
        if (host, rule) in self.broken:
            return "broken"
        return "held" if rule in self.held[host] else "–"


def check(
    method: Computation,
    *,
    at: At | None = None,
    side: Mapping[str, Side] | None = None,
    model: nn.Module | None = None,
    batch: Mapping[str, Any] | None = None,
    prepare: Callable[[Host, str], None] | None = None,
) -> Report:
    """Hold a method to the rules that every method of the library keeps.

    It is implanted in small hosts (an encoder, a decoder, an encoder-decoder, a convolutional
    network), or in a model of yours, and each rule of :mod:`modgraft.testing.rules` is asked there.
    Nothing is trained or downloaded, and it takes seconds on the small hosts. Your model is copied,
    not changed.

    Args:
        method: by its hyper-parameters, ``MyMethod(rank=8)``.
        at: where it goes, as for :meth:`modgraft.Host.implant`; None: in small hosts at query and
            value, or after attention and feed-forward, or where it goes by itself.
        side: side inputs by name, if the method reads one, for the examples of the batch: three,
            in small hosts.
        model: a model of yours instead of the small hosts.
        batch: keyword arguments for its ``forward``: tensors with two examples at least.
        prepare: does, to a host and the name of a new module, what the method's training procedure
            does beside learning parameters, such as choosing a mask.

    Returns:
        Which rules held on which host, and why others were not asked.

    Raises:
        ContractError: with all the rules that are broken, each with the smallest numbers that show
            it.
        ModgraftError: for what is no method by itself, a model without a batch, or a method that
            is defined on no host.
    """
    if not isinstance(method, Computation):
        what = method.__name__ if isinstance(method, type) else type(method).__name__
        raise ModgraftError(f"check({what}): write check({what}(…)), a method by its arguments")
    if batch is not None and not isinstance(batch, Mapping):
        raise ModgraftError(
            f"check(…, batch={type(batch).__name__}): it holds arguments of the model's forward "
            f"by name, batch={{'input_ids': …}}"
        )
    if method.members:
        raise ModgraftError(
            f"check({type(method).__name__}(…)): it combines other modules of a host, and the "
            f"rules are asked of a method by itself; host.probe(batch) looks at a whole host"
        )
    source = method.side_source
    if source is not None and source not in (side or {}):
        raise ModgraftError(
            f"check({type(method).__name__}(…)) reads the side input {source!r}: give one, "
            f"side={{{source!r}: mg.Side(torch.randn({EXAMPLES}, 4, width))}}"
        )
    report = Report()
    with torch.random.fork_rng(devices=()):
        for name, trial in _trials(method, at, model, batch):
            _try(
                name,
                replace(trial, sides=dict(side or {}), prepare=prepare or trial.prepare),
                report,
            )
    if not report.held:
        why = list(report.undefined.values())[-1]
        raise ModgraftError(f"check({method.brief()}): it is defined on no host: {why}")
    if report.broken:
        raise ContractError(_all_broken(method, report))
    return report


def _try(name: str, trial: Trial, report: Report) -> None:
    """Ask every rule on one host, and put down what came of it."""
    for source, side in trial.sides.items():
        if side.tensor.shape[0] != trial.count:
            raise ModgraftError(
                f"the side input {source!r} is of {side.tensor.shape[0]} examples, and the batch "
                f"of {name} has {trial.count}"
            )
    try:
        trial.put(trial.host())
    except ModgraftError as error:
        report.undefined[name] = str(error)
        return
    except Exception as error:  # noqa: BLE001, a stranger's code may raise anything
        report.held[name] = []
        report.broken[name, "build"] = _said(error)
        return
    held = report.held.setdefault(name, [])
    for rule in RULES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the host, such as of a length of its own
            try:
                rule(trial)
            except NotAsked as reason:
                report.not_asked[name, rule.__name__] = str(reason)
            except ContractError as error:
                report.broken[name, rule.__name__] = str(error)
            except Exception as error:  # noqa: BLE001, a stranger's code may raise anything
                report.broken[name, rule.__name__] = _said(error)
            else:
                held.append(rule.__name__)


def _trials(
    method: Computation,
    at: At | None,
    model: nn.Module | None,
    batch: Mapping[str, Any] | None,
) -> Iterator[tuple[str, Trial]]:
    """Yield the hosts that a method is tried on, by name."""

    def make() -> Computation:
        return type(method)(**method.config())

    if (model is None) != (batch is None):
        raise ModgraftError("check(…, model=model, batch=batch): give both, or neither")
    if model is None or batch is None:
        for name, host in HOSTS.items():
            where = host.at(method) if at is None else at
            yield name, Trial(
                lambda host=host: drawn(host.make), host.batch(), make, where,
                generates=host.generates, exact_in_half=host.exact_in_half,
            )  # fmt: skip
        return
    sizes = {k: v.shape[0] for k, v in batch.items() if isinstance(v, Tensor) and v.dim()}
    if not sizes or set(sizes.values()) == {1}:
        raise ModgraftError(
            f"check(…, batch=…): a batch is a dictionary of tensors with two examples at least, "
            f"and this one has {sizes or 'none'}"
        )
    yield type(model).__name__, Trial(
        lambda: copy.deepcopy(model).eval().requires_grad_(False), batch, make, at,
        noise=TRAINED, exact_in_half=False,
        generates="input_ids" in batch and _can_generate(model),
    )  # fmt: skip


def _can_generate(model: nn.Module) -> bool:
    can = getattr(model, "can_generate", None)
    return bool(can and can())


def _all_broken(method: Computation, report: Report) -> str:
    """Say every broken rule once, with the hosts where it is broken and what the first shows."""
    rules: dict[str, list[tuple[str, str]]] = {}
    for (host, rule), words in report.broken.items():
        rules.setdefault(rule, []).append((host, words))
    lines = [
        f"{rule} ({', '.join(host for host, _ in places)}): {places[0][1]}"
        for rule, places in rules.items()
    ]
    return f"{method.brief()} breaks {len(rules)} of {len(RULES)} rules:\n  " + "\n  ".join(lines)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"


def _sentence(rule: Callable[[Trial], None]) -> str:
    return (inspect.getdoc(rule) or "").splitlines()[0]
