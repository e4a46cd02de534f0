"""The tokenizer loses nothing, words are single tokens, and the model is what it claims to be."""

import random

import pytest
import torch
from transformers import AutoTokenizer

from prefopt.sandbox import World, build_model, build_tokenizer


@pytest.fixture(scope="module")
def world() -> World:
    return World(seed=0)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def test_any_text_comes_back(tokenizer):
    rng = random.Random(0)
    planes = [(0x20, 0x7E), (0x0, 0x1F), (0xA0, 0x2FF), (0x400, 0x4FF), (0x4E00, 0x9FFF), (0x1F300, 0x1F6FF)]
    texts = [
        "",
        " ",
        "  two  spaces ",
        "\n\n\t",
        "Ada's  café — naïve",
        "don't",
        "<eos>",
        "a<pad>b",
        "\x00",
        "👩‍👩‍👧",
    ]
    for _ in range(300):
        low, high = rng.choice(planes)
        texts.append("".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 40))))
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text


def test_the_worlds_texts_come_back_word_by_word(world, tokenizer):
    bytes_only = set()
    for document in world.corpus("train", 3000):
        ids = tokenizer(document)["input_ids"]
        assert tokenizer.decode(ids) == document
        bytes_only |= {t for t in tokenizer.convert_ids_to_tokens(ids) if len(t) == 1}
    assert bytes_only <= set(".:,?!Ċ")  # only punctuation and the line break are single bytes


def test_lengths(world, tokenizer):
    for split in ("sft", "test"):
        for prompt in world.prompts(split):
            n = len(tokenizer(prompt)["input_ids"])
            assert n <= 40
            for text in (world.good_answer(prompt), world.demonstration(prompt)):
                assert len(tokenizer(text)["input_ids"]) < 28
                assert n + len(tokenizer(text)["input_ids"]) < 64


def test_prompt_and_completion_tokenize_apart(world, tokenizer):
    for row in world.demonstrations("sft", 200):
        joint = tokenizer(row["prompt"] + row["completion"])["input_ids"]
        assert joint == tokenizer(row["prompt"])["input_ids"] + tokenizer(row["completion"])["input_ids"]


def test_special_tokens(tokenizer):
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.bos_token_id == tokenizer.eos_token_id
    assert tokenizer("Ada")["input_ids"][-1] != tokenizer.eos_token_id  # nothing is added when encoding


def test_tokenizer_survives_saving(tokenizer, world, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in [*world.prompts("sft")[:50], "Ünïcode <eos>  x"]:
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert loaded.decode(loaded(text)["input_ids"]) == text


def test_model_size_and_config(tokenizer):
    model = build_model(tokenizer)
    assert 1_000_000 <= model.num_parameters() <= 3_000_000
    assert model.dtype == torch.float32
    assert model.generation_config.eos_token_id == model.config.eos_token_id == tokenizer.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)


def test_model_weights_come_from_the_seed_alone(tokenizer):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = build_model(tokenizer, 3), build_model(tokenizer, 3), build_model(tokenizer, 4)
    assert torch.equal(torch.get_rng_state(), before)
    w = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(first.state_dict()[w], again.state_dict()[w])
    assert not torch.equal(first.state_dict()[w], other.state_dict()[w])
    assert first.state_dict()[w].std().item() == pytest.approx(0.06, rel=0.05)
