"""Prompts, written and trained: f'(x) = f([φ, x]) at the first layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import InitVar
from typing import Any, final

import torch
from torch import Tensor, nn

from modgraft.computation._checks import check_at_least_one
from modgraft.computation.base import TokenComposition
from modgraft.core.embeddings import Reading, reading_of, token_table
from modgraft.core.errors import ModgraftError
from modgraft.core.side import Side
from modgraft.core.sites import Site


@final
class SoftPrompt(TokenComposition):
    """f([φ, x]), φ ``[length, d]`` trained embeddings before the input.

    Prompt tuning (Lester et al. 2021, arXiv:2104.08691). In an encoder-decoder φ stands before the
    encoder's input only, as in the paper and in PEFT. In a vision transformer, after the class
    token, it is the shallow visual prompt of Jia et al. (2022, arXiv:2203.12119), whose bound is
    √(6 / (3·patch² + d)).

    Args:
        length: the number of tokens.
        init: how φ starts: ``"random"``, uniform in ±``bound``; ``"vocabulary"``, the embeddings of
            tokens drawn from the first ``common`` ids, without repetition; or a text or a sequence
            of class labels, with ``tokenizer``. The last two are turned into, and saved as, one
            entry a token: an id, or several ids whose embeddings are averaged (a label of several
            pieces); such entries can be given too. If there are fewer than ``length``, the rest is
            drawn as for ``"vocabulary"``, as in the paper.
        common: how many ids count as common; T5's vocabulary begins with the most common.
        bound: the bound of the random start.
        at_start: whether φ stands before a class token too, as in PEFT; if not, it stands after
            the class token of a host that expects one first (BERT). Padding on the left stays
            before φ in either case; PEFT has it between φ and the text.
        tokenizer: turns a text or labels into ids; it is not saved.

    Raises:
        ModgraftError: for more ids than ``length``, ids outside the host's vocabulary, a host that
            reads no tokens, or more tokens than it has positions.
    """

    length: int = 20
    init: str | Sequence[Any] = "random"
    common: int = 5000
    bound: float = 0.5
    at_start: bool = False
    tokenizer: InitVar[Any] = None

    def __post_init__(self, tokenizer: Any) -> None:
        check_at_least_one("SoftPrompt", length=self.length, common=self.common)
        if self.bound < 0:
            raise ModgraftError(f"SoftPrompt(bound={self.bound}): the bound is at least 0")
        if tokenizer is not None:
            self.init = _ids_of(self.init, tokenizer)
        elif isinstance(self.init, str):
            if self.init not in ("random", "vocabulary"):
                raise ModgraftError(
                    f"init={self.init!r} is neither 'random' nor 'vocabulary'; for a text, write "
                    f"SoftPrompt(init={self.init!r}, tokenizer=tokenizer)"
                )
            return
        else:
            self.init = tuple(_one_token(entry) for entry in self.init)
        if not 0 < len(self.init) <= self.length:
            raise ModgraftError(
                f"init has {len(self.init)} tokens where length={self.length}; write "
                f"SoftPrompt(length={max(len(self.init), 1)}, …) or begin with fewer, and at least "
                f"one"
            )

    def build(self, site: Site) -> None:
        host = site.module
        reading = reading_of(host)
        _check_start(self.at_start, reading)
        reading.check_room(self.length)
        phi = torch.empty(self.length, reading.width).uniform_(-self.bound, self.bound)
        if self.init != "random":
            phi = self._from_vocabulary(token_table(host))
        self.phi = nn.Parameter(phi)

    @torch.no_grad()
    def _from_vocabulary(self, table: nn.Embedding) -> Tensor:
        size, device = table.num_embeddings, table.weight.device
        given = () if isinstance(self.init, str) else self.init
        groups = [(i,) if isinstance(i, int) else i for i in given]
        _check_ids([i for group in groups for i in group], size)
        common, missing = min(self.common, size), self.length - len(groups)
        drawn = torch.randperm(common)[:missing]
        if missing > common:
            drawn = torch.randint(common, (missing,))
        rows = [table(torch.tensor(group, device=device)).mean(0, keepdim=True) for group in groups]
        return torch.cat([*rows, table(drawn.to(device))]).clone()

    def tokens(self, batch: int, side: Side | None) -> tuple[Tensor, Tensor]:
        seen = torch.ones(batch, self.length, dtype=torch.bool, device=self.phi.device)
        return self.phi.expand(batch, -1, -1), seen  # [length, d] → [B, length, d]


@final
class Prompt(TokenComposition):
    """f([φ, x]), φ = Emb(p), p a text.

    The text's tokens are put before the input's, after a class token if the host expects one first.
    There are no parameters: φ is looked up in the host's embeddings at every call.

    Args:
        text: p, without special tokens.
        ids: the text's token ids; if left out, ``tokenizer`` computes them. Both are saved, so that
            loading needs no tokenizer.
        at_start: whether φ stands before a class token too.
        tokenizer: turns the text into ids; it is not saved.

    Raises:
        ModgraftError: for a text without a tokenizer, an empty text, ids outside the host's
            vocabulary, a host that reads no text, or more tokens than it has positions.
    """

    text: str = ""
    ids: Sequence[int] = ()
    at_start: bool = False
    tokenizer: InitVar[Any] = None

    def __post_init__(self, tokenizer: Any) -> None:
        self.ids = tuple(int(i) for i in self.ids)
        if tokenizer is not None:
            encoded = _encode(self.text, tokenizer)
            if self.ids and self.ids != encoded:
                raise ModgraftError(
                    f"Prompt({self.text!r}): this tokenizer gives {list(encoded)}, not "
                    f"ids={list(self.ids)}; give one of the two"
                )
            self.ids = encoded
        if not self.ids:
            raise ModgraftError(
                f"Prompt({self.text!r}) has no tokens; write Prompt('You are …', "
                f"tokenizer=tokenizer), with the host's tokenizer, or Prompt(text, ids=(…))"
            )

    def build(self, site: Site) -> None:
        host = site.module
        reading = reading_of(host)
        _check_start(self.at_start, reading)
        _check_ids(self.ids, token_table(host).num_embeddings)
        reading.check_room(len(self.ids))
        self._host = (host,)  # not its table, which may be replaced; in a tuple, not as a child
        self.register_buffer("_ids", torch.tensor(self.ids), persistent=False)

    @property
    def words(self) -> Tensor:
        return self.get_buffer("_ids")

    def tokens(self, batch: int, side: Side | None) -> tuple[Tensor, Tensor]:
        ids = self.words.expand(batch, -1)  # [k] → [B, k]
        table = self._host[0].get_input_embeddings()  # type: ignore[operator]
        return table(ids), torch.ones_like(ids, dtype=torch.bool)  # [B, k, d], [B, k]


def _encode(text: str, tokenizer: Any) -> tuple[int, ...]:
    encoded = tokenizer.encode(text, add_special_tokens=False)
    return tuple(getattr(encoded, "ids", encoded))  # transformers: a list; tokenizers: an Encoding


def _ids_of(init: str | Sequence[Any], tokenizer: Any) -> tuple[Any, ...]:
    """Return a text's ids, one a token, or for each label all its ids, to be averaged."""
    if isinstance(init, str):
        return _encode(init, tokenizer)
    if not all(isinstance(label, str) for label in init):
        raise ModgraftError(f"with a tokenizer, init is a text or class labels, not {init!r}")
    return tuple(_one_token(_encode(label, tokenizer)) for label in init)


def _one_token(entry: Any) -> int | tuple[int, ...]:
    """Check an entry of ``init``: an id, or several in a tuple."""
    if isinstance(entry, int) and not isinstance(entry, bool):
        return entry
    if isinstance(entry, Sequence) and entry and all(isinstance(i, int) for i in entry):
        return tuple(entry)
    hint = "; for labels, write SoftPrompt(init=labels, tokenizer=tokenizer)"
    raise ModgraftError(
        f"init holds {entry!r}, which is neither a token's id nor several ids"
        f"{hint if isinstance(entry, str) else ''}"
    )


def _check_ids(ids: Sequence[int], size: int) -> None:
    wrong = [i for i in ids if not 0 <= i < size]
    if wrong:
        raise ModgraftError(
            f"token ids {wrong[:5]} are outside this host's vocabulary of {size}; take the "
            f"tokenizer that belongs to the host"
        )


def _check_start(at_start: bool, reading: Reading) -> None:
    if at_start and reading.inside:
        raise ModgraftError(
            f"{reading.host} reads its class at position 0, before which nothing goes; "
            f"leave out at_start=True"
        )
