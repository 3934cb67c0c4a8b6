"""Prefix beyond the contract: caches, padding, kinds of attention, its MLP, bad input."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AttentionInterface,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DynamicCache,
    GPT2LMHeadModel,
    PersimmonConfig,
    PersimmonForCausalLM,
    StaticCache,
)

import modgraft as mg
from common import counted, forge, kept
from contract.hosts import BATCH, HOSTS, HostCase, ids, side, tensor_of
from contract.modules import MODULES
from contract.written_out import prepend
from core.families import CASES

ATTENDING = [case for case in HOSTS.values() if case.name not in MODULES["prefix"].refused]
DECODERS = [HOSTS["gpt2"], HOSTS["llama"]]


def each(cases: list[HostCase]) -> Any:
    return pytest.mark.parametrize("case", cases, ids=[c.name for c in cases])


def prefixed(
    case: HostCase, name: str = "m", host: mg.Host | None = None, at: Any = None, **own: Any
) -> mg.Host:
    """Make a host with a prefix of random numbers."""
    host = host or mg.Host(case.model()).eval()
    host.implant(name, mg.Prefix(**{"length": 3, **own}), at=at)
    with torch.no_grad():
        for p in host[name].parameters():
            p.normal_(0, 0.5)
    return host


def run(host: nn.Module, case: HostCase, **kw: Any) -> Tensor:
    with torch.no_grad():
        return tensor_of(host(**{**case.batch(), **kw}))


# -- which attention ----------------------------------------------------------------------------


def latent() -> nn.Module:
    """Make a model whose keys are wider than its values."""
    config = DeepseekV3Config(
        vocab_size=41, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, intermediate_size=24, moe_intermediate_size=8, n_routed_experts=2,
        num_experts_per_tok=1, n_group=1, topk_group=1, first_k_dense_replace=2, q_lora_rank=8,
        kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=6,
    )  # fmt: skip
    return DeepseekV3ForCausalLM(config)


def of_no_family() -> nn.Module:
    """Make a model of no known family, with a fused projection."""
    config = PersimmonConfig(
        vocab_size=41, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24,
    )  # fmt: skip
    return PersimmonForCausalLM(config)


@pytest.mark.parametrize("reparametrise", [None, 5])
@pytest.mark.parametrize("make", [latent, of_no_family])
@torch.no_grad()
def test_attention_of_other_models(make: Any, reparametrise: int | None) -> None:
    torch.manual_seed(0)
    host, words = mg.Host(make().double()).eval(), ids()
    host.implant("m", mg.Prefix(length=3, reparametrise=reparametrise), active=False)
    for p in host["m"].parameters():
        p.normal_(0, 0.5)
    before = {id(m): place.plain() for m, place in _places(host)}

    def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kw: Any) -> Any:
        keys, values = (t.transpose(0, 1).expand(len(k), -1, -1, -1) for t in before[id(module)])
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
        scores = q @ torch.cat([keys, k], 2).mT * kw["scaling"]
        scores = scores.masked_fill(~F.pad(mask, (3, 0), value=True), -torch.inf)
        return (scores.softmax(-1) @ torch.cat([values, v], 2)).transpose(1, 2), None

    ours = {kind: [] for kind in ("eager", "sdpa")}
    for kind, outs in ours.items():
        host.model.set_attn_implementation(kind)
        outs.append(host(input_ids=words, modules="m", use_cache=False).logits)
        first = host(input_ids=words[:, :-1], modules="m", use_cache=True)
        last = host(
            input_ids=words[:, -1:], past_key_values=first.past_key_values, modules="m"
        ).logits
        outs.append(torch.cat([first.logits, last], 1))
    AttentionInterface.register("written_out_of_any", attend)
    host.model.set_attn_implementation("written_out_of_any")
    wanted = host.model(input_ids=words, use_cache=False).logits
    for out in (*ours["eager"], *ours["sdpa"]):
        torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)


def _places(host: mg.Host) -> Any:
    paths, places = host["m"].paths, host["m"].places
    return [(host.model.get_submodule(p), place) for p, place in zip(paths, places, strict=True)]


@each(ATTENDING)
def test_eager_equals_sdpa(case: HostCase) -> None:
    host = prefixed(case).double()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in case.batch().items()}
    outs = []
    for kind in ("sdpa", "eager"):
        host.model.set_attn_implementation(kind)
        outs.append(run(host, case, **batch))
    close = 1e-5 if case.name in ("llama", "vit") else 1e-9  # their eager softmax is float32
    torch.testing.assert_close(*outs, rtol=close, atol=close)


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
@each(DECODERS)
def test_no_mask_means_what_the_layer_means(case: HostCase, kind: str) -> None:
    host = prefixed(case)
    host.model.set_attn_implementation(kind)
    with torch.no_grad():
        masked = host(input_ids=ids(), attention_mask=torch.ones_like(ids())).logits
        torch.testing.assert_close(host(input_ids=ids()).logits, masked)
        first = host(input_ids=ids()[:, :1]).logits  # one query
    torch.testing.assert_close(first[:, 0], masked[:, 0], rtol=1e-4, atol=1e-5)


OTHERS = ("gpt_bigcode", "mistral", "qwen2", "qwen3", "gemma2", "roberta", "mt5", "t5 encoder")


@pytest.mark.parametrize("name", OTHERS)
def test_other_families_equal_the_written_out_attention(name: str) -> None:
    torch.manual_seed(0)
    model = CASES[name].model().double()
    plain, host = copy.deepcopy(model), mg.Host(model).eval()
    host.implant("m", mg.Prefix(length=3))
    for path, place in zip(host["m"].paths, host["m"].places, strict=True):
        nn.init.normal_(place.keys)
        nn.init.normal_(place.values)
        prepend(plain, path, place.keys, place.values)
    if name == "gemma2":  # it caps its scores, which the reference does not
        for layer in (*model.model.layers, *plain.model.layers):
            layer.self_attn.attn_logit_softcapping = None
    batch = CASES[name].batch()
    with torch.no_grad():
        one, other = host(**batch)[0], plain(**batch)[0]
    close = 1e-6 if name == "gemma2" else 1e-9  # its softmax is float32
    torch.testing.assert_close(one, other, rtol=100 * close, atol=close)


def test_attention_that_it_cannot_serve_is_an_error() -> None:
    host = prefixed(HOSTS["bert"])
    own = AttentionInterface()["sdpa"]
    AttentionInterface.register("somebodys_own", own)
    host.model.config._attn_implementation = "somebodys_own"
    with pytest.raises(mg.ModgraftError, match=r"eager and sdpa, not by 'somebodys_own'.*'sdpa'"):
        host(input_ids=ids())
    host(input_ids=ids(), modules=None)

    config = HOSTS["gpt2"].make().config
    config.reorder_and_upcast_attn = True
    config._attn_implementation = "eager"
    host = prefixed(HOSTS["bert"])
    layer = host.model.get_submodule(host["m"].paths[0])
    with pytest.raises(mg.ModgraftError, match=r"mask \[1, 1, 7, 9\] for 7 keys"):
        layer(torch.randn(1, 7, 16), torch.ones(1, 1, 7, 9, dtype=torch.bool))

    past = mg.Host(GPT2LMHeadModel(config)).eval()
    past.implant("m", mg.Prefix(length=3))
    with pytest.raises(mg.ModgraftError, match=r"m had no effect at transformer\.h\.0\.attn"):
        past(input_ids=ids())
    past(input_ids=ids(), modules=None)


def test_other_models_and_the_config_are_left_alone() -> None:
    case = HOSTS["llama"]
    other, model = case.model(), case.model()
    before = run(other, case)
    config = model.config.to_dict(), model.config._attn_implementation
    host = prefixed(case, host=mg.Host(model).eval())
    function = AttentionInterface.get_interface
    prefixed(case, name="n", host=host)
    assert AttentionInterface.get_interface is function  # once a process
    assert not torch.equal(run(host, case), before)
    assert torch.equal(run(other, case), before)
    assert (model.config.to_dict(), model.config._attn_implementation) == config


# -- caches, padding, positions -----------------------------------------------------------------


@each(DECODERS)
@torch.no_grad()
def test_step_by_step_with_a_cache_equals_one_forward(case: HostCase) -> None:
    host = prefixed(case)
    whole = host(input_ids=ids()).logits
    caches = (
        DynamicCache(config=host.config),
        StaticCache(config=host.config, max_cache_len=12),
    )
    for cache in caches:
        first = host(input_ids=ids()[:, :3], past_key_values=cache).logits
        rest = []
        for i in range(3, 7):
            out = host(input_ids=ids()[:, i : i + 1], past_key_values=cache)
            rest.append(out.logits)
            assert int(cache.get_seq_length()) == i + 1  # it holds the text alone
        torch.testing.assert_close(torch.cat([first, *rest], 1), whole, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_t5_step_by_step_with_a_cache_equals_one_forward() -> None:
    host = prefixed(HOSTS["t5"], at=["self_attention", "cross_attention"])
    batch, target = HOSTS["t5"].batch(), ids(5, 5)
    batch.pop("labels")
    whole = host(**batch, decoder_input_ids=target).logits
    cache, rest = None, []
    for i in range(5):
        out = host(**batch, decoder_input_ids=target[:, i : i + 1], past_key_values=cache)
        cache = out.past_key_values
        assert cache.get_seq_length() == i + 1
        assert cache.cross_attention_cache.layers[0].keys.shape[2] == 7
        rest.append(out.logits)
    torch.testing.assert_close(torch.cat(rest, 1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@each([HOSTS[n] for n in ("bert", "gpt2", "llama", "t5")])
@torch.no_grad()
def test_padding_changes_nothing(case: HostCase, left: bool) -> None:
    host, text = prefixed(case), ids()[:1]
    pad = torch.zeros(1, 4, dtype=torch.long)
    padded = torch.cat([pad, text] if left else [text, pad], 1)
    mask = (padded != 0).long()
    own = {"decoder_input_ids": ids(4, 3)[:1]} if case.name == "t5" else {}
    if case.name in ("bert", "gpt2") and left:  # tables, which the bare host would read elsewhere
        own["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    out = host(input_ids=padded, attention_mask=mask, **own).logits
    own.pop("position_ids", None)
    alone = host(input_ids=text, **own).logits
    out = out if case.name == "t5" else out[:, 4:] if left else out[:, :7]
    torch.testing.assert_close(out, alone, rtol=1e-4, atol=1e-5)


def padded_llama() -> tuple[mg.Host, Tensor, Tensor, Tensor]:
    """Make a host with a prefix, texts, and these padded on the left by 0, 1, 2, … and the mask."""
    text = ids()
    padded = torch.zeros(len(text), 6 + len(text), dtype=torch.long)
    for i, own in enumerate(text):
        padded[i, i : i + 7] = own
    return prefixed(HOSTS["llama"]), text, padded, padded.ne(0).long()


@torch.no_grad()
def test_texts_padded_on_the_left_are_what_they_are_alone() -> None:
    """Whatever says what acts, with a prompt beside it, by embeddings, and step by step."""
    host, text, padded, mask = padded_llama()
    prefixed(HOSTS["llama"], "n", host)
    host.implant("p", mg.SoftPrompt(length=2), active=False)
    host.implant("mix", mg.Mixture(["m", "n"], router=mg.Fixed()), active=False)
    batch = {"input_ids": padded, "attention_mask": mask}
    for composition in ("m", "m >> n", "p >> m", "mix", None):
        alone = host(input_ids=text, modules=composition).logits
        for own in (composition, [composition] * len(text)):
            out = host(**batch, modules=own).logits[mask.bool()].reshape(alone.shape)
            torch.testing.assert_close(out, alone, rtol=1e-4, atol=1e-5)
    host.use("m")
    alone = host(input_ids=text).logits
    assert not torch.allclose(alone, host(input_ids=text, modules=None).logits)
    embeddings = host.model.get_input_embeddings()(padded)
    for out in (
        host(inputs_embeds=embeddings, attention_mask=mask),
        host(padded, mask),
        host.model(padded, mask),
    ):
        torch.testing.assert_close(
            out.logits[mask.bool()].reshape(alone.shape), alone, rtol=1e-4, atol=1e-5
        )
    cache, some = DynamicCache(config=host.config), []
    for start, end in ((0, 5), (5, 6), (6, padded.shape[1])):
        step = {"input_ids": padded[:, start:end], "attention_mask": mask[:, :end]}
        some.append(host(**step, past_key_values=cache).logits)
    torch.testing.assert_close(
        torch.cat(some, 1)[mask.bool()].reshape(alone.shape), alone, rtol=1e-4, atol=1e-5
    )


@torch.no_grad()
def test_compiled_texts_padded_on_the_left_are_one_graph_and_a_bare_host_is_itself() -> None:
    host, _, padded, mask = padded_llama()
    batch = {"input_ids": padded, "attention_mask": mask}
    bare = HOSTS["llama"].model().eval()(**batch).logits
    assert torch.equal(host(**batch, modules=None).logits, bare)
    compiled, graphs = counted(host)
    for composition in ("m", None, "m"):
        host.use(composition)
        torch.testing.assert_close(compiled(**batch).logits, host(**batch).logits)
    assert len(graphs) == 1
    host.remove("m")
    assert torch.equal(host(**batch).logits, bare)
    assert not host.model._forward_pre_hooks


@each([*DECODERS, HOSTS["t5"]])
@torch.no_grad()
def test_generation_follows_the_logits_of_whole_forwards(case: HostCase) -> None:
    """Generation equals greedy decoding without a cache; a static cache gives the same."""
    host, batch = prefixed(case), case.batch()
    batch.pop("labels", None)
    text = "decoder_input_ids" if case.name == "t5" else "input_ids"
    rows = batch.get(text, torch.zeros(BATCH, 1, dtype=torch.long))
    start = rows.shape[1]
    mask = batch["attention_mask"]
    for _ in range(5):
        own = {}
        if case.name != "t5":
            mask = torch.cat([batch["attention_mask"], torch.ones_like(rows[:, start:])], 1)
            own["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        logits = host(**{**batch, text: rows, "attention_mask": mask, **own}).logits[:, -1]
        logits[:, 1] = -torch.inf  # min_new_tokens
        rows = torch.cat([rows, logits.argmax(-1, keepdim=True)], 1)
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "eos_token_id": 1}
    assert torch.equal(host.generate(**batch, **settings), rows)
    static = host.generate(**batch, **settings, cache_implementation="static")
    assert torch.equal(static, rows)


@each(DECODERS)
@torch.no_grad()
def test_from_the_activations_of_a_text_it_is_that_text(case: HostCase) -> None:
    host = mg.Host(case.model()).eval()
    host.implant("m", mg.Prefix(length=3))
    words, text = ids(3, seed=9)[:1], ids()
    mg.prefix_from_text(host, "m", input_ids=words)
    joined = torch.cat([words.expand(BATCH, -1), text], 1)
    expected = host(input_ids=joined, modules=None).logits[:, 3:]
    places = torch.arange(3, 10)[None]  # a text keeps its own positions unless it is told others
    out = host(input_ids=text, position_ids=places).logits
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(mg.ModgraftError, match=r"keys \[1, \d, 2, 8\].* one text of 3 tokens"):
        mg.prefix_from_text(host, "m", input_ids=words[:, :2])
    host.implant("mlp", mg.Prefix(reparametrise=4), active=False)
    with pytest.raises(mg.ModgraftError, match=r"Prefix\(length=10\)"):
        mg.prefix_from_text(host, "mlp", input_ids=words)


def test_it_takes_none_of_the_hosts_positions() -> None:
    case = HOSTS["bert"]
    host = mg.Host(case.model()).eval()
    host.implant("m", mg.Prefix(length=100))
    assert torch.isfinite(run(host, case)).all()
    assert host.config.max_position_embeddings == 32


# -- compositions -------------------------------------------------------------------------------


@each(ATTENDING)
def test_a_chain_is_one_longer_prefix(case: HostCase) -> None:
    host = prefixed(case, length=2)
    prefixed(case, "n", host, length=3)
    prefixed(case, "both", host, length=5)
    with torch.no_grad():
        for m, n, both in zip(*(host[k].places for k in ("m", "n", "both")), strict=True):
            both.keys.copy_(torch.cat([m.keys, n.keys]))
            both.values.copy_(torch.cat([m.values, n.values]))
    assert torch.equal(run(host, case, modules="m >> n"), run(host, case, modules="both"))


def test_compiled_in_any_order_it_is_one_graph() -> None:
    case = HOSTS["llama"]
    host = prefixed(case)
    prefixed(case, "n", host)
    compiled, graphs = counted(host)
    for composition in ("m >> n", "n", None, "m", "m >> n"):
        with host.using(composition):
            torch.testing.assert_close(run(compiled, case), run(host, case), rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1
    for _ in range(3):  # another order takes one more graph, once
        with host.using("n >> m"):
            torch.testing.assert_close(run(compiled, case), run(host, case))
    assert len(graphs) == 2


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
@each([HOSTS["gpt2"], HOSTS["t5"]])
def test_compiled_gradients_are_those_of_what_is_in_force(case: HostCase, kind: str) -> None:
    host = prefixed(case)
    prefixed(case, "n", host)
    host.model.set_attn_implementation(kind)
    torch._dynamo.reset()
    compiled = torch.compile(host, backend="aot_eager", fullgraph=True)

    def gradients(model: nn.Module) -> list[Tensor]:
        host.zero_grad()
        tensor_of(model(**case.batch())).square().mean().backward()
        zero = torch.zeros(())
        return [zero if p.grad is None else p.grad.clone() for p in host.implants.parameters()]

    for composition in ("n", "m >> n"):
        host.use(composition)
        for one, other in zip(gradients(compiled), gradients(host), strict=True):
            torch.testing.assert_close(one, other.expand_as(one), rtol=1e-3, atol=1e-5)


class FromSide(mg.KeyValueComposition):
    """Make a key and a value of each vector of a side input."""

    source: str = "image"

    @property
    def side_source(self) -> str:
        return self.source

    def build(self, site: mg.Site) -> None:
        self.map = nn.Linear(6, 2 * 8)

    def keys_values(self, batch: int, side: mg.Side | None) -> tuple[Tensor, Tensor]:
        assert side is not None
        made = self.map(side.tensor).reshape(batch, -1, 1, 16).transpose(1, 2)  # [B, 1, m, 16]
        keys, values = made.chunk(2, dim=-1)
        return keys, values


def test_ones_own_computation_from_a_side_input_follows_the_beams() -> None:
    case = HOSTS["llama"]
    host = mg.Host(case.model()).eval()
    host.implant("eye", FromSide())
    batch, given = case.batch(), side()
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": 3}
    out = host.generate(**batch, side={"image": given}, **settings)
    for i in range(BATCH):
        one = {k: v[i : i + 1] for k, v in batch.items()}
        own = {"image": mg.Side(given.tensor[i : i + 1], given.mask[i : i + 1])}
        assert torch.equal(host.generate(**one, side=own, **settings), out[i : i + 1])
    with pytest.raises(mg.ModgraftError, match="needs the side input 'image'"):
        host(**batch)
    wrong = mg.Host(HOSTS["gpt2"].model()).eval()
    wrong.implant("eye", FromSide())
    with pytest.raises(mg.ModgraftError, match=r"attends to \[3, 2, n, 8\]"):
        wrong(**HOSTS["gpt2"].batch(), side={"image": given})


# -- the mathematics ----------------------------------------------------------------------------


class AtSite(nn.Module):
    """Call the first site of a host with the inputs that it gets inside the host."""

    def __init__(self, host: mg.Host, batch: dict[str, Any]) -> None:
        super().__init__()
        self.places, self.calls = host["m"].places, []
        self.site = (host.model.get_submodule(host["m"].paths[0]),)
        hook = self.site[0].register_forward_pre_hook(
            lambda m, args, kwargs: self.calls.append((args, kwargs)), with_kwargs=True
        )
        host(**batch, **({"use_cache": False} if "input_ids" in batch else {}))
        hook.remove()

    def forward(self) -> Tensor:
        args, kwargs = self.calls[0]
        return self.site[0](*args, **kwargs)[0]


@pytest.mark.parametrize("reparametrise", [None, 3], ids=["plain", "mlp"])
@each(ATTENDING)
def test_gradcheck(case: HostCase, reparametrise: int | None) -> None:
    """Run one site alone: some norms of a host always work in float32."""
    host = prefixed(case, length=2, reparametrise=reparametrise).double()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in case.batch().items()}
    site = AtSite(host, batch)
    start = {k: p for k, p in site.named_parameters() if k.startswith("places.0.")}

    def out(*tensors: Tensor) -> Tensor:
        return torch.func.functional_call(site, dict(zip(start, tensors, strict=True)), ())

    given = tuple(p.detach().clone().requires_grad_() for p in start.values())
    assert torch.autograd.gradcheck(out, given)


def test_cross_attention_equals_the_written_out_one() -> None:
    case = HOSTS["t5"]
    host = prefixed(case, at="cross_attention").double()
    assert host["m"].paths == tuple(f"decoder.block.{i}.layer.1.EncDecAttention" for i in range(2))
    plain = copy.deepcopy(case.model()).double()
    for path, place in zip(host["m"].paths, host["m"].places, strict=True):
        prepend(plain, path, place.keys, place.values)
    torch.testing.assert_close(run(host, case), run(plain, case), rtol=1e-9, atol=1e-11)


# -- the MLP ------------------------------------------------------------------------------------


@each(ATTENDING)
def test_the_mlp_is_shared_and_folds_away(case: HostCase, tmp_path: Path) -> None:
    host = prefixed(case, reparametrise=5)
    first, second = host["m"].places[:2]
    assert {k for k, _ in second.named_parameters()} == {"out.weight", "out.bias"}
    assert {k for k, _ in first.named_parameters()} > {"embedding", "hidden.weight", "hidden.bias"}
    expected = run(host, case, modules="m")
    folded = mg.fold_prefix(host, "m", "plain")
    assert str(host.composition) == "m"
    torch.testing.assert_close(run(host, case, modules="plain"), expected)
    assert folded.size == sum(2 * 3 * p.heads * p.width for p in host["m"].places)
    host.save("plain", tmp_path / "plain")
    fresh = mg.Host(case.model()).eval()
    fresh.load(tmp_path / "plain")
    torch.testing.assert_close(run(fresh, case), expected)
    host.implant("other", mg.LoRA(), at="query", active=False)
    with pytest.raises(mg.ModgraftError, match="'other' is a LoRA"):
        mg.fold_prefix(host, "other", "x")


@each(DECODERS)
def test_training_resumes_with_the_mlp(case: HostCase, tmp_path: Path) -> None:
    def steps(host: mg.Host, count: int) -> list[Tensor]:
        with host.training_only("m"):
            for _ in range(count):
                host.zero_grad()
                out = tensor_of(host(**case.batch(), labels=ids())).log_softmax(-1)
                out[..., 5].mean().neg().backward()
                with torch.no_grad():
                    for p in host["m"].parameters():
                        p.sub_(0.1 * p.grad)
        return [p.detach().clone() for p in host["m"].parameters()]

    host = prefixed(case, reparametrise=5)
    steps(host, 2)
    host.save("m", tmp_path / "m")
    fresh = mg.Host(case.model()).eval()
    fresh.load(tmp_path / "m")
    for one, other in zip(steps(fresh, 2), steps(host, 2), strict=True):
        assert torch.equal(one, other)


# -- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mg.Prefix(length=0), r"Prefix\(length=0\).* at least 1 vector"),
        (lambda: mg.Prefix(reparametrise=0), r"reparametrise=0.*Prefix\(length=10\)"),
    ],
)
def test_bad_options(make: Any, message: str) -> None:
    with pytest.raises(mg.ModgraftError, match=message):
        make()


@pytest.mark.parametrize(
    ("name", "at", "message"),
    [
        ("llama", "query", r"q_proj \(Linear\) does not; at='model\.layers\.0\.self_attn'"),
        ("bert", "attention", r"BertAttention\) does not; at='.*\.0\.attention\.self'"),
        ("gpt2", "block", r"GPT2Block\) does not; at='transformer\.h\.0\.attn'"),
        ("gpt2", "h.*.attn.c_attn[0/3]", "matches no site"),
        ("t5", "*.1.layer.0.SelfAttention.q", r"at='encoder\.block\.1\.layer\.0\.SelfAttention'"),
        ("vit", "feedforward", r"at='vit\.layers\.0\.attention'"),
        ("plain", None, "'self_attention' matches no site"),
        ("gpt2", "*.h.1.attn[0/3]", r"taken as a whole, at='transformer\.h\.1\.attn'"),
    ],
)
def test_a_site_that_does_not_attend(name: str, at: Any, message: str) -> None:
    host = mg.Host(HOSTS[name].model())
    with pytest.raises(mg.ModgraftError, match=message):
        host.implant("m", mg.Prefix(), at=at)
    assert "m" not in host


def test_torchs_own_attention_and_heads_that_do_not_divide() -> None:
    host = mg.Host(nn.Sequential(nn.MultiheadAttention(8, 2)))
    with pytest.raises(mg.ModgraftError, match=r"MultiheadAttention\) does not.* by itself"):
        host.implant("m", mg.Prefix(), at="0")
    odd = HOSTS["llama"].model()
    odd.model.layers[0].self_attn.k_proj = nn.Linear(16, 9)
    with pytest.raises(mg.ModgraftError, match="9 key features are not heads of 8 features"):
        mg.Host(odd).implant("m", mg.Prefix())


def test_loaded_tensors_are_checked(tmp_path: Path) -> None:
    case = HOSTS["gpt2"]
    host = prefixed(case)
    host.save("m", tmp_path / "m")
    tensors = kept(tmp_path / "m")
    key = next(iter(tensors))
    for bad, message in (
        (tensors[key] * torch.nan, "NaN or infinity"),
        (tensors[key][:2], r"\[2, 2, 8\] where this host needs \[3, 2, 8\]"),
    ):
        forge(tmp_path / "m", {**tensors, key: bad})
        fresh = mg.Host(case.model())
        with pytest.raises(mg.ModgraftError, match=message):
            fresh.load(tmp_path / "m")
        assert "m" not in fresh


@pytest.mark.parametrize("additive", [False, True])
@torch.no_grad()
def test_a_mask_of_queries_and_keys_tells_where_a_text_begins(additive: bool) -> None:
    host = mg.Host(HOSTS["llama"].model().double()).eval()
    host.implant("m", mg.Prefix(length=3))
    for p in host["m"].parameters():
        p.normal_(0, 0.5)
    words = ids()
    alone = host(input_ids=words[:1, 2:]).logits[0]
    n = words.shape[1]
    seen = torch.ones(n, n, dtype=torch.bool).tril()[None, None].repeat(len(words), 1, 1, 1)
    seen[0, :, :, :2] = False
    seen |= torch.eye(n, dtype=torch.bool)  # a query of padding sees itself, not nothing
    mask = torch.zeros(seen.shape).double().masked_fill(~seen, -1e9) if additive else seen
    out = host(input_ids=words, attention_mask=mask).logits
    torch.testing.assert_close(out[0, 2:], alone, rtol=1e-4, atol=1e-5)


# -- a prefix that counts as positions ----------------------------------------------------------

COUNTING = [HOSTS["bert"], HOSTS["gpt2"], HOSTS["llama"]]


@each(COUNTING)
def test_the_texts_positions_begin_after_what_counts(case: HostCase) -> None:
    host = prefixed(case, counted=True)
    prefixed(case, "plain", host)
    prefixed(case, "other", host, length=2, counted=True)
    batch = {"attention_mask": None}
    bare = mg.Host(case.model()).eval()
    for name in ("m", "plain", "other"):
        length = host[name].method.config()["length"]
        bare.implant(name, mg.Prefix(length=length), active=False)
        bare[name].load_state_dict(host[name].state_dict())
    n = case.batch()["input_ids"].shape[1]

    def at(composition: Any, start: int) -> Tensor:
        places = torch.arange(start, start + n).expand(BATCH, -1)
        return run(bare, case, **batch, position_ids=places, modules=composition)

    for composition, start in (
        ("m", 3), ("plain", 0), ("m >> plain", 3), ("m >> other", 5), ("average(m, plain)", 3),
        (None, 0),
    ):  # fmt: skip
        got = run(host, case, **batch, modules=composition)
        torch.testing.assert_close(got, at(composition, start), rtol=1e-4, atol=1e-5)
    got = run(host, case, **batch, modules=["other", None, "m"])
    for row, (name, start) in enumerate((("other", 2), (None, 0), ("m", 3))):
        torch.testing.assert_close(got[row], at(name, start)[row], rtol=1e-4, atol=1e-5)
    host.remove("m")
    host.remove("other")
    got = run(host, case, **batch, modules="plain")
    torch.testing.assert_close(got, at("plain", 0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", DECODERS, ids=["gpt2", "llama"])
def test_what_counts_generates_as_whole_forwards_say(case: HostCase) -> None:
    host = prefixed(case, counted=True)
    text = ids(4)
    with torch.no_grad():
        written = host.generate(text, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        for n in range(text.shape[1], written.shape[1]):
            logits = host(input_ids=written[:, :n]).logits[:, -1]
            logits[:, 1] = -torch.inf  # min_new_tokens: no end
            assert torch.equal(logits.argmax(-1), written[:, n])


def test_what_counts_and_padding_on_the_left() -> None:
    case = HOSTS["llama"]
    host = prefixed(case, counted=True)
    text = ids(4)
    padded = torch.cat([torch.zeros(BATCH, 2, dtype=torch.long), text], 1)
    mask = (torch.arange(6) >= 2).long().expand(BATCH, -1)
    with torch.no_grad():
        alone = host(input_ids=text).logits
        got = host(input_ids=padded, attention_mask=mask).logits[:, 2:]
    torch.testing.assert_close(got, alone, rtol=1e-4, atol=1e-5)


def test_what_counts_is_one_graph_when_compiled() -> None:
    case = HOSTS["llama"]
    host = prefixed(case, counted=True)
    prefixed(case, "n", host, length=2, counted=True)
    batch = {"input_ids": ids(4)}
    expected = {}
    for name in ("m", "n", None, "m >> n"):
        with torch.no_grad(), host.using(name):
            expected[name] = host(**batch).logits
    compiled, graphs = counted(host)
    for name, want in expected.items():
        with torch.no_grad(), host.using(name):
            torch.testing.assert_close(compiled(**batch).logits, want, rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1


def test_where_nothing_counts() -> None:
    host = mg.Host(HOSTS["t5"].model())
    with pytest.raises(mg.ModgraftError, match="takes no position_ids, so the text's positions"):
        host.implant("m", mg.Prefix(length=2, counted=True))
    host = prefixed(HOSTS["gpt2"], counted=True)
    with pytest.raises(mg.ModgraftError, match="counts as positions, and what is chosen"):
        host.implant("mix", mg.Mixture(["m"], router=mg.Soft(level="example")))
