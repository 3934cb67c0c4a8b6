"""Hosts that continue text: decoders, of one kind of layer, of experts, with states, and mixed."""

from __future__ import annotations

from zoo.row import DECODER, SIZE, SPECIAL, VOCABULARY, Row, continued, hf, text, whole

GPT = {
    **SPECIAL,
    "vocab_size": VOCABULARY,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 64,
}
SMALL = {**SPECIAL, "vocab_size": VOCABULARY}
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
LATENT = {
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
ROUTED = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}
MAMBA = {"mamba_d_state": 4, "mamba_d_conv": 3, "mamba_expand": 2}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 3,
}
PLAIN_DECODER = {k: v for k, v in DECODER.items() if k != "head_dim"}


def _llama_like(name: str, model: str = "", **config: object) -> Row:
    model = model or f"{name.title().replace('_', '')}ForCausalLM"
    return hf(name, "decoder", model, continued, **{**DECODER, **config})


def _of(kind: str, name: str, model: str, base: dict, **config: object) -> Row:
    batch = whole if kind == "state space" else continued
    return hf(name, kind, model, batch, **{**base, **config})


ROWS = (
    _of("decoder", "gpt2", "GPT2LMHeadModel", GPT),
    _of("decoder", "gptj", "GPTJForCausalLM", GPT, rotary_dim=4),
    _of("decoder", "gpt_bigcode", "GPTBigCodeForCausalLM", GPT),
    _of("decoder", "codegen", "CodeGenForCausalLM", GPT, n_head=4, rotary_dim=4, n_ctx=64),
    _of("decoder", "openai-gpt", "OpenAIGPTLMHeadModel", GPT),
    _of("decoder", "ctrl", "CTRLLMHeadModel", GPT, dff=24),
    _of("decoder", "gpt_neo", "GPTNeoForCausalLM", SMALL, hidden_size=16, num_layers=2,
        num_heads=2, attention_types=[[["global", "local"], 1]], max_position_embeddings=64,
        intermediate_size=24, window_size=4),
    _of("decoder", "gpt_neox", "GPTNeoXForCausalLM", SIZE),
    _of("decoder", "bloom", "BloomForCausalLM", SMALL, hidden_size=16, n_layer=2, n_head=2),
    _of("decoder", "opt", "OPTForCausalLM", SIZE, ffn_dim=24, word_embed_proj_dim=16),
    _of("decoder", "opt projected", "OPTForCausalLM", SIZE, ffn_dim=24, word_embed_proj_dim=8),
    hf("opt class", "decoder", "OPTForSequenceClassification", text, **SIZE, ffn_dim=24,
       word_embed_proj_dim=16),
    _of("decoder", "falcon", "FalconForCausalLM", SIZE, new_decoder_architecture=False),
    _of("decoder", "mpt", "MptForCausalLM", SMALL, d_model=16, n_heads=2, n_layers=2,
        max_seq_len=64, expansion_ratio=2),
    _of("decoder", "xglm", "XGLMForCausalLM", SMALL, d_model=16, ffn_dim=24, num_layers=2,
        attention_heads=2, max_position_embeddings=64),
    _of("decoder", "biogpt", "BioGptForCausalLM", SIZE),
    _of("decoder", "phi", "PhiForCausalLM", PLAIN_DECODER),
    _of("decoder", "phi3", "Phi3ForCausalLM", PLAIN_DECODER),
    _of("decoder", "persimmon", "PersimmonForCausalLM", SIZE),
    _of("decoder", "stablelm", "StableLmForCausalLM", PLAIN_DECODER),
    _of("decoder", "starcoder2", "Starcoder2ForCausalLM", PLAIN_DECODER),
    _of("decoder", "modernbert-decoder", "ModernBertDecoderForCausalLM", SIZE, cls_token_id=1,
        sep_token_id=2),
    _of("decoder", "bert decoder", "BertLMHeadModel", SIZE, is_decoder=True, type_vocab_size=2),
    _of("decoder", "minicpm3", "MiniCPM3ForCausalLM", SIZE, **LATENT, num_key_value_heads=2),
    hf("llama class", "decoder", "LlamaForSequenceClassification", text, **DECODER),
    *(_llama_like(name) for name in (
        "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "granite", "cohere", "cohere2",
        "nemotron", "olmo", "olmo2", "olmo3", "glm", "glm4", "helium", "exaone4", "arcee",
        "apertus",
    )),
    _llama_like("gemma3", "Gemma3ForCausalLM", query_pre_attn_scalar=8),
    _llama_like("smollm3", "SmolLM3ForCausalLM"),
    _llama_like("diffllama", "DiffLlamaForCausalLM", num_key_value_heads=2),
    _llama_like("seed_oss", "SeedOssForCausalLM"),
    _llama_like("ernie4_5", "Ernie4_5ForCausalLM"),
    _llama_like("gemma4", "Gemma4ForCausalLM", hidden_size_per_layer_input=4, global_head_dim=8,
                vocab_size_per_layer_input=VOCABULARY,
                layer_types=["sliding_attention", "full_attention"]),
    # experts
    _of("experts", "mixtral", "MixtralForCausalLM", DECODER, **EXPERTS),
    _of("experts", "qwen2_moe", "Qwen2MoeForCausalLM", DECODER, **EXPERTS,
        shared_expert_intermediate_size=16),
    _of("experts", "qwen3_moe", "Qwen3MoeForCausalLM", DECODER, **EXPERTS),
    _of("experts", "olmoe", "OlmoeForCausalLM", PLAIN_DECODER, **EXPERTS),
    _of("experts", "gpt_oss", "GptOssForCausalLM", DECODER, **EXPERTS),
    _of("experts", "granitemoe", "GraniteMoeForCausalLM", PLAIN_DECODER, **EXPERTS),
    _of("experts", "phimoe", "PhimoeForCausalLM", PLAIN_DECODER, **EXPERTS,
        router_jitter_noise=0.0),
    _of("experts", "jetmoe", "JetMoeForCausalLM", SIZE, **EXPERTS, num_key_value_heads=2,
        kv_channels=8),
    _of("experts", "llama4", "Llama4ForCausalLM", DECODER, **EXPERTS, intermediate_size_mlp=24,
        attention_chunk_size=64, interleave_moe_layer_step=2),
    _of("experts", "deepseek_v2", "DeepseekV2ForCausalLM", SIZE, **LATENT, **ROUTED,
        num_key_value_heads=2),
    _of("experts", "deepseek_v3", "DeepseekV3ForCausalLM", SIZE, **LATENT, **ROUTED,
        num_key_value_heads=2),
    _of("experts", "glm4_moe", "Glm4MoeForCausalLM", DECODER, **ROUTED),
    _of("experts", "ernie4_5_moe", "Ernie4_5_MoeForCausalLM", PLAIN_DECODER, moe_num_experts=4,
        moe_k=2, moe_intermediate_size=16, moe_num_shared_experts=1, moe_layer_start_index=1),
    # states
    _of("state space", "mamba", "MambaForCausalLM", SIZE, state_size=4, conv_kernel=3),
    _of("state space", "mamba2", "Mamba2ForCausalLM", SIZE, state_size=4, conv_kernel=3,
        num_heads=4, head_dim=8, n_groups=1, chunk_size=4),
    _of("state space", "falcon_mamba", "FalconMambaForCausalLM", SIZE, state_size=4,
        conv_kernel=3),
    _of("state space", "rwkv", "RwkvForCausalLM", SIZE, context_length=64, rescale_every=1,
        attention_hidden_size=16),
    _of("state space", "rwkv unscaled", "RwkvForCausalLM", SIZE, context_length=64,
        rescale_every=0, attention_hidden_size=16),
    _of("state space", "recurrent_gemma", "RecurrentGemmaForCausalLM", SIZE, num_hidden_layers=2,
        block_types=["recurrent", "attention"], lru_width=16, attention_window_size=8,
        num_key_value_heads=1),
    # both
    _of("hybrid", "jamba", "JambaForCausalLM", PLAIN_DECODER, **MAMBA, **EXPERTS,
        attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1,
        use_mamba_kernels=False, mamba_dt_rank=2),
    _of("hybrid", "bamba", "BambaForCausalLM", PLAIN_DECODER, **MAMBA, mamba_n_heads=4,
        mamba_d_head=8, mamba_chunk_size=4, attn_layer_indices=[1]),
    _of("hybrid", "qwen3_next", "Qwen3NextForCausalLM", DECODER, **EXPERTS, **LINEAR,
        shared_expert_intermediate_size=16, layer_types=["linear_attention", "full_attention"]),
    _of("hybrid", "lfm2", "Lfm2ForCausalLM", PLAIN_DECODER, full_attn_idxs=[1],
        block_auto_adjust_ff_dim=False, conv_L_cache=3, layer_types=["conv", "full_attention"]),
    _of("hybrid", "nemotron_h", "NemotronHForCausalLM", DECODER, ssm_state_size=4,
        mamba_num_heads=4, mamba_head_dim=8, n_groups=1, conv_kernel=3, chunk_size=4,
        layers_block_type=["mamba", "attention", "moe"], use_mamba_kernels=False,
        n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        moe_shared_expert_intermediate_size=16),
    _of("hybrid", "falcon_h1", "FalconH1ForCausalLM", DECODER, **MAMBA, mamba_d_ssm=32,
        mamba_n_heads=4, mamba_d_head=8, mamba_chunk_size=4),
)  # fmt: skip
