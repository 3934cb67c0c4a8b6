"""SoftPrompt and Prompt beyond the contract: against PEFT, starts, limits, heads, bad input."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    ElectraConfig,
    ElectraForMaskedLM,
    GPT2ForSequenceClassification,
    RobertaConfig,
    RobertaForMaskedLM,
    SplinterConfig,
    SplinterForPreTraining,
    T5EncoderModel,
    T5Model,
    ViTForMaskedImageModeling,
    ViTModel,
)

import modgraft as mg
from common import counted
from contract.hosts import BATCH, HOSTS, WIDTH, HostCase, ids, tensor_of
from modgraft.data.tokenizer import train_tokenizer

TEXT = [case for case in HOSTS.values() if case.text]
GENERATES = [case for case in HOSTS.values() if case.generates]
IDS = (7, 30, 12)
text_hosts = pytest.mark.parametrize("case", TEXT, ids=[c.name for c in TEXT])
generating = pytest.mark.parametrize("case", GENERATES, ids=[c.name for c in GENERATES])
# PEFT's own use of what transformers has renamed
peers = pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing:FutureWarning", "ignore:Position ids are not supported"
)


def soft(model: nn.Module, length: int = 4, **own: Any) -> mg.Host:
    host = mg.Host(model).eval()
    host.implant("m", mg.SoftPrompt(length=length, bound=1.0, **own))
    return host


def padded(case: HostCase, side: str) -> dict[str, Any]:
    batch = {"input_ids": ids(), "attention_mask": torch.ones_like(ids())}
    batch["attention_mask"][0, slice(-2, None) if side == "right" else slice(2)] = 0
    if case.name == "t5":
        batch["labels"] = ids(5, 5)
    return batch


# -- beside PEFT, from the same tensors ---------------------------------------------------------


def pair(case: HostCase) -> tuple[mg.Host, Any, nn.Parameter]:
    """Make our host and PEFT's with the same prompt before [CLS]; also return PEFT's tensor."""
    host = soft(case.model(), at_start=True)
    task = {"t5": "SEQ_2_SEQ_LM", "bert": "FEATURE_EXTRACTION"}.get(case.name, "CAUSAL_LM")
    config = peft.PromptTuningConfig(task_type=task, num_virtual_tokens=4)
    peer = peft.get_peft_model(case.model(), config).eval()
    theirs = peer.prompt_encoder["default"].embedding.weight
    with torch.no_grad():  # T5's has rows for a decoder too, which PEFT's forward never reads
        theirs[:4].copy_(host["m"].places[0].phi)
    return host, peer, theirs


@peers
@text_hosts
def test_equals_peft_from_the_same_tensors(case: HostCase) -> None:
    host, peer, theirs = pair(case)
    batch = padded(case, "right")
    if case.name in ("gpt2", "llama"):
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    ours, other = host(**batch), peer(**batch)
    tokens = 0 if case.name == "t5" else 4  # PEFT leaves the tokens' own positions in
    torch.testing.assert_close(ours.logits, other.logits[:, tokens:], rtol=1e-5, atol=1e-5)
    if "labels" in batch:
        torch.testing.assert_close(ours.loss, other.loss, rtol=1e-5, atol=1e-5)
    for out in (ours, other):
        loss = out.logits[:, 0 if out is ours else tokens :].square().mean()
        loss.backward()
    own = host["m"].places[0].phi.grad
    assert own.abs().max() > 1e-3
    torch.testing.assert_close(own, theirs.grad[:4], rtol=1e-5, atol=1e-5)
    assert case.name != "t5" or not theirs.grad[4:].any()


@peers
@generating
def test_generates_what_peft_generates(case: HostCase) -> None:
    """Each example of a padded batch gives what PEFT gives for it alone. In a batch PEFT puts the
    padding between the tokens and the text, which changes its results."""
    host, peer, _ = pair(case)
    batch = padded(case, "left" if case.name != "t5" else "right")
    batch.pop("labels", None)
    for how in ({}, {"num_beams": 3}):
        settings = {"max_new_tokens": 6, "min_new_tokens": 6, **how}
        ours = host.generate(**batch, **settings)
        for row, mask, own in zip(batch["input_ids"], batch["attention_mask"], ours, strict=True):
            text = row[mask == 1][None]
            alone = peer.generate(input_ids=text, attention_mask=torch.ones_like(text), **settings)
            assert torch.equal(own[-6:], alone[0, -6:])


# -- a text, joined by hand ---------------------------------------------------------------------


def by_hand(case: HostCase, batch: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """Put the prompt's ids into the text, as a tokenizer that pads on that side would."""
    at = 1 if case.name == "bert" else 0
    rows, masks = [], []
    for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        place = int(mask.nonzero()[0]) + at
        rows.append(torch.cat([row[:place], torch.tensor(IDS), row[place:]]))
        masks.append(torch.cat([mask[:place], torch.ones(3, dtype=mask.dtype), mask[place:]]))
    joined = {"input_ids": torch.stack(rows), "attention_mask": torch.stack(masks)}
    return {**batch, **joined}, at


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@text_hosts
def test_a_prompt_equals_its_text_before_the_text(case: HostCase, side: str) -> None:
    host = mg.Host(case.model()).eval()
    host.implant("p", mg.Prompt("three words here", ids=IDS))
    batch = padded(case, side)
    joined, at = by_hand(case, batch)
    ours, expected = host(**batch).logits, host(**joined, modules=None).logits
    if case.name == "t5":
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
        return
    for b, row in enumerate(batch["attention_mask"]):
        place = int(row.nonzero()[0]) + at
        there = torch.cat([expected[b, :place], expected[b, place + 3 :]])
        torch.testing.assert_close(ours[b][row == 1], there[row == 1], rtol=1e-5, atol=1e-5)


@generating
def test_generates_what_the_joined_text_generates(case: HostCase) -> None:
    """Greedy, by beams and sampled: the text is returned, and lengths do not count the prompt."""
    host = mg.Host(case.model()).eval()
    host.implant("p", mg.Prompt(ids=IDS))
    batch = padded(case, "right" if case.name == "t5" else "left")
    batch.pop("labels", None)
    joined, _ = by_hand(case, batch)
    new = 0 if case.name == "t5" else batch["input_ids"].shape[1]
    for how in (
        {"max_new_tokens": 5},
        {"max_new_tokens": 5, "num_beams": 3, "num_return_sequences": 2},
        {"max_new_tokens": 5, "do_sample": True},
        {"max_length": new + 5, "min_length": new + 4},
    ):
        torch.manual_seed(3)
        ours = host.generate(**batch, **how)
        if "max_length" in how and new:
            how = {"max_length": new + 8, "min_length": new + 7}
        torch.manual_seed(3)
        expected = host.generate(**joined, modules=None, **how)
        start = new + 3 if new else 0
        assert torch.equal(ours[:, new:], expected[:, start:])
        if new:
            repeats = len(ours) // BATCH
            text = batch["input_ids"].repeat_interleave(repeats, dim=0)
            assert torch.equal(ours[:, :new], text)


@torch.no_grad()
@generating
def test_padding_without_a_mask_is_left_out_of_generation(case: HostCase) -> None:
    host = soft(case.model())
    batch = padded(case, "right" if case.name == "t5" else "left")
    text, mask = batch["input_ids"] * batch["attention_mask"], batch["attention_mask"]  # pad is 0
    settings = {"max_new_tokens": 4, "min_new_tokens": 4}
    if case.name == "t5":  # for encoder-decoders transformers takes no mask from the padding
        mask = torch.ones_like(mask)
    expected = host.generate(input_ids=text, attention_mask=mask, **settings)
    assert torch.equal(host.generate(text, **settings), expected)
    assert torch.equal(host.generate(inputs=text, **settings), expected)


# -- how φ begins -------------------------------------------------------------------------------


def test_starts() -> None:
    host = mg.Host(HOSTS["bert"].model())
    table = host.model.get_input_embeddings().weight

    def phi(**own: Any) -> torch.Tensor:
        torch.manual_seed(0)
        host.implant("m", mg.SoftPrompt(**own))
        made = host["m"].places[0].phi.detach().clone()
        host.remove("m")
        assert made.shape == (own["length"], WIDTH)
        return made

    def rows(made: torch.Tensor) -> list[int]:
        return [int((table == row).all(1).nonzero()[0]) for row in made]

    assert phi(length=30).abs().max() <= 0.5
    assert phi(length=30, bound=2.0).abs().max() > 1.5
    assert torch.equal(phi(length=5), phi(length=5))  # drawn from torch's seed
    drawn = rows(phi(length=12, init="vocabulary", common=20))
    assert len(set(drawn)) == 12
    assert max(drawn) < 20
    assert len(rows(phi(length=25, init="vocabulary", common=20))) == 25  # some words twice
    assert rows(phi(length=3, init=IDS)) == list(IDS)
    filled = rows(phi(length=6, init=IDS))
    assert filled[:3] == list(IDS)
    labels = phi(length=2, init=[5, (6, 7)])
    torch.testing.assert_close(labels, torch.stack([table[5], (table[6] + table[7]) / 2]))


def test_a_text_and_labels_become_ids() -> None:
    tokenizer = train_tokenizer(["is it good or not", "very bad"])
    text = mg.SoftPrompt(length=4, init="is it very bad", tokenizer=tokenizer)
    own = tuple(tokenizer.convert_tokens_to_ids(["is", "it", "very", "bad"]))
    assert text.config() == {
        "length": 4, "init": own, "common": 5000, "bound": 0.5, "at_start": False
    }  # fmt: skip
    labels = mg.SoftPrompt(length=2, init=["good", "very bad"], tokenizer=tokenizer)
    good = tokenizer.convert_tokens_to_ids("good")
    assert labels.init == ((good,), own[2:])
    prompt = mg.Prompt("very bad", tokenizer=tokenizer)  # without the end that it puts after a text
    assert prompt.config() == {"text": "very bad", "ids": own[2:], "at_start": False}
    assert mg.Prompt("very bad", tokenizer=tokenizer.backend_tokenizer).ids == own[2:]


@pytest.mark.parametrize(
    "module",
    [
        mg.SoftPrompt(length=4, init=[5, (6, 7)], at_start=True),
        mg.Prompt("three words here", ids=IDS),
    ],
    ids=["soft_prompt", "prompt"],
)
def test_saved_with_their_ids_and_loaded_without_a_tokenizer(
    module: mg.Computation, tmp_path: Path
) -> None:
    case = HOSTS["bert"]
    host = mg.Host(case.model()).eval()
    host.implant("m", module)
    expected = tensor_of(host(**case.batch()))
    host.save("m", tmp_path / "m")
    fresh = mg.Host(case.model()).eval()
    fresh.load(tmp_path / "m")
    assert fresh["m"].method.config() == module.config()
    assert torch.equal(tensor_of(fresh(**case.batch())), expected)


@torch.no_grad()
def test_a_prompt_is_looked_up_in_the_host_it_is_in() -> None:
    case = HOSTS["gpt2"]
    host = mg.Host(case.model()).eval()
    host.implant("p", mg.Prompt(ids=IDS))
    before = host(**case.batch()).logits
    twin = copy.deepcopy(host)
    twin.model.get_input_embeddings().weight[IDS[0]] += 1
    assert torch.equal(host(**case.batch()).logits, before)
    assert not torch.allclose(twin(**case.batch()).logits, before)
    host.model.resize_token_embeddings(50, mean_resizing=False)  # makes a new table
    torch.testing.assert_close(host(**case.batch()).logits[..., :41], before)


# -- limits and refusals ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mg.SoftPrompt(length=0), r"SoftPrompt\(length=0"),
        (lambda: mg.SoftPrompt(common=0), "at least 1"),
        (lambda: mg.SoftPrompt(init="Is it good?"), r"init='Is it good\?', tokenizer=tokenizer\)"),
        (lambda: mg.SoftPrompt(length=2, init=IDS), r"3 tokens where length=2.*length=3"),
        (lambda: mg.SoftPrompt(init=()), "at least one"),
        (lambda: mg.SoftPrompt(init=["yes", "no"]), r"init=labels, tokenizer=tokenizer"),
        (lambda: mg.SoftPrompt(init=[1.5]), "neither a token's id nor several"),
        (lambda: mg.Prompt("You are kind."), r"Prompt\('You are …', tokenizer=tokenizer\)"),
        (lambda: mg.Prompt(), "has no tokens"),
    ],
)  # fmt: skip
def test_bad_configurations(make: Any, message: str) -> None:
    with pytest.raises(mg.ModgraftError, match=message):
        make()


def test_ids_that_are_not_the_tokenizers() -> None:
    tokenizer = train_tokenizer(["very bad"])
    with pytest.raises(mg.ModgraftError, match="give one of the two"):
        mg.Prompt("very bad", ids=(1,), tokenizer=tokenizer)
    with pytest.raises(mg.ModgraftError, match="a text or class labels"):
        mg.SoftPrompt(init=(1, 2), tokenizer=tokenizer)


@text_hosts
def test_ids_outside_the_vocabulary(case: HostCase) -> None:
    host = mg.Host(case.model())
    for module in (mg.Prompt(ids=(3, 41)), mg.SoftPrompt(init=(3, (4, -1)))):
        with pytest.raises(mg.ModgraftError, match="outside this host's vocabulary of 41"):
            host.implant("m", module)
    assert "m" not in host


@pytest.mark.parametrize(("name", "room"), [("bert", 32), ("gpt2", 64)])
def test_no_more_tokens_than_positions(name: str, room: int) -> None:
    case = HOSTS[name]
    host = mg.Host(case.model()).eval()
    for module in (mg.SoftPrompt(length=room), mg.Prompt(ids=(5,) * (room + 1))):
        with pytest.raises(mg.ModgraftError, match=f"has {room} positions; take fewer, such as"):
            host.implant("m", module)
    assert "m" not in host
    host.implant("m", mg.SoftPrompt(length=room - 7))
    host(**case.batch())  # 7 more just fit
    host.implant("one", mg.SoftPrompt(length=1))
    wanted = rf"{room - 6} tokens before a text of 7, {room + 1} in all.*max_length=6 "
    with pytest.raises(mg.ModgraftError, match=wanted):
        host(**case.batch())


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_relative_and_rotary_positions_have_no_last(name: str) -> None:
    case = HOSTS[name]
    model = case.model()
    model.config.max_position_embeddings = model.config.n_positions = 8
    out = tensor_of(soft(model, length=9)(**case.batch()))
    assert torch.isfinite(out).all()


class Wide(mg.TokenComposition):
    """Make tokens whose width is not the host's."""

    def build(self, site: Any) -> None:
        self.phi = nn.Parameter(torch.zeros(2, WIDTH + 1))

    def tokens(self, batch: int, side: Any) -> Any:
        return self.phi.expand(batch, -1, -1), torch.ones(batch, 2, dtype=torch.bool)


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_tokens_of_another_width(name: str) -> None:
    case = HOSTS[name]
    host = mg.Host(case.model())
    host.implant("wide", Wide())
    with pytest.raises(mg.ModgraftError, match=rf"'wide' gave tokens \[3, 2, 17\].*k, {WIDTH}\]"):
        host(**case.batch())


@text_hosts
def test_calls_that_tokens_do_not_fit(case: HostCase) -> None:
    host, text = soft(case.model()), ids()
    with pytest.raises(mg.ModgraftError, match="neither"):
        host()
    said = r"attention_mask is \[3, 7\], .* this is \[3, 1, 7, 7\]; .* implant a Prefix"
    with pytest.raises(mg.ModgraftError, match=said):
        host(input_ids=text, attention_mask=torch.ones(3, 1, 7, 7))
    with pytest.raises(mg.ModgraftError, match="leave the cache out"):
        host(input_ids=text, past_key_values=object())
    if case.generates:
        with pytest.raises(mg.ModgraftError, match="by name"):
            host.generate(text, None)


# -- heads, other families ----------------------------------------------------------------------

SHAPE = {
    "vocab_size": 41,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}


def same_as_prompt_by_hand(model: nn.Module, at: int, **call: Any) -> tuple[Any, Any]:
    """Return a host's output with a prompt, and with the prompt's ids in the text."""
    host = mg.Host(model.eval())
    host.implant("p", mg.Prompt(ids=IDS))
    text = ids()
    joined = torch.cat([text[:, :at], torch.tensor([IDS] * BATCH), text[:, at:]], dim=1)
    moved = {k: v + 3 if k.endswith("positions") else v for k, v in call.items()}
    with torch.no_grad():
        return host(input_ids=text, **call), host(input_ids=joined, modules=None, **moved)


def test_heads_of_bert() -> None:
    config = BertConfig(**SHAPE, num_labels=7)  # as many classes as the text has tokens
    several = torch.rand(BATCH, 7)  # as [B, T] as labels of tokens would be
    for labels in (torch.tensor([0, 3, 6]), several):
        model = BertForSequenceClassification(copy.deepcopy(config))
        ours, hand = same_as_prompt_by_hand(model, 1, labels=labels)
        torch.testing.assert_close(ours.logits, hand.logits)
        torch.testing.assert_close(ours.loss, hand.loss)
    answer = {"start_positions": torch.tensor([2, 3, 6]), "end_positions": torch.tensor([4, 5, 9])}
    model = BertForQuestionAnswering(BertConfig(**SHAPE))
    ours, hand = same_as_prompt_by_hand(model, 1, **answer)
    assert ours.start_logits.shape == ours.end_logits.shape == (BATCH, 7)
    torch.testing.assert_close(ours.end_logits[:, 1:], hand.end_logits[:, 4:])
    torch.testing.assert_close(ours.loss, hand.loss)

    host = soft(BertForTokenClassification(config))
    out = host(input_ids=ids(), labels=ids() % 7)
    expected = nn.functional.cross_entropy(out.logits.flatten(0, 1), (ids() % 7).flatten())
    torch.testing.assert_close(out.loss, expected)
    with pytest.raises(mg.ModgraftError, match=r"texts \[batch, T\]"):
        soft(BertForMultipleChoice(config))(input_ids=ids()[:, None])
    with pytest.raises(mg.ModgraftError, match="return_dict=False"):
        host(input_ids=ids(), return_dict=False)


def test_positions_of_roberta_begin_after_its_padding() -> None:
    config = RobertaConfig(**{**SHAPE, "pad_token_id": 1, "max_position_embeddings": 20})
    model = RobertaForMaskedLM(config)
    ours, hand = same_as_prompt_by_hand(model, 1)
    torch.testing.assert_close(ours.logits[:, 1:], hand.logits[:, 4:])
    text = ids()
    text[0, -2:] = 1
    host = mg.Host(RobertaForMaskedLM(config)).eval()
    host.implant("eye", mg.LinearMap(dim=5))
    nothing = mg.Side(torch.zeros(BATCH, 2, 5), torch.zeros(BATCH, 2, dtype=torch.bool))
    mask = text.ne(1).long()
    with torch.no_grad():
        out = host(input_ids=text, attention_mask=mask, side={"image": nothing}).logits
        bare = host(input_ids=text, attention_mask=mask, modules=None).logits
    torch.testing.assert_close(out[mask == 1], bare[mask == 1], rtol=1e-5, atol=1e-5)
    with pytest.raises(mg.ModgraftError, match="has 18 positions"):
        mg.Host(RobertaForMaskedLM(config)).implant("m", mg.SoftPrompt(length=18))


def test_embeddings_narrower_than_the_host() -> None:
    model = ElectraForMaskedLM(ElectraConfig(**SHAPE, embedding_size=8))
    assert soft(model)["m"].places[0].phi.shape == (4, 8)
    ours, hand = same_as_prompt_by_hand(ElectraForMaskedLM(model.config), 1)
    torch.testing.assert_close(ours.logits[:, 1:], hand.logits[:, 4:])


def test_a_decoders_class_is_read_at_its_last_position() -> None:
    model = GPT2ForSequenceClassification(HOSTS["gpt2"].make().config)
    text = ids()
    ours, hand = same_as_prompt_by_hand(model, 0)
    torch.testing.assert_close(ours.logits, hand.logits)
    mask = torch.ones_like(text)
    mask[0, -2:] = 0
    with pytest.raises(mg.ModgraftError, match="pad on the left"):
        soft(GPT2ForSequenceClassification(model.config))(input_ids=text, attention_mask=mask)


@torch.no_grad()
def test_an_encoders_output_is_as_long_as_its_text_and_a_decoders_as_its_own() -> None:
    config = HOSTS["t5"].make().config
    encoder = soft(T5EncoderModel(copy.deepcopy(config)))
    assert encoder(input_ids=ids()).last_hidden_state.shape == (BATCH, 7, WIDTH)
    whole = soft(T5Model(config))  # 7 + 4 for the encoder, by chance as many for the decoder
    out = whole(input_ids=ids(), decoder_input_ids=ids(11))
    assert out.last_hidden_state.shape == (BATCH, 11, WIDTH)
    assert out.encoder_last_hidden_state.shape == (BATCH, 11, WIDTH)
    texts = soft(HOSTS["t5"].model())(input_ids=ids(), labels=ids(11))
    assert texts.logits.shape[:2] == (BATCH, 11)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_last_logits_alone(name: str) -> None:
    host = soft(HOSTS[name].model())
    whole = host(ids()).logits
    for last in (1, 3, 9):  # of 7 positions
        out = host(ids(), logits_to_keep=last).logits
        torch.testing.assert_close(out, whole[:, -last:])
    mask = torch.ones_like(ids())
    mask[0, :2] = 0  # padding on the left of one text: the tokens are elsewhere in each row
    cases: tuple[dict[str, Any], ...] = ({}, {"attention_mask": mask})
    for kwargs in cases:
        whole = host(ids(), **kwargs).logits
        out = host(ids(), logits_to_keep=torch.tensor([0, 2, -1]), **kwargs).logits
        torch.testing.assert_close(out, whole[:, [0, 2, -1]])


@torch.no_grad()
def test_own_positions_and_embeddings_of_the_caller() -> None:
    host = soft(HOSTS["gpt2"].model())
    text, own = ids(), torch.arange(5, 12)[None]
    out = host(input_ids=text, position_ids=own).logits
    table = host.model.get_input_embeddings()(text)
    phi = host["m"].places[0].phi.expand(BATCH, -1, -1)
    joined = {
        "inputs_embeds": torch.cat([phi, table], dim=1),
        "position_ids": torch.arange(5, 16)[None],
    }
    torch.testing.assert_close(out, host(**joined, modules=None).logits[:, 4:])
    torch.testing.assert_close(out, host(inputs_embeds=table, position_ids=own).logits)
    torch.testing.assert_close(host(text).logits, host(input_ids=text).logits)  # by position


# -- vision -------------------------------------------------------------------------------------


@torch.no_grad()
def test_visual_prompts_stay_inside() -> None:
    config, pixels = HOSTS["vit"].make().config, HOSTS["vit"].batch()["pixel_values"]
    host = soft(ViTModel(config))
    bare, out = host(pixels, modules=None), host(pixels, output_hidden_states=True)
    assert out.last_hidden_state.shape == bare.last_hidden_state.shape
    assert not torch.allclose(out.pooler_output, bare.pooler_output)
    assert [h.shape[1] for h in out.hidden_states] == [9, 9, 9]  # the layers see the tokens
    config.encoder_stride = 4
    assert soft(ViTForMaskedImageModeling(config))(pixels).reconstruction.shape == pixels.shape
    large = torch.randn(BATCH, 3, 16, 16)
    assert host(large, interpolate_pos_encoding=True).last_hidden_state.shape[1] == 17
    with pytest.raises(mg.ModgraftError, match="pixel_values"):
        host()
    with pytest.raises(mg.ModgraftError, match="called without it"):
        host.model.embeddings(pixels)
    host.use(None)
    assert torch.equal(host.model.embeddings(pixels), host.model.embeddings(pixels))


def test_what_a_vision_transformer_refuses() -> None:
    host = mg.Host(HOSTS["vit"].model())
    for module in (mg.SoftPrompt(init="vocabulary"), mg.SoftPrompt(init=(3,)), mg.Prompt(ids=IDS)):
        with pytest.raises(mg.ModgraftError, match=r"reads no text.*SoftPrompt\(init='random'\)"):
            host.implant("m", module)
    with pytest.raises(mg.ModgraftError, match="leave out at_start"):
        host.implant("m", mg.SoftPrompt(at_start=True))


# -- beside other modules, compiled -------------------------------------------------------------


@torch.no_grad()
def test_beside_modules_of_other_kinds() -> None:
    case = HOSTS["bert"]
    host = soft(case.model())
    host.implant("qa", mg.LoRA(rank=2), at=["query", "value"])
    for p in host["qa"].parameters():
        p.normal_(0, 0.3)
    both = host(**case.batch(), modules="m >> 0.5*qa").logits
    plain = mg.Host(host.merge("0.5*qa"))
    plain.implant("m", mg.SoftPrompt(length=4))
    plain["m"].places[0].phi.copy_(host["m"].places[0].phi)
    torch.testing.assert_close(both, plain(**case.batch()).logits, rtol=1e-5, atol=1e-5)
    compiled, graphs = counted(host)
    for composition in ("m", "m >> qa", "m >> 0.3*qa", "2*qa", None):
        host.use(composition)
        torch.testing.assert_close(compiled(**case.batch()).logits, host(**case.batch()).logits)
    assert len(graphs) == 2  # with the tokens and without: other modules are weights in either


def test_trained_by_fit() -> None:
    case = HOSTS["t5"]
    host = soft(case.model(), length=5, init="vocabulary")
    before = {k: v.clone() for k, v in host.model.state_dict().items()}
    start = host(**case.batch()).loss.item()
    host.fit([case.batch()], train="m", steps=30, lr=0.3, progress=False)
    assert host(**case.batch()).loss.item() < 0.95 * start
    assert all(torch.equal(v, before[k]) for k, v in host.model.state_dict().items())


@torch.no_grad()
def test_a_caller_that_counts_what_is_predicted_knows_of_no_prompt() -> None:
    """transformers' Trainer divides by the labels after the first, and so no prompt predicts it."""
    case = HOSTS["llama"]
    host = mg.Host(case.model()).eval()
    host.implant("p", mg.SoftPrompt(length=3))
    ids = torch.randint(3, 41, (4, 9), generator=torch.Generator().manual_seed(0))
    logits = host(input_ids=ids).logits[:, :-1].flatten(0, 1)
    wanted = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
    out = host(input_ids=ids, labels=ids, num_items_in_batch=torch.tensor(4 * 8))
    torch.testing.assert_close(out.loss, wanted)


@torch.no_grad()
def test_logits_of_several_questions_over_places() -> None:
    config = SplinterConfig(
        vocab_size=41, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, question_token_id=5,
    )  # fmt: skip
    host = mg.Host(SplinterForPreTraining(config)).eval()
    host.implant("p", mg.SoftPrompt(length=3))
    ids = torch.tensor([[7, 8, 5, 9, 10, 5, 11, 12]])
    batch = {"input_ids": ids, "question_positions": torch.tensor([[2, 5]])}
    with_prompt = host(**batch).start_logits
    assert with_prompt.shape == host(**batch, modules=None).start_logits.shape == (1, 2, 8)
