"""What the real PEFT saves: a row a kind of module and host."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
)

SIZES = {"vocab_size": 41}


def _ids(*, seed: int = 0, length: int = 6) -> Tensor:
    return torch.randint(3, 41, (3, length), generator=torch.Generator().manual_seed(seed))


def _bert() -> nn.Module:
    return BertForSequenceClassification(
        BertConfig(
            **SIZES, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=24, num_labels=3, max_position_embeddings=32,
        )
    )  # fmt: skip


def _gpt2() -> nn.Module:
    special = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    return GPT2LMHeadModel(
        GPT2Config(**SIZES, **special, n_embd=16, n_layer=2, n_head=4, n_positions=32)
    )


def _t5() -> nn.Module:
    return T5ForConditionalGeneration(
        T5Config(
            **SIZES, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4,
            decoder_start_token_id=0, tie_word_embeddings=True,
        )
    )  # fmt: skip


def _llama() -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            **SIZES, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, intermediate_size=24, max_position_embeddings=32,
            tie_word_embeddings=False,
        )
    )  # fmt: skip


def _mixtral() -> nn.Module:
    return MixtralForCausalLM(
        MixtralConfig(
            **SIZES, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, intermediate_size=24, num_local_experts=3,
            tie_word_embeddings=False, experts_implementation="eager",
        )
    )  # fmt: skip


def _resnet() -> nn.Module:
    return ResNetForImageClassification(
        ResNetConfig(
            num_channels=3, embedding_size=8, hidden_sizes=[16, 24], depths=[1, 1], num_labels=3,
            layer_type="basic",
        )
    )  # fmt: skip


HOSTS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]]]] = {
    "bert": (_bert, lambda: {"input_ids": _ids(), "attention_mask": _mask()}),
    "gpt2": (_gpt2, lambda: {"input_ids": _ids()}),
    "t5": (_t5, lambda: {"input_ids": _ids(), "decoder_input_ids": _ids(seed=1, length=4)}),
    "llama": (_llama, lambda: {"input_ids": _ids()}),
    "mixtral": (_mixtral, lambda: {"input_ids": _ids()}),
    "resnet": (_resnet, lambda: {"pixel_values": _pixels()}),
}


def _mask() -> Tensor:
    mask = torch.ones(3, 6, dtype=torch.long)
    mask[1, 4:] = 0
    return mask


def _pixels() -> Tensor:
    return torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))


def model_of(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Make a host with weights so large that a change of one shows."""
    torch.manual_seed(0)
    model = HOSTS[name][0]().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter + 0.1 + 0.1 * drawn if parameter.dim() < 2 else 0.25 * drawn)
    return model.to(dtype)


def batch_of(name: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Make a batch for a host."""
    made = HOSTS[name][1]()
    return {k: t.to(dtype) if t.is_floating_point() else t for k, t in made.items()}


def output(model: nn.Module, batch: Mapping[str, Tensor], **more: Any) -> Tensor:
    with torch.no_grad():
        return model(**batch, **more).logits


@dataclass(frozen=True)
class Case:
    """A module of PEFT at a host.

    Attributes:
        host: the host's name.
        config: makes its configuration.
        types: the classes of ours that it becomes.
        given: arguments of the class that it must have.
        again: whether our save of it is the same, tensor by tensor.
    """

    host: str
    config: Callable[[], peft.PeftConfig]
    types: tuple[str, ...] = ("LoRA",)
    given: Mapping[str, Any] = field(default_factory=dict)
    again: bool = True


def lora(host: str, targets: Any, *, again: bool = True, **more: Any) -> Case:
    def config() -> peft.PeftConfig:
        return peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": targets, **more})

    return Case(host, config, again=again)


def _case(host: str, kind: str, *types: str, **said: Any) -> Case:
    return Case(host, lambda: getattr(peft, kind)(**said), types or ("LoRA",))


SEEN = [7, 3, *dict.fromkeys(_ids()[0].tolist())][-3:]  # tokens of the batch
SEVERAL = {"t5": ["q", "v", "wo"], "bert": ["query", "value"], "gpt2": ["c_attn", "c_proj"],
           "llama": ["q_proj", "v_proj", "down_proj"], "resnet": ["convolution"]}  # fmt: skip

CASES: dict[str, Case] = {
    **{f"lora-{host}": lora(host, names) for host, names in SEVERAL.items()},
    **{f"rslora-{host}": lora(host, names, use_rslora=True) for host, names in SEVERAL.items()},
    **{f"dora-{host}": lora(host, names, use_dora=True) for host, names in SEVERAL.items()},
    "lora-all-linear": lora("llama", "all-linear"),
    "lora-pattern": lora("t5", r".*decoder.*(SelfAttention|EncDecAttention)\.(q|v)$"),
    "lora-excluded": lora("bert", ["dense"], exclude_modules=["pooler.dense"]),
    "lora-layers": lora("llama", ["q_proj"], layers_to_transform=[1]),
    "lora-layers-pattern": lora("gpt2", ["c_attn"], layers_to_transform=0, layers_pattern="h"),
    "lora-ranks": lora(
        "bert", ["query", "value"], rank_pattern={"layer.1.attention.self.query": 2, "value": 8},
        alpha_pattern={"^bert.encoder.layer.0.attention.self.query": 3},
    ),
    "rslora-ranks": lora(
        "gpt2", ["c_attn"], use_rslora=True, rank_pattern={r"h\.1\.attn.c_attn": 3},
        alpha_pattern={"0.attn.c_attn": 5},
    ),
    "lora-bias-only": lora("bert", ["query", "value"], bias="lora_only"),
    "lora-bias-all": lora("bert", ["query", "value"], bias="all"),
    "lora-bias-all-gpt2": lora("gpt2", ["c_attn"], bias="all"),
    "lora-own-bias": lora("bert", ["query", "value"], lora_alpha=8, lora_bias=True),
    "lora-embedding": lora("llama", ["embed_tokens", "q_proj"]),
    "lora-embedding-tied": lora("gpt2", ["wte", "wpe"]),
    "lora-embedding-bert": lora("bert", ["word_embeddings", "query"]),
    "dora-embedding": lora("llama", ["embed_tokens", "q_proj"], use_dora=True),
    "lora-head": lora("bert", ["query", "value"], task_type="SEQ_CLS"),
    "lora-head-bias-all": lora("bert", ["query"], task_type="SEQ_CLS", bias="all"),
    "lora-saved": lora("bert", ["query"], modules_to_save=["classifier", "pooler"]),
    "lora-saved-norm": lora("resnet", ["convolution"], modules_to_save=["classifier.1"]),
    "lora-tokens": Case(
        "llama", lambda: peft.LoraConfig(r=4, target_modules=["q_proj"],
                                         trainable_token_indices=SEEN),
        ("LoRA", "TrainableTokens"),
    ),
    "lora-tokens-tied": Case(
        "gpt2", lambda: peft.LoraConfig(r=4, target_modules=["c_attn"],
                                        trainable_token_indices={"wte": SEEN}),
        ("LoRA", "TrainableTokens"),
    ),
    "lora-experts": lora(
        "mixtral", ["q_proj"], lora_alpha=6,
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    ),
    "lora-experts-only": lora(
        "mixtral", [], r=3, target_parameters=["mlp.experts.down_proj", "gate.weight"],
        rank_pattern={"experts.down_proj": 2},
    ),
    **{
        f"ia3-{host}": _case(host, "IA3Config", *types, **said)
        for host, types, said in (
            ("bert", ("Rescale", "Rescale"), {"task_type": "SEQ_CLS"}),
            ("t5", ("Rescale", "Rescale"), {"task_type": "SEQ_2_SEQ_LM"}),
            ("gpt2", ("Rescale", "Rescale"), {"task_type": "CAUSAL_LM"}),
            ("llama", ("Rescale",), {"target_modules": ["k_proj"], "feedforward_modules": []}),
            ("resnet", ("Rescale", "Rescale"),
             {"target_modules": ["layer.0.convolution", "layer.1.convolution"],
              "feedforward_modules": ["layer.1.convolution"]}),
        )
    },
    "vera-llama": _case("llama", "VeraConfig", "VeRA", r=6, target_modules=["q_proj", "down_proj"]),
    "vera-gpt2": _case("gpt2", "VeraConfig", "VeRA", r=6, target_modules=["c_attn", "c_proj"],
                       projection_prng_key=3, d_initial=0.2),
    "vera-bert": _case("bert", "VeraConfig", "VeRA", r=6, target_modules=["query"],
                       bias="vera_only"),
    "oft-llama": _case("llama", "OFTConfig", "OFT", oft_block_size=4,
                       target_modules=["q_proj", "down_proj", "embed_tokens"]),
    "oft-exact": _case("t5", "OFTConfig", "OFT", oft_block_size=0, r=2,
                       target_modules=["q", "wo"], use_cayley_neumann=False),
    "oft-shared": _case("bert", "OFTConfig", "OFT", oft_block_size=8, target_modules=["query"],
                        block_share=True, num_cayley_neumann_terms=3, bias="oft_only"),
    "oft-terms": _case("bert", "OFTConfig", "OFT", oft_block_size=8, target_modules=["query"],
                       num_cayley_neumann_terms=7),
    "tokens-llama": _case("llama", "TrainableTokensConfig", "TrainableTokens",
                          token_indices=SEEN),
    "tokens-gpt2": _case("gpt2", "TrainableTokensConfig", "TrainableTokens",
                         token_indices=SEEN),
    "tokens-t5": _case("t5", "TrainableTokensConfig", "TrainableTokens", token_indices=SEEN),
    "tokens-bert": _case("bert", "TrainableTokensConfig", "TrainableTokens",
                         token_indices=SEEN, target_modules=["word_embeddings"]),
    **{
        f"prompt-{host}": _case(host, "PromptTuningConfig", "SoftPrompt", num_virtual_tokens=3,
                                task_type=task)
        for host, task in (("bert", "SEQ_CLS"), ("t5", "SEQ_2_SEQ_LM"), ("gpt2", "CAUSAL_LM"),
                           ("llama", "CAUSAL_LM"))
    },
    **{
        f"prefix-{host}": _case(host, "PrefixTuningConfig", "Prefix", num_virtual_tokens=3,
                                task_type=task, **more)
        for host, task, more in (
            ("bert", "SEQ_CLS", {}), ("gpt2", "CAUSAL_LM", {}), ("llama", "CAUSAL_LM", {}),
            ("mixtral", "CAUSAL_LM", {"prefix_projection": True, "encoder_hidden_size": 7}),
        )
    },
}  # fmt: skip


def trained(case: Case, model: nn.Module, folder: Path) -> Any:
    """Give what PEFT trains random numbers, and save it in PEFT."""
    made: Any = peft.get_peft_model(copy.deepcopy(model), case.config()).eval()
    made.to(next(model.parameters()).dtype)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.requires_grad:
                drawn = 0.3 * torch.randn(parameter.shape, generator=generator)
                near = any(word in name for word in ("magnitude", "bias", "ia3", "oft"))
                parameter.copy_(parameter * (1 + drawn) if near else drawn)
                if "oft" in name or "bias" in name:
                    parameter.copy_(parameter + 0.3 * drawn)
    made.save_pretrained(folder)
    return made
