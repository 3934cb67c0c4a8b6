"""The model card of a hub, written from the card of a module."""

from __future__ import annotations

from huggingface_hub import EvalResult, ModelCardData

from modgraft.store.card import Card

WRITTEN = "Written from the card in `module.safetensors`"
"""The last line begins so; a page without it is somebody's own, and stays."""


def readme(card: Card) -> str:
    """Return ``README.md``, as Hugging Face's hub reads it: what it is, how to load it, results."""
    title = ", ".join(card.names)
    about = ModelCardData(
        base_model=card.base_model,
        library_name="modgraft",
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
    lines += ["", f"{WRITTEN}, {card.made}, {card.sha256}."]
    return "\n".join(lines) + "\n"
