"""Small hosts and loaders that the training tests share; also imported by their subprocesses."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

torch.set_num_threads(1)


def t5(seed: int = 0, dropout: float = 0.1) -> nn.Module:
    """A T5 of 9k parameters with dropout."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=40,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_decoder_layers=1,
        num_heads=2,
        dropout_rate=dropout,
        decoder_start_token_id=0,
        tie_word_embeddings=True,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return T5ForConditionalGeneration(config)


class Pairs(Dataset):
    """Copy a sequence; label lengths differ, and reading draws noise from the global generator."""

    def __init__(self, n: int = 22, noisy: bool = True) -> None:
        g = torch.Generator().manual_seed(1)
        self.rows = [torch.randint(2, 40, (7,), generator=g) for _ in range(n)]
        self.noisy = noisy

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, object]:
        row = self.rows[i].clone()
        labels = row.clone()
        labels[2 + i % 6 :] = -100
        if self.noisy:
            row[torch.randint(0, 7, ())] = 1
        return {"input_ids": row, "labels": labels, "ids": f"q{i}"}


def collate(rows: list[dict]) -> dict:
    return {
        "input_ids": torch.stack([r["input_ids"] for r in rows]),
        "labels": torch.stack([r["labels"] for r in rows]),
        "ids": [r["ids"] for r in rows],
    }


def loader(n: int = 22, batch: int = 4, noisy: bool = True, **more: object) -> DataLoader:
    return DataLoader(
        Pairs(n, noisy), batch_size=batch, **({"shuffle": True, "collate_fn": collate} | more)
    )


class Line(nn.Module):
    """y = xW + b with a mean squared error over the entries that are not NaN: easy by hand."""

    def __init__(self, dim: int = 3, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(dim, 1, dtype=dtype)
        self.frozen = nn.Parameter(torch.ones(2, 2, dtype=dtype), requires_grad=False)
        self.norm = nn.BatchNorm1d(dim, dtype=dtype)
        self.use_norm = False

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> SimpleNamespace:
        x = self.norm(x) if self.use_norm else x
        keep = ~y.isnan()
        error = (self.linear(x)[..., 0] - y)[keep]
        return SimpleNamespace(loss=(error**2).mean())


def points(n: int, count: int = 8, dim: int = 3) -> list[dict]:
    """`count` batches of n points on a line with noise; a third of the targets of some are NaN."""
    g = torch.Generator().manual_seed(3)
    batches = []
    for i in range(count):
        x = torch.randn(n, dim, generator=g, dtype=torch.float64)
        y = x.sum(-1) + torch.randn(n, generator=g, dtype=torch.float64)
        y[: i % n] = torch.nan
        batches.append({"x": x, "y": y, "ids": [f"{i}.{j}" for j in range(n)]})
    return batches
