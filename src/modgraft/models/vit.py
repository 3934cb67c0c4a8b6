"""A vision transformer on one page, whose parts are the sites where modules act."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modgraft.core.family import Family
from modgraft.models.rotary import angles, frequencies, rotated

Positions = Literal["learned", "axial", "polar"]


class ViTConfig(PreTrainedConfig):
    """What a vision transformer is made of.

    Attributes:
        image_size: the height and width of a picture, in pixels.
        patch_size: the height and width of a patch.
        num_channels: the number of colours.
        hidden_size: the width d.
        num_hidden_layers: the number of blocks.
        num_attention_heads: the number of heads, each d / heads wide.
        intermediate_size: the width of the feed-forward layers; 0: 4 d.
        positions: ``"learned"``, one vector for each patch in raster order, or rotary ones in two
            dimensions, ``"axial"`` or ``"polar"`` (:mod:`modgraft.models.rotary`), which the class
            token has none of.
        rope_theta: the base of the rotary frequencies.
        dropout: how much is dropped of the embedding, of the attention's weights, and of each
            branch before it is added.
        norm_eps: what keeps the norms from dividing by 0.
        num_labels: the number of classes.
        initializer_range: the standard deviation of the weights at first.
    """

    model_type = "modgraft_vit"

    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 3
    hidden_size: int = 128
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    intermediate_size: int = 0
    positions: Positions = "learned"
    rope_theta: float = 100.0
    dropout: float = 0.0
    norm_eps: float = 1e-12
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        self.intermediate_size = self.intermediate_size or 4 * self.hidden_size
        super().__post_init__(**kwargs)
        if self.positions not in Positions.__args__:  # type: ignore[attr-defined]
            raise ValueError(
                f"ViTConfig: positions={self.positions!r} is none of learned, axial, polar"
            )
        for name, parts in (("hidden_size", "num_attention_heads"), ("image_size", "patch_size")):
            if getattr(self, name) % getattr(self, parts):
                raise ValueError(
                    f"ViTConfig: {name}={getattr(self, name)} is no multiple of "
                    f"{parts}={getattr(self, parts)}"
                )

    @property
    def side(self) -> int:
        """The number of patches in a row."""
        return self.image_size // self.patch_size


class Attention(nn.Module):
    """softmax(Q Kᵀ / √d_h) V Wₒ."""

    is_causal = False

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.config, self.width = config, d // config.num_attention_heads
        self.query, self.key, self.value = (nn.Linear(d, d) for _ in range(3))
        self.output = nn.Linear(d, d)

    def forward(self, x: Tensor, mask: Tensor | None, turn: tuple[Tensor, Tensor] | None) -> Tensor:
        """Attend from each token of ``x`` ``[B, 1 + n, d]`` to all, or to those of the mask."""
        apart = (*x.shape[:2], -1, self.width)
        q = self.query(x).view(apart).transpose(1, 2)  # [B, h, 1 + n, d_h]
        k = self.key(x).view(apart).transpose(1, 2)
        v = self.value(x).view(apart).transpose(1, 2)
        if turn is not None:
            q, k = rotated(q, turn), rotated(k, turn)
        # transformers' registry of attention functions, where a prefix comes before the keys
        attend: Any = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation or "sdpa", sdpa_attention_forward
        )
        dropout = self.config.dropout if self.training else 0.0
        y, _ = attend(self, q, k, v, mask, dropout=dropout, scaling=self.width**-0.5)
        return self.output(y.reshape(x.shape))


class FeedForward(nn.Module):
    """W₂ gelu(W₁ x)."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.down(F.gelu(self.up(x)))


class Block(GradientCheckpointingLayer):
    """x + Attention(Norm x), then x + FeedForward(Norm x)."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        d, eps = config.hidden_size, config.norm_eps
        self.attention_norm, self.attention = nn.LayerNorm(d, eps), Attention(config)
        self.feedforward_norm, self.feedforward = nn.LayerNorm(d, eps), FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        turn: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Return ``[B, 1 + n, d]`` of ``[B, 1 + n, d]``."""
        x = x + self.dropout(self.attention(self.attention_norm(x), mask, turn))
        return x + self.dropout(self.feedforward(self.feedforward_norm(x)))


class Embeddings(nn.Module):
    """[c; W patch₁; W patch₂; …] + positions: a class token, then the patches in raster order."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        d, patch = config.hidden_size, config.patch_size
        self.projection = nn.Conv2d(config.num_channels, d, patch, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, d))
        self.positions = None
        if config.positions == "learned":
            self.positions = nn.Parameter(torch.zeros(1, 1 + config.side**2, d))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return ``[B, 1 + n, d]`` of ``[B, channels, height, width]``."""
        patches = self.projection(pixel_values).flatten(2).mT  # [B, d, H, W] → [B, n, d]
        x = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], 1)
        return self.dropout(x if self.positions is None else x + self.positions)


class ViT(PreTrainedModel):
    """[class; patches W] + positions → blocks → norm → classes, from the first token.

    Dosovitskiy et al. 2021 (arXiv:2010.11929). It is written for modules: each part that one may
    act at is a layer of its own, and :attr:`family` says which part has which role. A transformers
    ViT becomes one, and is made of one again, by :mod:`modgraft.models.pretrained`.
    """

    family = Family(
        (ViTConfig.model_type,),
        block="blocks.*",
        attention="attention", query="query", key="key", value="value", output="output",
        feedforward="feedforward", up="feedforward.up", down="feedforward.down",
        embedding="embeddings", encoder="layernorm",
        sense="vision",
    )  # fmt: skip

    config: ViTConfig
    config_class = ViTConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _no_split_modules = ["Block"]  # noqa: RUF012

    def __init__(self, config: ViTConfig) -> None:
        super().__init__(config)
        self.embeddings = Embeddings(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.layernorm = nn.LayerNorm(config.hidden_size, config.norm_eps)
        self.head = nn.Linear(config.hidden_size, config.num_labels)  # type: ignore[arg-type]
        if config.positions != "learned":
            self.frequencies = nn.Buffer(self._frequencies(), persistent=False)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.trunc_normal_(module.weight, std=std)
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        elif isinstance(module, Embeddings):
            nn.init.trunc_normal_(module.cls_token, std=std)
            if module.positions is not None:
                nn.init.trunc_normal_(module.positions, std=std)
        elif module is self and self.config.positions != "learned":  # made by from_pretrained
            self.frequencies.copy_(self._frequencies())

    def _frequencies(self) -> Tensor:
        config = self.config
        width = config.hidden_size // config.num_attention_heads
        return frequencies(config.positions, width, config.rope_theta)

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> ImageClassifierOutput:
        """Classify pictures.

        Args:
            pixel_values: float ``[B, channels, height, width]``.
            labels: int64 ``[B]``, their classes.
            attention_mask: ``[B, 1 + n]``, 0 at tokens that are not seen.
            output_hidden_states: whether to return the input of each block, and the last norm's
                output.
            return_dict: leave it; a tuple is ``.to_tuple()`` of what is returned.

        Returns:
            The logits ``[B, num_labels]``, with the mean cross-entropy if there are labels.

        Raises:
            ValueError: for pictures of another size.
        """
        size = (self.config.num_channels, self.config.image_size, self.config.image_size)
        if tuple(pixel_values.shape[1:]) != size:
            raise ValueError(
                f"ViT: pictures {list(pixel_values.shape[1:])} for a model of {list(size)}; resize "
                f"them, or make the model with their size"
            )
        x, states = self.embeddings(pixel_values), []
        turn = None if self.config.positions == "learned" else self._turn(x)
        mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=x, attention_mask=attention_mask
        )
        for block in self.blocks:
            states.append(x)
            x = block(x, mask, turn)
        x = self.layernorm(x)
        logits = self.head(x[:, 0])
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        return ImageClassifierOutput(
            loss, logits, hidden_states=(*states, x) if output_hidden_states else None
        )

    def _turn(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosine and sine ``[1, 1, 1 + n, d_h/2]`` for tokens ``[B, 1 + n, d]``.

        What is before the patches does not turn.
        """
        side = self.config.side
        places = torch.arange(side**2, device=x.device)
        by = angles(self.config.positions, places, self.frequencies, (side, side))
        by = F.pad(by, (0, 0, x.shape[1] - len(places), 0))[None, None]
        return by.cos().to(x.dtype), by.sin().to(x.dtype)
