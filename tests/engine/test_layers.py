"""Modules at convolutions, attention and RNNs: layers with several weights and fused kernels."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import modgraft as mg
from common import WEIGHTS
from contract.hosts import HOSTS
from modgraft.engine.fast_paths import leave_fast_paths


def stirred(model: nn.Module, module: mg.Computation, at: Any, **kw: Any) -> mg.Host:
    """Make a host in eval mode with ``module``, its parameters random numbers."""
    host = mg.Host(model).eval()
    host.implant("m", module, at=at, **kw)
    with torch.no_grad():
        for p in host["m"].parameters():
            p.normal_(0, 0.3)
    return host


def labels(model: nn.Module, at: Any) -> list[str]:
    return [site.label for site in mg.Host(model).sites(at)]


# -- convolutions -------------------------------------------------------------------------------

CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
    "2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 8, 7)),
    "dilated": (lambda: nn.Conv2d(4, 6, (3, 1), dilation=(2, 1), padding="same"), (2, 4, 8, 7)),
    "no_bias": (lambda: nn.Conv2d(4, 6, 1, bias=False), (2, 4, 5, 5)),
}
OTHERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "3d": (lambda: nn.Conv3d(4, 6, 2), (2, 4, 4, 4, 4)),
    "reflect": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 6, 6)),
    "circular": (lambda: nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 6)),
    "groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), (2, 4, 6, 6)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6), (2, 6, 6, 6)),
    "unbatched": (lambda: nn.Conv2d(4, 6, 3), (4, 6, 6)),
    "channels_last": (
        lambda: nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last), (2, 4, 6, 6)
    ),
}  # fmt: skip


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_equals_pefts(name: str, dora: bool) -> None:
    make, shape = CONVOLUTIONS[name]
    model = nn.Sequential(make(), nn.Tanh())
    host = stirred(copy.deepcopy(model), mg.LoRA(rank=2, alpha=3.0, dora=dora), "0")
    config = peft.LoraConfig(r=2, lora_alpha=3.0, target_modules=["0"], use_dora=dora)
    peer = peft.get_peft_model(model, config).eval()  # type: ignore[arg-type]
    layer, place = peer.base_model.model[0], host["m"].places[0]
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight  # [r, in, k…], 1×1
    with torch.no_grad():
        A.copy_(place.A.view_as(A))
        B.copy_(place.B.view_as(B))
        if dora:
            m = layer.lora_magnitude_vector["default"].weight
            m.add_(place.magnitude.view_as(m))
    x = torch.randn(shape)
    ours, theirs = host(x), peer(x)
    if name == "dilated":  # PEFT's A is not dilated: only its merge is right
        merged = peer.merge_and_unload()(x)
        torch.testing.assert_close(ours, merged, rtol=1e-5, atol=1e-5)
        return
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    torch.testing.assert_close(place.A.grad.view_as(A), A.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(place.B.grad.view_as(B), B.grad, rtol=1e-4, atol=1e-5)
    merged = peer.merge_and_unload()(x)
    torch.testing.assert_close(host.merge("m")(x), merged, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", WEIGHTS)
@pytest.mark.parametrize("name", [*CONVOLUTIONS, *OTHERS])
@torch.no_grad()
def test_a_convolution_is_run_with_the_changed_kernel(name: str, method: str) -> None:
    make, shape = (CONVOLUTIONS | OTHERS)[name]
    host = stirred(nn.Sequential(make()).double(), WEIGHTS[method](), "0")
    layer, place, x = host.model[0], host["m"].places[0], torch.randn(shape).double()
    if method.startswith("rescale"):  # of channels, whatever the groups
        phi = place.phi[(..., *[None] * len(layer.kernel_size))]
        expected = host(x * phi, modules=None) if method == "rescale_input" else None
        expected = host(x, modules=None) * phi if expected is None else expected
    else:
        plain = make().double()
        plain.load_state_dict(layer.state_dict())
        matrix = plain.weight.reshape(len(plain.weight), -1)
        plain.weight.add_(place.delta(matrix).view(plain.weight.shape))
        expected = plain(x)
    assert not torch.allclose(expected, host(x, modules=None))
    torch.testing.assert_close(host(x), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(host.merge("m")(x), expected, rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_a_part_of_a_convolution_is_some_of_its_channels() -> None:
    host = stirred(nn.Sequential(nn.Conv2d(4, 6, 3)), mg.LoRA(rank=2, bias=True), "0[1/3]")
    x, place = torch.randn(2, 4, 6, 6), host["m"].places[0]
    changed, bare = host(x), host(x, modules=None)
    assert torch.equal(changed[:, :2], bare[:, :2])
    assert torch.equal(changed[:, 4:], bare[:, 4:])
    layer = host.model[0]
    kernel = layer.weight[2:4] + (place.B @ place.A).view(2, 4, 3, 3)
    torch.testing.assert_close(changed[:, 2:4], F.conv2d(x, kernel, layer.bias[2:4] + place.b))
    torch.testing.assert_close(host.merge("m")(x), changed)
    host.implant("maps", mg.ConvAdapter(over="map"), at="0[2/3]")
    host["maps"].places[0].F.normal_()
    mapped = host(x, modules="maps")
    assert torch.equal(mapped[:, :4], bare[:, :4])
    assert not torch.allclose(mapped[:, 4:], bare[:, 4:])


# -- attention ----------------------------------------------------------------------------------


class Attends(nn.Module):
    """Self-attention, and attention to features of other widths."""

    def __init__(self, **kw: Any) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True, **kw)
        self.cross = nn.MultiheadAttention(8, 2, kdim=5, vdim=6, batch_first=True, **kw)
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h, _ = self.attn(x, x, x, need_weights=False)
        seen, _ = self.cross(h, x[..., :5], x[..., :6])
        return self.fc(seen)


X = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(5))


def test_attention_equals_pefts() -> None:
    """At the output projection PEFT adds its Δ twice, merged and beside, so ours is ``2*out``."""
    model = Attends()
    host = mg.Host(copy.deepcopy(model)).eval()
    for name, at in (("into", "attn.in_proj_weight"), ("out", "attn.out_proj")):
        host.implant(name, mg.LoRA(rank=2, alpha=3.0), at=at)
    host.use("into + 2*out")
    config = peft.LoraConfig(r=2, lora_alpha=3.0, target_modules=["attn"])
    peer = peft.get_peft_model(model, config).eval()  # type: ignore[arg-type]
    layers = [m for m in peer.modules() if hasattr(m, "lora_A")]
    places = [host[name].places[0] for name in ("into", "out")]
    with torch.no_grad():
        for layer, place in zip(layers, places, strict=True):
            place.B.normal_(0, 0.3)
            layer.lora_A["default"].weight.copy_(place.A)
            layer.lora_B["default"].weight.copy_(place.B)
    ours, theirs = host(X), peer(X)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    for own, other in zip(places[0].parameters(), ("lora_A", "lora_B"), strict=True):
        grad = getattr(layers[0], other)["default"].weight.grad
        torch.testing.assert_close(own.grad, grad, rtol=1e-4, atol=1e-6)
    merged = peer.merge_and_unload()(X)
    torch.testing.assert_close(host.merge()(X), merged, rtol=1e-5, atol=1e-5)


AT = [*(f"attn.in_proj_weight[{i}/3]" for i in range(3)), "cross.{q,k,v}_proj_weight", "*.out_proj"]


@pytest.mark.parametrize("method", [m for m in WEIGHTS if m != "rescale_input"])
@torch.no_grad()
def test_every_weight_of_attention_with_its_bias(method: str) -> None:
    host = stirred(Attends().double(), WEIGHTS[method](), AT, expect=8)
    x, plain = X.double(), copy.deepcopy(host.merge(None))
    for label, place in zip(host["m"].paths, host["m"].places, strict=True):
        above, name = label.split(".")
        layer = plain.get_submodule(above)
        rows, biases = {
            "i": lambda: (layer.in_proj_weight, layer.in_proj_bias),  # noqa: B023
            "o": lambda: (layer.out_proj.weight, layer.out_proj.bias),  # noqa: B023
        }.get(name[0], lambda: (layer.get_parameter(name), layer.in_proj_bias))()  # noqa: B023
        if "[" in name:
            i = int(name[-4])
            rows, biases = rows[8 * i : 8 * i + 8], biases[8 * i : 8 * i + 8]
        elif name[0] in "qkv":
            biases = biases.chunk(3)["qkv".index(name[0])]
        rows.add_(place.delta(rows.clone()))
        if method == "rescale":
            biases.mul_(place.phi)
    assert not torch.allclose(host(x), host(x, modules=None))
    torch.testing.assert_close(host(x), plain(x), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(host.merge("m")(x), plain(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("part", ["attn.in_proj_weight[1/3]", "cross.k_proj_weight", "*.out_proj"])
@torch.no_grad()
def test_the_bias_beside_a_projection(part: str) -> None:
    host = stirred(Attends(), mg.LoRA(rank=1, bias=True), part)
    bare, merged = dict(host.model.named_parameters()), host.merge("m")
    changed = {
        name: (p != bare[name]).nonzero().flatten().tolist()
        for name, p in merged.named_parameters()
        if p.dim() == 1 and not torch.equal(p, bare[name])
    }
    key, out = list(range(8, 16)), list(range(8))
    assert (
        changed
        == {
            "attn.in_proj_weight[1/3]": {"attn.in_proj_bias": key},
            "cross.k_proj_weight": {"cross.in_proj_bias": key},
            "*.out_proj": {"attn.out_proj.bias": out, "cross.out_proj.bias": out},
        }[part]
    )
    torch.testing.assert_close(merged(X), host(X))


def test_the_output_projection_is_a_weight_of_its_attention() -> None:
    """Attention never calls it: a module that acted as at any ``nn.Linear`` would do nothing."""
    model = Attends()
    assert labels(model, nn.Linear) == ["attn.out_proj", "cross.out_proj", "fc"]
    for at in ("attn.out_proj", "attn.out_proj.weight", "*n.out_proj"):
        assert labels(model, at) == ["attn.out_proj"]
    assert labels(model, lambda path, module: path.endswith("s.out_proj")) == ["cross.out_proj"]
    assert labels(model, "fc.weight") == labels(model, "fc") == ["fc"]
    host = stirred(model, mg.LoRA(rank=2), nn.Linear)
    host(X).sum().backward()
    for p in host["m"].parameters():
        assert p.grad.abs().sum() > 0
    host.remove("m")
    assert type(model.attn) is nn.MultiheadAttention


@pytest.mark.parametrize("at", ["attn", "cross"])
def test_functions_of_what_attention_puts_out(at: str) -> None:
    host = stirred(Attends(), mg.ParallelAdapter(width=3, scale=2.0), at)
    place, seen = host["m"].places[0], []
    hook = host.model.get_submodule(at).register_forward_hook(
        lambda m, args, out: seen.append(args)
    )
    host(X)
    (args,) = seen
    hook.remove()
    y, weights = host.model.get_submodule(at)(*args)
    with host.using(None):
        bare, _ = host.model.get_submodule(at)(*args)
    torch.testing.assert_close(y, bare + 2 * place.up(torch.relu(place.down(args[0]))))
    assert weights is not None


def test_gradients_through_changed_weights() -> None:
    torch.manual_seed(0)
    host = stirred(Attends().double(), mg.LoRA(rank=1, bias=True), AT, expect=8)
    leaves = list(host["m"].parameters())
    x = X[:1, :2].double().requires_grad_()

    def f(x: Tensor, *tensors: Tensor) -> Tensor:
        names = [name for name, _ in host["m"].named_parameters()]
        return torch.func.functional_call(
            host, {f"implants.m.{n}": t for n, t in zip(names, tensors, strict=True)}, (x,)
        )

    assert torch.autograd.gradcheck(f, (x, *leaves))


# -- two threads, copies, folders ---------------------------------------------------------------


@torch.no_grad()
def test_two_threads_never_see_each_others_weights() -> None:
    host = stirred(Attends(), mg.LoRA(rank=2), AT)
    host.implant("n", mg.LoRA(rank=2), at=AT)
    for p in host["n"].parameters():
        p.normal_(0, 0.5)
    expected = {name: host(X, modules=name) for name in ("m", "n", "m - n", None)}
    wrong: list[Any] = []
    start = threading.Barrier(len(expected))

    def work(name: str | None) -> None:
        start.wait()
        with torch.no_grad():
            for _ in range(150):
                if not torch.equal(host(X, modules=name), expected[name]):
                    wrong.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_saved_loaded_and_copied(tmp_path: Any) -> None:
    model = Attends()
    host = stirred(copy.deepcopy(model), mg.LoRA(rank=2), AT)
    expected = host(X)
    host.save("m", tmp_path / "m")
    again = mg.Host(copy.deepcopy(model)).eval()
    again.load(tmp_path / "m")
    assert again["m"].paths == host["m"].paths
    assert torch.equal(again(X), expected)
    twin = copy.deepcopy(host)
    with torch.no_grad():
        twin.model.attn.in_proj_weight.zero_()
    assert torch.equal(host(X), expected)
    assert not torch.allclose(twin(X), expected)


class Notes(nn.Module):
    """A user's layer that reads its own matrix and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(5, 8))
        self.table = nn.Parameter(torch.randn(2, 3, 4))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x @ self.mix.T


@torch.no_grad()
def test_a_matrix_of_a_layer_of_ones_own() -> None:
    host = stirred(nn.Sequential(Notes()), mg.LoRA(rank=2), "0.mix")
    place, notes = host["m"].places[0], host.model[0]
    torch.testing.assert_close(host(X), X @ (notes.mix + place.B @ place.A).T)
    host(X)
    assert notes.calls == 2
    assert notes.mix is notes._parameters["mix"]
    torch.testing.assert_close(host.merge("m")(X), host(X))
    words = (
        r"Rescale at 0\.table: this parameter is \[2, 3, 4\].*LoRA\(rank=8\) changes each matrix"
    )
    with pytest.raises(mg.ModgraftError, match=words):
        host.implant("n", mg.Rescale(), at="0.table")
    place = host.implant("n", mg.LoRA(rank=2), at="0.table").places[0]
    assert place.delta(notes.table).shape == (2, 3, 4)


# -- PyTorch's fused inference -------------------------------------------------------------------

LAYER = {"d_model": 8, "nhead": 2, "dim_feedforward": 12, "dropout": 0.0, "batch_first": True}
UNSEEN = torch.tensor([[False] * 4, [False, False, True, True], [False, False, False, True]])


def fused(model: nn.Module, monkeypatch: pytest.MonkeyPatch, *args: Any, **kw: Any) -> int:
    """Count the calls of the fused kernel."""
    calls = []
    whole = torch._transformer_encoder_layer_fwd

    def counting(*args: Any) -> Tensor:
        calls.append(1)
        return whole(*args)

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(torch, "_transformer_encoder_layer_fwd", counting)
        model(*args, **kw)
    return len(calls)


@pytest.mark.parametrize("at", ["layers.0.linear1", "layers.*.self_attn", "layers.1.norm2", "out"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_fused_inference_passes_no_module_by(at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(**LAYER), 2)
    bare = copy.deepcopy(encoder).eval()
    kw = {"src_key_padding_mask": UNSEEN}
    assert fused(bare, monkeypatch, X, **kw) == 2  # fused without modules
    if at == "out":
        host = stirred(encoder, mg.LoRA(rank=2), "layers.*.self_attn.{in_proj_weight,out_proj}")
    else:
        host = stirred(encoder, mg.Adapter(width=3), at)
    assert fused(host, monkeypatch, X, **kw) == 0
    seen = ~UNSEEN
    with torch.no_grad():
        inferred = host(X, **kw)
        torch.testing.assert_close(host(X, **kw, modules=None)[seen], bare(X, **kw)[seen])
    assert not torch.allclose(inferred[seen], bare(X, **kw)[seen])
    trained = host(X, **kw)
    assert trained.requires_grad
    assert torch.equal(inferred, trained)
    host.model.train()
    torch.testing.assert_close(host(X, **kw), trained)  # no dropout here: the slow path for sure
    host.model.eval()
    plain = host.merge("m" if at == "out" else None)
    assert fused(plain, monkeypatch, X, **kw) == 2  # fused again
    assert [vars(m).keys() for m in plain.modules()] == [vars(m).keys() for m in bare.modules()]
    if at == "out":
        with torch.no_grad():
            torch.testing.assert_close(plain(X, **kw)[seen], inferred[seen], rtol=1e-4, atol=1e-5)


def test_wrapping_twice_leaves_one_hook() -> None:
    layer = nn.TransformerEncoderLayer(**LAYER)
    mg.Host(layer)
    leave_fast_paths(layer)
    mg.Host(layer)
    assert len(layer._forward_pre_hooks) == 1
    assert not mg.Host(layer).merge(None)._forward_pre_hooks


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_logits_of_last_tokens_are_one_product(name: str) -> None:
    """PyTorch would read frozen weights once for each example; see modgraft.engine.fast_paths."""
    model = HOSTS[name].model()
    batch = {key: value for key, value in HOSTS[name].batch().items() if key != "labels"}
    want = model(**batch, logits_to_keep=1).logits
    read: list[Tensor] = []
    host = mg.Host(model)
    model.get_output_embeddings().register_forward_pre_hook(lambda _, args: read.extend(args))
    torch.testing.assert_close(host(**batch, logits_to_keep=1).logits, want)
    assert read[0].shape[1] == 1
    assert read[0].is_contiguous()
    mg.Host(model)
    assert len(model.get_output_embeddings()._forward_pre_hooks) == 2  # one above, one here
    assert len(host.merge(None).get_output_embeddings()._forward_pre_hooks) == 1


@torch.no_grad()
def test_attention_alone_is_fused_with_its_changed_weights() -> None:
    """``nn.MultiheadAttention`` calls no sub-module, so its kernel can take W + Δ."""
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    host = stirred(attention, mg.LoRA(rank=2), ["in_proj_weight[0/3]", "out_proj"])
    inferred, _ = host(X, X, X)
    with torch.enable_grad():
        torch.testing.assert_close(host(X, X, X)[0], inferred)
    torch.testing.assert_close(host.merge("m")(X, X, X)[0], inferred)


# -- RNNs ---------------------------------------------------------------------------------------

RNNS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "rnn": (lambda: nn.RNN(8, 6), "weight_*"),
    "relu": (lambda: nn.RNN(8, 6, nonlinearity="relu", bias=False), "weight_*"),
    "gru": (lambda: nn.GRU(8, 6, num_layers=2, batch_first=True), "weight_*"),
    "lstm": (lambda: nn.LSTM(8, 6, bidirectional=True), "weight_*"),
    "gates": (lambda: nn.LSTM(8, 6, batch_first=True), "weight_hh_l0[2/4]"),
    "projected": (lambda: nn.LSTM(8, 6, proj_size=3, bidirectional=True), "weight_hr_*"),
    "cell": (lambda: nn.LSTMCell(8, 6), "weight_{ih,hh}"),
}


def flat(out: Any) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else [t for each in out for t in flat(each)]


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("method", WEIGHTS)
@pytest.mark.parametrize("name", RNNS)
def test_an_rnn_is_run_with_the_changed_weights(name: str, method: str) -> None:
    make, at = RNNS[name]
    model = make().double()
    host = stirred(copy.deepcopy(model), WEIGHTS[method](), at)
    x = X[:, 0].double() if name == "cell" else X.double()
    for label, place in zip(host["m"].paths, host["m"].places, strict=True):
        weight, _, part = label.partition("[")
        bias = getattr(model, weight.replace("weight", "bias"), None)
        i, n = (int(part[0]), int(part[2])) if part else (0, 1)
        with torch.no_grad():
            rows = model.get_parameter(weight).chunk(n)[i]
            rows.add_(place.delta(rows.clone()))
            if method == "rescale" and bias is not None:
                bias.chunk(n)[i].mul_(place.phi)
    ours, merged, theirs = flat(host(x)), flat(host.merge("m")(x)), flat(model.eval()(x))
    bare = flat(host(x, modules=None))
    for own, whole, other, before in zip(ours, merged, theirs, bare, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(whole, other, rtol=1e-10, atol=1e-12)
        assert not torch.allclose(own, before)


def test_an_rnn_learns_in_training_with_dropout_between_layers() -> None:
    model = nn.LSTM(8, 6, num_layers=2, dropout=0.5, batch_first=True)
    host = stirred(model, mg.LoRA(rank=2), "weight_{ih,hh}_l*")
    host.train()
    outs = []
    for each in (host, host.merge("m").train()):
        torch.manual_seed(3)
        outs.append(each(X)[0])
    torch.testing.assert_close(outs[0], outs[1])
    outs[0].sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in host["m"].parameters())
    assert all(p.grad is None for p in model.parameters())


def test_an_rnn_of_packed_sequences() -> None:
    host = stirred(nn.GRU(8, 6, batch_first=True, bidirectional=True), mg.LoRA(rank=2), "weight_*")
    lengths = torch.tensor([4, 2, 3])
    packed = pack_padded_sequence(X, lengths, batch_first=True, enforce_sorted=False)
    out, last = host(packed)
    assert isinstance(out, PackedSequence)
    rows, _ = pad_packed_sequence(out, batch_first=True)
    for i, n in enumerate(lengths.tolist()):  # as each example alone
        alone, end = host(X[i : i + 1, :n])
        torch.testing.assert_close(rows[i, :n], alone[0])
        torch.testing.assert_close(last[:, i], end[:, 0])
    host.implant("a", mg.Adapter(width=3), at="")
    host(X)
    with pytest.raises(mg.ModgraftError, match=r"returns a PackedSequence.*padded tensor"):
        host(packed)


def test_gradients_through_an_rnn() -> None:
    host = stirred(nn.LSTM(3, 4, proj_size=2).double(), mg.LoRA(rank=1), "weight_*")
    x = torch.randn(3, 2, 3).double().requires_grad_()
    names = [name for name, _ in host["m"].named_parameters()]

    def f(x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        new = {f"implants.m.{n}": t for n, t in zip(names, tensors, strict=True)}
        return tuple(flat(torch.func.functional_call(host, new, (x,))))

    assert torch.autograd.gradcheck(f, (x, *host["m"].parameters()))


# -- what is refused, and the corrected call ------------------------------------------------------

BAD: dict[str, tuple[Callable[[], nn.Module], Callable[[], mg.Computation], Any, str]] = {
    "attention_as_a_whole": (
        Attends, mg.LoRA, "attn",
        r"LoRA at attn: a MultiheadAttention has several weights, 'attn\.in_proj_weight\[0/3\]' "
        r"\(query\), .*'attn\.out_proj' \(output\); say which: at='attn\.in_proj_weight\[0/3\]'",
    ),
    "attention_of_other_widths_as_a_whole": (
        Attends, mg.SparseDelta, "cross", r"'cross\.q_proj_weight' \(query\), .*'cross\.out_proj'",
    ),
    "parts_of_attention": (Attends, mg.LoRA, "attn[0/3]", r"at='attn\.in_proj_weight\[0/3\]'"),
    "rnn_as_a_whole": (
        lambda: nn.Sequential(nn.GRU(8, 6)), mg.LoRA, "0",
        r"several weights, '0\.weight_ih_l0', '0\.weight_hh_l0'; say which: at='0\.weight_ih_l0'",
    ),
    "host_as_a_whole": (lambda: nn.GRU(8, 6), mg.LoRA, "", r"the host itself.*at='weight_ih_l0'"),
    "no_fused_weight": (
        Attends, mg.LoRA, "cross.in_proj_weight[0/3]",
        r"has no in_proj_weight \(embed_dim=8, kdim=5, vdim=6: they are kept in three weights\); "
        r"write at='cross\.q_proj_weight'",
    ),
    "no_separate_weight": (
        Attends, mg.LoRA, "attn.{q,v}_proj_weight",
        r"has no q_proj_weight .*in one weight\); write at='attn\.in_proj_weight\[0/3\]'",
    ),
    "function_at_a_weight": (
        Attends, mg.Adapter, "attn.out_proj",
        r"Adapter at attn\.out_proj: .* no activation passes there .*at='attn'",
    ),
    "function_at_all_linear_layers": (
        Attends, mg.Adapter, nn.Linear, r"at attn\.out_proj: .*at='attn'"
    ),
    "vector": (Attends, mg.LoRA, "attn.in_proj_bias", r"is \[24\], and LoRA changes weights"),
    "output_bias": (Attends, mg.LoRA, "attn.out_proj.bias", r"at attn\.out_proj\.bias: .* \[8\]"),
    "rank": (Attends, lambda: mg.LoRA(rank=6), "cross.k_proj_weight", r"8 × 5.*at most 5"),
    "conv_rank": (
        lambda: nn.Sequential(nn.Conv2d(2, 30, 3)), lambda: mg.LoRA(rank=19), "0", "30 × 18.*18"
    ),
    "no_bias": (
        lambda: Attends(bias=False), lambda: mg.LoRA(bias=True), "attn.in_proj_weight", "no bias"
    ),
    "projection_has_no_bias": (
        lambda: nn.LSTM(8, 6, proj_size=3), lambda: mg.LoRA(rank=2, bias=True), "weight_hr_l0",
        "weight_hr_l0.*no bias",
    ),
    "dropout": (
        Attends, lambda: mg.LoRA(dropout=0.1), "attn.out_proj", r"no input .*use LoRA\(rank=8\)"
    ),
    "part_too_high": (
        Attends, mg.LoRA, "attn.in_proj_weight[3/3]",
        r"the 3 parts count from 0; the last is attn\.in_proj_weight\[2/3\]",
    ),
    "parts_that_do_not_divide": (
        Attends, mg.LoRA, "attn.in_proj_weight[0/5]",
        r"24 outputs, .*not 5 equal parts \(24 / 5 = 4\.8\); write "
        r"at='attn\.in_proj_weight\[0/3\]', or the whole, at='attn\.in_proj_weight'",
    ),
    "parts_of_a_plain_layer": (Attends, mg.LoRA, "fc[0/3]", r"8 outputs.*at='fc\[0/2\]'.*at='fc'"),
    "function_of_such_parts": (
        Attends, mg.Adapter, "fc[0/3]", r"8 features, which is not 3 equal parts; write at='fc'"
    ),
    "parts_of_a_table": (
        lambda: nn.Sequential(nn.Embedding(9, 6)), mg.LoRA, "0[0/3]", "a table has no parts.*at='0'"
    ),
    "parts_of_groups": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)), lambda: mg.LoRA(rank=1), "0[0/3]",
        "2 groups is in parts already; write at='0'",
    ),
    "misspelt": (Attends, mg.LoRA, "attn.in_pro_weight", r"near it: .*attn\.in_proj_weight"),
    "convolution_over_volumes": (
        lambda: nn.Sequential(nn.Conv3d(4, 6, 3)), lambda: mg.ConvAdapter(over="map"), "0",
        r"puts out \[B, C, D, H, W\]",
    ),
    "adapter_over_a_map": (
        lambda: nn.Sequential(nn.Conv3d(4, 6, 3)), mg.Adapter, "0", r"puts out a map \[B, C"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused_says_the_corrected_call(name: str) -> None:
    make, module, at, says = BAD[name]
    host = mg.Host(make())
    with pytest.raises(mg.ModgraftError, match=says):
        host.implant("m", module(), at=at)
    assert "m" not in host
    assert not any("_modgraft_state" in m.__dict__ for m in host.model.modules())


def test_gpt2s_fused_projection_addressed_wrongly() -> None:
    host = mg.Host(HOSTS["gpt2"].model())
    for at, says in (
        ("*.c_attn[3/3]", r"the 3 parts count from 0; the last is \*\.c_attn\[2/3\]"),
        ("*.c_attn[0/5]", r"48 outputs, .* \(48 / 5 = 9\.6\); write .*c_attn\[0/3\]'"),
    ):
        with pytest.raises(mg.ModgraftError, match=says):
            host.implant("m", mg.LoRA(), at=at)


@torch.no_grad()
def test_a_weight_that_two_layers_share_is_not_merged_into() -> None:
    model = Attends()
    model.cross.out_proj.weight = model.attn.out_proj.weight
    host = stirred(model, mg.LoRA(rank=2), "attn.out_proj")
    with pytest.raises(mg.ModgraftError, match=r"attn\.out_proj, cross\.out_proj share it"):
        host.merge("m")
