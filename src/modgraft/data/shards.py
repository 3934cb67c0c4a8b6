"""A corpus as shards of tokens on disk, which are mapped into memory and read by position."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import DataLoader, Dataset

from modgraft.core.errors import DataError, ModgraftError
from modgraft.core.files import folder_path, read_json, write_json

CARD = "shards.json"
_PIECE = 1 << 16  # characters that are tokenized at a time
_REMEDY = "write the shards again, with write_shards"


# -- tokenizers ----------------------------------------------------------------------------------


def character_tokenizer(text: str) -> Tokenizer:
    """Make the tokenizer whose tokens are the characters of ``text``, in their order.

    Raises:
        ModgraftError: for an empty text.
    """
    if not text:
        raise ModgraftError("the corpus is empty: it has no characters to make tokens of")
    made = Tokenizer(
        models.WordLevel({c: i for i, c in enumerate(sorted(set(text)))}, unk_token="")
    )
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    made.decoder = decoders.Fuse()
    return made


def bpe_tokenizer(text: str, vocab_size: int) -> Tokenizer:
    """Train a byte-pair encoding (Sennrich et al. 2016), which starts from the 256 bytes.

    Raises:
        ModgraftError: for an empty text, or fewer than 256 tokens.
    """
    if not text:
        raise ModgraftError("the corpus is empty: it has no pairs to make tokens of")
    if vocab_size < 256:
        raise ModgraftError(f"vocab_size={vocab_size}: the 256 bytes are tokens in any case")
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(_pieces(text), trainer)
    return made


def tokens_of(tokenizer: Tokenizer, text: str, name: str = "the text") -> np.ndarray:
    """Return the tokens of a text, int64 ``[n]``.

    Raises:
        ModgraftError: for a character that the tokenizer does not have; it says which, and where.
    """
    ids, line = [], 1
    for piece in _pieces(text):
        if unknown := sorted(set(piece) - _known(tokenizer, piece)):
            at = min(piece.index(c) for c in unknown)
            raise ModgraftError(
                f"{name}, line {line + piece.count(chr(10), 0, at)}: the character {piece[at]!r} "
                f"is none of the {tokenizer.get_vocab_size()} tokens of this tokenizer; leave it "
                f"out, or train with one of bytes (bpe)"
            )
        ids.append(np.array(tokenizer.encode(piece).ids, dtype=np.int64))
        line += piece.count("\n")
    return np.concatenate(ids) if ids else np.zeros(0, dtype=np.int64)


def _known(tokenizer: Tokenizer, text: str) -> set[str]:
    """Return the characters of a text that a tokenizer has tokens for."""
    if isinstance(tokenizer.model, models.BPE):
        unknown = tokenizer.model.unk_token  # None: it has every byte
        if unknown is None:
            return set(text)
        return {c for c in set(text) if unknown not in tokenizer.encode(c).tokens}
    return {c for c in set(text) if tokenizer.token_to_id(c) is not None}


def _pieces(text: str) -> Iterator[str]:
    """Yield a text in pieces that end with a line, where lines are not too long."""
    at = 0
    while at < len(text):
        end = text.rfind("\n", at, at + _PIECE) + 1 if at + _PIECE < len(text) else len(text)
        end = end or at + _PIECE
        yield text[at:end]
        at = end


def tokenizer_key(tokenizer: Tokenizer) -> str:
    """Return what identifies a tokenizer, a SHA-256 of all that it is."""
    return sha256(tokenizer.to_str().encode()).hexdigest()


# -- shards --------------------------------------------------------------------------------------


def write_shards(
    folder: str | Path, tokenizer: Tokenizer, texts: Iterable[str], *, size: int = 1 << 24
) -> Shards:
    """Write texts as tokens, ``size`` of them a file, with the tokenizer beside.

    Args:
        folder: a folder; what is in it under the same names is replaced, the card last.
        tokenizer: turns texts into tokens.
        texts: the texts, which follow one another without anything between them.
        size: the tokens in a file.

    Raises:
        ModgraftError: for no text, or a character that the tokenizer does not have.
    """
    home = folder_path(folder, "write_shards(folder)")
    home.mkdir(parents=True, exist_ok=True)
    kind = np.dtype("<u2" if tokenizer.get_vocab_size() <= 1 << 16 else "<u4")
    files: list[dict[str, Any]] = []
    rest = np.zeros(0, dtype=kind)

    def put(tokens: np.ndarray) -> None:
        name = f"tokens-{len(files):05}.bin"
        data = tokens.astype(kind).tobytes()
        (home / name).write_bytes(data)
        files.append({"name": name, "tokens": len(tokens), "sha256": sha256(data).hexdigest()})

    for number, text in enumerate(texts):
        new = tokens_of(tokenizer, text, f"text {number}").astype(kind)
        rest = np.concatenate([rest, new])
        while len(rest) >= size:
            put(rest[:size])
            rest = rest[size:]
    if len(rest):
        put(rest)
    if not files:
        raise ModgraftError(f"the corpus is empty: no token was written to {home}")
    tokenizer.save(str(home / "tokenizer.json"))
    card = {"format": 1, "dtype": kind.str, "files": files, "tokenizer": tokenizer_key(tokenizer)}
    write_json(home / CARD, card | {"vocab_size": tokenizer.get_vocab_size()})
    return Shards.open(home)


@dataclass(frozen=True)
class Shards(Sequence[int]):
    """The tokens of a corpus, one after another, in files that are mapped into memory.

    Attributes:
        folder: where they are.
        files: each file's tokens.
        starts: the position of each file's first token, and at the end that after the last.
        tokenizer: the key of the tokenizer that made them.
        vocab_size: how many tokens it has.
    """

    folder: Path
    files: tuple[np.ndarray, ...]
    starts: np.ndarray
    tokenizer: str
    vocab_size: int

    @classmethod
    def open(cls, folder: str | Path, *, check: bool = False) -> Shards:
        """Open the shards in a folder.

        Args:
            folder: where :func:`write_shards` wrote them.
            check: whether to read every file through and compare its SHA-256.

        Raises:
            ModgraftError: where there are none, or a file is missing, cut short or altered.
        """
        home = Path(folder)
        card = read_json(
            home / CARD, what="shards of tokens", remedy=_REMEDY,
            keys=("format", "dtype", "files", "tokenizer", "vocab_size"),
        )  # fmt: skip
        kind, files = np.dtype(card["dtype"]), []
        for each in card["files"]:
            path = home / each["name"]
            there = path.stat().st_size if path.is_file() else None
            if there != each["tokens"] * kind.itemsize:
                has = "is missing" if there is None else f"has {there} bytes"
                raise DataError(
                    f"this shard {has}, of {each['tokens'] * kind.itemsize}", file=path,
                    remedy=_REMEDY,
                )  # fmt: skip
            tokens = np.memmap(path, dtype=kind, mode="r")
            if check and sha256(tokens.tobytes()).hexdigest() != each["sha256"]:
                raise DataError("this shard's bytes were changed", file=path, remedy=_REMEDY)
            files.append(tokens)
        starts = np.cumsum([0, *(len(tokens) for tokens in files)])
        return cls(home, tuple(files), starts, card["tokenizer"], card["vocab_size"])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            start, stop, step = at.indices(len(self))
            return self.read(start, max(stop - start, 0))[::step]
        return int(self.read(range(len(self))[at], 1)[0])

    def read(self, start: int, count: int) -> np.ndarray:
        """Return ``count`` tokens from ``start`` on, int64, over the borders of files."""
        found = []
        file = int(np.searchsorted(self.starts, start, "right")) - 1
        while count > 0 and file < len(self.files):
            begin = start - int(self.starts[file])
            found.append(self.files[file][begin : begin + count].astype(np.int64))
            start, count, file = start + len(found[-1]), count - len(found[-1]), file + 1
        return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Refuse another tokenizer than the one that made the tokens.

        Raises:
            ModgraftError: with the remedy.
        """
        if tokenizer_key(tokenizer) != self.tokenizer:
            raise ModgraftError(
                f"the tokens in {self.folder} were made by another tokenizer than this model's "
                f"({tokenizer.get_vocab_size()} tokens here, {self.vocab_size} there); write the "
                f"shards again with this one, or train with {self.folder / 'tokenizer.json'}"
            )


# -- windows -------------------------------------------------------------------------------------


class Windows(Dataset[dict[str, torch.Tensor]]):
    """Window i of an epoch is tokens ``p + i n`` to ``p + (i + 1) n``, and what comes after each.

    Each epoch begins at another p, 0 ≤ p < n, so that windows are cut elsewhere; all but the ends
    of a corpus is read once an epoch. With :meth:`loader`, what is read at a step is a function of
    the seed and the step alone, and a run that is resumed goes on at the next token.

    Args:
        tokens: the corpus: int64 ``[N]``, or :class:`Shards`.
        length: n, the tokens of a window.
        seed: of p.

    Raises:
        ModgraftError: for a corpus that is shorter than two windows.
    """

    def __init__(self, tokens: Shards | np.ndarray, length: int, seed: int = 0) -> None:
        if len(tokens) < 2 * length:
            raise ModgraftError(
                f"a corpus of {len(tokens)} tokens has no two windows of {length}; give more text, "
                f"or a shorter window"
            )
        self.tokens, self.length, self.seed, self.first = tokens, length, seed, 0

    @property
    def made_by(self) -> dict[str, str]:
        """What tells these tokens from those of another tokenizer, for a run that is resumed."""
        return {"the tokenizer": self.tokens.tokenizer} if isinstance(self.tokens, Shards) else {}

    def set_epoch(self, epoch: int) -> None:
        """Set where the windows of an epoch begin."""
        self.first = random.Random(f"{self.seed} {epoch}").randrange(self.length)

    def __len__(self) -> int:
        return len(self.tokens) // self.length - 1

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: rows[0] for name, rows in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """Return windows as one batch: ``input_ids`` and ``targets``, ``[B, n]``."""
        n = self.length
        rows = np.stack([self.tokens[(at := self.first + i * n) : at + n + 1] for i in indices])
        both = torch.from_numpy(rows.astype(np.int64, copy=False))
        return {"input_ids": both[:, :-1], "targets": both[:, 1:]}

    def loader(self, batch: int) -> DataLoader[dict[str, torch.Tensor]]:
        """Return batches of windows in random order, for `fit`."""
        return DataLoader(self, batch, shuffle=True, drop_last=True, collate_fn=lambda rows: rows)
