"""Checks of prompts and prefixes, and of what is written."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import AttentionInterface

import modgraft as mg
from zoo.case import (
    Case,
    Cell,
    Meaningless,
    Outputs,
    difference,
    randomise,
    size,
)
from zoo.check import (
    check,
    edited_everywhere,
    everywhere,
    unpadded,
)
from zoo.row import PROMPT, SPECIAL, TOKENS, VOCABULARY, Batch


def _taught(case: Case, vectors: Tensor) -> nn.Module:
    """Return a copy of the plain model in whose table the ids ``PROMPT`` are ``vectors``.

    A prompt is words that nobody wrote: the oracle writes them, and calls the model as ever.
    """
    model = case.fresh(plain=True)
    try:
        table = model.get_input_embeddings()
        words = torch.tensor([PROMPT])
        with torch.no_grad():
            scale = table(words)[0] / table.weight[words[0]]  # tables that scale what they find
            new = table.weight.clone()
            new[words[0]] = vectors / scale
    except Exception as error:
        raise Meaningless("reads no text") from error
    if "input_ids" not in case.batch:
        raise Meaningless("reads no text")
    same, taught = table.weight, nn.Parameter(new, requires_grad=False)
    for layer in model.modules():
        if isinstance(layer, nn.Embedding) and layer.weight is same:  # not the logits' layer
            layer.weight = taught
        elif isinstance(layer, nn.Embedding) and layer.num_embeddings == VOCABULARY:
            with torch.no_grad():  # another table of words: there they are as padding is
                layer.weight[words[0]] = layer.weight[SPECIAL["pad_token_id"]].clone()
    return model


def _with_prompt(case: Case, batch: Batch) -> Batch:
    """Return a batch in which the ids ``PROMPT`` stand before each text."""
    words, new = batch["input_ids"], dict(batch)
    length = words.shape[1]
    first = int(case.row.class_token)
    for name, value in batch.items():
        if isinstance(value, Tensor) and value.shape[:2] == words.shape:
            ones = {"attention_mask": 1}.get(name, 0)
            put = value.new_full((len(words), len(PROMPT)), ones)
            if name == "input_ids":
                put = torch.tensor([PROMPT]).expand(len(words), -1)
            elif name == "decoder_input_ids":
                continue
            new[name] = torch.cat([value[:, :first], put, value[:, first:]], 1)
    assert new["input_ids"].shape[1] == length + len(PROMPT)
    return new


def _without_prompt(case: Case, values: Outputs, length: int, of: Outputs) -> Outputs:
    """Take the prompt's positions out of what the oracle put out."""
    first = int(case.row.class_token)
    found = {}
    for name, value in values.items():
        if name not in of:
            continue
        for axis in range(1, value.dim()):
            if value.shape[axis] == length + len(PROMPT) and of[name].shape[axis] == length:
                keep = [*range(first), *range(first + len(PROMPT), length + len(PROMPT))]
                value = value.index_select(axis, torch.tensor(keep))
        found[name] = value
    return found


def _prompted(case: Case) -> tuple[mg.Host, Tensor]:
    host = case.host()
    implant = host.implant("p", mg.SoftPrompt(length=len(PROMPT)), active=False)
    randomise(implant, 5, 0.5)
    return host, implant.places[0].phi.detach().clone()  # type: ignore[union-attr]


@check
def prompt(case: Case, cell: Cell) -> None:
    """A soft prompt is three words that nobody wrote; a padded text is what it is alone."""
    if "input_ids" not in case.batch:
        raise Meaningless("reads no text")
    with cell.at("all"):
        host, vectors = _prompted(case)
        taught, batch = _taught(case, vectors), unpadded(case)
        try:
            truth = case.run(taught, _with_prompt(case, batch))
        except Exception as error:
            raise Meaningless(f"the bare model: {type(error).__name__}: {error}") from error
        ours = case.run(host, batch, modules="p")
        bare = case.oracle(batch)
        kept = _without_prompt(case, truth, batch["input_ids"].shape[1], ours)
        cell.expect("all", ours, kept, {n: bare[n] for n in kept})
        _expect_alone(case, cell, host)


def _expect_alone(case: Case, cell: Cell, host: mg.Host) -> None:
    """Compare the padded first example with what it is alone, where the bare host allows it."""
    mask = case.batch.get("attention_mask")
    if mask is None or bool(mask.all()):
        return
    kept = mask[0].bool().nonzero()[:, 0]
    alone = {n: v[:1, kept] if v.shape == mask.shape and n != "decoder_input_ids" else v[:1]
             for n, v in case.batch.items()}  # fmt: skip

    def off(model: nn.Module, **how: Any) -> float:
        one, all_ = case.run(model, alone, **how), case.run(model, **how)
        found = 0.0
        for name, value in one.items():
            if name not in all_ or value.dim() != all_[name].dim() or len(value) != 1:
                continue
            mine = all_[name][:1]
            if mine.dim() > 1 and mine.shape[1] == TOKENS and value.shape[1] == len(kept):
                mine = mine[:, kept]
            if mine.shape == value.shape:
                found = max(found, difference({name: mine}, {name: value}) / size({name: value}))
        return found

    if off(case.plain) < 1e-4 and (share := off(host, modules="p")) > 1e-3:
        cell.wrong["padded"] = f"a padded text is {share:.2g} off what it is alone"


def _generated(case: Case, model: Any, batch: Batch, cache: bool, **how: Any) -> Outputs:
    """Return the scores of four words that a model writes, each without the words before it."""
    known = {k: v for k, v in batch.items() if k != "decoder_input_ids"}
    out = model.generate(
        **known, **how, max_new_tokens=4, min_new_tokens=4, do_sample=False, num_beams=1,
        use_cache=cache, output_logits=True, return_dict_in_generate=True,
        suppress_tokens=[*PROMPT, 41, 42, 43, 44],
    )  # fmt: skip
    return {"scores": torch.stack(out.logits).nan_to_num(0, 0, 0)}


def _can_generate(case: Case) -> None:
    can = getattr(case.plain, "can_generate", None)
    if can is None or not can():
        raise Meaningless("writes no text")


def _written(case: Case, model: Any, batch: Batch, cache: bool) -> Outputs:
    try:
        return _generated(case, model, batch, cache)
    except Exception as error:
        raise Meaningless(f"the bare model: {type(error).__name__}: {error}") from error


@check
def generate(case: Case, cell: Cell) -> None:
    """What is written is what the model with edited weights writes, with a cache and without."""
    _can_generate(case)
    host = case.host()
    with cell.caught("implanting"):
        deltas = everywhere(case, host)
    if "m" not in host:
        return
    edited = edited_everywhere(case, deltas)
    for cache in (True, False):
        where = "cached" if cache else "not cached"
        with cell.at(where):
            bare = _written(case, case.fresh(plain=True), case.batch, cache)
            truth = _written(case, edited, case.batch, cache)
            ours = _generated(case, host, case.batch, cache, modules="m")
            cell.expect(where, ours, truth, bare)


@check
def prompted(case: Case, cell: Cell) -> None:
    """What is written after a prompt is what follows three words that nobody wrote."""
    _can_generate(case)
    if "input_ids" not in case.batch:
        raise Meaningless("reads no text")
    for cache in (True, False):
        where = "cached" if cache else "not cached"
        with cell.at(where):
            host, vectors = _prompted(case)
            taught, batch = _taught(case, vectors), unpadded(case)
            bare = _written(case, case.fresh(plain=True), batch, cache)
            truth = _written(case, taught, _with_prompt(case, batch), cache)
            ours = _generated(case, host, batch, cache, modules="p")
            for values in (ours, truth, bare):  # the words that the oracle was taught
                values["scores"][..., list(PROMPT)] = 0
            cell.expect(where, ours, truth, bare)


def _attends(case: Case) -> bool:
    """Return whether the plain model asks transformers' registry for a function that attends."""
    asked, before = [], AttentionInterface.get_interface

    def ask(*args: Any, **kwargs: Any) -> Any:
        asked.append(args)
        return before(*args, **kwargs)

    AttentionInterface.get_interface = ask  # type: ignore[method-assign]
    try:
        case.oracle()
    finally:
        AttentionInterface.get_interface = before  # type: ignore[method-assign]
    return bool(asked)


@check
def prefix(case: Case, cell: Cell) -> None:
    """A prefix acts, in each example as alone, and in what is written cached as not cached."""
    if not _attends(case):
        raise Meaningless("no attention of transformers")
    with cell.at("all"):
        host = case.host()
        for seed, name in enumerate("ab"):
            randomise(host.implant(name, mg.Prefix(length=2), active=False), seed, 1.0)
        rows = ["a", "b", None, "a", "a >> b"]
        alone = {row: case.run(host, modules=row) for row in rows}
        if difference(alone["a"], case.bare) <= 1e-5 * size(case.bare):
            cell.wrong["all"] = "no effect"
            return
        ours = case.run(host, modules=rows)
        truth = {n: torch.cat([case.examples(alone[r][n])[i] for i, r in enumerate(rows)],
                              case.row.axis) for n in case.local}  # fmt: skip
        cell.expect("each", ours, truth, alone[None])
    if cell.status == "holds" and hasattr(case.plain, "generate"):
        with cell.at("generate"):
            _can_generate(case)
            bare = _written(case, case.fresh(plain=True), case.batch, True)
            slow = _written(case, case.fresh(plain=True), case.batch, False)
            if difference(bare, slow) > 1e-3 * size(bare):
                return
            one, two = (_generated(case, host, case.batch, c, modules="a") for c in (True, False))
            cell.expect("generate", one, two, bare)
