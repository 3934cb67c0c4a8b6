"""Bad input to any method: the error says where, gives the numbers, and shows the right call."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import modgraft as mg
from common import forge, kept
from contract.hosts import HOSTS
from contract.modules import MODULES, ModuleCase, implanted
from modgraft.core.sites import Site


def refused(host: mg.Host, make: Callable[[], Any], at: Any, *says: str) -> None:
    """Check that implanting raises an error that says all of this and leaves the host as it was."""
    with pytest.raises(mg.ModgraftError) as error:
        host.implant("m", make(), at=at)
    for part in says:
        assert part in str(error.value), str(error.value)
    assert "m" not in host
    assert not any("_modgraft_state" in sub.__dict__ for sub in host.model.modules())


# -- more than the layer has ---------------------------------------------------------------------

QUERY = "bert.encoder.layer.0.attention.self.query"
DOWN = "bert.encoder.layer.0.output.dense"
TOO_LARGE: dict[str, tuple[Callable[[], Any], Any, tuple[str, ...]]] = {
    "lora": (
        lambda: mg.LoRA(rank=99), "query",
        (QUERY, "16 × 16", "at most 16", "use LoRA(rank=16)"),
    ),
    "compacter": (
        lambda: mg.Compacter(width=8, rank=9), "down",
        (DOWN, "2 × 4", "at most 2", "use Compacter(rank=2)"),
    ),
    "compacter_products": (
        lambda: mg.Compacter(width=8, n=3), "down",
        (DOWN, "width 16", "bottleneck's 8", "use Compacter(width=8, n=2)"),
    ),
    "intrinsic": (
        lambda: mg.IntrinsicDimension(dim=999), "query",
        (QUERY, "16 × 16 = 256", "use IntrinsicDimension(dim=256)"),
    ),
    "adapter": (
        lambda: mg.Adapter(reduction=99), "down",
        (DOWN, "16 wide", "at most 16", "Adapter(width=8)"),
    ),
    "parallel": (
        lambda: mg.ParallelAdapter(reduction=99), "attention",
        ("16 wide", "at most 16", "ParallelAdapter(width=8)"),
    ),
    "supermask": (lambda: mg.Supermask(density=2), "query", ("density=2", "(0, 1)", "density=0.1")),
    "sparse": (lambda: mg.SparseDelta(density=2), "query", ("density=2", "(0, 1)", "density=0.1")),
    "soft_prompt": (
        lambda: mg.SoftPrompt(length=40), None,
        ("40 tokens before the text", "32 positions", "length=4"),
    ),
    "prompt": (
        lambda: mg.Prompt("long", ids=(5,) * 32), None,
        ("32 tokens before the text", "32 positions"),
    ),
    "prompt_of_another_vocabulary": (
        lambda: mg.Prompt("hm", ids=(5, 99)), None, ("99", "vocabulary of 41", "tokenizer"),
    ),
    "prefix": (lambda: mg.Prefix(length=0), None, ("length=0", "at least 1", "Prefix(length=1)")),
}  # fmt: skip


@pytest.mark.parametrize("name", TOO_LARGE)
def test_more_than_the_layer_has(name: str) -> None:
    make, at, says = TOO_LARGE[name]
    refused(mg.Host(HOSTS["bert"].model()), make, at, *says)


def test_a_prompt_and_a_text_longer_than_the_hosts_positions() -> None:
    host = mg.Host(HOSTS["bert"].model())
    host.implant("soft", mg.SoftPrompt(length=20))
    text = torch.randint(3, 41, (2, 13))
    with pytest.raises(mg.ModgraftError) as error:
        host(input_ids=text)
    for part in ("20 tokens", "text of 13", "33 in all", "32 positions", "12", "at most 19"):
        assert part in str(error.value)
    host(input_ids=text[:, :12])


# -- sites a method cannot use -------------------------------------------------------------------

FUNCTIONS = {
    "adapter": lambda: mg.Adapter(width=2),
    "compacter": lambda: mg.Compacter(width=4),
    "conv": mg.ConvAdapter,
    "parallel": lambda: mg.ParallelAdapter(width=2),
    "fusion": lambda: mg.GatedFusion(dim=6),
}
WEIGHTS = {
    "lora": lambda: mg.LoRA(rank=2),
    "subnetwork": mg.SparseSubnetwork,
    "supermask": mg.Supermask,
    "sparse": mg.SparseDelta,
    "intrinsic": lambda: mg.IntrinsicDimension(dim=3),
    "rescale": mg.Rescale,
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_change_of_weights_where_there_is_no_weight_matrix(name: str) -> None:
    host = mg.Host(HOSTS["plain"].model())
    refused(host, WEIGHTS[name], "1", "Tanh", "Linear")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_where_the_output_has_no_width(name: str) -> None:
    host = mg.Host(HOSTS["plain"].model())
    refused(host, FUNCTIONS[name], "1", "1 (Tanh)", "choose a layer that knows, such as nn.Linear")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_of_tokens_at_a_map(name: str) -> None:
    host = mg.Host(HOSTS["cnn"].model())
    refused(host, FUNCTIONS[name], "conv", " at conv: ", "Conv2d puts out a map [B, C, ")


WRONG_SITES: dict[str, tuple[str, Callable[[], Any], Any, tuple[str, ...]]] = {
    "a map of tokens": (
        "bert", lambda: mg.ConvAdapter(over="map"), "block",
        ("bert.encoder.layer.0", "nn.Conv2d", "where tokens [B, n, d] are put out"),
    ),
    "beside an embedding": (
        "bert", lambda: mg.ParallelAdapter(width=2), "embedding",
        ("bert.embeddings.word_embeddings", "token ids", "use Adapter there"),
    ),
    "beside a layer that changes its width": (
        "llama", lambda: mg.ParallelAdapter(width=2), "key",
        ("model.layers.0.self_attn.k_proj", "16 wide", "output 8", "at='feedforward'"),
    ),
    "the input of an embedding": (
        "bert", lambda: mg.Rescale(where="input"), "embedding",
        ("ids", "use Rescale(where='output')"),
    ),
    "a bias where there is none": (
        "t5", lambda: mg.LoRA(rank=2, bias=True), "query",
        ("SelfAttention.q", "no bias", "use LoRA(rank=2)"),
    ),
    "a prefix at a projection": (
        "bert", mg.Prefix, "query",
        (QUERY, "(Linear)", "at='bert.encoder.layer.0.attention.self'"),
    ),
    "a prefix without attention": ("plain", mg.Prefix, "0", ("0 (Linear)", "use LoRA or Adapter")),
    "tokens before what reads none": (
        "plain", mg.SoftPrompt, None, ("Sequential", "such as LoRA(rank=8)"),
    ),
    "a text before an image": (
        "vit", lambda: mg.Prompt("hm", ids=(5,)), None, ("no vocabulary", "SoftPrompt(init="),
    ),
    "tokens inside the host": (
        "bert", lambda: mg.LinearMap(dim=6), "query", ("LinearMap", "leave out at='query'"),
    ),
    "a residual of weights": (
        "bert", lambda: mg.LoRA(rank=2), "query[residual]", ("LoRA", "leave out [residual]"),
    ),
    "no site at all": ("bert", lambda: mg.LoRA(rank=2), None, ("at='query'",)),
    "a number for a site": ("bert", lambda: mg.LoRA(rank=2), 3, ("a role, a path pattern", "3")),
    "a role with a slip": (
        "bert", lambda: mg.LoRA(rank=2), "querry", ("'querry'", "did you mean at='query'?"),
    ),
    "a class for a module": ("bert", lambda: mg.LoRA, "query", ("LoRA(…) is implanted",)),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG_SITES)
def test_a_site_the_method_cannot_use(what: str) -> None:
    name, make, at, says = WRONG_SITES[what]
    refused(mg.Host(HOSTS[name].model()), make, at, *says)


def test_a_name_that_every_torch_module_has() -> None:
    host = mg.Host(HOSTS["bert"].model())
    for name in ("keys", "train", "half"):
        with pytest.raises(mg.ModgraftError, match=f"take another, such as '{name}_1'"):
            host.implant(name, mg.LoRA(rank=2), at="query")
    assert not list(host.implants)
    assert not any("_modgraft_state" in sub.__dict__ for sub in host.model.modules())


# -- a fused projection addressed wrongly --------------------------------------------------------

C_ATTN = "transformer.h.0.attn.c_attn"
FUSED: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "a part beyond the last": (
        "gpt2", "transformer.h.*.attn.c_attn[3/3]", ("count from 0", "c_attn[2/3]"),
    ),
    "parts that do not divide it": (
        "gpt2", "transformer.h.*.attn.c_attn[0/5]", ("48", "5 equal parts", f"at='{C_ATTN}[0/3]'"),
    ),
    "parts of what is not fused": (
        "bert", "*.query[0/3]", ("16", "3 equal parts", f"at='{QUERY}'"),
    ),
    "parts of a role": ("gpt2", "query[0/3]", ("did you mean at='query'?",)),
    "parts of a table": (
        "bert", "*.word_embeddings[0/2]", ("no parts", "at='bert.embeddings.word_embeddings'"),
    ),
    "another host's name for it": (
        "gpt2", "*.q_proj", ("matches no site", "its roles: query, key"),
    ),
    "packed where it is apart": ("mha", "cross.in_proj_weight[0/3]", ("at='cross.q_proj_weight'",)),
    "attention as one weight": ("mha", "encoder.self_attn", ("in_proj_weight[0/3]", "query")),
}  # fmt: skip


@pytest.mark.parametrize("what", FUSED)
def test_a_fused_projection_addressed_wrongly(what: str) -> None:
    name, at, says = FUSED[what]
    refused(mg.Host(HOSTS[name].model()), lambda: mg.LoRA(rank=2), at, *says)


def test_a_function_at_parts_that_do_not_divide_a_projection() -> None:
    host = mg.Host(HOSTS["gpt2"].model())
    at = "transformer.h.*.attn.c_attn[0/5]"
    refused(host, lambda: mg.Adapter(width=2), at, "48", "5 equal parts", f"at='{C_ATTN}'")


# -- a task that a hypernetwork does not know -----------------------------------------------------


def test_a_task_that_a_hypernetwork_does_not_know() -> None:
    host = mg.Host(HOSTS["bert"].model())
    hyper = mg.HyperNetwork(mg.Adapter(width=2), tasks=("fr", "de"), embedding=4)
    host.implant("h", hyper, at="output", active=False)
    for composition, says in (
        ("h['frr']", ("'h' knows no task 'frr'", "did you mean h['fr']?")),
        ("h", ("h['fr']",)),
        ("2*h['es'] + h['de']", ("'h' knows no task 'es'", "h['fr']", "h['de']")),
    ):
        with pytest.raises(mg.ModgraftError) as error:
            host.use(composition)
        for part in says:
            assert part in str(error.value), str(error.value)
    assert host.composition is None


# -- a loaded module that is damaged or another's ------------------------------------------------


def saved(module: ModuleCase, folder: Path) -> Any:
    """Save the module of the first host where it is defined; return that case."""
    case = next(case for name, case in HOSTS.items() if name not in module.refused)
    implanted(case, module).save("m", folder)
    return case


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize("name", MODULES)
def test_nan_in_a_loaded_tensor(name: str, value: float, tmp_path: Path) -> None:
    case = saved(MODULES[name], tmp_path / "m")
    whole = kept(tmp_path / "m")
    floats = [k for k, t in whole.items() if t.is_floating_point() and t.numel()]
    if not floats:
        pytest.skip(f"{name} keeps no floating-point tensor")
    for key in (floats[0], floats[-1]):
        damaged = {k: t.clone() for k, t in whole.items()}
        damaged[key].view(-1)[-1] = value
        forge(tmp_path / "m", damaged)
        host = mg.Host(case.model())
        with pytest.raises(mg.ModgraftError, match="holds NaN or infinity") as error:
            host.load(tmp_path / "m")
        assert key.partition(":")[2] in str(error.value)
        assert str(tmp_path / "m") in str(error.value)
        assert "m" not in host
        assert not any("_modgraft_state" in sub.__dict__ for sub in host.model.modules())


@pytest.mark.parametrize("name", MODULES)
def test_another_shape_in_a_loaded_tensor(name: str, tmp_path: Path) -> None:
    case = saved(MODULES[name], tmp_path / "m")
    whole = kept(tmp_path / "m")
    if not whole:
        pytest.skip(f"{name} keeps no tensors")
    key = next(iter(whole))
    longer = {**whole, key: torch.cat([whole[key].flatten()] * 2)}
    forge(tmp_path / "m", longer)
    host = mg.Host(case.model())
    with pytest.raises(mg.ModgraftError) as error:
        host.load(tmp_path / "m")
    assert re.search(r"\d", str(error.value))
    assert key.rpartition(":")[2] in str(error.value), str(error.value)
    assert "m" not in host


WRONG = (None, True, -1, 0, 1e99, math.nan, "", "x", [], ["x"], [1], {}, {"a": 1}, 2**70)
"""What may stand in a card that somebody changed."""


def changed(value: Any) -> Iterator[Any]:
    """Yield a JSON value with one part changed or left out, each part once."""
    if isinstance(value, dict):
        for key in value:
            yield {k: v for k, v in value.items() if k != key}
            yield from ({**value, key: other} for other in changed(value[key]))
    if isinstance(value, list):
        yield value[1:]
        yield from ([other, *value[1:]] for other in (changed(value[0]) if value else ()))
    yield from WRONG


@pytest.mark.parametrize("name", MODULES)
def test_a_card_that_was_changed_is_refused_or_understood(name: str, tmp_path: Path) -> None:
    case = saved(MODULES[name], tmp_path / "m")
    whole = json.loads((tmp_path / "m" / "module.json").read_text("utf-8"))
    host = mg.Host(case.model())
    for module in changed({"trained_in": None, **whole["modules"][0]}):
        forge(tmp_path / "m", modules=[module])
        with suppress(mg.ModgraftError):  # and no other error
            host.load(tmp_path / "m", "m")
            host.remove("m")
        assert not list(host.implants)
        assert not any("_modgraft_state" in sub.__dict__ for sub in host.model.modules())
    tensors = {f"n:{key.removeprefix('m:')}": t for key, t in kept(tmp_path / "m").items()}
    named = {**whole["modules"][0], "name": "n"}  # understood: under another name everywhere
    forge(tmp_path / "m", tensors, names=["n"], modules=[named])
    host.load(tmp_path / "m", "m")


# -- an argument of another type -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: mg.LoRA(rank="8"), "LoRA(rank='8'): rank is int, not str"),  # type: ignore[arg-type]
        (lambda: mg.LoRA(rank=8.0), "LoRA(rank=8.0): rank is int, not float"),  # type: ignore[arg-type]
        (lambda: mg.LoRA(rank=True), "LoRA(rank=True): rank is int, not bool"),
        (lambda: mg.LoRA(alpha=math.nan), "alpha is float | None, not NaN"),
        (lambda: mg.Prefix(length=None), "Prefix(length=None): length is int, not NoneType"),  # type: ignore[arg-type]
        (lambda: mg.Adapter(width=torch.ones(2)), "width is int | None, not Tensor"),  # type: ignore[arg-type]
        (lambda: mg.SparseDelta(density=np.ones(2)), "density is float, not ndarray"),  # type: ignore[arg-type]
        (lambda: mg.Prompt("x", ids="ab"), "ids is Sequence[int], not str"),  # type: ignore[arg-type]
    ],
)  # fmt: skip
def test_an_argument_of_another_type(make: Callable[[], object], says: str) -> None:
    with pytest.raises(mg.ModgraftError) as error:
        make()
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"steps": 1e3}, "fit(steps=1000.0): steps is int | None, not float"),
        ({"steps": 3, "lr": "1e-3"}, "fit(lr='1e-3'): lr is float, not str"),
        ({"steps": 3, "seed": None}, "fit(seed=None): seed is int, not NoneType"),
        ({"steps": 3, "clip": math.nan}, "fit(clip=nan): clip is float | None, not NaN"),
        ({"steps": 3, "betas": ("0.9", 0.99)}, "betas is tuple[float, float] | None, not tuple"),
        ({"steps": 3, "save_every": "10"}, "save_every is int | None, not str"),
    ],
)
def test_a_setting_of_another_type(given: dict[str, Any], says: str, tmp_path: Path) -> None:
    case = HOSTS["bert"]
    host = mg.Host(case.model())
    host.implant("m", mg.LoRA(rank=2), at="query")
    with pytest.raises(mg.ModgraftError) as error:
        host.fit([case.batch()], folder=tmp_path / "run", progress=False, **given)
    assert says in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_side_input_without_its_name_and_a_composition_that_is_no_text() -> None:
    case = HOSTS["bert"]
    host = mg.Host(case.model())
    host.implant("eye", mg.GatedFusion("image", 4), at="output", active=False)
    image = mg.Side(torch.ones(2, 3, 4))
    for side in (image, image.tensor, [image]):
        with pytest.raises(mg.ModgraftError, match=r"write side=\{'image': mg\.Side"):
            host(**case.batch(), side=side, modules="eye")
    for composition in (3, mg.LoRA(), math.nan, [None, 3]):
        with pytest.raises(mg.ModgraftError, match=r"as 'fr >> qa'"):
            host.use(composition)  # type: ignore[arg-type]
    with pytest.raises(mg.ModgraftError, match="3 cannot name a module"):
        host.implant(3, mg.LoRA(), at="query")  # type: ignore[arg-type]


def test_the_types_of_a_method_of_ones_own() -> None:
    class Damped(mg.FunctionComposition):
        by: float = 1.0
        of: dict[str, tuple[int, ...]] | None = None

        def __post_init__(self) -> None:
            if self.by < 0:
                raise mg.ModgraftError("by is at least 0")

        def build(self, site: Site) -> None:
            pass

        def forward(self, y: torch.Tensor, x: torch.Tensor | None, side: object) -> torch.Tensor:
            return self.by * y

    assert Damped(2, {"a": (1, 2)}).by == 2
    with pytest.raises(mg.ModgraftError, match="by is at least 0"):
        Damped(by=-1)
    with pytest.raises(mg.ModgraftError, match=r"Damped\(by='2'\): by is float, not str"):
        Damped(by="2")  # type: ignore[arg-type]
    with pytest.raises(mg.ModgraftError, match=r"of is dict\[str, tuple\[int, \.\.\.\]\] \| None"):
        Damped(of={"a": ("1",)})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="unexpected keyword argument 'times'; it has by, of"):
        Damped(times=2)  # type: ignore[call-arg]


def test_a_hook_of_a_former_name_is_refused() -> None:
    """It would never be called, and the module would compute something else without a word."""
    for base in (mg.FunctionComposition, mg.Router, mg.Aggregation):
        assert base.renamed
        for old, new in base.renamed.items():
            assert hasattr(base, new) or hasattr(mg.ParameterComposition, new)
            with pytest.raises(mg.ModgraftError, match=rf"Own.{old}: .* it is {new} now"):
                type("Own", (base,), {old: None})


def test_a_field_or_a_child_that_hides_a_hook_is_refused() -> None:
    with pytest.raises(
        mg.ModgraftError, match=r"field of this name hides the hook Configured.brief"
    ):
        type("Own", (mg.FunctionComposition,), {"__annotations__": {"brief": bool}, "brief": True})

    class Own(mg.FunctionComposition):
        def build(self, site: mg.Site) -> None:
            self.unwrapped = torch.nn.Linear(site.width, site.width)

        def forward(self, y: torch.Tensor, x: torch.Tensor | None, side: mg.Side | None) -> Any:
            return self.unwrapped(y)

    host = mg.Host(torch.nn.Sequential(torch.nn.Linear(4, 4)))
    with pytest.raises(mg.ModgraftError, match=r"Own.build: self.unwrapped is an attribute"):
        host.implant("own", Own(), at="0")
    assert "own" not in host
