"""A small model of every family whose roles modgraft knows, with and without its head."""

from __future__ import annotations

from transformers import (
    BertModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Model,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    MT5Config,
    MT5ForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5EncoderModel,
    ViTModel,
)

from contract.hosts import HOSTS

SHAPE = {
    "vocab_size": 41,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
DECODER = {**SHAPE, "num_key_value_heads": 1, "head_dim": 8}
MODELS = {
    **{name: HOSTS[name].make for name in ("t5", "bert", "gpt2", "llama", "vit")},
    "gated t5": lambda: MT5ForConditionalGeneration(
        MT5Config(vocab_size=41, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    ),
    "t5 encoder": lambda: T5EncoderModel(
        T5Config(vocab_size=41, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    ),
    "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**SHAPE)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE, num_key_value_heads=1)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**DECODER)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**DECODER)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**DECODER)),
    "bare bert": lambda: BertModel(HOSTS["bert"].make().config),
    "bare gpt2": lambda: GPT2Model(HOSTS["gpt2"].make().config),
    "bare llama": lambda: LlamaModel(HOSTS["llama"].make().config),
    "bare vit": lambda: ViTModel(HOSTS["vit"].make().config),
}
