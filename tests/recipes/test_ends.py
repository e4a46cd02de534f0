"""What is learned as the end of an answer is what completions stop at, from SFT to sampling and to the next trainer."""

import json

import pytest
from datasets import Dataset
from transformers import GenerationConfig

from prefopt import RankedDPOConfig, RankedDPOTrainer
from prefopt.inference.generate import end_as_learned, end_token_ids, generate
from prefopt.models.loading import load_language_model
from prefopt.rankings.tokens import closing_token_id
from prefopt.recipes import sft
from tests.trainers.conftest import settings

pytestmark = pytest.mark.slow

EOS, CLOSING = 1, 3
CHAT = [{"role": "user", "content": "the cat"}]
SAT = [{"role": "assistant", "content": "sat"}]


@pytest.fixture
def base_tokenizer(chat_tokenizer):
    """As that of a base model: a chat template whose end of turn is not the end token."""
    chat_tokenizer.eos_token = "<eos>"
    return chat_tokenizer


@pytest.mark.parametrize("how", ["full", "lora"])
def test_sft_on_chats_teaches_a_base_model_where_to_stop(how, base_tokenizer, causal_lm, tmp_path):
    causal_lm.save_pretrained(tmp_path / "base")
    base_tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text(8 * (json.dumps({"prompt": CHAT, "completion": SAT}) + "\n"))
    options = {
        "model_name_or_path": tmp_path / "base",
        "dataset_name": tmp_path / "rows.jsonl",
        "output_dir": tmp_path / "sft",
        "use_cpu": True,
        "report_to": "none",
        "max_steps": 40,
        "learning_rate": 0.05,
        "save_strategy": "no",
    }
    options |= {"use_peft": True, "lora_target_modules": "all-linear"} if how == "lora" else {}
    sft.main([part for name, value in options.items() for part in (f"--{name}", str(value))])
    assert set(GenerationConfig.from_pretrained(tmp_path / "sft").eos_token_id) == {EOS, CLOSING}
    model, tokenizer = load_language_model(tmp_path / "sft", merge=how == "lora", dtype="float32", device="cpu")
    (completion,) = generate(model, tokenizer, [CHAT], max_new_tokens=12, temperature=0)[0]
    assert completion.text == "sat"
    assert not completion.truncated


def test_dpo_on_chats_does_too(base_tokenizer, causal_lm, tmp_path):
    rows = Dataset.from_list([{"prompt": CHAT, "completions": ["sat", "ran"], "ranks": [1, 2]}])
    args = RankedDPOConfig(**settings(tmp_path / "dpo"))
    trainer = RankedDPOTrainer(causal_lm, args=args, train_dataset=rows, processing_class=base_tokenizer)
    assert end_token_ids(trainer.model, base_tokenizer) == [EOS, CLOSING]


def test_other_ends_are_left_alone(base_tokenizer, tokenizer, causal_lm, caplog):
    assert closing_token_id(base_tokenizer) == CLOSING
    assert closing_token_id(tokenizer) is None
    for rows in ([[5, 6, EOS]], [[5, 6], [7, 8]]):  # text, and chats that are cut
        end_as_learned(causal_lm, base_tokenizer, rows)
        assert causal_lm.generation_config.eos_token_id == EOS
    assert not caplog.text
    end_as_learned(causal_lm, base_tokenizer, [[5, 6], [7, CLOSING]])
    assert causal_lm.generation_config.eos_token_id == [EOS, CLOSING]
    assert "Answers end with '<|im_end|>'" in caplog.text
    caplog.clear()
    end_as_learned(causal_lm, base_tokenizer, [[7, CLOSING]])
    assert not caplog.text
