"""Extract vision features from image files, with any vision model of `transformers`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel, CLIPVisionModel, PreTrainedModel
from transformers.utils import logging as hf_logging

from modgraft.core.errors import DataError
from modgraft.core.files import whole
from modgraft.data.features import check_features
from modgraft.data.picture import open_picture
from modgraft.data.records import OR_SKIP, Questions, Record, Skips

Processor = Callable[..., Mapping[str, Any]]
_BATCHES = 50  # batches between writes of the cache: an interruption loses no more


def load_vision(
    source: str | Path, *, console: Console | None = None
) -> tuple[PreTrainedModel, Processor]:
    """Load a vision model, in evaluation mode, and its image processor.

    `source` is a local folder or a name on the Hugging Face Hub; a message says what is about to be
    fetched. Tested with `DetrModel`, `ViTModel`, `CLIPVisionModel` (also from the folder of a whole
    CLIP model) and `ResNetModel`.

    Raises:
        DataError: There is no such folder or name, a package that the model needs is not installed,
            or the model does not take images.
    """
    local = Path(source).is_dir()
    if not local:
        (console or Console(stderr=True)).print(
            f"Fetching {source} (configuration, image processor and weights) from the Hugging Face "
            "Hub, unless its cache has them already"
        )
    options: dict[str, Any] = {"local_files_only": local}
    level = hf_logging.get_verbosity()
    try:
        hf_logging.set_verbosity_error()  # it warns about a missing torchvision; PIL is enough
        config = AutoConfig.from_pretrained(source, **options)
        # of a whole CLIP, only the image encoder: the text encoder would need text
        loader: Any = CLIPVisionModel if config.model_type == "clip" else AutoModel
        model = cast(PreTrainedModel, loader.from_pretrained(source, **options))
        processor = AutoImageProcessor.from_pretrained(source, **options)
    except ImportError as error:
        reason = f"{source} needs a package that is not installed: {str(error).strip()}"
        raise DataError(reason, remedy="Install it, or use another vision model") from error
    except (OSError, ValueError) as error:
        remedy = "Give a folder made by save_pretrained (model and image processor), or a Hub name"
        raise DataError(f"no vision model at {source}: {error}", remedy=remedy) from error
    finally:
        hf_logging.set_verbosity(level)
    if model.main_input_name != "pixel_values":
        reason = f"{source} is a {type(model).__name__}, which reads {model.main_input_name}"
        raise DataError(reason, remedy="Use a model of images, such as a DetrModel or a ViTModel")
    return model.eval(), cast(Processor, processor)


def extract_features(
    questions: Questions,
    model: nn.Module,
    processor: Processor,
    *,
    cache: str | Path | None = None,
    batch_size: int = 8,
    skip_bad: bool = False,
    progress: bool = True,
) -> Questions:
    """Return the questions with features of their images: the model's last hidden state.

    Args:
        questions: Questions whose images are at `questions.image_path(record)`.
        model: A model whose `last_hidden_state` is `[B, m, d]`, or a map `[B, d, h, w]`, which
            becomes `[B, h·w, d]` row by row. It runs in evaluation mode on its device.
        processor: `processor(images=[PIL image, …], return_tensors="pt")` makes the inputs.
        cache: A `.safetensors` file {id: features} for this model and processor. Features in it are
            not extracted again, so an interrupted run resumes. Replaced images are not noticed.
        batch_size: The number of images in a batch.
        skip_bad: Leave out questions whose image is missing or broken; `.skipped` lists them.
        progress: Show a progress bar.

    Raises:
        MissingFileError: An image does not exist.
        DataError: An image is broken, the cache is another model's, or features cannot be used.
    """
    skips = Skips(skip_bad)
    known = _Cache(None if cache is None else Path(cache), model, processor)
    wanted = [record for record in questions if record.image is not None]
    todo = [record for record in wanted if record.id not in known.maps]
    if todo:
        questions.image_path(todo[0])  # an unknown folder is an error, not a question to skip
    columns = (
        TextColumn("vision features"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=Console(stderr=True), disable=not (progress and todo))
    training = model.training
    model.eval()
    try:
        with bar:
            task = bar.add_task("", total=len(todo))
            for i in range(0, len(todo), batch_size):
                batch = todo[i : i + batch_size]
                known.add(_extract(batch, questions, model, processor, skips))
                bar.advance(task, len(batch))
    finally:
        model.train(training)
        known.save()
    out = skips.ids
    kept = [record for record in wanted if record.id not in out]
    have = {record.id: known.maps[record.id] for record in kept}
    features = check_features(have, kept, skips=skips, file=known.file or type(model).__name__)
    return dataclasses.replace(questions, features=features).without(skips)


def encode_images(images: Sequence[Image.Image], model: nn.Module, processor: Processor) -> Tensor:
    """Return features of images, float32 `[B, m, d]` on the CPU, without gradients.

    The model's training mode is not changed.

    Raises:
        DataError: The model's last hidden state does not have the right shape.
    """
    device = next(model.parameters()).device
    inputs = processor(images=list(images), return_tensors="pt")
    # not inference_mode: its tensors could not be saved for the backward pass of a fusion
    with torch.no_grad():
        hidden = model(
            **{name: value.to(device) for name, value in inputs.items()}
        ).last_hidden_state
    if hidden.ndim == 4:
        hidden = hidden.flatten(2).transpose(1, 2)  # [B, d, h, w] -> [B, h·w, d]
    if hidden.ndim != 3 or len(hidden) != len(images):
        reason = f"{type(model).__name__}'s last hidden state has shape {list(hidden.shape)}"
        raise DataError(reason, remedy=f"Expected [{len(images)}, patches, width] or a map of it")
    return hidden.float().cpu()


def fingerprint(model: nn.Module, processor: Processor) -> str:
    """Hash the model's class and weights and the processor's settings, to identify a cache."""
    digest = hashlib.blake2b(type(model).__name__.encode(), digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    # processors of transformers have settings; a plain function only has a name
    settings = getattr(processor, "to_dict", dict)()
    name = getattr(processor, "__qualname__", type(processor).__qualname__)
    digest.update(json.dumps([name, settings], sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _extract(
    batch: Sequence[Record],
    questions: Questions,
    model: nn.Module,
    processor: Processor,
    skips: Skips,
) -> dict[str, Tensor]:
    images: dict[str, Image.Image] = {}
    for record in batch:
        try:
            path = questions.image_path(record)
            images[record.id] = open_picture(path, id=record.id, otherwise=OR_SKIP)
        except DataError as error:
            skips(error)
    if not images:
        return {}
    maps = encode_images(list(images.values()), model, processor)
    # clones, because views of one batch cannot be saved separately
    return {qid: map_.clone() for qid, map_ in zip(images, maps, strict=True)}


class _Cache:
    """The features extracted so far, by id, also kept in ``file`` unless it is None."""

    def __init__(self, file: Path | None, model: nn.Module, processor: Processor) -> None:
        self.file = file
        self.maps: dict[str, Tensor] = {}
        self._unsaved = 0  # batches
        if file is not None:
            self._mark = fingerprint(model, processor)
            if file.exists():
                self.maps = self._read(file)

    def _read(self, file: Path) -> dict[str, Tensor]:
        try:
            with safe_open(file, framework="pt") as cache:
                found = (cache.metadata() or {}).get("fingerprint", "")
                maps = {qid: cache.get_tensor(qid) for qid in cache.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            reason = f"the cache is not a whole .safetensors file ({error})"
            raise DataError(reason, file=file, remedy="Delete it; it will be made again") from error
        if found != self._mark:
            reason = "the cache holds the features of another model or image processor"
            remedy = "Delete it, or give each model its own cache file"
            raise DataError(reason, file=file, remedy=remedy)
        return maps

    def add(self, maps: Mapping[str, Tensor]) -> None:
        """Add the features of a batch; the file is written now and then."""
        self.maps |= maps
        self._unsaved += 1
        if self._unsaved == _BATCHES:
            self.save()

    def save(self) -> None:
        """Write the file, if there is one and it lacks anything."""
        if self.file is not None and self._unsaved:
            with whole(self.file) as part:
                save_file(self.maps, part, metadata={"fingerprint": self._mark})
        self._unsaved = 0
