"""Where ``adapters`` puts its bottlenecks in each type of host, and which sites of ours those are.

A row is a place in a block. What stands after a sub-layer reads one of three things there:

    output     y, what the sub-layer puts out: h = y + m(y), and then the sum with the residual
    stream     the sum, normed where the host norms it then: m is added to the sum
    parallel   x, the residual: m(x) is added to y

A type of host that has no row is not known, and a place that has no site of ours is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from modgraft.core.errors import ModgraftError
from modgraft.store.formats.adapterhub.layout import prefix, type_of


class Row(NamedTuple):
    """A place in each block of a stack; paths of sites are relative to the block, ``"."`` is it.

    Attributes:
        location: what configurations call it.
        block: the blocks of ours, ``*`` the number.
        theirs: the path of theirs, in a block.
        output, stream, parallel: our site, by what is read; ``""``: there is none.
        theirs_block: the blocks of theirs, where they are called otherwise.
    """

    location: str
    block: str
    theirs: str
    output: str
    stream: str = ""
    parallel: str = ""
    theirs_block: str = ""


def _before_norms(block: str, attention: str, last: str, theirs: str = "") -> tuple[Row, ...]:
    """Return rows of hosts that norm what a sub-layer reads; no layer puts out the first sum."""
    inside = "output." if theirs else ""  # a ViT keeps the second in its last layer
    return (
        Row("mh_adapter", block, "attention_adapters", attention, theirs_block=theirs),
        Row("output_adapter", block, f"{inside}output_adapters", last, ".", theirs_block=theirs),
    )


def _bart(stack: str) -> tuple[Row, ...]:
    block = f"{stack}.layers.*"
    places = [("mh_adapter", "attention_adapters", "self_attn", "self_attn.out_proj")]
    if stack == "decoder":
        cross = ("cross_adapter", "cross_attention_adapters", "encoder_attn")
        places.append((*cross, "encoder_attn.out_proj"))
    return (
        *(
            Row(location, block, theirs, output, f"{attention}_layer_norm[residual]", attention)
            for location, theirs, attention, output in places
        ),
        Row("output_adapter", block, "output_adapters", "fc2", "final_layer_norm[residual]"),
    )


def _t5(stack: str) -> tuple[Row, ...]:
    block, last = f"{stack}.block.*", "layer.2" if stack == "decoder" else "layer.1"
    cross = Row(
        "cross_adapter", block, "layer.1", "layer.1.EncDecAttention.o", "layer.1", "layer.1"
    )
    return (
        Row("mh_adapter", block, "layer.0", "layer.0.SelfAttention.o", "layer.0", "layer.0"),
        *([cross] if stack == "decoder" else []),
        Row("output_adapter", block, last, f"{last}.DenseReluDense.wo", ".", last),
    )


_BERT = tuple(
    Row(
        location, "encoder.layer.*", path, f"{path}.dense", f"{path}[residual]", f"{path}[residual]"
    )
    for location, path in (("mh_adapter", "attention.output"), ("output_adapter", "output"))
)  # one layer makes y, and sums and norms it
ROWS: dict[str, tuple[Row, ...]] = {
    "bert": _BERT,
    "roberta": _BERT,
    "distilbert": (
        Row(
            "mh_adapter", "transformer.layer.*", "attention_adapters", "attention.out_lin",
            "sa_layer_norm[residual]", "attention",
        ),
        Row(
            "output_adapter", "transformer.layer.*", "output_adapters", "ffn.lin2",
            "output_layer_norm[residual]", "ffn",
        ),
    ),
    "bart": (*_bart("encoder"), *_bart("decoder")),
    "t5": (*_t5("encoder"), *_t5("decoder")),
    "gpt2": _before_norms("h.*", "attn.c_proj", "mlp.c_proj"),
    "llama": _before_norms("layers.*", "self_attn.o_proj", "mlp.down_proj"),
    "vit": _before_norms("layers.*", "attention.o_proj", "mlp.fc2", "encoder.layer.*"),
}  # fmt: skip
EMBEDDED = {
    "bert": "embeddings", "roberta": "embeddings", "distilbert": "embeddings",
    "bart": "encoder.layernorm_embedding", "gpt2": "drop", "llama": "embed_tokens",
}  # fmt: skip
"""What puts out the embeddings, ready for the first block."""


def places(model: nn.Module, locations: set[str], reads: str) -> list[tuple[int, str, str]]:
    """Return the places of a host: the number of the layer, the path of theirs, our label.

    Args:
        model: the host's.
        locations: which are wanted, by their names in configurations.
        reads: ``output``, ``stream`` or ``parallel``.

    Raises:
        ModgraftError: for a host that is not known, or a place where no site of ours reads that.
    """
    kind = type_of(model)
    if kind not in ROWS:
        raise ModgraftError(f"bottlenecks are read in {', '.join(ROWS)}, not in a {kind}")
    found = []
    for path, _ in model.named_modules():
        path = path.removeprefix(prefix(model))
        for row, number in _rows(kind, path):
            if row.location not in locations:
                continue
            own = getattr(row, reads)
            if not own:
                raise ModgraftError(
                    f"{row.location} in a {kind} that reads the {_WORDS[reads]}: no layer of the "
                    f"host has that, so it is not computed here"
                )
            theirs = row.theirs_block.replace("*", str(number)) or path
            label = path if own == "." else f"{path}.{own}"
            found.append(
                (layer_number(model, path), f"{theirs}.{row.theirs}", prefix(model) + label)
            )
    return found


_CALLED = {
    "vit": {
        r"layers\.(\d+)\.": r"encoder.layer.\1.",
        r"attention\.q_proj": "attention.attention.query",
        r"attention\.k_proj": "attention.attention.key",
        r"attention\.v_proj": "attention.attention.value",
        r"mlp\.fc1": "intermediate.dense",
        r"mlp\.fc2": "output.dense",
    }
}
"""What layers of ours are called in the transformers of ``adapters``, where that is otherwise."""


def path_of(model: nn.Module, path: str) -> str:
    """Return the path of theirs, without the base model's name, of a layer of the host."""
    path = path.removeprefix(prefix(model))
    for ours, theirs in _CALLED.get(type_of(model), {}).items():
        path = re.sub(ours, theirs, path)
    return path


_WORDS = {
    "output": "sub-layer's output",
    "stream": "residual stream (original_ln_before)",
    "parallel": "residual (is_parallel)",
}


def _rows(kind: str, path: str) -> Iterator[tuple[Row, int]]:
    """Return the rows of a block with this path, and its number."""
    for row in ROWS[kind]:
        pattern = re.escape(row.block).replace(r"\*", r"(\d+)")
        if found := re.fullmatch(pattern, path):
            yield row, int(found[1])


def layer_number(model: nn.Module, path: str) -> int:
    """Return the number of the layer that a path is in; a decoder's come after its encoder's."""
    path = path.removeprefix(prefix(model))
    number = int(re.findall(r"\d+", path)[0])
    base = model.get_submodule(prefix(model).removesuffix("."))
    both = path.startswith("decoder.") and "encoder" in base._modules
    config: Any = model.config
    return number + (config.num_hidden_layers if both else 0)
