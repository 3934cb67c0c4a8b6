"""The model card of a hub, written from the card of a module."""

from __future__ import annotations

from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from modgraft.core.errors import CheckpointError
from modgraft.store.card import Card

WRITTEN = "Written from the card in `module.safetensors`"
"""The last line begins so; a page without it is somebody's own, and stays."""


def readme(card: Card, library: str = "modgraft") -> str:
    """Return ``README.md``, as Hugging Face's hub reads it: what it is, how to load it, results.

    Args:
        card: what is known.
        library: whose files are beside it, as the hub names it. Those of another one are not
            written from the card, and do not say so.
    """
    title = ", ".join(card.names)
    about = ModelCardData(
        base_model=card.base_model,
        library_name=library,
        license=card.licence,
        tags=["modgraft", *sorted({saved.type.lower() for saved in card.modules})],
        model_name=title,
        pipeline_tag=card.task,
        eval_results=[
            EvalResult(
                task_type=card.task or "other",
                dataset_type="other",
                dataset_name=card.data or "not said",
                metric_type=name,
                metric_value=value,
            )
            for name, value in card.metrics.items()
        ]
        or None,
    )
    host = card.base_model or card.host.get("architecture", "the host")
    lines = [
        "---", about.to_yaml().rstrip(), "---", "", f"# {title}", "",
        card.description or f"Modules for {host}, made with modgraft.", "",
        "| module | method | sites |", "|---|---|---|",
        *(f"| `{m.name}` | {m.type} | {len(m.sites)} |" for m in card.modules), "",
        "```python", "import modgraft as mg", "",
        f"host = mg.Host(model)  # {host}, with the weights it was trained with",
        'host.load("this/folder")', "```",
    ]  # fmt: skip
    if card.metrics:
        lines += ["", f"Measured on {card.data}:" if card.data else "Measured:", ""]
        lines += ["| metric | value |", "|---|---|"]
        said = {" ".join(n.replace("|", "\\|").split()): v for n, v in card.metrics.items()}
        lines += [f"| {name} | {value:g} |" for name, value in said.items()]
    if card.command:
        lines += ["", "Made by", "", *(f"    {line}" for line in card.command.splitlines())]
    if card.beside:
        lines += ["", f"With it trained, and are loaded with it: {', '.join(card.beside)}."]
    if library == "modgraft":
        lines += ["", f"{WRITTEN}, {card.made}, {card.sha256}."]
    return "\n".join(lines) + "\n"


def read_readme(text: str) -> dict[str, Any]:
    """Return what another tool's ``README.md`` says that a card has a field for.

    Raises:
        CheckpointError: for a page whose head is no YAML of a model card.
    """
    try:
        said: Any = ModelCard(text, ignore_metadata_errors=True).data
    except Exception as error:  # YAML's own, and huggingface_hub's
        raise CheckpointError(
            f"its head cannot be read ({str(error).splitlines()[0]:.100})"
        ) from error
    results = [r for r in said.eval_results or () if isinstance(r.metric_value, int | float)]
    types = [r.metric_type for r in results]
    numbers = {
        r.metric_type if types.count(r.metric_type) == 1 else f"{r.metric_type} {r.dataset_name}":
        float(r.metric_value) for r in results
    }  # fmt: skip
    found = {"licence": said.license, "base_model": said.base_model, "task": said.pipeline_tag}
    about: dict[str, Any] = {key: v for key, v in found.items() if isinstance(v, str)}
    return about | ({"metrics": numbers} if numbers else {})
