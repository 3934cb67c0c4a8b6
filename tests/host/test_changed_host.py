"""A host that is changed under its modules, pickled, or copied to devices: right, or refused."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, multiprocessing, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import GPT2Config, GPT2LMHeadModel

import modgraft as mg

IDS = torch.arange(3, 17).view(2, 7)


def gpt2(tied: bool = False) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32, tie_word_embeddings=tied,
        bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def host_with(*sites: str, tied: bool = False) -> mg.Host:
    host = mg.Host(gpt2(tied)).eval()
    for i, at in enumerate(sites):
        host.implant(f"m{i}", mg.LoRA(rank=2), at=at)
    draw(host)
    return host


@torch.no_grad()
def draw(host: mg.Host) -> None:
    for parameter in host.implants.parameters():
        parameter.normal_(0, 0.3)


@torch.no_grad()
def logits(host: mg.Host, **kw: Any) -> Tensor:
    return host(IDS, **kw).logits


# -- changed under its modules --------------------------------------------------------------------


def test_a_layer_that_was_replaced() -> None:
    at, host = "lm_head", host_with("lm_head")
    assert not torch.equal(logits(host), logits(host, modules=None))
    host.model.resize_token_embeddings(54)
    for call in (logits, lambda host: host.merge("m0"), lambda host: host.generate(IDS)):
        with pytest.raises(mg.ModgraftError, match=f"{at}, the .* 'm0' acts in, is no longer part"):
            call(host)
    host.remove("m0")  # as the error says
    assert logits(host).shape[-1] == 54
    host.implant("m0", mg.LoRA(rank=2), at=at)
    draw(host)
    assert not torch.equal(logits(host), logits(host, modules=None))


def test_a_layer_that_was_resized() -> None:
    host = host_with("lm_head", tied=True)
    host.model.resize_token_embeddings(54)
    for call in (logits, lambda host: host.merge("m0")):
        with pytest.raises(
            mg.ModgraftError, match=r"'m0' at lm_head: .*had .*50, 16.*has .*54, 16"
        ):
            call(host)


def test_an_embedding_that_was_resized_serves_the_tokens_it_had() -> None:
    host = host_with("embedding", tied=True)
    before = logits(host)
    host.model.resize_token_embeddings(54)
    torch.testing.assert_close(logits(host)[..., :50], before)
    with pytest.raises(mg.ModgraftError, match=r"'m0' at transformer.wte.*had .*has .*54, 16"):
        host(torch.full((1, 2), 53))


def test_a_block_that_was_replaced_and_put_back() -> None:
    host = host_with("query")
    before, block = logits(host), host.model.transformer.h[1]
    host.model.transformer.h[1] = gpt2().transformer.h[1]
    with pytest.raises(mg.ModgraftError, match=r"transformer\.h\.1\.attn\.c_attn"):
        logits(host)
    host.model.transformer.h[1] = block
    assert torch.equal(logits(host), before)
    whole = host.model
    host.model = gpt2()
    with pytest.raises(mg.ModgraftError, match="no longer part"):
        logits(host)
    host.model = whole
    assert torch.equal(logits(host), before)


def test_a_layer_that_was_wrapped_is_where_it_was() -> None:
    host = host_with("query", "down")
    before = logits(host)
    for block in host.model.transformer.h:
        block.mlp = checkpoint_wrapper(block.mlp)
        block.attn.c_attn = checkpoint_wrapper(block.attn.c_attn)
    assert torch.equal(logits(host), before)


@pytest.mark.parametrize("move", ["host.model", "host.implants"])
def test_a_part_that_was_cast_alone(move: str) -> None:
    host = host_with("query")
    before = logits(host)
    {"host.model": host.model, "host.implants": host.implants}[move].double()
    # a module computes in the type of its layer
    torch.testing.assert_close(logits(host).double(), before.double(), rtol=1e-5, atol=1e-6)
    host.double()
    torch.testing.assert_close(logits(host), before.double(), rtol=1e-5, atol=1e-6)
    with pytest.raises(IndexError):  # what is no fault of the host stays what it is
        host(torch.full((1, 2), 77))


@pytest.mark.parametrize(
    "method", [mg.LoRA(rank=2), mg.LoRA(rank=2, dora=True), mg.Prefix(length=2)]
)
def test_a_module_that_was_implanted_in_inference_mode_can_train(
    method: Any, tmp_path: Path
) -> None:
    host = mg.Host(gpt2())
    at = None if isinstance(method, mg.Prefix) else ["query", "value"]
    with torch.inference_mode():
        host.implant("a", method, at=at)
        host(IDS)
        host.save("a", tmp_path / "a")
        host.remove("a")
        host.load(tmp_path / "a", "b")
        host.use("0.5*b" if at else "b")
        host(IDS)
    host.use("b")
    host(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and not p.is_inference() for p in host["b"].parameters())


# -- pickled --------------------------------------------------------------------------------------

METHODS: dict[str, Callable[[mg.Host], Any]] = {
    "lora": lambda h: h.implant("m", mg.LoRA(rank=2), at="query"),
    "adapter": lambda h: h.implant("m", mg.Adapter(width=3), at="block"),
    "prefix": lambda h: h.implant("m", mg.Prefix(length=2)),
    "prompt": lambda h: h.implant("m", mg.SoftPrompt(length=2)),
    "shared": lambda h: h.implant("m", mg.Shared(mg.LoRA(rank=2)), at=["query", "value"]),
    "tasks": lambda h: (
        h.implant(
            "m", mg.HyperNetwork(mg.LoRA(rank=2), tasks=("a", "b")), at="query", active=False
        ),
        h.use("m['b']"),
    ),
    "mixture": lambda h: (
        h.implant("x", mg.LoRA(rank=2), at="query", active=False),
        h.implant("y", mg.LoRA(rank=2), at="query", active=False),
        h.implant("m", mg.Mixture(["x", "y"], router=mg.TopK(1, level="token"))),
    ),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("by", ["pickle", "torch.save"])
def test_pickled_and_back(name: str, by: str) -> None:
    host = mg.Host(gpt2()).eval()
    METHODS[name](host)
    draw(host)
    before, bare = logits(host), logits(host, modules=None)
    assert not torch.equal(before, bare)
    if by == "pickle":
        twin = pickle.loads(pickle.dumps(host))
    else:
        file = io.BytesIO()
        torch.save(host, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert torch.equal(logits(twin), before)
    assert str(twin.composition) == str(host.composition)
    assert {
        type(a).__mro__[1:] == type(b).__mro__[1:]
        for a, b in zip(host.modules(), twin.modules(), strict=True)
    } == {True}
    draw(twin)
    assert torch.equal(logits(host), before)
    twin.use(None)
    assert torch.equal(logits(twin), bare)
    twin.implant("new", mg.LoRA(rank=2), at="down")
    twin.remove("m")
    twin.remove("new")
    assert torch.equal(logits(twin), bare)


def in_another_process(host: mg.Host, answers: Any) -> None:
    answers.put((logits(host).numpy(), logits(host, modules=None).numpy()))


def test_sent_to_a_process_that_was_spawned() -> None:
    """Also what modules need hooked in each process: prefixes the attention."""
    host = host_with("query")
    host.implant("p", mg.Prefix(length=2))
    draw(host)
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=in_another_process, args=(host, answers))
    process.start()
    there = [torch.from_numpy(each) for each in answers.get(timeout=120)]
    process.join(60)
    for one, other in zip(there, (logits(host), logits(host, modules=None)), strict=True):
        torch.testing.assert_close(one, other)


class OfItsOwn(nn.Linear):
    """A layer that says itself how it is pickled."""

    def __reduce__(self) -> Any:
        return OfItsOwn, (self.in_features, self.out_features)


def test_a_layer_with_a_way_of_its_own_is_made_by_that_and_has_the_modules() -> None:
    host = mg.Host(nn.Sequential(OfItsOwn(3, 3)))
    host.implant("m", mg.LoRA(rank=1), at="0")
    draw(host)
    for twin in (pickle.loads(pickle.dumps(host)), copy.deepcopy(host)):
        twin.load_state_dict(host.state_dict())  # which its way leaves out
        assert torch.equal(twin(torch.eye(3)), host(torch.eye(3)))
        assert torch.equal(twin(torch.eye(3), modules=None), host(torch.eye(3), modules=None))
    assert type(copy.deepcopy(host.model)[0]) is OfItsOwn  # type: ignore[index]


# -- copied to devices ----------------------------------------------------------------------------


def replicate(model: nn.Module) -> list[nn.Module]:
    """What ``nn.DataParallel`` does first for each device."""
    return [module._replicate_for_data_parallel() for module in model.modules()]


def test_data_parallel_is_refused_where_modules_would_stay_behind() -> None:
    host = mg.Host(gpt2())
    replicate(host)
    host.implant("m", mg.LoRA(rank=2), at="query")
    for model in (host, host.model):
        with pytest.raises(mg.ModgraftError, match=r"nn\.DataParallel.*DistributedDataParallel"):
            replicate(model)
    host.remove("m")
    replicate(host)


def test_modules_follow_the_mode_of_their_layer() -> None:
    """Who puts the model, or a part of it, into a mode puts its modules into it."""
    torch.manual_seed(0)
    host = mg.Host(nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))))
    host.implant("a", mg.LoRA(rank=2, dropout=0.5), at=["0", "2"])
    host.implant("ad", mg.Adapter(width=2), at="0")
    nn.init.normal_(host["a"].places[0].B)  # type: ignore[arg-type]
    nn.init.normal_(host["a"].places[1].B)  # type: ignore[arg-type]

    def modes() -> list[bool]:
        return [host.model[i].training for i in (0, 2)] + [p.training for p in host["a"].places]

    x = torch.randn(5, 4)
    host.train()
    host.model.eval()
    assert modes() == [False] * 4
    assert not host["ad"].places[0].training
    assert torch.equal(host(x), host(x))
    torch.testing.assert_close(host(x, modules="a"), host.merge("a")(x))
    host.model[2].train()
    assert modes() == [False, True, False, True]
    assert not torch.equal(host(x), host(x))
    host.eval()
    assert modes() == [False] * 4
    host.model.train()
    assert modes() == [True] * 4
    for layer in host.model.modules():  # as Lightning puts modes back
        layer.training = False
    assert modes() == [False] * 4
    host.model.train()
    assert host["ad"].places[0].training
    host.remove("a")
    assert host.model[2].eval().training is False


def test_a_new_module_is_in_the_mode_of_its_layer() -> None:
    host = mg.Host(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).train())
    host.model.eval()
    host.model[1].train()
    host.implant("a", mg.LoRA(rank=2, dropout=0.5), at=nn.Linear)
    assert [place.training for place in host.implants["a"].places] == [False, True]


def test_a_buffer_that_is_sparse_is_left_where_it_is() -> None:
    model = nn.Sequential(nn.Linear(6, 6))
    model.register_buffer("graph", torch.eye(6).to_sparse())
    host = mg.Host(model)
    host.implant("a", mg.LoRA(rank=2), at="0")
    host.train()
    host(torch.randn(3, 6)).sum().backward()
    assert not host.probe({"input": torch.randn(3, 6)}).faults
