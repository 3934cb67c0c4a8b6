"""A prompt before the text of any host: what the bare host gives on [φ, embeddings]."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import modgraft as mg
from engine.inputs.text_hosts import (
    DECODERS,
    ENCODERS,
    HOSTS,
    LENGTH,
    PAD,
    SEQ2SEQ,
    SPECIAL,
    drawn,
    ids,
    make,
    outside,
    prompted,
    writer,
)
from modgraft.core.embeddings import reading_of

CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 2e-5}
every = pytest.mark.parametrize("name", HOSTS)


def model_of(name: str) -> nn.Module:
    return writer(name) if name in DECODERS else make(name, "ForMaskedLM")


@every
def test_equals_the_bare_host_on_embeddings(name: str) -> None:
    model, at = model_of(name), int(name in ENCODERS)
    host, phi = prompted(model)
    ours = host(input_ids=ids()).logits
    ours.square().mean().backward()
    found, phi.grad = phi.grad, None
    host.use(None)
    whole = model(**outside(model, phi, ids(), at)).logits
    expected = torch.cat([whole[:, :at], whole[:, at + LENGTH :]], 1)
    torch.testing.assert_close(ours, expected, **CLOSE)
    expected.square().mean().backward()
    assert found.abs().max() > 1e-3
    torch.testing.assert_close(found, phi.grad, **CLOSE)


CLASSES = [name for name in HOSTS if hasattr(tf, f"{name}ForSequenceClassification")]
CLASSES = [name for name in CLASSES if name not in ("XLNet", "Gemma4")]  # XLNet pads on the left


@torch.no_grad()
@pytest.mark.parametrize("name", CLASSES)
def test_a_class_is_read_where_the_host_reads_it(name: str) -> None:
    """At the class token, which stays first, or where a text padded on the right ends."""
    model, at = make(name, "ForSequenceClassification"), int(name in ENCODERS)
    host, phi = prompted(model)
    text = ids()
    text[0, 5:] = PAD
    ours = host(input_ids=text, attention_mask=(text != PAD).long()).logits
    host.use(None)
    for row, own in enumerate(text):
        alone = own[own != PAD][None]
        expected = model(**outside(model, phi, alone, at)).logits
        torch.testing.assert_close(ours[row : row + 1], expected, **CLOSE)


@torch.no_grad()
@every
def test_what_is_absent_leaves_an_example_as_it_was(name: str) -> None:
    host, text = mg.Host(model_of(name)).eval(), ids()
    host.implant("eye", mg.LinearMap(dim=5))
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(3, 4, 5, generator=generator)
    seen = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0], [0, 1, 0, 1]], dtype=torch.bool)
    given = {"image": mg.Side(features, seen)}
    out = host(input_ids=text, side=given).logits
    torch.testing.assert_close(out[1], host(text, modules=None).logits[1], **CLOSE)
    for row in (0, 2):
        own = {"image": mg.Side(features[row : row + 1, seen[row]])}
        alone = host(input_ids=text[row : row + 1], side=own).logits
        torch.testing.assert_close(out[row], alone[0], **CLOSE)
    if name in ("GPT2", "Bamba", "Gemma3", "OPT"):
        last = host(input_ids=text, side=given, logits_to_keep=2).logits
        torch.testing.assert_close(last, out[:, -2:], **CLOSE)


@torch.no_grad()
@every
def test_each_example_has_its_own_prompts(name: str) -> None:
    host, text = mg.Host(model_of(name)).eval(), ids()
    host.implant("long", mg.SoftPrompt(length=3, bound=1.0), active=False)
    host.implant("short", mg.Prompt(ids=(7, 30)), active=False)
    each = ["long >> short", None, "short"]
    out = host(input_ids=text, modules=each).logits
    for row, own in enumerate(each):
        alone = host(input_ids=text[row : row + 1], modules=own).logits
        torch.testing.assert_close(out[row], alone[0], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("name", ["Gemma3n", "Gemma4"])
def test_a_written_prompt_has_its_rows_in_every_table(name: str) -> None:
    host, text = mg.Host(writer(name)).eval(), ids()
    host.implant("p", mg.Prompt(ids=(7, 30, 12)))
    joined = torch.cat([torch.tensor([[7, 30, 12]] * 3), text], 1)
    expected = host(joined, modules=None).logits[:, 3:]
    torch.testing.assert_close(host(text).logits, expected, **CLOSE)


# -- positions ----------------------------------------------------------------------------------

LIMITED = ("GPT2", "OPT", "GPTJ", "CTRL", "Mpt", "Bert", "DistilBert", "DebertaV2", "Albert")


@torch.no_grad()
@every
def test_no_more_tokens_than_positions(name: str) -> None:
    host, _ = prompted(model_of(name))
    host(input_ids=ids(1, 21 if name not in ("Roberta", "MPNet") else 19))  # 24 in all
    if name not in LIMITED:
        return
    wanted = "3 tokens before a text of 22, 25 in all, .* has 24 positions; leave the text 21"
    with pytest.raises(mg.ModgraftError, match=wanted):
        host(input_ids=ids(1, 22))


@torch.no_grad()
def test_positions_of_the_caller_in_several_dimensions() -> None:
    config = tf.Qwen2VLTextConfig(
        vocab_size=41, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    )  # fmt: skip
    model = drawn(tf.Qwen2VLTextModel(config))
    host, phi = prompted(model)
    own = torch.stack([torch.arange(7) * step + 1 for step in (1, 2, 3)])[:, None].expand(3, 3, 7)
    ours = host(input_ids=ids(), position_ids=own).last_hidden_state
    host.use(None)
    places = torch.cat([1 + torch.arange(LENGTH).expand(3, 3, -1), own + LENGTH], 2)
    whole = model(**outside(model, phi, ids(), 0), position_ids=places).last_hidden_state
    torch.testing.assert_close(ours, whole[:, LENGTH:], **CLOSE)


# -- encoder-decoders ---------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", ["Bart", "MBart", "Pegasus"])
def test_before_an_encoders_text(name: str) -> None:
    config = getattr(tf, f"{name}Config")(**SEQ2SEQ)
    model = drawn(getattr(tf, f"{name}ForConditionalGeneration")(config))
    host, phi = prompted(model)
    read = {"decoder_input_ids": ids(3, 10)}  # as many as the encoder's text and the tokens
    ours = host(input_ids=ids(), **read).logits
    settings = {"max_new_tokens": 5, "min_new_tokens": 5}
    written = [host.generate(ids(), **settings, num_beams=beams) for beams in (1, 2)]
    with pytest.raises(mg.ModgraftError, match=f"{name}ForConditionalGeneration.*decoder_input_id"):
        host(input_ids=ids())
    host.use(None)
    joined = outside(model, phi, ids(), 0)
    torch.testing.assert_close(ours, model(**joined, **read).logits, **CLOSE)
    for beams, own in zip((1, 2), written, strict=True):
        assert torch.equal(own, model.generate(**joined, **settings, num_beams=beams))


@torch.no_grad()
def test_after_the_class_token_of_an_encoder_in_two() -> None:
    encoder = make("Bert", "Model")
    config = tf.BertConfig(**encoder.config.to_dict())
    config.is_decoder = config.add_cross_attention = True
    model = drawn(tf.EncoderDecoderModel(encoder=encoder, decoder=tf.BertLMHeadModel(config)))
    host, phi = prompted(model)
    ours = host(input_ids=ids(), decoder_input_ids=ids(3, 5)).logits
    host.use(None)
    expected = model(**outside(model, phi, ids(), 1), decoder_input_ids=ids(3, 5)).logits
    torch.testing.assert_close(ours, expected, **CLOSE)


def test_a_class_that_a_decoder_reads_at_the_encoders_end_is_refused() -> None:
    host, _ = prompted(drawn(tf.BartForSequenceClassification(tf.BartConfig(**SEQ2SEQ))))
    text = ids()
    text[:, -1] = SPECIAL["eos_token_id"]
    with pytest.raises(mg.ModgraftError, match="implant a Prefix"):
        host(input_ids=text, decoder_input_ids=text)
    with pytest.raises(IndexError):  # the host's own error, of ids that it does not have
        host(input_ids=text + 40, decoder_input_ids=text)


# -- the host -----------------------------------------------------------------------------------


@every
def test_the_tables_are_as_before_once_the_last_prompt_has_gone(name: str) -> None:
    model = model_of(name)
    kinds = [type(module) for module in model.modules()]
    host, _ = prompted(model)
    before = host(input_ids=ids()).logits
    host.implant("other", mg.SoftPrompt(length=2), active=False)
    host.remove("other")
    assert torch.equal(host(input_ids=ids()).logits, before)
    host.remove("m")
    assert [type(module) for module in model.modules()] == kinds
    assert not any("_modgraft_state" in module.__dict__ for module in model.modules())


class Elsewhere(tf.GPT2LMHeadModel):
    """Looks its ids up in another table than the one that it gives."""

    def __init__(self, config: tf.GPT2Config) -> None:
        super().__init__(config)
        self.other = nn.Embedding(41, 32)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.other


def test_a_host_that_looks_its_ids_up_elsewhere() -> None:
    host, _ = prompted(Elsewhere(tf.GPT2Config(**HOSTS["GPT2"], **SPECIAL)))
    with pytest.raises(mg.ModgraftError, match="'m' had no effect: this Elsewhere"):
        host(ids())


class Unmasked(tf.GPT2LMHeadModel):
    """Takes no mask."""

    def forward(  # type: ignore[override]
        self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None
    ) -> Any:
        return super().forward(input_ids, inputs_embeds=inputs_embeds)


@torch.no_grad()
def test_tokens_that_a_host_without_a_mask_would_see() -> None:
    host = mg.Host(drawn(Unmasked(tf.GPT2Config(**HOSTS["GPT2"], **SPECIAL)))).eval()
    host.implant("eye", mg.LinearMap(dim=5))
    features, seen = torch.ones(3, 2, 5), torch.ones(3, 2, dtype=torch.bool)
    seen[0, 1] = False
    with pytest.raises(mg.ModgraftError, match="Unmasked takes no attention_mask"):
        host(ids(), side={"image": mg.Side(features, seen)})
    host.implant("soft", mg.SoftPrompt(length=2), active=False)
    assert host(ids(), modules="soft").logits.shape == (3, 7, 41)


# -- where the class is read ----------------------------------------------------------------------

SEEN: dict[str, Any] = {"max_position_embeddings": 32, "vocab_size": 41, "pad_token_id": PAD}
SEEN |= {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
SEEN |= {"num_attention_heads": 4}
FIRST: dict[str, tuple[Any, dict[str, Any], str]] = {
    "MarkupLM": (
        tf.MarkupLMForSequenceClassification, {"xpath_unit_hidden_size": 4, "max_depth": 4},
        "logits",
    ),
    "LayoutLMv3": (
        tf.LayoutLMv3ForSequenceClassification,
        {
            "visual_embed": False, "coordinate_size": 4, "shape_size": 8,
            "max_2d_position_embeddings": 64, "has_spatial_attention_bias": False,
            "has_relative_attention_bias": False,
        },
        "logits",
    ),
    "BlipText": (tf.BlipTextModel, {"encoder_hidden_size": 16}, "pooler_output"),
    "Splinter": (tf.SplinterModel, {}, "last_hidden_state"),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("name", FIRST)
def test_encoders_whose_texts_begin_with_a_class_token(name: str) -> None:
    """The prompt goes after it, whether the head, a pooler or nothing in the file reads it."""
    kind, own, key = FIRST[name]
    model = drawn(kind(kind.config_class(**{**SEEN, **own})))
    host, phi = prompted(model)
    text = ids()
    rows = host.model.get_input_embeddings().weight  # type: ignore[union-attr]
    rows[5 : 5 + LENGTH] = phi  # type: ignore[index]
    text[text < 5 + LENGTH] = 30
    ours = host(input_ids=text)[key]
    words = torch.arange(5, 5 + LENGTH).expand(3, -1)
    put = torch.cat([text[:, :1], words, text[:, 1:]], 1)
    whole = host(input_ids=put, modules=None)[key]
    if key == "last_hidden_state":
        whole = torch.cat([whole[:, :1], whole[:, 1 + LENGTH :]], 1)
    torch.testing.assert_close(ours, whole, **CLOSE)


def test_a_blip_that_writes_reads_no_class() -> None:
    config = tf.BlipTextConfig(**SEEN, encoder_hidden_size=16)
    assert reading_of(tf.BlipTextModel(config)).first == 1
    assert reading_of(tf.BlipTextLMHeadModel(config)).first == 0


SIZE = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "vocab_size": 60, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
PLACES: dict[str, tuple[Any, Any, int, Tensor]] = {
    "mc_token_ids": (
        tf.GPT2DoubleHeadsModel,
        tf.GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, num_labels=1, pad_token_id=0),
        0,
        torch.tensor([2, 5]),
    ),
    "entity_position_ids": (
        tf.LukeForEntityClassification,
        tf.LukeConfig(**SIZE, entity_vocab_size=10, entity_emb_size=8, num_labels=2),
        1,
        torch.tensor([[[1, 2, -1]], [[3, -1, -1]]]),
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("name", PLACES)
def test_places_in_the_text_move_with_the_tokens(name: str) -> None:
    kind, config, first, places = PLACES[name]
    torch.manual_seed(0)
    host = mg.Host(drawn(kind(config)))
    host.implant("p", mg.SoftPrompt(length=3))
    phi = host["p"].places[0].get_parameter("phi").normal_()
    plain: Any = host.merge(None)
    plain.get_input_embeddings().weight[[57, 58, 59]] = phi
    text = torch.randint(3, 55, (2, 6))
    words = torch.tensor([[57, 58, 59]]).expand(2, -1)
    whole = torch.cat([text[:, :first], words, text[:, first:]], 1)
    more: dict[str, Tensor] = {}
    if name == "entity_position_ids":
        one = torch.ones(2, 1, dtype=torch.long)
        more = {"entity_ids": one, "entity_attention_mask": one}
    key = "mc_logits" if name == "mc_token_ids" else "logits"
    moved = torch.where(places < 0, places, places + 3)
    ours, truth = host(text, **more, **{name: places}), plain(whole, **more, **{name: moved})
    torch.testing.assert_close(ours[key], truth[key], **CLOSE)


def test_a_part_that_reads_the_text_is_not_called_past_a_prompt() -> None:
    host, _ = prompted(make("Bert", "ForMaskedLM"))
    bert: Any = host.model.get_submodule("bert")
    with pytest.raises(mg.ModgraftError, match="its BertModel was called without it"):
        bert(ids())
    host(input_ids=ids())  # what was begun has ended
    host.use(None)
    bert(ids())
