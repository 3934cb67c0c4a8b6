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
    without = loss_of(host_of(mg.NoisyTopK(1, level="token", importance=0.0, load=0.0)))
    assert abs(expected.item() - without.item()) > 1e-3
    torch.testing.assert_close(loss_of(host_of(router), return_dict=False), expected)
    torch._dynamo.reset()
    compiled = loss_of(torch.compile(host_of(router), backend="eager"))
    torch.testing.assert_close(compiled, expected)


ADDING = [mg.NoisyTopK(1, level="token"), mg.Top1("reinforce", level="token")]


def trained(host: mg.Host, run: Any, **how: Any) -> list[torch.Tensor]:
    """Return the loss of a call, and its gradients, before any other loss is known."""
    host.zero_grad()
    for place in host["mix"].places:
        place.baseline = None  # type: ignore[assignment]
    loss = loss_of(run, **how)
    loss.backward()
    own = list(host.implants.parameters())
    return [loss.detach(), *(torch.zeros_like(p) if p.grad is None else p.grad for p in own)]


@pytest.mark.filterwarnings("ignore")  # of where the graph ends
@pytest.mark.parametrize("router", [*ADDING, mg.Soft(level="task"), mg.NoisyTopK(1, level="task")])
def test_in_the_model_called_without_the_host(router: mg.Router) -> None:
    host = host_of(router)
    expected = trained(host, host)
    runs: list[Any] = [host.model]
    if router is ADDING[0]:
        torch._dynamo.reset()
        runs.append(torch.compile(host.model, backend="eager"))
    for run in runs:
        for _ in range(2):  # what one call chose and added is not the next one's
            torch.testing.assert_close(trained(host, run), expected)
    with host.using("mix"):
        for _ in range(2):
            torch.testing.assert_close(trained(host, host.model, return_dict=False), expected)
    assert not host._context.compiled.bare.routings  # nothing holds the graph


@pytest.mark.filterwarnings("ignore")  # of where the graph ends
def test_examples_are_routed_where_the_host_is_called() -> None:
    host = host_of(mg.Soft(level="example"))
    for run in (host.model, torch.compile(host.model, backend="eager")):
        with pytest.raises(mg.ModgraftError, match="call the host and not its model"):
            loss_of(run)


@pytest.mark.parametrize("router", ADDING)
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
