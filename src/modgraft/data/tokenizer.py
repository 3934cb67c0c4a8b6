"""Train small tokenizers, for models that are trained from scratch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from modgraft.core.errors import ModgraftError

PAD, EOS, UNK = "<pad>", "</s>", "<unk>"

# An option's mark "(A)" and a heading "Options:" are one token each. So an option is the neighbour
# of its mark, where a simple attention head finds it, and sequences are a third shorter.
_WORDS = Regex(r"\([A-Z]\)|N/A|\w+:|\w+|[^\w\s]")
_SIGNS = r"[^\W\d_]+|\d|_|[^\w\s]"


def train_tokenizer(texts: Iterable[str], *, vocab_size: int = 8000) -> PreTrainedTokenizerFast:
    """Train a tokenizer of words, numbers, punctuation, option marks `(A)` and headings `Options:`.

    Ids 0, 1 and 2 are `<pad>`, `</s>` (put after every text) and `<unk>`, as T5 expects pad and
    end. The most frequent words of `texts` follow, up to `vocab_size` tokens; other words become
    `<unk>`. Decoding puts blanks between words, but none before `.`, `,` and `?`, so that decoding
    restores the texts of DigitsQA exactly.

    Raises:
        ModgraftError: `texts` holds no word.
    """
    tokenizer = Tokenizer(models.WordLevel(unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_WORDS, behavior="isolated"),
            # removes the white space between words
            pre_tokenizers.WhitespaceSplit(),
        ]
    )
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    trainer = trainers.WordLevelTrainer(
        vocab_size=vocab_size, special_tokens=[PAD, EOS, UNK], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() == 3:
        raise ModgraftError("train_tokenizer: the texts hold no word; pass the training texts")
    return _append_end_token(tokenizer)


def train_pieces(
    texts: Iterable[str], *, vocab_size: int = 1000, sentinels: int = 0
) -> PreTrainedTokenizerFast:
    """Train a lower-case WordPiece tokenizer; digits and other signs are one token each.

    Ids 0, 1 and 2 are as in `train_tokenizer`; the `sentinels` `<extra_id_0>`, … for spans that are
    left out follow, then every character of `texts`, at a word's start and inside a word. Half of
    the remaining tokens are whole words, the other half pieces of two to four letters of other
    words, chosen by how many tokens they save. The same texts always give the same tokens, unlike
    with the trainers of `tokenizers`. White space is not preserved: decoding puts a blank between
    all words, digits and signs.

    Raises:
        ModgraftError: `texts` holds no word, or more characters than fit into `vocab_size`.
    """
    words = Counter(word for text in texts for word in re.findall(_SIGNS, text.lower()))
    known = [PAD, EOS, UNK, *(f"<extra_id_{i}>" for i in range(sentinels))]
    signs = sorted({sign for word in words for sign in word})
    left = vocab_size - len(known) - 2 * len(signs)
    if not words or left < 0:
        why = f"{len(signs)} signs do not fit into vocab_size={vocab_size}" if words else "no word"
        raise ModgraftError(f"train_pieces: the texts hold {why}; pass other texts, or more places")
    whole = _best({word: n * (len(word) - 1) for word, n in words.items()}, left // 2)
    saves: Counter[str] = Counter()
    for word in words.keys() - whole:
        for size in (2, 3, 4):
            for i in range(len(word) - size + 1):
                saves["##" * (i > 0) + word[i : i + size]] += words[word] * (size - 1)
    known += [*signs, *(f"##{sign}" for sign in signs), *whole]
    known += _best({p: n for p, n in saves.items() if p not in whole}, vocab_size - len(known))
    tokenizer = Tokenizer(
        models.WordPiece({piece: i for i, piece in enumerate(known)}, unk_token=UNK)
    )
    tokenizer.add_special_tokens(known[: 3 + sentinels])
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(_SIGNS), "isolated"), pre_tokenizers.WhitespaceSplit()]
    )
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    return _append_end_token(tokenizer)


def _best(saves: Mapping[str, int], count: int) -> list[str]:
    """Return up to ``count`` pieces that save the most tokens."""
    order = sorted(saves, key=lambda piece: (-saves[piece], piece))
    return [piece for piece in order if saves[piece] > 0][:count]


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """Load the tokenizer at `path`: a `tokenizer.json`, or the folder that holds it.

    Raises:
        ModgraftError: The file does not exist, or is not a tokenizer's.
    """
    file = Path(path)
    file = file / "tokenizer.json" if file.is_dir() else file
    if not file.is_file():
        raise ModgraftError(
            f"{file}: no such file; save one with save_tokenizer(tokenizer, folder)"
        )
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:
        raise ModgraftError(f"{file}: not a tokenizer.json ({error})") from error
    return _wrap(tokenizer)


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: str | Path) -> Path:
    """Write `folder/tokenizer.json` and return its path; `load_tokenizer` reads it back."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "tokenizer.json"
    tokenizer.backend_tokenizer.save(str(file))
    return file


def _append_end_token(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Let the tokenizer append the end token to every text."""
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", special_tokens=[(EOS, tokenizer.token_to_id(EOS))]
    )
    return _wrap(tokenizer)


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )
