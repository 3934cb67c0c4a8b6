"""Layers whose weights are no real numbers, and modules made where tensors have no data."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import modgraft as mg


class Codes(nn.Linear):
    """Reads its weight from codes, as quantised layers do."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.to(input.dtype) / 10, self.bias)


def codes(dtype: torch.dtype) -> nn.Module:
    layer = Codes(4, 4)
    layer.weight = nn.Parameter((10 * layer.weight.detach()).to(dtype), requires_grad=False)
    return nn.Sequential(layer, nn.Linear(4, 4))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize(
    "module", [mg.LoRA(rank=2), mg.LoRA(rank=2, dora=True), mg.Rescale(), mg.SparseDelta()]
)
def test_codes_take_no_change_and_their_layer_takes_an_adapter(
    module: mg.Computation, dtype: torch.dtype
) -> None:
    host, x = mg.Host(codes(dtype)), torch.randn(3, 4)
    bare, kind = host(x), type(host.model[0])
    with pytest.raises(
        mg.ModgraftError, match=rf"at 0: its weight is {dtype}, codes that.*Adapter"
    ):
        host.implant("m", module, at=["0", "1"])
    assert type(host.model[0]) is kind
    assert not host.implants
    host.implant("m", mg.Adapter(width=2), at="0")
    assert torch.equal(host(x), bare)
    assert host["m"].places[0].down.weight.dtype == torch.float32
    host.implant("n", module, at="1")
    host(x).sum().backward()


def test_a_dynamically_quantised_layer() -> None:
    made = torch.ao.quantization.quantize_dynamic
    with pytest.warns(Warning, match="deprecated"):
        host = mg.Host(made(nn.Sequential(nn.Linear(4, 6)), {nn.Linear}, dtype=torch.qint8))
    x = torch.randn(3, 4)
    bare = host(x)
    with pytest.raises(
        mg.ModgraftError, match=r"a torch\.ao\S+\.Linear has no weight that.*Adapter"
    ):
        host.implant("m", mg.LoRA(rank=2), at="0")
    place = host.implant("m", mg.Adapter(width=2), at="0").places[0]
    with torch.no_grad():
        place.up.weight.normal_()
    torch.testing.assert_close(host(x), place(bare, x, None))


COMPLEX: dict[str, Callable[[], mg.Computation]] = {
    "adapter": lambda: mg.Adapter(width=2),
    "parallel": lambda: mg.ParallelAdapter(width=2),
    "compacter": lambda: mg.Compacter(width=2, n=2),
    "invertible": lambda: mg.InvertibleAdapter(reduction=2),
    "conv": lambda: mg.ConvAdapter(),
    "fusion": lambda: mg.GatedFusion(dim=3),
}


@pytest.mark.parametrize("make", COMPLEX.values(), ids=COMPLEX)
def test_complex_outputs_take_no_function_of_real_ones(make: Callable[[], mg.Computation]) -> None:
    host = mg.Host(nn.Sequential(nn.Linear(4, 4, dtype=torch.complex64)))
    with pytest.raises(mg.ModgraftError, match=r"at 0: this Linear puts out complex numbers.*LoRA"):
        host.implant("m", make(), at="0")
    assert type(host.model[0]) is nn.Linear


def test_a_weight_of_complex_numbers_takes_lora() -> None:
    host, x = mg.Host(nn.Sequential(nn.Linear(4, 4, dtype=torch.complex64))), torch.randn(3, 4) + 1j
    place = host.implant("m", mg.LoRA(rank=2), at="0").places[0]
    with torch.no_grad():
        place.B.normal_()
    layer = host.model[0]
    expected = F.linear(x, layer.weight + place.B @ place.A, layer.bias)
    torch.testing.assert_close(host(x), expected)
    torch.testing.assert_close(host.merge("m")(x), expected)


@pytest.mark.parametrize(
    "module", [mg.LoRA(rank=2), mg.Adapter(width=2), mg.Shared(mg.LoRA(rank=2))]
)
def test_modules_made_where_tensors_have_no_data(module: mg.Computation) -> None:
    made = []
    for device in ("cpu", "meta"):
        torch.manual_seed(0)
        host, x = mg.Host(nn.Sequential(nn.Linear(4, 4))), torch.ones(3, 4)
        with torch.device(device):
            host.implant("m", module, at="0")
        assert torch.isfinite(host(x)).all()
        made.append(host["m"].tensors())
    for key, tensor in made[0].items():
        assert torch.equal(tensor, made[1][key])
