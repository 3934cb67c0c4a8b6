"""What routers add to the loss reaches it wherever it is computed, or is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import modgraft as mg

IDS = torch.randint(3, 60, (3, 6), generator=torch.Generator().manual_seed(0))


def host_of(router: mg.Router, names: str = "ab") -> mg.Host:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, pad_token_id=0,
    )  # fmt: skip
    host = mg.Host(LlamaForCausalLM(config))
    for name in names:
        host.implant(name, mg.LoRA(rank=2), at=["query", "up"], active=False)
    host.implant("mix", mg.Mixture(list(names), router=router))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in host.implants.parameters():
            parameter.normal_(0, 0.3)
    host.use("mix")
    return host.train()


def loss_of(run: Any, **how: Any) -> torch.Tensor:
    torch.manual_seed(7)
    return run(input_ids=IDS, labels=IDS, **how)[0]


@pytest.mark.filterwarnings("ignore")  # of where the graph ends, and of what torch traces there
def test_in_a_tuple_and_in_a_compiled_host() -> None:
    router = mg.NoisyTopK(1, level="token")
    expected = loss_of(host_of(router))
    bare = loss_of(host_of(router).model)
    assert abs(expected.item() - bare.item()) > 1e-3  # which adds nothing
    torch.testing.assert_close(loss_of(host_of(router), return_dict=False), expected)
    torch._dynamo.reset()
    compiled = loss_of(torch.compile(host_of(router), backend="eager"))
    torch.testing.assert_close(compiled, expected)


@pytest.mark.parametrize(
    "router", [mg.NoisyTopK(1, level="token"), mg.Top1("reinforce", level="token")]
)
def test_out_of_a_reentrant_block_they_are_refused(router: mg.Router) -> None:
    host = host_of(router)
    host.model.activation_checkpointing_enable({"use_reentrant": True})  # type: ignore[operator]
    with pytest.raises(mg.ModgraftError, match="use_reentrant=False"):
        loss_of(host)
    host.model.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    torch.testing.assert_close(loss_of(host), loss_of(host_of(router)))


def test_a_router_without_a_loss_of_its_own_runs_in_a_reentrant_block() -> None:
    gradients = []
    for reentrant in (None, True):
        host = host_of(mg.Soft(level="token"))
        if reentrant:
            host.model.activation_checkpointing_enable(  # type: ignore[operator]
                {"use_reentrant": True}
            )
        loss_of(host).backward()
        gradients.append([p.grad for p in host.implants.parameters()])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_module_that_left_before_backward_is_named(reentrant: bool) -> None:
    host = host_of(mg.Soft(level="token"))
    host.model.activation_checkpointing_enable(  # type: ignore[operator]
        {"use_reentrant": reentrant}
    )
    loss = loss_of(host, modules="a")
    host.remove("mix")
    host.remove("a")
    with pytest.raises(mg.ModgraftError, match="'a' was removed between a forward and its back"):
        loss.backward()
