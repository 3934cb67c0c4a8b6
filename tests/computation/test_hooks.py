"""Hooks of torch on a module at a site: empty dictionaries of them are made when asked for."""

import copy
import pickle
from collections import OrderedDict

import pytest
import torch
from torch import nn

import modgraft as mg


@pytest.fixture
def place() -> nn.Module:
    host = mg.Host(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)))
    host.implant("qa", mg.Rescale(), at="0")
    return host["qa"].places[0]


def hooks_of(module: nn.Module) -> list[str]:
    torchs = [name for name, value in vars(nn.Module()).items() if isinstance(value, OrderedDict)]
    return [name for name in torchs if name in vars(module)]


def test_no_dictionary_is_kept_until_it_is_asked_for(place):
    assert hooks_of(nn.Linear(2, 2))  # torch's own modules have them
    assert hooks_of(place) == []
    assert place._forward_hooks is place._forward_hooks == OrderedDict()
    assert hooks_of(place) == ["_forward_hooks"]


def test_two_modules_have_hooks_of_their_own(place):
    host = mg.Host(nn.Linear(4, 4))
    host.implant("a", mg.LoRA(rank=2), at="*")
    host.implant("b", mg.LoRA(rank=2), at="*")
    one, other = host["a"].places[0], host["b"].places[0]
    one.register_forward_pre_hook(lambda module, args: None)
    assert len(one._forward_pre_hooks) == 1
    assert len(other._forward_pre_hooks) == 0


def test_every_hook_runs(place):
    seen = []
    place.register_state_dict_pre_hook(lambda m, prefix, keep: seen.append("saving"))
    place.register_load_state_dict_pre_hook(lambda m, *args: seen.append("loading"))
    place.register_load_state_dict_post_hook(lambda m, keys: seen.append("loaded"))
    place.load_state_dict(place.state_dict())
    assert seen == ["saving", "loading", "loaded"]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_keeps_its_hooks(place, copied):
    place.register_forward_hook(print)
    again = copied(place)
    assert list(again._forward_hooks.values()) == [print]
    assert again._backward_hooks == OrderedDict()


def test_a_buffer_may_come_later(place):
    place.register_buffer("scratch", torch.zeros(2), persistent=False)
    assert "scratch" not in place.state_dict()
    assert "scratch" in dict(place.named_buffers())
