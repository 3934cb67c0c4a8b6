"""A small word-level tokenizer trained on one's own texts, for hosts trained from scratch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from modgraft.errors import ModgraftError

PAD, EOS, UNK = "<pad>", "</s>", "<unk>"

# An option's mark "(A)" and a heading "Options:" are one token each: the value stands right beside
# its mark, one step away for an attention head that looks at its neighbour, and the sequences are a
# third shorter.
_WORDS = Regex(r"\([A-Z]\)|N/A|\w+:|\w+|[^\w\s]")


def train_tokenizer(texts: Iterable[str], *, vocab_size: int = 8000) -> PreTrainedTokenizerFast:
    """One token a word, number, punctuation mark, option mark `(A)` or heading `Options:`.

    Ids 0, 1 and 2 are `<pad>`, `</s>` (put after every text) and `<unk>`, as T5 expects pad and
    end; the most frequent words of `texts` follow, `vocab_size` tokens in all, the rest become
    `<unk>`. Decoding joins words by blanks and puts `.`, `,` and `?` back on the word before them,
    so that the templates of DigitsQA survive the round trip exactly.

    Raises:
        ModgraftError: `texts` holds no word at all.
    """
    tokenizer = Tokenizer(models.WordLevel(unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_WORDS, behavior="isolated"),
            # what is left between words is white space, and goes
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
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", special_tokens=[(EOS, tokenizer.token_to_id(EOS))]
    )
    return _wrap(tokenizer)


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer saved at `path`: a `tokenizer.json`, or the folder that holds it.

    Raises:
        ModgraftError: there is no such file, or it is not a tokenizer's.
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


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )
