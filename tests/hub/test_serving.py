"""A merged reward model elsewhere: plain transformers, its pipeline and TRL's `reward_funcs` give prefopt's scores."""

import copy
import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaForSequenceClassification, pipeline
from trl import GRPOConfig, GRPOTrainer

from prefopt.hub.cards import build_card
from prefopt.hub.push import save_merged
from prefopt.inference.scoring import score_texts
from prefopt.models.checkpoints import load_classifier, load_reward_model, merge_reward_model, save_reward_model
from prefopt.models.reward import get_reward_bias, sequence_scores, set_reward_bias
from prefopt.rankings.tokens import build_ids
from tests.conftest import tiny_config
from tests.hub.models import ANSWER, DEMONSTRATIONS, QUESTION, ROWS, SETTINGS, chat, reward_trainer

pytestmark = [pytest.mark.allow_hosts(["127.0.0.1"]), pytest.mark.slow]
IDS, MASK = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 1]]), torch.ones(2, 4, dtype=torch.long)


@pytest.fixture
def trained(base, tokenizer, tmp_path):
    """A LoRA reward model on plain text with a bias, and its folder merged."""
    trainer = reward_trainer(base, tokenizer, tmp_path / "rm")
    trainer.train()
    trainer.center_on(DEMONSTRATIONS)
    trainer.save_model()
    save_merged(tmp_path / "rm", tmp_path / "merged")
    return trainer


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("is_chat", [True, False])
def test_plain_transformers_and_its_pipeline(has_bias, is_chat, base, tokenizer, chat_tokenizer, tmp_path):
    tokenizer = chat_tokenizer if is_chat else tokenizer
    trainer = reward_trainer(base, tokenizer, tmp_path / "rm", rows=[chat(r) for r in ROWS] if is_chat else ROWS)
    trainer.train()
    bias = trainer.center_on([DEMONSTRATIONS[0]]) if has_bias and not is_chat else 0.0
    if has_bias and is_chat:
        one = chat({"prompt": QUESTION, "completions": [ANSWER.strip()]})
        bias = trainer.center_on([{"prompt": one["prompt"], "completion": one["completions"][0]}])
    assert (abs(bias) > 1e-3) == has_bias
    trainer.save_model()
    save_merged(tmp_path / "rm", tmp_path / "merged")

    prompt, answer = [{"role": "user", "content": QUESTION}], [{"role": "assistant", "content": ANSWER.strip()}]
    prompt, answer = (prompt, answer) if is_chat else (QUESTION, ANSWER)
    score = trainer.score([prompt], [answer])[0]
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    plain = AutoTokenizer.from_pretrained(tmp_path / "merged")
    text = (
        plain.apply_chat_template(prompt + answer, tokenize=False).rstrip()
        if is_chat
        else prompt + answer + plain.eos_token
    )
    ids = plain(text, add_special_tokens=False).input_ids
    prompt_ids, answer_ids = build_ids(tokenizer, prompt, answer)
    assert ids == prompt_ids + answer_ids
    logit = model(input_ids=torch.tensor([ids])).logits[0, 0].item()
    assert model.config.reward_bias == pytest.approx(bias)
    assert logit - bias == pytest.approx(score, abs=1e-5)
    pipe = pipeline("text-classification", model=model, tokenizer=plain)
    # Three texts in one batch, and no sigmoid on top.
    for output in pipe([text, text + text, text], batch_size=3, add_special_tokens=False)[::2]:
        assert output["score"] - bias == pytest.approx(score, abs=1e-5)


@pytest.mark.parametrize("lora", [True, False])
def test_the_trainer_saves_that_the_logit_is_the_score(lora, base, tokenizer, tmp_path):
    reward_trainer(base, tokenizer, tmp_path / "rm", lora=lora).save_model()
    assert json.loads((tmp_path / "rm" / "config.json").read_text())["problem_type"] == "regression"


class WithBias(LlamaForSequenceClassification):
    """A classifier whose head has a bias, as no class of transformers has."""

    def __init__(self, config):
        super().__init__(config)
        self.score = nn.Linear(config.hidden_size, 1, bias=True)


def test_a_head_with_a_bias_takes_up_the_reward_bias(tmp_path):
    torch.manual_seed(0)
    base = WithBias(tiny_config(num_labels=1))
    nn.init.constant_(base.score.bias, 0.25)
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"], modules_to_save=["score"])
    model = get_peft_model(copy.deepcopy(base), config).eval()
    set_reward_bias(model, 0.7)
    expected = sequence_scores(model, IDS, MASK).detach()
    save_reward_model(model, tmp_path / "rm")
    merged = merge_reward_model(tmp_path / "rm", base_model=copy.deepcopy(base))
    assert get_reward_bias(merged) == 0.0
    torch.testing.assert_close(sequence_scores(merged, IDS, MASK), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(merged(input_ids=IDS).logits[:, 0], expected, rtol=0, atol=1e-6)
    assert merged.score.bias.item() == pytest.approx(0.25 - 0.7)
    adapter = load_reward_model(tmp_path / "rm", base_model=base)
    assert get_reward_bias(adapter) == 0.7  # the adapter's own file stays as it was


def test_the_card_of_a_whole_model_tells_how_vllm_serves_it(trained, tmp_path):
    bias = get_reward_bias(trained.model)
    command = f"vllm serve me/rm --runner pooling --pooler-config '{{\"logit_mean\": {bias}}}'"
    assert command in build_card(tmp_path / "merged", {}, "me/rm").text
    assert "vllm" not in build_card(tmp_path / "rm", {}, "me/rm").text


def test_trl_reward_funcs(trained, base, tokenizer, tmp_path):
    """As a function the scorer's numbers; as a folder the logits after the text without its end token."""
    rm, rm_tokenizer = load_classifier(tmp_path / "rm")
    seen = []

    def reward(prompts, completions, completion_ids, **kwargs):
        cut = [ids[-1] != rm_tokenizer.eos_token_id for ids in completion_ids]
        scores = score_texts(rm, rm_tokenizer, prompts, completions, cut)
        seen.append((prompts, completions, scores))
        return scores

    trainer = GRPOTrainer(
        base,
        reward_funcs=[reward, str(tmp_path / "merged")],
        args=GRPOConfig(
            str(tmp_path / "policy"),
            per_device_train_batch_size=4,
            num_generations=2,
            max_completion_length=5,
            **{**SETTINGS, "max_steps": 1},
        ),
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in ROWS]),
        processing_class=tokenizer,
    )
    trainer.train()
    ((prompts, completions, scores),) = seen
    logged = next(row for row in trainer.state.log_history if "rewards/reward/mean" in row)
    assert logged["rewards/reward/mean"] == pytest.approx(sum(scores) / 4, abs=1e-5)
    unfinished = score_texts(trained.model.eval(), tokenizer, prompts, completions, [True] * 4)
    bias = get_reward_bias(trained.model)
    assert abs(bias) > 1e-3
    assert logged["rewards/merged/mean"] - bias == pytest.approx(sum(unfinished) / 4, abs=1e-5)
