"""An adapter on its base: one rule for the vocabulary, in every way to load it."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM
from trl import ModelConfig

from prefopt.hub.push import save_merged
from prefopt.models.checkpoints import load_reward_model, reward_model_from_adapter
from prefopt.models.loading import load_causal_lm, load_language_model, saved_vocabulary
from prefopt.recipes.common.models import load_policy
from tests.conftest import tiny_config

pytestmark = pytest.mark.slow

INPUT = torch.tensor([[20, 30, 40, 50]])
NEW = torch.tensor([[20, 322, 40, 50]])


def with_tokens(tokenizer, length):
    tokenizer.add_tokens([f"<new {i}>" for i in range(length - len(tokenizer))])
    return tokenizer


@pytest.fixture
def folder(tmp_path, tokenizer):
    """`base`, a language model of 320 tokens with a tokenizer of fewer."""
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config()).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path


def adapter(folder, rows, name="adapter", save_embedding_layers="auto", **options):
    """Save a LoRA policy trained on `base` with so many token embeddings; returns the policy."""
    torch.manual_seed(1)
    base = LlamaForCausalLM.from_pretrained(folder / "base")
    if rows != 320:
        base.resize_token_embeddings(rows)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], init_lora_weights=False, **options)
    model = get_peft_model(base, config).eval()
    model.save_pretrained(folder / name, save_embedding_layers=save_embedding_layers)
    return model


def logits(model, ids=INPUT):
    with torch.no_grad():
        return model(input_ids=ids).logits


def every_way(folder):
    """The policy by each of the ways to load it."""
    path = str(folder / "adapter")
    yield load_language_model(path)[0]
    yield load_language_model(path, merge=True)[0]
    yield load_policy(ModelConfig(path), {})
    yield load_policy(ModelConfig(path), {}, is_trainable=False)
    save_merged(folder / "adapter", folder / "merged")
    yield load_causal_lm(folder / "merged")


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        (323, {}),
        (310, {}),  # fewer than the base has
        (323, {"modules_to_save": ["embed_tokens", "lm_head"]}),
        (323, {"trainable_token_indices": {"embed_tokens": [322]}}),
    ],
)
def test_the_rows_that_an_adapter_carries_decide(rows, options, folder, tokenizer):
    trained = adapter(folder, rows, **options)
    with_tokens(tokenizer, 330).save_pretrained(folder / "adapter")
    tiny_config(vocab_size=325).save_pretrained(folder / "adapter")
    assert saved_vocabulary(folder / "adapter") == rows
    ids = NEW if rows == 323 else INPUT
    for model in every_way(folder):
        assert logits(model, ids).shape[-1] == rows
        torch.testing.assert_close(logits(model, ids), logits(trained, ids), atol=1e-5, rtol=0)


def test_else_the_config_next_to_the_adapter_decides(folder, tokenizer):
    trained = adapter(folder, 323, save_embedding_layers=False)
    with_tokens(tokenizer, 330).save_pretrained(folder / "adapter")
    trained.get_base_model().config.save_pretrained(folder / "adapter")
    assert saved_vocabulary(folder / "adapter") is None
    for model in every_way(folder):
        assert model.get_input_embeddings().num_embeddings == 323
        torch.testing.assert_close(logits(model)[..., :320], logits(trained)[..., :320], atol=1e-5, rtol=0)


def test_a_config_makes_no_vocabulary_smaller(folder, tokenizer):
    trained = adapter(folder, 320)
    tokenizer.save_pretrained(folder / "adapter")
    tiny_config(vocab_size=310).save_pretrained(folder / "adapter")
    for model in every_way(folder):
        torch.testing.assert_close(logits(model), logits(trained), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("length", "rows"), [(330, 330), (0, 320)])
def test_where_nothing_else_says_the_tokenizer_does(length, rows, folder, tokenizer):
    trained = adapter(folder, 320)
    with_tokens(tokenizer, length).save_pretrained(folder / "adapter")
    assert len(tokenizer) == max(length, 307)
    for model in every_way(folder):
        assert model.get_input_embeddings().num_embeddings == rows
        torch.testing.assert_close(logits(model)[..., :320], logits(trained), atol=1e-5, rtol=0)


def test_embeddings_of_another_name_are_found(tmp_path):
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    GPT2LMHeadModel(GPT2Config(vocab_size=320, **sizes)).save_pretrained(tmp_path / "base")
    base = GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(323)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"], init_lora_weights=False)
    trained = get_peft_model(base, config).eval()
    trained.save_pretrained(tmp_path / "adapter")
    assert saved_vocabulary(tmp_path / "adapter") == 323
    torch.testing.assert_close(logits(load_causal_lm(tmp_path / "adapter"), NEW), logits(trained, NEW))


def test_a_reward_model_starts_from_an_adapter_of_a_larger_vocabulary(folder):
    trained = adapter(folder, 323)
    model = reward_model_from_adapter(folder / "adapter")
    assert torch.equal(model.get_input_embeddings().weight, trained.get_input_embeddings().weight)
    model.save_pretrained(folder / "reward")
    loaded = load_reward_model(folder / "reward")  # without a config of its own
    assert torch.equal(loaded.get_input_embeddings().weight, trained.get_input_embeddings().weight)


def test_generation_ends_as_the_adapter_says(folder):
    adapter(folder, 320)
    assert load_causal_lm(folder / "adapter").generation_config.eos_token_id == 1
    GenerationConfig(eos_token_id=[3, 7]).save_pretrained(folder / "adapter")
    for model in (load_causal_lm(folder / "adapter"), load_causal_lm(folder / "adapter", merge=True)):
        assert model.generation_config.eos_token_id == [3, 7]


def test_a_policy_is_trained_or_frozen(folder):
    adapter(folder, 320)
    trainable = load_policy(ModelConfig(str(folder / "adapter")), {})
    assert {name for name, p in trainable.named_parameters() if p.requires_grad} == {
        name for name, _ in trainable.named_parameters() if "lora_" in name
    }
    assert load_policy(ModelConfig(str(folder / "base")), {}) == str(folder / "base")
    for source in ("adapter", "base"):
        frozen = load_policy(ModelConfig(str(folder / source)), {}, is_trainable=False)
        assert not frozen.training
        assert not any(p.requires_grad for p in frozen.parameters())


def test_a_reward_model_is_no_policy(folder, reward_model):
    reward_model.save_pretrained(folder / "reward")
    adapter(folder, 320)
    config = folder / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"task_type": "SEQ_CLS"}))
    for source in ("reward", "adapter"):
        path = str(folder / source)
        with pytest.raises(ValueError, match=f"^'{path}' is a reward model; expected a language model"):
            load_causal_lm(path)
        with pytest.raises((ValueError, SystemExit), match=f"model_name_or_path: '{path}' is a reward model"):
            load_policy(ModelConfig(path), {})
