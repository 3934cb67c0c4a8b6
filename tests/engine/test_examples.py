"""Where the examples of a batch lie at each layer: asked of the host, not told by numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMultipleChoice,
    OPTConfig,
    OPTForCausalLM,
    SwinConfig,
    SwinModel,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
    XLNetConfig,
    XLNetLMHeadModel,
)

import modgraft as mg

B = 3
IDS = torch.randint(3, 41, (B, B), generator=torch.Generator().manual_seed(0))  # n = B


def stirred(model: nn.Module, at: Any, module: mg.Computation | None = None) -> mg.Host:
    """Return a host in float64 with two modules at ``at``, of which none is in force."""
    host = mg.Host(model.double()).eval()
    for name in "ab":
        host.implant(name, module or mg.LoRA(rank=2), at=at, active=False)
    with torch.no_grad():
        for p in host.parameters():
            p.normal_(0.0, 0.3)
    return host


def encoder(batch_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=batch_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def opt() -> nn.Module:
    config = OPTConfig(
        vocab_size=41, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=24,
        word_embed_proj_dim=16,
    )  # fmt: skip
    return OPTForCausalLM(config)


def xlnet() -> nn.Module:
    return XLNetLMHeadModel(XLNetConfig(vocab_size=41, d_model=16, n_layer=2, n_head=2, d_inner=24))


def swin() -> nn.Module:
    return SwinModel(
        SwinConfig(
            image_size=16, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 4],
            window_size=4,
        )
    )  # fmt: skip


def hidden(rows: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, length, 8, dtype=torch.float64, generator=generator)


CASES = {
    "batch second": (lambda: encoder(False), "*.linear1", hidden(B, B), 1, 1),
    "batch second, few steps": (lambda: encoder(False), "*.linear1", hidden(2, B), 1, 1),
    "batch first": (lambda: encoder(True), "*.linear1", hidden(B, B), 0, 0),
    "tokens of all examples": (opt, "*.fc1", IDS, 0, 0),
    "xlnet": (xlnet, "*.ff.layer_1", IDS, 1, 0),
    "windows": (swin, "*.q_proj", torch.randn(B, 3, 16, 16, dtype=torch.float64), 0, 0),
}


def tensor(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out[0]


@pytest.mark.parametrize(("make", "at", "x", "axis", "of_output"), CASES.values(), ids=CASES)
def test_each_example_is_what_it_is_alone(
    make: Any, at: str, x: Tensor, axis: int, of_output: int
) -> None:
    host = stirred(make(), at)
    out = tensor(host(x, modules=["a", "b", None]))
    found = {path: where for path, where in host._context.layout.items() if path}
    assert set(found.values()) == {axis}
    alone = [tensor(host(x, modules=m)) for m in ("a", "b", None)]
    for row, whole in enumerate(alone):
        torch.testing.assert_close(out.select(of_output, row), whole.select(of_output, row))
    weights = torch.tensor([[1.0, 0], [0, 1], [0, 0]], dtype=torch.float64)
    weighted = tensor(host(x, modules=mg.Weighted(["a", "b"], weights)))
    torch.testing.assert_close(weighted, out)


def test_a_convolution_over_tokens_leaves_other_examples_alone() -> None:
    host = stirred(encoder(False), "*.linear2", mg.ConvAdapter(kernel=3))
    x = hidden(5, B)
    other = x.clone()
    other[:, 1] += 1
    out, changed = host(x, modules="a"), host(other, modules="a")
    torch.testing.assert_close(changed[:, [0, 2]], out[:, [0, 2]])
    one = host(x[:, :1], modules="a")  # a batch of one
    torch.testing.assert_close(one, out[:, :1])


class Steps(nn.Module):
    """An RNN and attention with the batch second."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.block = nn.GRU(8, 8), nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.rnn(x)[0])


@pytest.mark.parametrize("at", ["rnn", "block"])
@pytest.mark.parametrize("length", [B, B + 2])
def test_side_inputs_and_neighbours_where_the_batch_is_second(at: str, length: int) -> None:
    x = hidden(length, B)
    host = stirred(Steps(), at, mg.ConvAdapter(kernel=3))
    torch.testing.assert_close(host(x, modules="a")[:, :1], host(x[:, :1], modules="a"))
    host = stirred(Steps(), at, mg.GatedFusion(dim=4))
    features = torch.randn(B, 2, 4, dtype=torch.float64)
    out = host(x, side={"image": mg.Side(features)}, modules="a")
    for i in range(B):
        alone = host(x[:, i : i + 1], side={"image": mg.Side(features[i : i + 1])}, modules="a")
        torch.testing.assert_close(out[:, i : i + 1], alone)


def test_side_inputs_where_an_example_has_several_windows() -> None:
    host = stirred(swin(), "*.q_proj", mg.GatedFusion(dim=4))
    x, features = torch.randn(B, 3, 16, 16).double(), torch.randn(B, 2, 4).double()
    out = host(x, side={"image": mg.Side(features)}, modules="a")[0]
    for i in range(B):
        alone = host(x[i : i + 1], side={"image": mg.Side(features[i : i + 1])}, modules="a")[0]
        torch.testing.assert_close(out[i : i + 1], alone)


def test_experts_have_no_rows_of_examples_and_the_part_around_them_does() -> None:
    config = SwitchTransformersConfig(
        vocab_size=41, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, num_experts=2,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, decoder_start_token_id=0,
    )  # fmt: skip
    model = SwitchTransformersForConditionalGeneration(config)
    host = stirred(model, "encoder.*.experts.*.wi")
    batch = {"input_ids": torch.randint(3, 41, (B, 11)), "labels": IDS}
    out = host(**batch, modules=["a", "b", None]).logits
    for row, name in enumerate(("a", "b", None)):
        torch.testing.assert_close(out[row], host(**batch, modules=name).logits[row])


def test_asking_leaves_the_host_and_the_random_numbers_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 8))
    host = stirred(model, "0").train()
    before = {k: v.clone() for k, v in host.state_dict().items()}
    handles = {m: dict(m._forward_hooks) for m in model.modules()}
    torch.manual_seed(0)
    host(hidden(4, 8)[:, 0], modules="a")
    want = torch.rand(1)
    host.load_state_dict(before)
    torch.manual_seed(0)
    host(hidden(4, 8)[:, 0], modules=["a", "b", None, "a"])
    assert torch.equal(torch.rand(1), want)
    assert host._context.layout == {"0": 0}
    assert [m.training for m in model.modules()] == [
        True,
        True,
        False,
        True,
        True,
    ]  # the norm stays
    assert handles == {m: dict(m._forward_hooks) for m in model.modules()}


def test_it_is_asked_once_for_calls_that_are_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    import modgraft.host.host as module

    asked: list[int | None] = []
    ask = module.ask
    monkeypatch.setattr(module, "ask", lambda *a: asked.append(a[-1]) or ask(*a))
    host = stirred(encoder(True), "*.linear1")
    host(hidden(2, 4), modules="a")
    assert not asked  # every example has the same module
    host(hidden(2, 4), modules=["a", "b"])
    host(hidden(3, 5), modules=["a", "b", None])
    assert asked == [2]
    host.implant("c", mg.LoRA(rank=1), at="*.linear2", active=False)
    host(hidden(2, 4), modules=["a", "c"])
    assert asked == [2, 2]


class Guided(nn.Module):
    """Runs each text beside an empty one, in one batch: two rows an example, far apart."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        without, own = self.inner(torch.cat([torch.zeros_like(x), x])).cumsum(1).chunk(2)
        return without + 2 * (own - without)


class Turned(nn.Module):
    """Runs with the batch second where a flag says so, or the text is short."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor, second: bool = False) -> Tensor:
        if second or x.shape[1] < B + 1:
            return self.inner(x.transpose(0, 1)).cumsum(0).transpose(0, 1)
        return self.inner(x).cumsum(1)


class Causal(nn.Module):
    """Attends to what came before: to nothing, and so to no number, where a text begins late."""

    def __init__(self) -> None:
        super().__init__()
        self.attend, self.out = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        y, _ = self.attend(x, x, x, attn_mask=later, key_padding_mask=x[..., 0] == 0)
        return self.out(x + y)


@pytest.mark.parametrize("padded", [0, 1, 2])
def test_what_is_no_number_in_the_bare_host_is_the_same_as_itself(padded: int) -> None:
    host, x = stirred(Causal(), "out"), hidden(B, 6).clone()
    x[padded, :2] = 0
    names = ["a", "b", None]
    out, alone = host(x, modules=names), [host(x, modules=name) for name in names]
    assert out.isnan().any(-1).nonzero().tolist() == [[padded, 0], [padded, 1]]
    right = torch.stack([whole[i] for i, whole in enumerate(alone)])
    torch.testing.assert_close(out, right, equal_nan=True)


@pytest.mark.parametrize("length", [B, B + 1])
def test_tokens_are_not_taken_for_examples_where_these_have_no_axis(length: int) -> None:
    host, x = stirred(Guided(), "inner"), hidden(B, length)
    out = host(x, modules=["a", "b", None])
    assert host._context.layout["inner"] is None
    for row, name in enumerate(("a", "b", None)):
        torch.testing.assert_close(out[row], host(x, modules=name)[row])


def test_a_layout_holds_for_calls_that_are_alike() -> None:
    host = stirred(Turned(), "inner")
    for length, second in ((B, False), (7, True), (7, False), (B, True), (B, False)):
        x, compositions = hidden(B, length), ["a", "b", None]
        out = host(x, second=second, modules=compositions)
        alone = [host(x[i : i + 1], second=second, modules=m) for i, m in enumerate(compositions)]
        torch.testing.assert_close(out, torch.cat(alone))


def test_one_row_of_positions_for_several_rows_of_an_example() -> None:
    config = BertConfig(
        vocab_size=41, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24,
    )  # fmt: skip
    choices = IDS[:, None].repeat(1, 2, 1)
    for at in ("*.position_embeddings", "*.query"):
        host = stirred(BertForMultipleChoice(config), at)
        out = host(choices, modules=["a", "b", None]).logits
        for row, name in enumerate(("a", "b", None)):
            torch.testing.assert_close(out[row], host(choices, modules=name).logits[row])


class WeighedFirst(nn.Module):
    """Takes weights of its classes, and then the examples."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Linear(6, 6)

    def forward(self, weights: Tensor, x: Tensor) -> Tensor:
        return self.read(x) * weights


@pytest.mark.parametrize("shape", [(6,), (5, 6), ()], ids=str)
@torch.no_grad()
def test_the_first_tensor_need_not_hold_the_examples(shape: tuple[int, ...]) -> None:
    host = stirred(WeighedFirst(), "read")
    weights, x = torch.randn(shape, dtype=torch.float64), torch.randn(4, 5, 6, dtype=torch.float64)
    each = ["a", None, "b", "a >> b"]
    out = host(weights, x, modules=each)
    for i, own in enumerate(each):
        torch.testing.assert_close(out[i : i + 1], host(weights, x[i : i + 1], modules=own))
    with pytest.raises(mg.ModgraftError, match=r"gives 3 compositions"):
        host(weights, x, modules=each[:3])
    with pytest.raises(mg.ModgraftError, match=r"gives 6 compositions"):
        host(weights, x, modules=[None, *each, "a"])
