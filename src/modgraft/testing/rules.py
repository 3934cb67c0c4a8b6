"""The rules of the contract: what must hold for every method on every host where it is defined.

A rule is a function of a :class:`~modgraft.testing.trial.Trial`. It returns if it holds, raises a
:class:`~modgraft.core.errors.ContractError` with the smallest numbers that show that it does not,
and :class:`~modgraft.testing.trial.NotAsked` where it means nothing.
"""

from __future__ import annotations

import copy
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging as hf_logging

from modgraft.computation.base import FunctionComposition, ParameterComposition
from modgraft.core.errors import ContractError, ModgraftError, UndividedError
from modgraft.core.layers import STATE, weight_matrix
from modgraft.core.side import Side
from modgraft.core.sites import located
from modgraft.host.host import Host
from modgraft.host.measure import watched
from modgraft.testing.trial import NotAsked, Trial, agree, expect, output_of

T = TypeVar("T")

EXACT = {"rtol": 1e-9, "atol": 1e-11}
"""What float64 loses on the way through a host."""


def refuses(run: Callable[[], object], says: str, words: str) -> None:
    """Expect a :class:`ModgraftError` in which the pattern ``says`` is found."""
    try:
        run()
    except ModgraftError as error:
        expect(bool(re.search(says, str(error))), f"{words}: the error is {error}")
        return
    raise ContractError(f"{words}: it is not refused")


def leaves_the_host(trial: Trial) -> None:
    """Implanting, running and removing leave the host's layers, weights and output as they were."""
    model = trial.model()
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    kinds = {path: (type(m), str(type(m))) for path, m in model.named_modules()}
    attributes = {path: set(m.__dict__) for path, m in model.named_modules()}
    host = Host(model).eval()
    bare = trial.run(host)

    def same(when: str) -> None:
        now = model.state_dict()
        expect(list(now) == list(weights), f"{when}, the host has other tensors than before")
        for key, value in weights.items():
            agree(now[key], value, f"{when}, the host's {key} is another")
        layers = dict(model.named_modules())
        expect(list(layers) == list(kinds), f"{when}, the host has other layers than before")
        for path, layer in layers.items():
            alike = isinstance(layer, kinds[path][0]) and str(type(layer)) == kinds[path][1]
            expect(alike, f"{when}, {path} is a {type(layer)}")

    trial.put(host, stir=False)
    same("after host.implant")
    trial.run(host, **trial.side())
    same("after a call")
    host.remove("m")
    same("after host.remove")
    for path, layer in model.named_modules():
        expect(type(layer) is kinds[path][0], f"after host.remove, {path} is a {type(layer)}")
        more = set(layer.__dict__) ^ attributes[path]
        expect(not more, f"after host.remove, {path} has other attributes: {sorted(more)}")
    agree(trial.run(host), bare, "after host.remove, the host puts out something else")
    expect(not list(host.implants.parameters()), "after host.remove, there are parameters left")


def is_born_as_declared(trial: Trial) -> None:
    """Newly built, it leaves the host's output exactly as it was, if it says ``identity``."""
    host = trial.host()
    bare = trial.run(host)
    trial.put(host, newborn=True)
    out = trial.run(host, **trial.side())
    if trial.make().identity:
        agree(out, bare, "identity is True, and yet the new module changes the host's output")
    else:
        unlike = out.shape != bare.shape or not torch.equal(out, bare)
        expect(unlike, "the new module changes nothing: say identity: ClassVar[bool] = True")
    host.use(None)
    agree(trial.run(host), bare, "without a composition, the host puts out something else")


def does_something(trial: Trial) -> None:
    """With random parameters, it changes the host's output."""
    host = trial.implanted()
    out, bare = trial.run(host, **trial.side()), trial.run(host, modules=None)
    expect(not torch.equal(out, bare), "with random parameters, the output is the bare host's")


def leaves_examples_without_its_side_input(trial: Trial) -> None:
    """An example without its side input is left exactly as it was; a missing one is refused."""
    source = trial.make().side_source
    if source is None:
        raise NotAsked("it reads no side input")
    side = trial.sides[source]
    seen = side.seen().clone()
    seen[1] = False
    none, some = (Side(side.tensor, mask) for mask in (torch.zeros_like(seen), seen))
    for stir in (False, True):
        host = trial.implanted(stir)
        bare = trial.run(host, modules=None)
        absent = trial.run(host, side={**trial.sides, source: none})
        one = trial.run(host, side={**trial.sides, source: some})
        where, near = trial.seen(bare), {}
        if trial.before_input:  # masked tokens change only how sums are rounded
            near = {"rtol": 1e-5, "atol": 1e-5}
        words = f"no example has the side input {source!r}, and yet the host is changed"
        agree(absent[where], bare[where], words, **near)
        words = f"example 1 has no side input {source!r}, and yet it is changed"
        agree(one[1][where[1]], bare[1][where[1]], words, **near)
        changed = not torch.allclose(one[0], bare[0])
        expect(changed or not stir, f"the side input {source!r} changes nothing")
    host = trial.implanted()
    missing = f"needs the side input {source!r}"
    refuses(lambda: trial.run(host), missing, f"a call without the side input {source!r}")


def learns_alone(trial: Trial) -> None:
    """A step changes its parameters and nothing of the host or of other modules."""
    host = trial.implanted()
    if not host["m"].size:
        raise NotAsked("it has no parameters")
    trial.put(host, "m2", stir=False)  # a name that begins with the other
    before = {k: v.clone() for k, v in host.state_dict().items()}
    own = {id(p) for p in host["m"].parameters()}
    with host.training_only("m"):
        learn = {id(p) for p in host.parameters() if p.requires_grad}
        expect(learn == own, "other parameters than the module's require a gradient")
        optimiser = torch.optim.SGD(host.parameters(), lr=0.5)
        _backward(output_of(host(**trial.inputs(), **trial.side())))
        optimiser.step()
    after = host.state_dict()
    changed = {k for k, v in after.items() if not torch.equal(v, before[k])}
    names = {k for k, p in host.named_parameters() if id(p) in own}
    others = sorted(changed - names)
    expect(not others, f"a step with train='m' changes {others[0] if others else ''} as well")
    still = sorted(names - changed)
    # a gradient may vanish: softmax ignores a key's bias
    expect(bool(changed) and len(still) <= 3, f"a step leaves {len(still)} of its parameters as "
           f"they were, such as {still[0] if still else ''}: no gradient reaches them")  # fmt: skip


def is_repeatable(trial: Trial) -> None:
    """In evaluation, two calls give the same, also with another call between them."""
    host = trial.implanted()
    first = trial.run(host, **trial.side())
    agree(trial.run(host, **trial.side()), first, "a second call gives something else")
    with torch.no_grad():
        host(**trial.example(1))
    again = trial.run(host, **trial.side())
    agree(again, first, "after a call with another batch, the same batch gives something else")


def keeps_examples_apart(trial: Trial) -> None:
    """An example comes out in a batch as it does alone, also where others have other modules."""
    host = trial.implanted().double()
    name, kind = host["m"].names[0], torch.float64
    requests = [name if i % 2 == 0 else None for i in range(trial.count)]

    def together(modules: Any) -> Tensor:
        with torch.no_grad():
            return output_of(host(**trial.inputs(kind), **trial.side(kind), modules=modules))

    def alone(i: int, modules: Any) -> Tensor:
        with torch.no_grad():
            return output_of(host(**trial.example(i, kind), modules=modules))

    def compare(out: Tensor, several: list[str | None], words: str) -> None:
        for i, modules in enumerate(several):
            where = trial.seen(out)[i : i + 1]
            agree(alone(i, modules)[where], out[i : i + 1][where], words.format(i=i), **EXACT)

    bare = together(None)
    if bare.shape[:1] != (trial.count,):
        raise NotAsked("the first axis of the host's output is not that of the examples")
    try:
        compare(bare, [None] * trial.count, "{i}")
    except ContractError:
        raise NotAsked("the bare host does not keep its examples apart") from None
    compare(together(name), [name] * trial.count, "example {i} alone, against it in the batch")
    try:
        mixed = together(requests)
    except UndividedError as error:
        raise NotAsked(f"one composition for each example: {error}") from None
    words = f"example {{i}} alone, against it with modules={requests}"
    compare(mixed, requests, words)


def keeps_tokens_apart(trial: Trial) -> None:
    """Each token's result depends on that token alone, if it says ``by_token``."""
    method = trial.make().unwrapped
    if not isinstance(method, FunctionComposition) or not method.by_token:
        raise NotAsked("it is no function that says by_token")
    host = trial.implanted().double()
    sites = {s.label: s for s in located(host.model, host["m"].paths) if s.label == s.path}
    calls: dict[str, tuple[Tensor | None, Tensor]] = {}

    def look(path: str, args: tuple, kwargs: dict, y: Tensor) -> None:
        x = args[0] if args and isinstance(args[0], Tensor) else None
        calls[path] = x, y

    with watched({path: site.module for path, site in sites.items()}, look), torch.no_grad():
        host(**trial.inputs(torch.float64), modules=None)
    asked = False
    for path, place in host["m"].at_sites(host["m"].names[0]):
        x, y = calls.get(path, (None, None))
        if y is None or y.dim() != 3 or sites[path].channels_first or sites[path].time_first:
            continue
        one = (x, y)
        other = [t if t is None or t.shape[:2] != y.shape[:2] else _moved(t) for t in one]
        with torch.no_grad():
            first, second = (place(y, x, None) for x, y in (one, other))
        asked = True
        words = f"by_token is True, and yet token 0 changes another token at {path}: override it"
        agree(second[:, 1:], first[:, 1:], words, **EXACT)
    if not asked:
        raise NotAsked("no site of it has tokens [B, n, d]")


def _moved(tokens: Tensor) -> Tensor:
    """Return ``tokens`` ``[B, n, …]`` with other numbers in the first."""
    moved = tokens.clone()
    moved[:, 0] = moved[:, 0] * 2 + 1 if moved.is_floating_point() else moved[:, -1]
    return moved


def has_one_delta(trial: Trial) -> None:
    """The factors of a change of weights are those of its delta, which has the weight's shape."""
    if not isinstance(trial.make().unwrapped, ParameterComposition):
        raise NotAsked("it is no change of weights")
    host = trial.implanted().double()
    sites = located(host.model, host["m"].paths)
    for site, (_, place) in zip(sites, host["m"].at_sites(host["m"].names[0]), strict=True):
        inner = place.unwrapped
        if not isinstance(inner, ParameterComposition):
            raise NotAsked("it acts through another module")
        with torch.no_grad():
            weight = weight_matrix(site.module, site.part, site.parameter)
            delta, factors = inner.delta(weight), inner.factors()
            if factors is not None:
                left, right, scale = factors
                words = f"s·BA of factors(), against delta(weight) at {site.label}"
                agree(scale * (left @ right), delta, words, **EXACT)
        expect(delta.shape == weight.shape, f"delta at {site.label} is {list(delta.shape)}, and "
               f"the weight {list(weight.shape)}")  # fmt: skip


def merges_or_is_refused(trial: Trial) -> None:
    """A change of weights, merged, computes what it does unmerged; anything else is refused."""
    method = trial.make().unwrapped
    host, kind = trial.implanted().double(), torch.float64
    m = host["m"].names[0]
    if not isinstance(method, ParameterComposition):
        does = "puts vectors before" if trial.chains_only else "computes on activations"
        refuses(
            lambda: host.merge(m),
            f"cannot be merged: .* {does}",
            "the merge of what is no change of weights",
        )
        return
    before = copy.deepcopy(host.model.state_dict())

    def compare(host: Host, composition: str) -> nn.Module:
        plain = host.merge(composition)
        with torch.no_grad():
            merged = output_of(plain(**trial.inputs(kind)))
            wanted = output_of(host(**trial.inputs(kind), modules=composition))
        agree(merged, wanted, f"host.merge({composition!r}), against it unmerged", **EXACT)
        return plain

    plain = compare(host, f"-0.5*{m}")
    expect(type(plain) is type(trial.model()), f"the merged model is a {type(plain).__name__}")
    left = any(STATE in layer.__dict__ for layer in plain.modules())
    expect(not left, "the merged model still has modules in it")
    for key, value in host.model.state_dict().items():
        agree(value, before[key], f"host.merge changes the host's {key}")
    twin = copy.deepcopy(host)
    n = trial.put(twin, "n")
    twin.double()  # each Δ is computed from the host's weight, not from the other's result
    compare(twin, f"{m} + 2*{n}")


def composes(trial: Trial) -> None:
    """Effects add and cancel: ``m + n`` on one output; in ``m >> n``, n acts on that of m."""
    host, kind = trial.implanted().double(), torch.float64
    m, n = host["m"].names[0], trial.put(host, "n")
    host.double()
    if len(host["m"].names) == 1:
        expect(str(host.composition) == f"{m} >> {n}", f"in force is {host.composition}")

    def at(composition: str | None) -> Tensor:
        with torch.no_grad():
            given = trial.inputs(kind) | trial.side(kind)
            return output_of(host(**given, modules=composition))

    if trial.chains_only:
        for wrong in (f"{m} + {n}", f"{m} - {n}", f"2*{m}", f"{m} >> 0.5*{n}"):
            refuses(lambda wrong=wrong: at(wrong), "cannot be added or scaled", wrong)
        at(f"{m} >> {n}")
        return
    same = [
        (f"{m} + {n}", f"{n} + {m}"),
        (f"2*({m} + {n}) - {m} - {n}", f"{m} + {n}"),
        (f"{m} - {m}", None),
    ]
    for one, other in same:
        agree(at(one), at(other), f"{one}, against {other}", **EXACT)
    chain, total = at(f"{m} >> {n}"), at(f"{m} + {n}")
    if trial.adds or isinstance(trial.make().unwrapped, ParameterComposition):
        agree(chain, total, f"{m} >> {n}, against {m} + {n}", **EXACT)
    elif trial.adds is False:
        expect(not torch.allclose(chain, total), f"{m} >> {n} is {m} + {n}")


def is_saved_whole(trial: Trial) -> None:
    """Saved and loaded into a fresh host, it computes the same; in another host it is refused."""
    host = trial.implanted()
    expected = trial.run(host, **trial.side())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m"
        host.save("m", path)
        fresh = trial.host()
        name = _drawn_anew(lambda: fresh.load(path)).names[0]
        fresh.use(name)
        out = trial.run(fresh, **trial.side())
        agree(out, expected, "saved and loaded: a tensor is missing, or the configuration")
        fresh.load(path, name="twice")
        expect(list(fresh.implants) == ["m", "twice"], "loaded twice, it is not there twice")
        stranger = Host(_another(trial.model())).eval()
        refuses(lambda: stranger.load(path), "another host", "loading it in another host")
        expect("m" not in stranger, "what was refused is in the host")
        stranger.load(path, strict=False)


def has_its_state(trial: Trial) -> None:
    """Its state dict is all of its state; a copy of the host is another host."""
    host, other = trial.implanted(), trial.host()
    _drawn_anew(lambda: trial.put(other, stir=False))
    expected = trial.run(host, **trial.side())
    other.load_state_dict(host.state_dict())
    out = trial.run(other, **trial.side())
    agree(out, expected, "load_state_dict(state_dict()): a tensor is missing")
    twin = copy.deepcopy(host)
    agree(trial.run(twin, **trial.side()), expected, "copy.deepcopy(host)")
    with torch.no_grad():
        for parameter in twin["m"].parameters():
            parameter.mul_(2)
    twin.use(None)
    agree(trial.run(host, **trial.side()), expected, "the host, after its copy was changed")
    twin.remove("m")
    agree(trial.run(host, **trial.side()), expected, "the host, after its copy's was removed")


def computes_in_half(trial: Trial) -> None:
    """Under autocast and in a host of bfloat16 it computes nearly the same, and it learns."""
    host = trial.implanted()
    exact = trial.run(host, **trial.side())

    def step(words: str, inputs: dict[str, Any]) -> Tensor:
        if not host["m"].size:
            host.model.requires_grad_(True)
        out = output_of(host(**inputs, **trial.side()))
        _backward(out)
        for name, p in host["m"].named_parameters():
            if p.grad is None and len(host["m"].names) > 1:
                continue  # another task's
            learns = p.grad is not None and bool(torch.isfinite(p.grad).all())
            expect(learns, f"{words}: the gradient of {name} is {p.grad}")
        near(words, out)
        return out

    def near(words: str, out: Tensor) -> None:
        off, size = (out.float() - exact).abs().mean(), exact.abs().mean()
        expect(bool(off < 0.1 * size), f"{words}: off by {off:.3g} in the mean, of {size:.3g}")

    with torch.autocast(exact.device.type, dtype=torch.bfloat16):
        step("under autocast", trial.inputs())
    host.zero_grad()
    host.model.bfloat16()
    inputs = trial.inputs(torch.bfloat16)
    half = step("in a host of bfloat16", inputs)
    with torch.no_grad():
        again = output_of(host(**inputs, **trial.side()))
        bare = output_of(host(**inputs, modules=None))
    near("in a host of bfloat16", again)
    kinds = {out.dtype for out in (half, again, bare)}
    expect(kinds == {torch.bfloat16}, f"in a host of bfloat16, the outputs are {kinds}")
    host.remove("m")
    trial.put(host, newborn=True)
    kinds = {p.dtype for p in host["m"].parameters()}
    expect(kinds <= {torch.float32}, f"in a host of bfloat16, its parameters are {kinds}")
    if trial.make().identity:
        with torch.no_grad():
            born = output_of(host(**inputs, **trial.side()))
        if trial.exact_in_half:
            agree(born, bare, "new in a host of bfloat16, it changes the output")
        else:
            small = (born - bare).abs().mean() < 0.02 * bare.abs().mean()
            expect(bool(small), "new in a host of bfloat16, it changes the output")


def generates(trial: Trial) -> None:
    """Text is the same with the cache as without, by beams, sampled, and for an example alone."""
    if not trial.generates:
        raise NotAsked("the host does not generate")
    host: Any = trial.implanted()
    length = {"max_new_tokens": 6, "min_new_tokens": 6}
    batch = {k: v for k, v in trial.batch.items() if k != "labels"}

    def same(found: Tensor, wanted: Tensor, words: str) -> None:
        expect(torch.equal(found, wanted), f"{words}: {found.tolist()}, not {wanted.tolist()}")

    ways: tuple[dict[str, Any], ...] = ({}, {"num_beams": 3})
    if isinstance(trial.make().unwrapped, ParameterComposition):
        plain: Any = host.merge(host["m"].names[0])
        for how in ways:
            merged = plain.generate(**batch, **how, **length)
            same(host.generate(**batch, **how, **length), merged, f"generate({how}), merged")
    for how in (*ways, {"num_beams": 3, "num_return_sequences": 2}):
        cached = host.generate(**batch, **trial.side(), **how, **length)
        again = host.generate(**batch, **trial.side(), **how, use_cache=False, **length)
        same(cached, again, f"generate({how}) with its cache, against without")
        rows = how.get("num_return_sequences", 1)
        for i in range(trial.count):  # its side input followed its beams
            one = {k: v for k, v in trial.example(i).items() if k != "labels"}
            alone = host.generate(**one, **how, **length)
            same(alone, cached[i * rows : (i + 1) * rows], f"generate({how}), example {i} alone")
    sampled = []
    for _ in range(2):
        torch.manual_seed(7)
        sampled.append(host.generate(**batch, **trial.side(), do_sample=True, **length))
    same(sampled[1], sampled[0], "two samples from one seed")


def is_recomputed(trial: Trial) -> None:
    """With gradient checkpointing, its gradients are the same."""
    host: Any = trial.implanted()
    if not getattr(host.model, "supports_gradient_checkpointing", False):
        raise NotAsked("the host has no gradient checkpointing")
    if not host["m"].size:
        host.model.requires_grad_(True)
    learn = list(host["m"].parameters()) or list(host.model.parameters())
    name = host["m"].names[0]
    under = name if trial.chains_only else f"0.5*{name}"
    if trial.chains_only:
        host.use(None)

    def gradients() -> list[Tensor]:
        host.zero_grad()
        torch.manual_seed(0)  # of the host's dropout
        with host.using(under):
            out = output_of(host(**trial.inputs(), **trial.side()))
        _backward(out)  # the composition in force is another one by now
        return [p.grad.clone() for p in learn if p.grad is not None]

    host.train()
    expected = gradients()
    host.model.activation_checkpointing_enable()
    for one, other in zip(gradients(), expected, strict=True):
        words = "a gradient with checkpointing, against without"
        agree(one, other, words, rtol=1.3e-6, atol=1e-5)


def is_left_out_of_the_model(trial: Trial) -> None:
    """``host.model.save_pretrained`` writes the bare model, which loads without modgraft."""
    host = trial.implanted()
    if not isinstance(host.model, PreTrainedModel):
        raise NotAsked("the host is no model of transformers")
    bare = trial.model()
    with tempfile.TemporaryDirectory() as folder, _without_progress():
        host.model.save_pretrained(folder)
        again = type(bare).from_pretrained(folder).eval().to(host.model.device)  # type: ignore[attr-defined]
    named = again.config.architectures
    expect(named == [type(bare).__name__], f"the saved model is called {named}")
    host.use(None)
    agree(trial.run(host), trial.run(again), "the bare host, against the model that it saved")


def _backward(out: Tensor) -> None:
    """Go back from an output's squared distance from some numbers to whatever learns.

    Without these a layer norm at the end would leave no gradient: its squares are of one sum.
    """
    expect(out.requires_grad, "no gradient reaches its parameters")
    some = torch.arange(out.numel(), device=out.device).mul(12.9898).sin().view(out.shape)
    (out.float() - some).square().mean().backward()


def _drawn_anew(make: Callable[[], T]) -> T:
    """Make something with other random numbers than came before."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(97)
        return make()


@contextmanager
def _without_progress() -> Iterator[None]:
    """Write and read a model without a bar."""
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


def _another(model: nn.Module) -> nn.Module:
    """Return ``model`` with other weights."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    return model


RULES = (
    leaves_the_host,
    is_born_as_declared,
    does_something,
    leaves_examples_without_its_side_input,
    learns_alone,
    is_repeatable,
    keeps_examples_apart,
    keeps_tokens_apart,
    has_one_delta,
    merges_or_is_refused,
    composes,
    is_saved_whole,
    has_its_state,
    computes_in_half,
    generates,
    is_recomputed,
    is_left_out_of_the_model,
)
