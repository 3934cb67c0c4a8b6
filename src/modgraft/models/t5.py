"""A T5 on one page: an encoder and a decoder, whose parts are the sites where modules act."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modgraft.core.family import Family

Activation = Literal["relu", "geglu"]


class T5Config(PreTrainedConfig):
    """What a T5 is made of.

    Attributes:
        vocab_size: the number of tokens.
        hidden_size: the width d.
        head_dim: the width of a head; 0: d / heads.
        intermediate_size: the width of the feed-forward layers; 0: 2 d.
        num_encoder_layers: the number of blocks of the encoder.
        num_hidden_layers: the number of blocks of the decoder; 0: as many.
        num_attention_heads: the number of heads.
        buckets: the number of distances that the relative bias tells apart.
        max_distance: the distance from which on all are one.
        activation: ``"relu"`` (version 1.0) or ``"geglu"``, gelu with a gate beside (version 1.1).
        dropout: how much is dropped of the embeddings, of the attention's weights, within the
            feed-forward layers, of each branch before it is added, and of the output.
        norm_eps: what keeps the norms from dividing by 0.
        tie_word_embeddings: whether the head is the embedding.
        scale_output: whether the head reads its input times d^(−1/2); None: as if tied (1.0).
    """

    model_type = "modgraft_t5"
    keys_to_ignore_at_inference: ClassVar = ["past_key_values"]

    vocab_size: int = 32128
    hidden_size: int = 128
    head_dim: int = 0
    intermediate_size: int = 0
    num_encoder_layers: int = 2
    num_hidden_layers: int = 0
    num_attention_heads: int = 4
    buckets: int = 32
    max_distance: int = 128
    activation: Activation = "relu"
    dropout: float = 0.0
    norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    scale_output: bool | None = None
    use_cache: bool = True
    is_encoder_decoder: bool = True
    pad_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1
    decoder_start_token_id: int | None = 0

    def __post_init__(self, **kwargs: Any) -> None:
        heads = self.num_attention_heads
        if self.activation not in Activation.__args__:  # type: ignore[attr-defined]
            raise ValueError(f"T5Config: activation={self.activation!r} is none of relu, geglu")
        if not self.head_dim and self.hidden_size % heads:
            raise ValueError(
                f"T5Config: hidden_size={self.hidden_size} is no multiple of {heads} heads"
            )
        self.head_dim = self.head_dim or self.hidden_size // heads
        self.intermediate_size = self.intermediate_size or 2 * self.hidden_size
        self.num_hidden_layers = self.num_hidden_layers or self.num_encoder_layers
        if self.scale_output is None:
            self.scale_output = self.tie_word_embeddings
        super().__post_init__(**kwargs)


class RelativeBias(nn.Module):
    """B[bucket(j − i)], one number a head, added to the score of query i and key j.

    Half of the buckets are single distances, the others grow like powers; in the encoder half of
    all are for keys that come later.
    """

    def __init__(self, config: T5Config, *, two_sided: bool) -> None:
        super().__init__()
        self.config, self.two_sided = config, two_sided
        self.table = nn.Embedding(config.buckets, config.num_attention_heads)

    def bucket(self, distance: Tensor) -> Tensor:
        """Return the row of the table for each distance j − i, int64 of one shape."""
        side = self.config.buckets // (2 if self.two_sided else 1)
        later = (distance > 0).long() * side if self.two_sided else 0
        far = distance.abs() if self.two_sided else (-distance).clamp(min=0)
        single = side // 2
        power = torch.log(far.float() / single) / math.log(self.config.max_distance / single)
        grown = (single + (power * (side - single)).long()).clamp(max=side - 1)
        return later + torch.where(far < single, far, grown)

    def forward(self, queries: int, keys: int) -> Tensor:
        """Return ``[1, h, queries, keys]`` for the last ``queries`` of ``keys`` positions."""
        place = torch.arange(keys, device=self.table.weight.device)
        distance = place[None, :] - place[keys - queries :, None]
        return self.table(self.bucket(distance)).permute(2, 0, 1)[None]


class Attention(nn.Module):
    """softmax(Q Kᵀ + B) V Wₒ: without 1/√d_h, which is in T5's initial weights."""

    def __init__(self, config: T5Config, layer: int, *, causal: bool = False) -> None:
        super().__init__()
        d, inner = config.hidden_size, config.num_attention_heads * config.head_dim
        self.config, self.layer, self.is_causal = config, layer, causal
        self.query, self.key, self.value = (nn.Linear(d, inner, bias=False) for _ in range(3))
        self.output = nn.Linear(inner, d, bias=False)

    def _apart(self, x: Tensor) -> Tensor:
        """``[B, n, h d_h]`` → ``[B, h, n, d_h]``."""
        return x.view(*x.shape[:2], -1, self.config.head_dim).transpose(1, 2)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        bias: RelativeBias | None = None,
        seen: Tensor | None = None,
        cache: EncoderDecoderCache | None = None,
    ) -> Tensor:
        """Attend from ``x`` ``[B, n, d]`` to itself, or to ``seen`` ``[B, m, d]``."""
        q = self._apart(self.query(x))
        if seen is not None and cache is not None and cache.is_updated.get(self.layer):
            kept: Any = cache.cross_attention_cache.layers[self.layer]
            k, v = kept.keys, kept.values
        else:
            source = x if seen is None else seen
            k, v = self._apart(self.key(source)), self._apart(self.value(source))
            if cache is not None and seen is None:
                k, v = cache.self_attention_cache.update(k, v, self.layer)
            elif cache is not None:
                k, v = cache.cross_attention_cache.update(k, v, self.layer)
                cache.is_updated[self.layer] = True
        # transformers' registry of attention functions, where a prefix comes before the keys
        attend: Any = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation or "sdpa", sdpa_attention_forward
        )
        more = {} if bias is None else {"position_bias": bias(q.shape[2], k.shape[2])}
        dropout = self.config.dropout if self.training else 0.0
        y, _ = attend(self, q, k, v, mask, dropout=dropout, scaling=1.0, **more)
        return self.output(y.reshape(*x.shape[:2], -1))


class FeedForward(nn.Module):
    """W₂ relu(W₁ x), or W₂ (gelu(W_g x) ⊙ W₁ x)."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        d, inner = config.hidden_size, config.intermediate_size
        self.gate = nn.Linear(d, inner, bias=False) if config.activation == "geglu" else None
        self.up, self.down = nn.Linear(d, inner, bias=False), nn.Linear(inner, d, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        if self.gate is None:
            return self.down(self.dropout(F.relu(self.up(x))))
        return self.down(self.dropout(F.gelu(self.gate(x), approximate="tanh") * self.up(x)))


class Block(GradientCheckpointingLayer):
    """x + Attention(Norm x);  in the decoder x + Cross(Norm x, seen);  x + FeedForward(Norm x)."""

    def __init__(self, config: T5Config, layer: int, *, decoder: bool) -> None:
        super().__init__()
        d, eps = config.hidden_size, config.norm_eps
        self.attention_norm = nn.RMSNorm(d, eps)
        self.attention = Attention(config, layer, causal=decoder)
        if decoder:
            self.cross_norm, self.cross = nn.RMSNorm(d, eps), Attention(config, layer)
        self.feedforward_norm, self.feedforward = nn.RMSNorm(d, eps), FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        bias: RelativeBias,
        seen: Tensor | None = None,
        seen_mask: Tensor | None = None,
        cache: EncoderDecoderCache | None = None,
    ) -> Tensor:
        """Return ``[B, n, d]`` of ``[B, n, d]``."""
        x = x + self.dropout(self.attention(self.attention_norm(x), mask, bias, cache=cache))
        if seen is not None:
            across = self.cross(self.cross_norm(x), seen_mask, seen=seen, cache=cache)
            x = x + self.dropout(across)
        return x + self.dropout(self.feedforward(self.feedforward_norm(x)))


class Stack(nn.Module):
    """Blocks with one relative bias, then a norm: the encoder, or the decoder."""

    main_input_name = "input_ids"

    def __init__(self, config: T5Config, *, decoder: bool) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.bias = RelativeBias(config, two_sided=not decoder)
        count = config.num_hidden_layers if decoder else config.num_encoder_layers
        self.blocks = nn.ModuleList(Block(config, i, decoder=decoder) for i in range(count))
        self.norm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)


class Encoder(Stack):
    """Reads a text."""

    def __init__(self, config: T5Config) -> None:
        super().__init__(config, decoder=False)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutput:
        """Return ``[B, n, d]`` for ids ``[B, n]``; see :meth:`T5.forward`."""
        if output_attentions:
            raise ValueError("T5: it returns no attentions; observe them with a hook")
        x = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=x, attention_mask=attention_mask
        )
        x, states = self.dropout(x), []
        for block in self.blocks:
            states.append(x)
            x = block(x, mask, self.bias)
        x = self.dropout(self.norm(x))
        return BaseModelOutput(x, (*states, x) if output_hidden_states else None)


class Decoder(Stack):
    """Writes a text, and sees the encoder's."""

    def __init__(self, config: T5Config) -> None:
        super().__init__(config, decoder=True)

    def forward(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        inputs_embeds: Tensor | None,
        seen: Tensor,
        seen_mask: Tensor | None,
        cache: EncoderDecoderCache | None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Return ``[B, n, d]`` for ids ``[B, n]``, and the input of each block."""
        x = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        own = None if cache is None else cache.self_attention_cache
        mask = create_causal_mask(
            config=self.config, inputs_embeds=x, attention_mask=attention_mask, past_key_values=own
        )
        seen_mask = create_bidirectional_mask(
            config=self.config,
            inputs_embeds=x,
            attention_mask=seen_mask,
            encoder_hidden_states=seen,
        )
        x, states = self.dropout(x), []
        for block in self.blocks:
            states.append(x)
            x = block(x, mask, self.bias, seen, seen_mask, cache)
        return self.dropout(self.norm(x)), states


class T5(PreTrainedModel, GenerationMixin):
    """Encoder and decoder of Raffel et al. 2020 (arXiv:1910.10683), version 1.0 or 1.1.

    It is written for modules: each part that one may act at is a layer of its own, and
    :attr:`family` says which part has which role. ``generate`` is transformers'. A transformers T5
    becomes one, and is made of one again, by :mod:`modgraft.models.pretrained`.
    """

    family = Family(
        (T5Config.model_type,),
        block="{encoder,decoder}.blocks.*",
        attention="attention", cross="cross",
        query="query", key="key", value="value", output="output",
        feedforward="feedforward", up="feedforward.{gate,up}", down="feedforward.down",
        embedding="{encoder,decoder}.embedding", encoder="encoder.norm", decoder="decoder.norm",
    )  # fmt: skip

    config: T5Config  # type: ignore[assignment]
    shared: nn.Embedding
    head: nn.Module
    config_class = T5Config
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _no_split_modules = ["Block"]  # noqa: RUF012
    _tied_weights_keys = {  # noqa: RUF012
        "encoder.embedding.weight": "shared.weight",
        "decoder.embedding.weight": "shared.weight",
        "head.weight": "shared.weight",
    }

    def __init__(self, config: T5Config) -> None:
        super().__init__(config)
        self.shared = nn.Embedding(config.vocab_size, config.hidden_size)
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        d = self.config.hidden_size
        if isinstance(module, Attention):
            width, inner = self.config.head_dim, module.output.in_features
            nn.init.normal_(module.query.weight, std=(d * width) ** -0.5)
            nn.init.normal_(module.key.weight, std=d**-0.5)
            nn.init.normal_(module.value.weight, std=d**-0.5)
            nn.init.normal_(module.output.weight, std=inner**-0.5)
        elif isinstance(module, FeedForward):
            for layer in (module.gate, module.up, module.down):
                if layer is not None:
                    nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        elif isinstance(module, RelativeBias):
            nn.init.normal_(module.table.weight, std=d**-0.5)
        elif module is self:
            nn.init.normal_(self.shared.weight)
            if not self.config.tie_word_embeddings:
                nn.init.normal_(self.get_parameter("head.weight"))

    def get_encoder(self, modality: str | None = None) -> Encoder:  # noqa: D102
        return self.encoder

    def get_decoder(self) -> Decoder:  # noqa: D102
        return self.decoder

    def get_input_embeddings(self) -> nn.Module:  # noqa: D102
        return self.shared

    def set_input_embeddings(self, value: nn.Module) -> None:  # noqa: D102
        self.shared = self.encoder.embedding = self.decoder.embedding = value  # type: ignore[assignment]

    def get_output_embeddings(self) -> nn.Module:  # noqa: D102
        return self.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:  # noqa: D102
        self.head = new_embeddings

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """Return what the decoder reads to write ``labels`` ``[B, n]``: the start, then all but the
        last."""
        start, pad = self.config.decoder_start_token_id, self.config.pad_token_id
        if start is None or pad is None:
            raise ValueError("T5: the config needs a decoder_start_token_id and a pad_token_id")
        read = F.pad(labels[:, :-1], (1, 0), value=start)
        return read.masked_fill(read == -100, pad)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple[Tensor, ...] | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Seq2SeqLMOutput:
        """Predict each token of a text that is written, from those before it and a text read.

        Args:
            input_ids: int64 ``[B, m]``, the text read.
            attention_mask: ``[B, m]``, 0 at its padding.
            decoder_input_ids: int64 ``[B, n]``, the text written so far; None: the labels, one
                later.
            decoder_attention_mask: ``[B, past + n]``, 0 at padding.
            encoder_outputs: what the encoder gave, instead of a text read.
            past_key_values: keys and values of what came before, which grows.
            inputs_embeds, decoder_inputs_embeds: ``[B, m, d]`` and ``[B, n, d]`` instead of ids.
            labels: int64 ``[B, n]``, the text to write, −100 where nothing is to be predicted.
            use_cache: whether to return such a cache; None: in evaluation, as the config says.
            output_hidden_states: whether to return the input of each block, and the last norm's
                output.
            return_dict: leave it; a tuple is ``.to_tuple()`` of what is returned.

        Returns:
            The logits ``[B, n, vocab_size]``, with the mean cross-entropy if there are labels.

        Raises:
            ValueError: for ids and embeddings both, or neither.
        """
        if encoder_outputs is None and (input_ids is None) == (inputs_embeds is None):
            raise ValueError("T5: give either input_ids or inputs_embeds")
        encoded: Any = encoder_outputs or self.encoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            output_hidden_states=output_hidden_states,
        )
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            if labels is None:
                raise ValueError("T5: give labels, or decoder_input_ids")
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and labels is None
        cache = past_key_values
        if cache is None and use_cache:
            cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        x, states = self.decoder(
            decoder_input_ids,
            decoder_attention_mask,
            decoder_inputs_embeds,
            encoded[0],
            attention_mask,
            cache,
        )
        logits = self.head(x * self.config.hidden_size**-0.5 if self.config.scale_output else x)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        return Seq2SeqLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=cache if use_cache else None,
            decoder_hidden_states=(*states, x) if output_hidden_states else None,
            encoder_last_hidden_state=encoded[0],
            encoder_hidden_states=getattr(encoded, "hidden_states", None),
        )
