"""A module of a model loads where that model stands under another path or another head."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)

import modgraft as mg

CONFIG = BertConfig(
    vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=24, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip
BATCH = {"input_ids": torch.tensor([[2, 5, 7, 3], [2, 9, 4, 3]])}


class Own(nn.Module):
    """An encoder within a module of one's own."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.parts = nn.ModuleDict({"encoder": bert})
        self.head = nn.Linear(16, 3)

    def forward(self, **batch: Tensor) -> Tensor:
        return self.head(self.parts["encoder"](**batch).last_hidden_state[:, 0])


class Around(nn.Module):
    """A model within another that gives what it gives."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **batch: Tensor) -> Any:
        return self.model(**batch)


def _encoder() -> BertModel:
    torch.manual_seed(0)
    return BertModel(CONFIG).eval()


def _under(kind: type) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        torch.manual_seed(1)
        model = kind(CONFIG)
        model.bert = _encoder()
        return model

    return make


def _without_pooler() -> nn.Module:
    torch.manual_seed(2)
    model = BertForTokenClassification(CONFIG)
    model.bert.load_state_dict(_encoder().state_dict(), strict=False)
    return model.eval()


HOSTS: dict[str, Callable[[], nn.Module]] = {
    "encoder": _encoder,
    "tokens": _without_pooler,
    "classifier": _under(BertForSequenceClassification),
    "masked": _under(BertForMaskedLM),
    "own": lambda: Own(_encoder()),
}
PATHS = {
    "encoder": "",
    "classifier": "bert.",
    "masked": "bert.",
    "tokens": "bert.",
    "own": "parts.encoder.",
}


def _hidden(host: mg.Host, name: str) -> Tensor:
    """Run the host, and return what its encoder puts out."""
    seen: list[Tensor] = []
    encoder: Any = host.model.get_submodule(PATHS[name].removesuffix("."))
    hook = encoder.register_forward_hook(lambda *run: seen.append(run[2].last_hidden_state))
    with torch.no_grad():
        host(**BATCH)
    hook.remove()
    return seen[0]


def _saved(name: str, folder: Path, format: str = "modgraft") -> Tensor:
    host = mg.Host(HOSTS[name]()).eval()
    host.implant("qa", mg.LoRA(rank=2), at=["query", "up"])
    host.implant("other", mg.LoRA(rank=2), at="query", active=False)
    torch.manual_seed(1)
    with torch.no_grad():
        for place in host["qa"].places:
            place.B.normal_()
    host.save("qa", folder, format=format)
    return _hidden(host, name)


@pytest.mark.filterwarnings("ignore:.*(does not hold|did not train with)")  # of PEFT's folders
@pytest.mark.parametrize("format", ["modgraft", "peft"])
@pytest.mark.parametrize("there", HOSTS)
def test_a_module_loads_into_another_model_around_its_own(
    there: str, format: str, tmp_path: Path
) -> None:
    want = _saved(there, tmp_path / "qa", format)
    for name, make in HOSTS.items():
        host = mg.Host(make()).eval()
        bare = _hidden(host, name)
        loaded = host.load(tmp_path / "qa")
        assert all(path.startswith(f"{PATHS[name]}encoder.layer.") for path in loaded.paths)
        assert torch.equal(_hidden(host, name), want)
        assert not torch.equal(bare, want)
        host.save("qa", tmp_path / f"again_{name}")  # and on from there
        again = mg.Host(HOSTS["own"]()).eval()
        again.load(tmp_path / f"again_{name}", lazy=True)
        with again.using("qa"):
            assert torch.equal(_hidden(again, "own"), want)


def test_other_weights_of_the_model_within_are_refused(tmp_path: Path) -> None:
    _saved("classifier", tmp_path / "qa")
    other = copy.deepcopy(HOSTS["own"]())
    other.parts["encoder"].embeddings.LayerNorm.bias.data.add_(1.0)
    host = mg.Host(other)
    with pytest.raises(mg.ModgraftError, match=r"another host \(weights differ"):
        host.load(tmp_path / "qa")
    with pytest.warns(UserWarning, match="another host"):
        host.load(tmp_path / "qa", strict=False)
    larger = BertConfig(**{**CONFIG.to_dict(), "intermediate_size": 32})
    with pytest.raises(mg.ModgraftError, match="another host"):
        mg.Host(BertModel(larger)).load(tmp_path / "qa", strict=False)


@pytest.mark.parametrize("precision", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("there", ["encoder", "classifier", "own"])
def test_the_model_within_in_another_precision_is_called_that(
    there: str, precision: torch.dtype, tmp_path: Path
) -> None:
    _saved(there, tmp_path / "qa")
    whole = HOSTS.keys() - {"tokens"}  # without a pooler, rounded weights are other weights
    for make in map(HOSTS.__getitem__, whole):
        host = mg.Host(make().to(precision))
        with pytest.raises(mg.ModgraftError, match="was trained in this host in another precis"):
            host.load(tmp_path / "qa")
        host.load(tmp_path / "qa", strict=False)


def test_what_cannot_be_placed_is_refused(tmp_path: Path) -> None:
    _saved("encoder", tmp_path / "qa")
    twice = nn.ModuleDict({"left": _encoder(), "right": _encoder()})
    with pytest.raises(mg.ModgraftError, match="several times, at 'left', 'right'"):
        mg.Host(twice).load(tmp_path / "qa")
    host = mg.Host(HOSTS["classifier"]())
    host.implant("qa", mg.LoRA(rank=2), at="query")
    host.model.classifier.requires_grad_(True)
    host.save("qa", tmp_path / "head")  # with a head, which other hosts have not
    with pytest.raises(mg.ModgraftError, match="another host"):
        mg.Host(_encoder()).load(tmp_path / "head", strict=False)
    prompt = mg.Host(_encoder())
    prompt.implant("p", mg.SoftPrompt(length=2))
    prompt.save("p", tmp_path / "p")
    with pytest.raises(mg.ModgraftError, match="another host"):
        mg.Host(HOSTS["classifier"]()).load(tmp_path / "p")


@pytest.mark.parametrize("format", ["modgraft", "peft"])
def test_a_module_and_its_head_load_where_the_classifier_is_within_another_model(
    format: str, tmp_path: Path
) -> None:
    wraps = (
        HOSTS["classifier"],
        *(lambda w=w: w(HOSTS["classifier"]()) for w in (Around, nn.DataParallel)),
    )
    for i, there in enumerate(wraps):
        host = mg.Host(there())
        host.implant("qa", mg.LoRA(rank=2), at="query")
        host.model.requires_grad_(False)
        for name, parameter in host.model.named_parameters():
            parameter.requires_grad_("classifier" in name)
        labelled = BATCH | {"labels": torch.tensor([0, 1])}
        host.fit([labelled], train=["qa"], steps=2, progress=False)
        host.save("qa", tmp_path / str(i), format=format)
        want = host.eval()(**BATCH).logits
        for here in wraps:
            other = mg.Host(here()).eval()
            other.load(tmp_path / str(i))
            assert torch.equal(other(**BATCH).logits, want)


def test_a_model_without_a_part_in_the_middle_is_another(tmp_path: Path) -> None:
    """What both have is compared: a part that only one has is left out if it is a whole child."""
    _saved("tokens", tmp_path / "qa")
    moved = HOSTS["encoder"]()
    moved.encoder.layer[1].output.dense.bias.data[0] += 1  # type: ignore[union-attr,index]
    with pytest.raises(mg.ModgraftError, match=r"another host \(weights differ"):
        mg.Host(moved).load(tmp_path / "qa")
    with pytest.warns(UserWarning, match=r"encoder.layer.1.output.dense.bias by \d"):
        mg.Host(moved).load(tmp_path / "qa", strict=False)
    deeper = BertConfig(**{**CONFIG.to_dict(), "num_hidden_layers": 3})
    other = BertConfig(**{**CONFIG.to_dict(), "layer_norm_eps": 1e-3})
    for config in (deeper, other):
        torch.manual_seed(0)
        with pytest.raises(mg.ModgraftError, match="another host"):
            mg.Host(BertModel(config)).load(tmp_path / "qa", strict=False)


class Chain(nn.Module):
    """Layers in a row, any of which may be left out."""

    def __init__(self, *parts: str) -> None:
        super().__init__()
        self.parts = parts
        for i, part in enumerate(("front", "middle", "end")):
            torch.manual_seed(i)
            if part in parts:
                setattr(self, part, nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = getattr(self, part)(x)
        return x


def test_a_part_in_front_makes_another_model(tmp_path: Path) -> None:
    """What the sites read is other numbers then."""
    host = mg.Host(Chain("front", "middle", "end"))
    host.implant("a", mg.LoRA(rank=1), at="middle")
    host.save("a", tmp_path)
    with pytest.raises(mg.ModgraftError, match="another host"):
        mg.Host(Chain("middle", "end")).load(tmp_path, strict=False)
