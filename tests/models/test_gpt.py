"""The small hosts by themselves: positions, caches, n-grams, saving, room and roles."""

from __future__ import annotations

import math

import pytest
import torch

import modgraft as mg
from modgraft.models.gpt import GPT, GPTConfig
from modgraft.models.rotary import angles, frequencies, rotated
from modgraft.models.t5 import T5, T5Config
from modgraft.models.vit import ViT, ViTConfig

SETTINGS = {
    "learned": {},
    "rotary": {"positions": "rotary", "norm": "rms", "activation": "swiglu", "bias": False,
               "num_key_value_heads": 2, "tie_word_embeddings": False},
    "axial": {"positions": "axial", "grid": (8, 8), "activation": "relu2",
              "ngram_rows": (66**2, 5000)},
    "polar": {"positions": "polar", "grid": (8, 8), "ngram_rows": (500,), "zero_start": True},
}  # fmt: skip


def gpt(name: str, **more) -> GPT:
    torch.manual_seed(0)
    model = GPT(
        GPTConfig(hidden_size=32, num_hidden_layers=3, pad_token_id=0, **SETTINGS[name], **more)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def ids(n: int = 20) -> torch.Tensor:
    return torch.randint(2, 65, (3, n), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", SETTINGS)
def test_a_cache_gives_what_the_whole_text_gives(name):
    model = gpt(name)
    whole = model(ids()).logits
    first = model(ids()[:, :12], use_cache=True)
    then = model(ids()[:, 12:13], past_key_values=first.past_key_values)
    rest = model(ids()[:, 13:], past_key_values=then.past_key_values)
    got = torch.cat([first.logits, then.logits, rest.logits], 1)
    torch.testing.assert_close(got, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", SETTINGS)
def test_generate_writes_what_rereading_the_text_gives(name):
    model, text = gpt(name), ids()
    for _ in range(9):
        text = torch.cat([text, model(text, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    got = model.generate(ids(), max_new_tokens=9, do_sample=False)
    assert torch.equal(got, text[:, : got.shape[1]])
    assert model.generate(ids(), max_new_tokens=4, num_beams=3).shape == (3, 24)


@pytest.mark.parametrize("name", SETTINGS)
def test_nothing_sees_what_comes_later(name):
    model, text = gpt(name), ids()
    other = text.clone()
    other[:, 12] = (text[:, 12] + 1) % 65
    same = model(text).logits[:, :12] == model(other).logits[:, :12]
    assert same.all()


@pytest.mark.parametrize("name", SETTINGS)
def test_saved_and_loaded_it_is_the_same(name, tmp_path):
    model = gpt(name)
    model.save_pretrained(tmp_path)
    again = GPT.from_pretrained(tmp_path).eval()
    assert torch.equal(model(ids()).logits, again(ids()).logits)
    assert again.config.grid == model.config.grid


def test_zero_started_blocks_are_the_identity():
    torch.manual_seed(0)
    model = GPT(GPTConfig(hidden_size=32, zero_start=True)).eval()
    states = model(ids(), output_hidden_states=True).hidden_states
    assert all(torch.equal(state, states[0]) for state in states[:-1])


def test_the_written_out_equation():
    """Two blocks of attention and feed-forward in float64, without any layer of torch's."""
    model = gpt("rotary").double()
    w = {name: p.detach() for name, p in model.named_parameters()}
    text, d, heads, shared = ids(), 32, 4, 2
    width = d // heads

    def rms(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    place = torch.arange(20, dtype=torch.float64)
    omega = 10000.0 ** -(torch.arange(width // 2, dtype=torch.float64) / (width // 2))
    turn = torch.polar(torch.ones(20, width // 2, dtype=torch.float64), place[:, None] * omega)

    def turned(x):  # [B, n, h, width]: pairs (i, i + width/2) as complex numbers
        z = torch.complex(x[..., : width // 2], x[..., width // 2 :]) * turn[:, None]
        return torch.cat([z.real, z.imag], -1)

    x = w["embedding.weight"][text]
    hidden = torch.ones(20, 20).triu(1).bool()
    for i in range(3):
        at = f"blocks.{i}."
        h = rms(x, w[at + "attention_norm.weight"])
        q, k, v = (
            (h @ w[f"{at}attention.{name}.weight"].T).view(3, 20, -1, width)
            for name in ("query", "key", "value")
        )
        q, k = turned(q), turned(k)
        out = torch.zeros(3, 20, heads, width, dtype=torch.float64)
        for head in range(heads):
            own = head // (heads // shared)
            scores = q[:, :, head] @ k[:, :, own].mT / math.sqrt(width)
            weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
            out[:, :, head] = weights @ v[:, :, own]
        x = x + out.reshape(3, 20, d) @ w[at + "attention.output.weight"].T
        h = rms(x, w[at + "feedforward_norm.weight"])
        gate = h @ w[at + "feedforward.gate.weight"].T
        up = h @ w[at + "feedforward.up.weight"].T
        x = x + (gate * gate.sigmoid() * up) @ w[at + "feedforward.down.weight"].T
    want = rms(x, w["norm.weight"]) @ w["head.weight"].T
    torch.testing.assert_close(model(text).logits, want, atol=1e-6, rtol=1e-6)


def test_ngram_tables_hold_the_ngrams_that_end_at_each_token():
    model = gpt("learned", ngram_rows=(66**2, 66**3))
    text = ids(5)
    got = model.ngrams(text, torch.arange(5)[None])
    pairs, triples = (table.weight for table in model.ngrams.tables)
    for row in range(3):
        told = [0, 0, *(text[row] + 1).tolist()]  # token −1 before the text
        for i in range(5):
            a, b, c = told[i : i + 3]
            want = pairs[c + 66 * b] + triples[c + 66 * b + 66**2 * a]
            torch.testing.assert_close(got[row, i], want)


@pytest.mark.parametrize("rows", [(), (4356, 5000)])
def test_padding_packing_and_a_cache_of_one_size_change_nothing(rows):
    model, text = gpt("rotary", ngram_rows=rows), ids(9)
    alone = model(text, use_cache=False).logits
    padded = torch.nn.functional.pad(text, (3, 0))
    mask = torch.nn.functional.pad(torch.ones_like(text), (3, 0))
    places = (mask.cumsum(1) - 1).clamp(min=0)
    for more in ({}, {"position_ids": places}):
        got = model(padded, attention_mask=mask, **more).logits[:, 3:]
        torch.testing.assert_close(got, alone, atol=1e-4, rtol=1e-4)
    written = model.generate(text, max_new_tokens=6, do_sample=False)
    left = model.generate(padded, attention_mask=mask, max_new_tokens=6, do_sample=False)
    assert torch.equal(left[:, 3:], written)
    row = torch.cat([text[0], text[1], text[2]])[None]
    packed = model(row, position_ids=torch.arange(9).repeat(3)[None], use_cache=False).logits
    torch.testing.assert_close(packed.view(3, 9, -1), alone, atol=1e-4, rtol=1e-4)
    how = {"max_new_tokens": 5, "do_sample": False, "output_logits": True}
    both = [
        model.generate(text, cache_implementation=kind, return_dict_in_generate=True, **how).logits
        for kind in (None, "static")
    ]
    torch.testing.assert_close(both[0], both[1], atol=1e-4, rtol=1e-4)


def test_a_prompt_is_no_token_of_an_ngram():
    model, text = gpt("learned", ngram_rows=(4356, 5000)), ids(7)
    host = mg.Host(model).eval()
    host.implant("s", mg.SoftPrompt(length=3), active=False)
    host.implant("a", mg.SoftPrompt(length=2), active=False)
    whole = host(text, modules="s").logits
    each = host(text, modules=["a", "s", None]).logits
    torch.testing.assert_close(each[1], whole[1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(each[2], host(text, modules=None).logits[2], atol=1e-4, rtol=1e-4)
    twice = host(text[:1].expand(2, -1), modules="s").logits
    torch.testing.assert_close(twice[0], twice[1], atol=1e-5, rtol=1e-5)


def test_targets_are_what_labels_are_one_later_also_with_a_prompt():
    host = mg.Host(gpt("learned")).eval()
    text = ids(9)
    shifted = torch.nn.functional.pad(text[:, 1:], (0, 1), value=-100)
    torch.testing.assert_close(host(text, targets=shifted).loss, host(text, labels=text).loss)
    host.implant("s", mg.SoftPrompt(length=2))
    out = host(text, targets=shifted)
    want = torch.nn.functional.cross_entropy(
        out.logits[:, :-1].flatten(0, 1), text[:, 1:].flatten()
    )
    torch.testing.assert_close(out.loss, want)


def test_the_trainer_finds_a_loss_to_choose_the_best_by(tmp_path):
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": row, "labels": row} for row in ids(9)]
    host = mg.Host(gpt("learned"))
    host.implant("l", mg.LoRA(rank=2), at="query")
    given = TrainingArguments(
        tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1, save_steps=1, report_to=[],
        load_best_model_at_end=True, disable_tqdm=True, use_cpu=True,
        remove_unused_columns=False,
    )  # fmt: skip
    trainer = Trainer(host, given, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    assert "eval_loss" in trainer.evaluate()


def test_rotary_scores_depend_on_differences_alone():
    q, k = torch.randn(2, 1, 1, 1, 16)

    def score(kind, i, j, grid):
        omega = frequencies(kind, 16)
        by = angles(kind, torch.tensor([i, j]), omega, grid)[None, None]
        turn = by.cos(), by.sin()
        return float((rotated(q, (turn[0][:, :, :1], turn[1][:, :, :1]))
                      * rotated(k, (turn[0][:, :, 1:], turn[1][:, :, 1:]))).sum())  # fmt: skip

    assert math.isclose(score("rotary", 3, 9, None), score("rotary", 13, 19, None), abs_tol=1e-5)
    # rows and columns of a grid of 8: both pairs are one row down and two columns to the right
    assert math.isclose(score("axial", 9, 19, (8, 8)), score("axial", 20, 30, (8, 8)), abs_tol=1e-5)
    assert not math.isclose(
        score("axial", 0, 7, (8, 8)), score("axial", 7, 14, (8, 8)), abs_tol=1e-3
    )
    # a quarter turn around the middle moves both angles by the same
    corner = (
        score("polar", 0, 2, (3, 3)),
        score("polar", 2, 8, (3, 3)),
        score("polar", 8, 6, (3, 3)),
    )
    assert all(math.isclose(corner[0], other, abs_tol=1e-4) for other in corner)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"positions": "round"}, "positions='round'"),
        ({"norm": "batch"}, "norm='batch'"),
        ({"activation": "tanh"}, "activation='tanh'"),
        ({"hidden_size": 30}, "hidden_size=30 is no multiple of 4 heads"),
        ({"num_key_value_heads": 3}, "3 heads of keys cannot be shared by 4"),
        ({"positions": "polar"}, "need a grid"),
    ],
)
def test_settings_that_mean_nothing_are_refused(change, said):
    with pytest.raises(ValueError, match=said):
        GPTConfig(**change)


@pytest.mark.parametrize("name", ["learned", "axial"])
def test_a_text_longer_than_the_positions_is_refused(name):
    model = gpt(name)
    with pytest.raises(ValueError, match=r"position 64 of a model with 64 .* its last 64 tokens"):
        model(ids(65))
    padded = torch.cat([torch.ones(3, 8, dtype=torch.long), ids(60)], 1)
    mask = torch.ones_like(padded)
    mask[:, :8] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    got = model(padded, attention_mask=mask, position_ids=places).logits
    if name == "learned":
        torch.testing.assert_close(got[:, 8:], model(ids(60)).logits, atol=1e-5, rtol=1e-5)


def test_both_ids_and_embeddings_or_neither_are_refused():
    model = gpt("learned")
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="n-grams are of ids"):
        gpt("axial")(inputs_embeds=torch.zeros(1, 3, 32))
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        T5(T5Config(vocab_size=9, hidden_size=8))(labels=torch.ones(1, 2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"pictures \[3, 4, 4\] for a model of \[3, 8, 8\]"):
        ViT(ViTConfig(image_size=8, patch_size=4, hidden_size=8))(torch.zeros(1, 3, 4, 4))


@pytest.mark.parametrize("positions", ["learned", "axial", "polar"])
def test_everything_composes_on_every_small_host(positions):
    torch.manual_seed(0)
    more = {} if positions == "learned" else {"grid": (8, 8)}
    vision = ViTConfig(image_size=16, patch_size=4, hidden_size=32, positions=positions)
    hosts = [
        (GPT(GPTConfig(hidden_size=32, positions=positions, **more)), {"input_ids": ids()}),
        (ViT(vision), {"pixel_values": torch.randn(3, 3, 16, 16)}),
        (T5(T5Config(vocab_size=65, hidden_size=32)), {"input_ids": ids(), "labels": ids()}),
    ]
    for model, batch in hosts:
        host = mg.Host(model).eval()
        bare = host(**batch).logits
        host.implant("l", mg.LoRA(rank=2), at=["query", "value", "up"])
        host.implant("a", mg.Adapter(reduction=4), at="block")
        host.implant("p", mg.Prefix(length=3), at="attention", active=False)
        host.implant("s", mg.SoftPrompt(length=2, init="random"), active=False)
        assert torch.equal(host(**batch).logits, bare)  # both start as the identity
        with torch.no_grad():
            for name in "lasp":
                for parameter in host[name].parameters():
                    parameter.normal_(std=0.3)
        host.use("s >> p >> l >> a")
        together = host(**batch).logits
        each = host(**batch, modules=["s >> p >> l >> a", None, "l"]).logits
        torch.testing.assert_close(each[0], together[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(each[1], bare[1], atol=1e-4, rtol=1e-4)
        assert not torch.allclose(together, bare)
        for name in "lasp":
            host.remove(name)
        assert torch.equal(host(**batch).logits, bare)
