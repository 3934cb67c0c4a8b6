"""Hosts that no library made: each does one thing that people's own models do."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from zoo.row import DECODER, EXAMPLES, TOKENS, Batch, Row, continued, hf, ids, values

WIDTH = 16


def tokens() -> Batch:
    return {"x": values(TOKENS, WIDTH)}


def time_first() -> Batch:
    return {"x": values(TOKENS, WIDTH).transpose(0, 1)}


def maps() -> Batch:
    return {"x": values(3, 8, 8)}


def words() -> Batch:
    return {"x": ids()}


class Encoder(nn.Module):
    """PyTorch's own encoder, with a layer before and a layer after it."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 24, 0.0, batch_first=batch_first)
        self.into, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.encoder(self.into(x)))


class Seq2Seq(nn.Module):
    """PyTorch's own encoder and decoder."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.both = nn.Transformer(WIDTH, 2, 1, 1, 24, 0.0, batch_first=batch_first)

    def forward(self, x: Tensor) -> Tensor:
        return self.both(x, x.flip(-1))


class CNN(nn.Module):
    """Convolutions, BatchNorm, and activations that write into what the layer before put out."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
            nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Sequential(nn.Linear(8, 16), nn.ReLU(inplace=True), nn.Linear(16, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class RNNs(nn.Module):
    """An LSTM and a GRU, one after the other, with the batch first or second."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, 8, bidirectional=True, batch_first=batch_first)
        self.gru = nn.GRU(WIDTH, WIDTH, batch_first=batch_first)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(self.lstm(x)[0])[0])


class Reader(nn.Module):
    """Reads its child's weight, and never calls the child."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.called = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.called(torch.tanh(F.linear(x, self.read.weight, self.read.bias)))


class Written(nn.Module):
    """Adds in place to what its layers put out, as some residual streams do."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        y += x
        z = self.two(torch.tanh(y))
        z *= 0.5
        return z


class Own(nn.Module):
    """Recomputes its layers in backward, by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.recompute: bool | None = None

    def gradient_checkpointing_enable(self, how: dict[str, Any]) -> None:
        self.recompute = how["use_reentrant"]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:

            def step(y: Tensor, layer: nn.Module = layer) -> Tensor:
                return y + torch.tanh(layer(y))

            if self.recompute is None or not self.training:
                x = step(x)
            else:
                x = checkpoint(step, x, use_reentrant=self.recompute)
        return x  # fmt: skip


class Flat(nn.Module):
    """Works on all tokens of all examples as one list, and sorts them."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.tanh(self.one(x)).flatten(0, 1)  # [B, n, d] → [B·n, d]
        order = flat[:, 0].argsort()
        return self.two(flat[order])[order.argsort()].view_as(x)


class Windows(nn.Module):
    """Puts two halves of the tokens of each example side by side, as windows of attention are."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(WIDTH // 2, WIDTH // 2), nn.Linear(WIDTH // 2, WIDTH // 2)

    def forward(self, x: Tensor) -> Tensor:
        halves = x.unflatten(-1, (2, -1)).transpose(1, 2).flatten(0, 1)  # [B·2, n, d/2]
        new = self.two(torch.tanh(self.one(halves)))
        return new.unflatten(0, (-1, 2)).transpose(1, 2).flatten(2)


class Mixer(nn.Module):
    """Mixes tokens by a layer on the transposed input, then channels."""

    def __init__(self) -> None:
        super().__init__()
        self.over_tokens, self.over_width = nn.Linear(TOKENS, TOKENS), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.over_width(torch.tanh(x + self.over_tokens(x.mT).mT))


class Words(nn.Module):
    """A table whose rows are renormed, and one tied to the output."""

    def __init__(self) -> None:
        super().__init__()
        self.bounded = nn.Embedding(48, WIDTH, max_norm=0.5)
        self.tied = nn.Embedding(48, WIDTH, padding_idx=0)
        self.out = nn.Linear(WIDTH, 48, bias=False)
        self.out.weight = self.tied.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.bounded(x) + self.tied(x)))


class Stateful(nn.Module):
    """Keeps what it saw last, and adds it to what it sees now."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.block = nn.Linear(WIDTH, WIDTH), _Remembers()

    def forward(self, x: Tensor) -> Tensor:
        self.block.seen = torch.zeros_like(x)
        return self.block(self.one(x))


class _Remembers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.seen = nn.Linear(WIDTH, WIDTH), torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x) + self.seen
        self.seen = y.detach()
        return y


class Dictionary(nn.Module):
    """Puts out a dictionary of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = torch.tanh(self.one(x))
        return {"features": h, "scores": self.two(h)}


def _normed() -> nn.Module:
    first = nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))
    second = nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))
    return Sequence(first, nn.Tanh(), second, nn.Tanh(), nn.Linear(WIDTH, 4))


class Sequence(nn.Sequential):
    """A ``Sequential`` that is called by name."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def _patched() -> nn.Module:
    """Has a ``forward`` put on an instance, as tools that log or move weights do."""
    model = Sequence(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 4))
    before = model[0].forward

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return 2 * before(x)

    model[0].forward = MethodType(forward, model[0])  # type: ignore[method-assign]
    return model


def _dispatched() -> nn.Module:
    from accelerate import dispatch_model

    model = hf("llama", "decoder", "LlamaForCausalLM", continued, **DECODER).make()
    return dispatch_model(model, {"": "cpu"}, force_hooks=True)


def _plain(name: str, make: Any, batch: Any = tokens, axis: int = 0) -> Row:
    return Row(name, "plain", make, batch, axis)


ROWS = (
    _plain("torch encoder", lambda: Encoder(True)),
    _plain("torch encoder batch second", lambda: Encoder(False), time_first, 1),
    _plain("torch encoder-decoder", lambda: Seq2Seq(True)),
    _plain("torch encoder-decoder batch second", lambda: Seq2Seq(False), time_first, 1),
    _plain("cnn in place", CNN, maps),
    _plain("rnn", lambda: RNNs(True)),
    _plain("rnn batch second", lambda: RNNs(False), time_first, 1),
    _plain("reads a child's weight", Reader),
    _plain("writes in place", Written),
    _plain("checkpoints itself", Own),
    _plain("flat tokens", Flat),
    _plain("windows", Windows),
    _plain("mixer", Mixer),
    _plain("tables", Words, words),
    _plain("stateful", Stateful),
    _plain("dictionary", Dictionary),
    _plain("weight-normed", _normed),
    _plain("patched forward", _patched),
    Row("llama dispatched", "plain", _dispatched, continued),
)
assert EXAMPLES == TOKENS
