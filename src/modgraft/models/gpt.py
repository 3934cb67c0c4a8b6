"""A GPT on one page: a decoder of text, whose parts are the sites where modules act."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modgraft.core.family import Family
from modgraft.models.rotary import angles, frequencies, rotated

Positions = Literal["learned", "rotary", "axial", "polar"]
Norm = Literal["layer", "rms"]
Activation = Literal["gelu", "gelu_tanh", "swiglu", "relu2"]


class GPTConfig(PreTrainedConfig):
    """What a GPT is made of.

    Attributes:
        vocab_size: the number of tokens.
        max_position_embeddings: the number of positions that it is made for.
        hidden_size: the width d.
        num_hidden_layers: the number of blocks.
        num_attention_heads: the number of heads.
        num_key_value_heads: the number of heads of keys and values, each shared by as many heads of
            queries; 0: as many as heads.
        head_dim: the width of a head; 0: d / heads.
        intermediate_size: the width of the feed-forward layers; 0: 4 d.
        positions: ``"learned"``, one vector a position, or rotary ones: in one dimension, or in the
            two of ``grid``, ``"axial"`` or ``"polar"`` (:mod:`modgraft.models.rotary`).
        grid: the rows and columns that the tokens fill one after another, in two dimensions.
        rope_theta: the base of the rotary frequencies.
        norm: ``"layer"`` or ``"rms"``.
        norm_eps: what keeps them from dividing by 0.
        activation: ``"gelu"``, ``"gelu_tanh"``, ``"relu2"`` (max(0, x)²), or ``"swiglu"``, which
            has a gate beside.
        bias: whether linear layers have biases.
        dropout: how much is dropped in the three places that have it: of the embedding, of the
            attention's weights, and of each branch before it is added.
        tie_word_embeddings: whether the head is the embedding.
        zero_start: whether both projections of each block that write to the residual start at 0, so
            that each block is the identity at first.
        ngram_rows: the rows of a table for each longer n-gram that ends at a token, which are added
            to its embedding: ``(4096, 65536)`` are pairs and triples. What does not fit is hashed.
        initializer_range: the standard deviation of the weights at first.
    """

    model_type = "modgraft_gpt"
    keys_to_ignore_at_inference: ClassVar = ["past_key_values"]

    vocab_size: int = 65
    max_position_embeddings: int = 64
    hidden_size: int = 128
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 0
    head_dim: int = 0
    intermediate_size: int = 0
    positions: Positions = "learned"
    grid: tuple[int, int] | None = None
    rope_theta: float = 10000.0
    norm: Norm = "layer"
    norm_eps: float = 1e-5
    activation: Activation = "gelu"
    bias: bool = True
    dropout: float = 0.0
    tie_word_embeddings: bool = True
    zero_start: bool = False
    ngram_rows: tuple[int, ...] = ()
    initializer_range: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        heads = self.num_attention_heads
        self.num_key_value_heads = self.num_key_value_heads or heads
        self.head_dim = self.head_dim or self.hidden_size // heads
        self.intermediate_size = self.intermediate_size or 4 * self.hidden_size
        self.ngram_rows = tuple(self.ngram_rows)
        self.grid = (self.grid[0], self.grid[1]) if self.grid else None  # json has lists
        super().__post_init__(**kwargs)
        self._check()

    def _check(self) -> None:
        heads, shared = self.num_attention_heads, self.num_key_value_heads
        for name, known in (
            ("positions", Positions),
            ("norm", Norm),
            ("activation", Activation),
        ):
            if (value := getattr(self, name)) not in known.__args__:
                raise ValueError(f"GPTConfig: {name}={value!r} is none of {known.__args__}")
        if self.head_dim * heads < self.hidden_size and self.hidden_size % heads:
            raise ValueError(
                f"GPTConfig: hidden_size={self.hidden_size} is no multiple of {heads} heads"
            )
        if heads % shared:
            raise ValueError(f"GPTConfig: {shared} heads of keys cannot be shared by {heads} heads")
        if self.positions in ("axial", "polar") and self.grid is None:
            raise ValueError(f"GPTConfig: positions={self.positions!r} need a grid=(rows, columns)")


def norm(config: GPTConfig) -> nn.Module:
    """Make (x − mean)/std · w + b, or x/rms · w."""
    if config.norm == "rms":
        return nn.RMSNorm(config.hidden_size, config.norm_eps)
    return nn.LayerNorm(config.hidden_size, config.norm_eps, bias=config.bias)


class Output(nn.Linear):
    """W x + b, added to the residual path: with 2 L of them in all, each is smaller at first."""


class Attention(nn.Module):
    """softmax(Q Kᵀ / √d_h + M) V Wₒ, where M hides from a token what comes after it."""

    is_causal = True

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        d, width = config.hidden_size, config.head_dim
        self.config, self.layer, self.width = config, layer, width
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.query = nn.Linear(d, config.num_attention_heads * width, bias=config.bias)
        self.key = nn.Linear(d, config.num_key_value_heads * width, bias=config.bias)
        self.value = nn.Linear(d, config.num_key_value_heads * width, bias=config.bias)
        self.output = Output(config.num_attention_heads * width, d, bias=config.bias)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        turn: tuple[Tensor, Tensor] | None,
        cache: Cache | None,
    ) -> Tensor:
        """Attend from each token of ``x`` ``[B, n, d]`` to itself and what came before."""
        apart = (*x.shape[:2], -1, self.width)
        q = self.query(x).view(apart).transpose(1, 2)  # [B, h, n, d_h]
        k = self.key(x).view(apart).transpose(1, 2)  # [B, h_kv, n, d_h]
        v = self.value(x).view(apart).transpose(1, 2)
        if turn is not None:
            q, k = rotated(q, turn), rotated(k, turn)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)  # [B, h_kv, past + n, d_h]
        # transformers' registry of attention functions, where a prefix comes before the keys
        attend: Any = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation or "sdpa", sdpa_attention_forward
        )
        dropout = self.config.dropout if self.training else 0.0
        y, _ = attend(self, q, k, v, mask, dropout=dropout, scaling=self.width**-0.5)
        return self.output(y.reshape(*x.shape[:2], -1))  # [B, n, h d_h] → [B, n, d]


class FeedForward(nn.Module):
    """W₂ σ(W₁ x), or W₂ (silu(W_g x) ⊙ W₁ x)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        d, inner = config.hidden_size, config.intermediate_size
        self.activation = config.activation
        if self.activation == "swiglu":
            self.gate = nn.Linear(d, inner, bias=config.bias)
        self.up = nn.Linear(d, inner, bias=config.bias)
        self.down = Output(inner, d, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        match self.activation:
            case "swiglu":
                return self.down(F.silu(self.gate(x)) * self.up(x))
            case "relu2":
                return self.down(F.relu(self.up(x)).square())
            case "gelu_tanh":
                return self.down(F.gelu(self.up(x), approximate="tanh"))
            case _:
                return self.down(F.gelu(self.up(x)))


class Block(GradientCheckpointingLayer):
    """x + Attention(Norm x), then x + FeedForward(Norm x)."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm, self.attention = norm(config), Attention(config, layer)
        self.feedforward_norm, self.feedforward = norm(config), FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        turn: tuple[Tensor, Tensor] | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Return ``[B, n, d]`` of ``[B, n, d]``."""
        x = x + self.dropout(self.attention(self.attention_norm(x), mask, turn, cache))
        return x + self.dropout(self.feedforward(self.feedforward_norm(x)))


class Ngrams(nn.Module):
    """Σ_n T_n[h(x_{t−n+1}, …, x_t)]: a vector for the pair that ends at a token, the triple, …

    A table with a row for every n-gram (V^n of them) is read at the n-gram itself, a smaller one at
    a hash of it. Where a text begins, what would be before it is token −1, and so is padding and
    what is no token of the vocabulary. Gradients are sparse: a step moves the rows of its batch, so
    that its cost does not grow with the table.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.vocab = config.vocab_size + 1  # token −1 beside them
        self.tables = nn.ModuleList(
            nn.Embedding(rows, config.hidden_size, sparse=True) for rows in config.ngram_rows
        )

    def forward(self, ids: Tensor, places: Tensor) -> Tensor:
        """Return ``[B, n, d]`` for the last n of some tokens.

        Args:
            ids: int64 ``[B, past + n]``; −1 is none.
            places: int64 ``[B or 1, n]``, how many tokens of its text are before each of the n.
        """
        new = places.shape[1]
        ids = F.pad(ids + 1, (len(self.tables), 0))
        own = ids[:, -new:]
        code, total = own, torch.zeros((), device=ids.device)
        for back, table in enumerate(self.tables, 1):
            before = ids[:, ids.shape[1] - new - back : ids.shape[1] - back]
            code = code + before.where(places >= back, 0) * self.vocab**back
            rows = table.num_embeddings
            exact = self.vocab ** (back + 1) <= rows
            # Knuth's multiplicative hash spreads codes that differ in one token
            total = total + table(code if exact else (code * 2654435761 % 2**32) % rows)
        return total.where((own > 0)[..., None], 0.0)


class Ids(DynamicLayer):
    """The ids that a cache was made of, as a layer more of it, so that they follow its beams."""

    is_compileable = True  # it changes nothing of how a cache of one size is read


class GPT(PreTrainedModel, GenerationMixin):
    """E x + positions → blocks → norm → logits: a text, and what comes next at each place.

    It is written for modules: each part that one may act at is a layer of its own, and
    :attr:`family` says which part has which role. ``generate`` is transformers' (greedy, sampled,
    beams, streamers, with a cache of keys and values). GPT-2 and Llama models become one and are
    made of one again by :mod:`modgraft.models.pretrained`.
    """

    family = Family(
        (GPTConfig.model_type,),
        block="blocks.*",
        attention="attention", query="query", key="key", value="value", output="output",
        feedforward="feedforward", up="feedforward.{gate,up}", down="feedforward.down",
        embedding="embedding", decoder="norm",
    )  # fmt: skip

    config: GPTConfig
    config_class = GPTConfig
    base_model_prefix = ""
    _supports_sdpa = True
    supports_gradient_checkpointing = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _no_split_modules = ["Block"]  # noqa: RUF012
    _tied_weights_keys = {"head.weight": "embedding.weight"}  # noqa: RUF012

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.ngram_rows:
            self.ngrams = Ngrams(config)
        if config.positions == "learned":
            self.positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        else:
            self.inv_freq = nn.Buffer(self._frequencies(), persistent=False)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = norm(config)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, Output):
            std = (
                0.0 if self.config.zero_start else std / (2 * self.config.num_hidden_layers) ** 0.5
            )
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if module is self and self.config.positions != "learned":  # made anew by from_pretrained
            self.inv_freq.copy_(self._frequencies())

    def _frequencies(self) -> Tensor:
        config = self.config
        return frequencies(config.positions, config.head_dim, config.rope_theta)

    def get_input_embeddings(self) -> nn.Module:  # noqa: D102
        return self.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:  # noqa: D102
        self.embedding = value

    def get_output_embeddings(self) -> nn.Module:  # noqa: D102
        return self.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:  # noqa: D102
        self.head = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        targets: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast:
        """Predict the token after each.

        Args:
            input_ids: int64 ``[B, n]``.
            attention_mask: ``[B, past + n]``, 0 at padding.
            position_ids: int64 ``[B or 1, n]``; None: 0, 1, … after what the cache holds.
            past_key_values: keys and values of what came before, which grows.
            inputs_embeds: ``[B, n, d]`` instead of the ids.
            labels: int64 ``[B, n]``, the tokens themselves, −100 where none is to be predicted.
            targets: int64 ``[B, n]``, what comes after each token, instead of ``labels``; −100
                where that is not to be predicted.
            use_cache: whether to return such a cache; None: in evaluation, as the config says.
            logits_to_keep: how many of the last positions, or which, get logits; 0: all.
            output_hidden_states: whether to return the input of each block, and the last norm's
                output.
            return_dict: leave it; a tuple is ``.to_tuple()`` of what is returned.

        Returns:
            The logits ``[B, n, vocab_size]``, with the mean cross-entropy if there are labels.

        Raises:
            ValueError: for ids and embeddings both, or neither; for more positions than learned;
                on a CPU, for a token that is none of the vocabulary.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("GPT: give either input_ids or inputs_embeds")
        x = self._embedded(input_ids) if inputs_embeds is None else inputs_embeds
        cache = past_key_values
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if cache is None and use_cache:
            cache = DynamicCache()
        past = cache.get_seq_length() if cache is not None else 0
        if position_ids is None:
            position_ids = torch.arange(past, past + x.shape[1], device=x.device)[None]
        self._check_room(past + x.shape[1], position_ids)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x,
            attention_mask=attention_mask,
            past_key_values=cache,
            position_ids=position_ids,
        )
        if self.config.ngram_rows:
            x = x + self._ngrams(input_ids, attention_mask, position_ids, cache)
        turn = None
        if self.config.positions == "learned":
            x = x + self.positions(position_ids)
        else:
            turn = self._turn(position_ids, x.dtype)
        x = self.dropout(x)
        states = []
        for block in self.blocks:
            states.append(x)
            x = block(x, mask, turn, cache)
        x = self.norm(x)
        if not isinstance(logits_to_keep, int):
            logits = self.head(x[:, logits_to_keep])
        else:
            logits = self.head(x[:, -logits_to_keep:])  # -0 is the first
        if labels is not None:
            targets = F.pad(labels[:, 1:], (0, 1), value=-100)
        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=cache if use_cache else None,
            hidden_states=(*states, x) if output_hidden_states else None,
        )

    def _embedded(self, ids: Tensor | None) -> Tensor:
        try:
            return self.embedding(ids)
        except IndexError as error:
            raise ValueError(
                f"GPT: token {int(ids.max())} of a vocabulary of {self.config.vocab_size}; the "  # type: ignore[union-attr]
                f"text was made by another tokenizer than this model was: make its tokens with "
                f"the model's own, or a model of its tokenizer's vocab_size"
            ) from error

    def _check_room(self, length: int, position_ids: Tensor) -> None:
        """Refuse positions that there are none for; padding before a text takes none."""
        config = self.config
        if config.positions == "rotary":
            return
        rows, columns = config.grid or (1, config.max_position_embeddings)
        room = rows * columns
        if length > room and int(position_ids.max()) >= room:
            raise ValueError(
                f"GPT: position {int(position_ids.max())} of a model with {room} "
                f"{config.positions} positions; give it a shorter text, or its last {room} tokens"
            )

    def _turn(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return cosine and sine ``[B or 1, 1, n, d_h/2]``."""
        config = self.config
        by = angles(config.positions, position_ids, self.inv_freq, config.grid)[:, None]
        return by.cos().to(dtype), by.sin().to(dtype)

    def _ngrams(
        self, ids: Tensor | None, mask: Tensor | None, places: Tensor, cache: Cache | None
    ) -> Tensor:
        """Return what the n-grams add to the ids ``[B, n]`` at these places of their texts."""
        if ids is None:
            raise ValueError("GPT: n-grams are of ids; give input_ids, not inputs_embeds")
        known = (ids >= 0) & (ids < self.config.vocab_size)  # a prompt's tokens are none
        if mask is not None and mask.dim() == 2:
            known &= mask[:, -ids.shape[1] :] != 0
        elif mask is not None:  # [B, 1, n, keys], as generate makes one for a cache of one size
            at = torch.arange(ids.shape[1], device=ids.device)
            own = mask[:, 0, at, at + (0 if cache is None else cache.get_seq_length())]
            known &= own if own.dtype == torch.bool else own == 0
        ids = ids.where(known, -1)
        if cache is not None:
            if len(cache.layers) == len(self.blocks):
                cache.layers.append(Ids())
            kept = ids[:, None, :, None]  # [B, 1, n, 1]
            ids = cache.update(kept, kept, len(self.blocks))[0][:, 0, :, 0]  # [B, past + n]
        return self.ngrams(ids, places)
