"""Roles of hosts that hold a known model, of several models in one, and of unknown ones."""

from __future__ import annotations

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

import modgraft as mg
from contract.hosts import HOSTS
from core.families import CASES, Wrapped, first_output
from modgraft.core.roles import roles_of


@pytest.mark.parametrize("name", ["bert", "llama", "vit", "t5", "clip"])
@torch.no_grad()
def test_a_wrapped_model_has_the_roles_of_the_model_in_it(name: str) -> None:
    case = CASES[name]
    inner = case.model()
    inside, host, batch = mg.Host(inner), mg.Host(Wrapped(inner)).eval(), case.batch()
    for role in roles_of(inner).patterns:
        try:
            paths = [f"inner.reader.{site.label}" for site in inside.sites(role)]
        except mg.ModgraftError:
            continue
        assert [site.label for site in host.sites(role)] == paths
    bare = first_output(host(**batch))
    host.implant("m", mg.LoRA(rank=2), at=["query", "value"])
    for parameter in host["m"].parameters():
        parameter.normal_(0, 0.3)
    changed = first_output(host(**batch))
    assert not torch.allclose(changed, bare)
    merged = first_output(host.merge("m")(**batch))
    torch.testing.assert_close(merged, changed, rtol=1e-4, atol=1e-5)


def test_data_parallel_has_the_roles_of_its_module() -> None:
    model = nn.DataParallel(CASES["llama"].model())
    assert [s.path for s in mg.Host(model).sites("query")] == [
        f"module.model.layers.{i}.self_attn.q_proj" for i in range(2)
    ]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # in PEFT
@torch.no_grad()
def test_a_peft_model_has_roles_at_the_layers_that_it_wraps() -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    host = mg.Host(get_peft_model(CASES["llama"].model(), config)).eval()
    batch = CASES["llama"].batch()
    assert host.sites("query")[0].path.endswith("layers.0.self_attn.q_proj.base_layer")
    assert host.sites("key")[0].path.endswith("layers.0.self_attn.k_proj")
    bare = host(**batch).logits
    host.implant("m", mg.LoRA(rank=2), at=["query", "key", "up"])
    assert torch.equal(host(**batch).logits, bare)
    for parameter in host["m"].parameters():
        parameter.normal_(0, 0.3)
    changed = host(**batch).logits
    assert not torch.allclose(changed, bare)
    merged = host.merge("m")(**batch).logits
    torch.testing.assert_close(merged, changed, rtol=1e-4, atol=1e-5)
    host.implant("a", mg.Adapter(width=3), at="feedforward")
    assert torch.equal(host(**batch).logits, changed)


def test_eye_and_language_are_apart() -> None:
    host = mg.Host(CASES["blip-2"].model())
    first = {role: host.sites(role)[0].path.split(".")[0] for role in roles_of(host.model).patterns}
    assert {first[r] for r in first if "." not in r} == {"language_model"}
    assert {first[r] for r in first if r.startswith("vision.")} == {"vision_model"}
    assert {first[r] for r in first if r.startswith("qformer.")} == {"qformer"}
    both = mg.Host(nn.ModuleDict({"one": CASES["bert"].model(), "other": CASES["roberta"].model()}))
    assert {s.path.split(".")[0] for s in both.sites("query", expect=4)} == {"one", "other"}
    eyes = mg.Host(nn.ModuleList([CASES["vit"].model()]))
    assert len(eyes.sites("query")) == 2
    pair = mg.Host(CASES["encoder-decoder"].model())
    assert [s.path for s in pair.sites(["encoder.output", "decoder.output"])] == [
        "encoder.encoder", "decoder.bert.encoder",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "name", ["t5", "bart", "encoder-decoder", "vision-encoder-decoder", "detr"]
)
def test_cross_attention_is_in_query_key_value_and_output(name: str) -> None:
    host = mg.Host(CASES[name].model())

    def within(part: str, role: str) -> set[str]:
        above = tuple(f"{site.path}." for site in host.sites(part))
        return {s.label for s in host.sites(role) if s.label.startswith(above)}

    for role in ("query", "key", "value"):
        own, across = within("self_attention", role), within("cross_attention", role)
        assert own
        assert across
        assert not own & across
        assert {s.label for s in host.sites(role)} == own | across
    both = {s.path for s in host.sites(["self_attention", "cross_attention"])}
    assert len(both) == len(host.sites("attention"))


class Attention(nn.Module):
    """Query, key and value as diffusers call them."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(8, 8) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(8, 8)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = (self.to_q(x) @ self.to_k(x).mT).softmax(-1)
        return self.to_out[0](weights @ self.to_v(x))


class Block(nn.Module):
    """A block of no known family."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.fc1, self.fc2 = Attention(), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(x)
        return x + self.fc2(self.fc1(x).relu())


class Unknown(nn.Module):
    """Two such blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.parts, self.out = nn.ModuleList([Block(), Block()]), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.parts:
            x = part(x)
        return self.out(x)


@torch.no_grad()
def test_an_unknown_host_has_guessed_roles_and_says_so() -> None:
    host, x = mg.Host(Unknown()).eval(), torch.randn(2, 5, 8)
    assert {r: [s.label for s in host.sites(r)] for r in roles_of(host.model).patterns} == {
        "query": ["parts.0.attn.to_q", "parts.1.attn.to_q"],
        "key": ["parts.0.attn.to_k", "parts.1.attn.to_k"],
        "value": ["parts.0.attn.to_v", "parts.1.attn.to_v"],
        "output": ["parts.0.attn.to_out.0", "parts.1.attn.to_out.0"],
        "attention": ["parts.0.attn", "parts.1.attn"],
        "self_attention": ["parts.0.attn", "parts.1.attn"],
        "up": ["parts.0.fc1", "parts.1.fc1"],
        "down": ["parts.0.fc2", "parts.1.fc2"],
        "block": ["parts.0", "parts.1"],
    }
    assert "guessed=True" in repr(host.sites("query")[0])
    assert "guessed=False" in repr(host.sites("*.to_q")[0])
    assert "of no known family; roles guessed from names and shapes: query, key" in repr(host)
    with pytest.raises(mg.ModgraftError, match=r"at='query'.*guessed from names and shapes: query"):
        host.sites("querry")
    host.implant("m", mg.LoRA(rank=2), at=["query", "up"])
    for parameter in host["m"].parameters():
        parameter.normal_(0, 0.3)
    torch.testing.assert_close(host.merge("m")(x), host(x))


def test_only_what_is_sure_is_guessed() -> None:
    attention = roles_of(HOSTS["mha"].model())
    assert attention.guessed
    assert {s.parameter for s in mg.Host(HOSTS["mha"].model()).sites("query")} <= {
        "in_proj_weight", "q_proj_weight",
    }  # fmt: skip
    fused, odd = nn.Module(), nn.Module()
    fused.qkv = nn.Linear(8, 24)  # nothing tells how its parts lie
    odd.fc1, odd.fc2 = nn.Linear(8, 16), nn.Linear(12, 8)  # these do not follow each other
    odd.query, odd.key, odd.value = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(6, 8)
    for own in (fused, odd, nn.Linear(2, 2)):
        assert not roles_of(own).patterns
    host = mg.Host(odd)
    assert host.sites("query")[0].guessed is False  # it is a path


def test_linear_layers_alone_leave_experts_out_aloud() -> None:
    for name in ("mixtral", "gpt_oss", "llama4_text"):
        host = mg.Host(CASES[name].model())
        with pytest.warns(UserWarning, match="weights of experts.*left out; at=.*gate_up_proj"):
            linear = host.sites(nn.Linear)
        assert not [site for site in linear if site.parameter]
        every = host.sites([nn.Linear, "experts.up", "experts.down"])
        assert len(every) > len(linear)
    assert mg.Host(CASES["llama"].model()).sites(nn.Linear)


def test_guessed_roles_tell_attention_to_oneself_and_experts() -> None:
    config = transformers.BioGptConfig(
        vocab_size=41, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24,
    )  # fmt: skip
    host = mg.Host(transformers.BioGptForCausalLM(config))
    assert [s.path for s in host.sites("self_attention")] == ["biogpt.layers.0.self_attn"]
    config = transformers.Dots1Config(
        vocab_size=41, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, intermediate_size=24, moe_intermediate_size=8, head_dim=8,
        n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, first_k_dense_replace=0,
        n_group=1, topk_group=1,
    )  # fmt: skip
    host = mg.Host(transformers.Dots1ForCausalLM(config))
    experts = "model.layers.0.mlp.experts"
    assert [s.label for s in host.sites("experts.up")] == [f"{experts}.gate_up_proj"]
    assert f"{experts}.down_proj" in [s.label for s in host.sites("down")]


def test_layers_are_found_without_what_torch_wraps_around_them() -> None:
    host = mg.Host(CASES["llama"].model())
    expected = [site.path for site in host.sites("query")]
    layers = host.model.get_submodule("model.layers")
    setattr(layers, "0", torch.compile(layers[0], backend="eager"))  # type: ignore[index]
    found = [site.path.replace("._orig_mod", "") for site in host.sites("query")]
    assert found == expected
    assert any("_orig_mod" in site.path for site in host.sites("query"))


class Attends(nn.Module):
    """As diffusers names it: ``attn2`` looks at a text of another width."""

    def __init__(self, context: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(8, 8)
        self.to_k, self.to_v = nn.Linear(context, 8), nn.Linear(context, 8)


def test_keys_of_another_width_are_of_something_else() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn1, self.attn2 = Attends(8), Attends(12)
            self.mha = nn.MultiheadAttention(8, 2, kdim=12, vdim=12)

    host = mg.Host(Block())
    assert [site.path for site in host.sites("self_attention")] == ["attn1"]
    assert [site.path for site in host.sites("cross_attention")] == ["attn2", "mha"]
    assert len(host.sites("attention")) == 3


def test_towers_beside_a_model_of_no_known_family_have_their_sense() -> None:
    text = {
        "model_type": "helium", "vocab_size": 99, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    }  # fmt: skip
    eye = {
        "model_type": "clip_vision_model", "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "intermediate_size": 48, "image_size": 32, "patch_size": 8,
    }  # fmt: skip
    config = transformers.LlavaConfig(text_config=text, vision_config=eye, image_token_index=98)
    host = mg.Host(transformers.LlavaForConditionalGeneration(config))
    assert all("language_model" in site.path for site in host.sites(["query", "value", "down"]))
    assert all("vision_tower" in site.path for site in host.sites("vision.query"))
    assert len(host.sites("vision.query")) == len(host.sites("query")) == 2
    assert host.sites("query")[0].guessed


def test_stages_of_blocks_are_no_blocks() -> None:
    config = transformers.Swin2SRConfig(
        image_size=16, embed_dim=16, depths=[2, 2], num_heads=[2, 2], window_size=4
    )
    host = mg.Host(transformers.Swin2SRModel(config))
    paths = [site.path for site in host.sites("block")]
    assert len(paths) == 4
    assert all(".layers." in path.split("stages.")[1] for path in paths)
