from __future__ import annotations

import random

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from modgraft.core.errors import ModgraftError
from modgraft.training.stream import Repeated, Stream, ids_of, label_tokens, next_tokens, to_device
from training.tiny import Pairs, collate, loader


def ids(batches) -> list[str]:
    return [i for b in batches for i in b["ids"]]


class Endless(IterableDataset):
    """Yield rows in an order that the global generator draws while they are read."""

    def __iter__(self):
        rows = [{"ids": f"r{i}"} for i in range(12)]
        random.shuffle(rows)
        for row in rows:
            yield row | {"noise": torch.rand(())}


LOADERS = {
    "shuffled": lambda: loader(),
    "generator": lambda: loader(generator=torch.Generator().manual_seed(9)),
    "iterable": lambda: DataLoader(
        Endless(),
        batch_size=4,
        collate_fn=lambda rows: {
            "ids": [r["ids"] for r in rows],
            "input_ids": torch.stack([r["noise"] for r in rows]),
        },
    ),
    "list": lambda: list(loader(noisy=False, shuffle=False)),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_any_position_is_replayed(kind):
    torch.manual_seed(1)
    whole = list(Stream(LOADERS[kind](), seed=3).read(2))
    torch.manual_seed(2)  # what the caller's generators hold plays no part
    random.seed(2)
    tail = []
    for batch in Stream(LOADERS[kind](), seed=3).read(2, start=1):
        torch.rand(5), random.random()  # and neither does what training draws in between
        tail.append(batch)
    assert len(tail) == len(whole) - 1
    for a, b in zip(whole[1:], tail, strict=True):
        assert a["ids"] == b["ids"]
        assert torch.equal(a["input_ids"], b["input_ids"])


def test_epochs_and_seeds_differ_and_each_covers_the_data():
    orders = [ids(Stream(loader(), seed=s).read(e)) for s in (0, 1) for e in (0, 1)]
    assert len({tuple(o) for o in orders}) == 4
    assert all(sorted(o) == sorted(f"q{i}" for i in range(22)) for o in orders)


def test_global_generators_are_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    given = torch.Generator().manual_seed(9)
    before = given.get_state()
    list(Stream(loader(generator=given)).read(0))
    assert torch.rand(1) == expected
    assert torch.equal(given.get_state(), before)


def test_the_order_does_not_depend_on_workers():
    plain = ids(Stream(loader(), seed=1).read(0, start=2))
    assert ids(Stream(loader(num_workers=1), seed=1).read(0, start=2)) == plain


@pytest.mark.parametrize("kind", ["shuffled", "list", "iterable"])
def test_processes_share_an_epoch(kind):
    alone = [b["ids"] for b in Stream(LOADERS[kind]()).read(0)]  # 6 batches, "iterable": 3
    shares = [list(Stream(LOADERS[kind](), rank=r, world=4).read(0)) for r in range(4)]
    assert len({len(s) for s in shares}) == 1
    every = [b for share in shares for b in share]
    assert sorted(b["ids"] for b in every if not isinstance(b, Repeated)) == sorted(alone)
    again = [b["ids"] for b in every if isinstance(b, Repeated)]
    assert len(again) == -len(alone) % 4
    assert all(b in alone for b in again)


def test_loaders_that_cannot_serve():
    with pytest.raises(ModgraftError, match="read only once"):
        Stream(b for b in [{}])
    with pytest.raises(ModgraftError, match="no batches"):
        Stream(loader(n=2, batch=4, drop_last=True))
    with pytest.raises(ModgraftError, match="batch 0 of epoch 0 is a list"):
        next(Stream([[1, 2]]).read(0))


def test_first_ids_and_ids():
    stream = Stream(loader(), seed=4)
    assert ids_of(stream.first()) == next(stream.read(0))["ids"]
    assert ids_of(stream.reread(2, 3)) == list(stream.read(2))[3]["ids"]
    assert ids_of({"qid": [1, 2]}, ("qid",)) == ["1", "2"]
    assert ids_of({"x": 1}) is None


def test_moving_reaches_everything_with_to():
    class Mover:
        def to(self, device):
            return f"on {device}"

    moved = to_device(
        {"a": torch.ones(1), "side": {"image": Mover()}, "n": 3, "l": [torch.ones(1)]},
        torch.device("meta"),
    )
    assert moved["a"].device.type == moved["l"][0].device.type == "meta"
    assert (moved["side"], moved["n"]) == ({"image": "on meta"}, 3)


def test_token_counts():
    labels = torch.tensor([[5, 6, -100], [7, -100, -100]])
    assert label_tokens({"labels": labels}) == 3
    assert next_tokens({"labels": labels}) == 1


def test_pairs_are_what_the_tests_say():
    batch = collate([Pairs()[0], Pairs()[5]])
    assert label_tokens(batch) == 2 + 7
