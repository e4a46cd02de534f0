"""RankedRewardTrainer against TRL's RewardTrainer, against slow loops, and through training, saving and resuming."""

import copy
import dataclasses
import itertools
import logging
import math

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForSequenceClassification, LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    TrainerCallback,
)
from trl import RewardConfig, RewardTrainer

from prefopt.models.checkpoints import load_reward_model, reward_model_from_adapter, save_reward_model
from prefopt.models.reward import get_reward_bias, init_score_head, sequence_scores, set_reward_bias
from prefopt.rankings.tokens import build_ids
from prefopt.statistics.rankings import pair_accuracy
from prefopt.trainers.reward.config import HONORED, REFUSED, RankedRewardConfig
from prefopt.trainers.reward.trainer import RankedRewardTrainer
from tests.trainers import conftest
from tests.trainers.conftest import PAIRS, first_loss, lora, settings, shape_of_one_forward

pytestmark = pytest.mark.slow

RAGGED = [
    *conftest.RAGGED[:3],
    {"prompt": "a red house", "completions": [" is this", " sat", " ran"], "ranks": [1, 1, 2]},
    *conftest.RAGGED[3:],
]


def config(tmp_path, cls=RankedRewardConfig, **overrides):
    sizes = {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 8, "logging_steps": 1}
    return cls(**settings(tmp_path, **{**sizes, **overrides}))


def trainer_on(model, rows, tokenizer, tmp_path, eval_rows=None, peft_config=None, **overrides):
    return RankedRewardTrainer(
        model=model,
        args=config(tmp_path, **overrides),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=None if eval_rows is None else Dataset.from_list(eval_rows),
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def alone(model, tokenizer, prompt, completion):
    """Slow reference score: one row, no padding, transformers' own forward."""
    prompt_ids, completion_ids = build_ids(tokenizer, prompt, completion)
    return model(input_ids=torch.tensor([prompt_ids + completion_ids])).logits[0, 0]


def loss_by_hand(model, tokenizer, rows):
    """Eq. 1 as loops: pairs of a prompt, then prompts."""
    per_prompt = []
    for row in rows:
        scores = [alone(model, tokenizer, row["prompt"], completion) for completion in row["completions"]]
        losses = [
            -torch.nn.functional.logsigmoid(scores[i] - scores[j])
            for i, j in itertools.permutations(range(len(scores)), 2)
            if row["ranks"][i] < row["ranks"][j]
        ]
        per_prompt.append(sum(losses) / len(losses))
    return sum(per_prompt) / len(per_prompt)


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("center", [None, 0.3])
def test_equals_trl_on_pairs(kind, center, reward_model, tokenizer, tmp_path):
    ours = reward_model if kind == "full" else lora(reward_model, "SEQ_CLS")
    theirs = copy.deepcopy(ours)
    ranked = trainer_on(ours, PAIRS, tokenizer, tmp_path, center_rewards_coefficient=center)
    pairwise = RewardTrainer(
        model=theirs,
        args=config(tmp_path, RewardConfig, center_rewards_coefficient=center),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=tokenizer,
    )
    # the same order of rows, so the same batch
    our_loss, their_loss = first_loss(ranked), first_loss(pairwise)
    torch.testing.assert_close(our_loss, their_loss, rtol=0, atol=1e-6)
    our_loss.backward()
    their_loss.backward()
    compared = 0
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6, msg=name)
            compared += bool(b.grad.abs().max() > 1e-4)
    assert compared >= 5
    our_logs, their_logs = {}, {}
    ranked.log(our_logs)
    pairwise.log(their_logs)
    for key in ("accuracy", "margin", "mean_reward", "min_reward", "max_reward", "num_tokens"):
        assert our_logs[key] == pytest.approx(their_logs[key], abs=1e-6), key


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_rankings_equal_a_loop_over_pairs(kind, reward_model, tokenizer, tmp_path):
    model = reward_model if kind == "full" else lora(reward_model, "SEQ_CLS")
    expected_loss = loss_by_hand(model, tokenizer, RAGGED)
    expected_grads = torch.autograd.grad(
        expected_loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True
    )
    trainer = trainer_on(model, RAGGED, tokenizer, tmp_path)
    loss = first_loss(trainer)
    torch.testing.assert_close(loss, expected_loss, rtol=0, atol=1e-6)
    loss.backward()
    for parameter, expected in zip([p for p in model.parameters() if p.requires_grad], expected_grads, strict=True):
        if expected is not None:
            torch.testing.assert_close(parameter.grad, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("share", [True, False])
def test_every_token_is_forwarded_once(share, reward_model, tokenizer, tmp_path):
    trainer = trainer_on(reward_model, RAGGED, tokenizer, tmp_path, prefix_sharing=share)
    first_loss(trainer)  # the first batch is also where prefix sharing is checked
    seen = []
    reward_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    first_loss(trainer)
    assert seen == [shape_of_one_forward(trainer, share)]


def test_loss_does_not_depend_on_padding(reward_model, tokenizer, tmp_path):
    narrow = first_loss(trainer_on(reward_model, RAGGED, tokenizer, tmp_path))
    wide = first_loss(trainer_on(reward_model, RAGGED, tokenizer, tmp_path, pad_to_multiple_of=64))
    torch.testing.assert_close(narrow, wide, rtol=0, atol=1e-6)


def test_pad_token_may_be_eos(reward_model, tokenizer, tmp_path):
    expected = first_loss(trainer_on(reward_model, RAGGED, tokenizer, tmp_path))
    tokenizer.pad_token = tokenizer.eos_token
    torch.testing.assert_close(
        first_loss(trainer_on(reward_model, RAGGED, tokenizer, tmp_path)), expected, rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_plain_scores_where_the_pad_token_is_eos(kind, base_path, tokenizer, tmp_path):
    tokenizer.pad_token = None  # TRL takes EOS
    trainer = trainer_on(
        base_path,
        RAGGED,
        tokenizer,
        tmp_path / "rm",
        peft_config=LoraConfig(r=4, target_modules=["q_proj"]) if kind == "lora" else None,
        max_steps=2,
        save_strategy="steps",
        save_steps=1,
    )
    trainer.train()
    trainer.save_model()
    expected = trainer.score([RAGGED[0]["prompt"]] * 3, RAGGED[0]["completions"])
    for folder in ("rm", "rm/checkpoint-1", "rm/checkpoint-2"):
        assert AutoConfig.from_pretrained(tmp_path / folder).pad_token_id is None
    if kind == "full":
        plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")
    else:
        plain = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "rm", num_labels=1)
        plain.config.pad_token_id = None
    scores = [alone(plain, tokenizer, RAGGED[0]["prompt"], c).item() for c in RAGGED[0]["completions"]]
    assert scores == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("peft", [False, True])
def test_a_model_trained_elsewhere_goes_on_where_it_was_begun(peft, reward_model, tokenizer, tmp_path):
    """With EOS for its pad token, its head was trained at the token before EOS: so it is read, trained and saved."""
    reward_model.config.pad_token_id = tokenizer.eos_token_id
    reward_model.save_pretrained(tmp_path / "elsewhere")
    prompts, completions = [RAGGED[0]["prompt"]] * 3, RAGGED[0]["completions"]
    expected = [alone(reward_model, tokenizer, *both).item() for both in zip(prompts, completions, strict=True)]
    config = LoraConfig(r=4, target_modules=["q_proj"]) if peft else None
    trainer = trainer_on(
        str(tmp_path / "elsewhere"), RAGGED, tokenizer, tmp_path / "rm", peft_config=config, max_steps=1
    )
    assert trainer.score(prompts, completions) == pytest.approx(expected, abs=1e-5)
    trainer.train()
    trainer.save_model()
    scores = trainer.score(prompts, completions)
    loaded = load_reward_model(tmp_path / "rm")
    assert loaded.config.pad_token_id == tokenizer.eos_token_id
    plain = [alone(loaded, tokenizer, *both).item() for both in zip(prompts, completions, strict=True)]
    assert plain == pytest.approx(scores, abs=1e-5)
    assert max(abs(a - b) for a, b in zip(scores, expected, strict=True)) > 1e-4


def test_rows_without_a_comparison_are_dropped_and_counted(reward_model, tokenizer, tmp_path, caplog):
    tied = {"prompt": "a", "completions": [" cat", " dog"], "ranks": [1, 1]}
    with caplog.at_level(logging.WARNING, "prefopt"):
        trainer = trainer_on(reward_model, [*RAGGED, tied], tokenizer, tmp_path)
    assert len(trainer.train_dataset) == len(RAGGED)
    assert "1 rows in which all completions tie; 5 of 6 rows remain" in caplog.text


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5])
def test_evaluation_does_not_depend_on_the_batch_size(batch_size, reward_model, tokenizer, tmp_path):
    trainer = trainer_on(
        reward_model, RAGGED, tokenizer, tmp_path, eval_rows=RAGGED, per_device_eval_batch_size=batch_size
    )
    metrics = trainer.evaluate()
    scores = [trainer.score([row["prompt"]] * len(row["ranks"]), row["completions"]) for row in RAGGED]
    accuracy = pair_accuracy(scores, [row["ranks"] for row in RAGGED]).value
    assert metrics["eval_accuracy"] == pytest.approx(accuracy, abs=1e-6)
    flat = [score for row in scores for score in row]
    assert metrics["eval_mean_reward"] == pytest.approx(sum(flat) / len(flat), abs=1e-6)
    expected = loss_by_hand(reward_model, tokenizer, RAGGED).item()
    assert metrics["eval_loss"] == pytest.approx(expected, abs=1e-6)
    assert 0 < accuracy < 1


def test_evaluate_names_each_of_several_sets(reward_model, tokenizer, tmp_path):
    trainer = trainer_on(reward_model, RAGGED, tokenizer, tmp_path)
    metrics = trainer.evaluate({"one": Dataset.from_list(RAGGED[:1]), "rest": Dataset.from_list(RAGGED[1:])})
    for name, rows in (("one", RAGGED[:1]), ("rest", RAGGED[1:])):
        scores = [trainer.score([row["prompt"]] * len(row["ranks"]), row["completions"]) for row in rows]
        accuracy = pair_accuracy(scores, [row["ranks"] for row in rows]).value
        assert metrics[f"eval_{name}_accuracy"] == pytest.approx(accuracy, abs=1e-6)


def test_predict_leaves_nothing_behind(reward_model, tokenizer, tmp_path):
    trainer = trainer_on(reward_model, RAGGED, tokenizer, tmp_path, eval_rows=RAGGED)
    expected = trainer.evaluate()["eval_accuracy"]
    prediction = trainer.predict(trainer.train_dataset.select([1, 4]))
    assert prediction.predictions.shape == prediction.label_ids.shape == (2, 2)
    assert trainer.evaluate()["eval_accuracy"] == pytest.approx(expected, abs=1e-6)


def test_compute_metrics_gets_scores_and_ranks(reward_model, tokenizer, tmp_path):
    seen = []
    trainer = trainer_on(reward_model, RAGGED, tokenizer, tmp_path, eval_rows=RAGGED, per_device_eval_batch_size=2)
    trainer.compute_metrics = lambda prediction: seen.append(prediction) or {"mine": 7.0}
    assert trainer.evaluate()["eval_mine"] == 7.0
    ranks = [[rank for rank in row if rank > 0] for row in seen[0].label_ids.tolist()]
    assert ranks == [row["ranks"] for row in RAGGED]
    scores = trainer.score([RAGGED[2]["prompt"]] * 5, RAGGED[2]["completions"])
    assert seen[0].predictions[2].tolist() == pytest.approx(scores, abs=1e-6)


def test_score_is_that_of_single_rows(reward_model, tokenizer, tmp_path):
    trainer = trainer_on(reward_model, RAGGED, tokenizer, tmp_path, per_device_eval_batch_size=2)
    prompts = [row["prompt"] for row in RAGGED for _ in row["completions"]]
    completions = [completion for row in RAGGED for completion in row["completions"]]
    expected = [alone(reward_model, tokenizer, p, c).item() for p, c in zip(prompts, completions, strict=True)]
    assert trainer.score(prompts, completions) == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match="got 1 prompts and 2 completions"):
        trainer.score(["a"], ["b", "c"])


def test_center_on_makes_demonstrations_score_zero_on_average(reward_model, tokenizer, tmp_path):
    trainer = trainer_on(reward_model, RAGGED, tokenizer, tmp_path)
    demonstrations = Dataset.from_list(
        [{"prompt": row["prompt"], "completion": row["completions"][0]} for row in RAGGED]
    )
    before = trainer.score(demonstrations["prompt"], demonstrations["completion"])
    bias = trainer.center_on(demonstrations)
    assert bias == pytest.approx(sum(before) / len(before), abs=1e-6)
    after = trainer.score(demonstrations["prompt"], demonstrations["completion"])
    assert sum(after) == pytest.approx(0.0, abs=1e-5)
    assert after[0] == pytest.approx(before[0] - bias, abs=1e-6)
    assert trainer.center_on(demonstrations) == pytest.approx(bias, abs=1e-6)  # already centered
    with pytest.raises(ValueError, match="at least one demonstration"):
        trainer.center_on([])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("a cat", "expected a dict with prompt and completion, got 'a cat'"),
        ({"prompt": "a", "completion": None}, "field 'completion': expected a value, got None"),
        ({"completion": " cat"}, "field 'prompt': expected a value, got nothing"),
        ({"prompt": "", "completion": " cat"}, "field 'prompt': expected a non-empty string"),
        (
            {"prompt": "a", "completion": 3},
            "field 'completion': expected a string or a list of chat messages",
        ),
        ({"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}, "give both in one format"),
        (RAGGED[0], "expected one completion, got the field 'completions'; give the demonstrations"),
        (PAIRS[0], "expected one completion, got the field 'chosen'"),
    ],
)
def test_center_on_names_a_bad_row(row, message, reward_model, tokenizer, tmp_path):
    trainer = trainer_on(reward_model, RAGGED, tokenizer, tmp_path)
    forwards = []
    reward_model.register_forward_pre_hook(lambda *_: forwards.append(1))
    with pytest.raises(ValueError, match="center_on row 1: .*" + message):
        trainer.center_on([{"prompt": "a", "completion": " cat"}, row])
    assert not forwards
    assert get_reward_bias(reward_model) == 0.0


LEARNABLE = [
    {
        "prompt": prompt,
        "completions": [f" {a} dog {b}", f" {a} cat {b}", f" {a} mat {b}"],
        "ranks": [1, 2, 3],
    }
    for prompt in ("the", "what is this?", "a", "question:")
    for a, b in (("red", "ran"), ("the", "sat"), ("a", "is"))
]


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_learns_and_survives_saving(kind, base_path, tokenizer, tmp_path):
    """Includes huggingface/trl#578: a LoRA reward model must reload with its trained head."""
    out = tmp_path / "rm"
    trainer = trainer_on(
        base_path,
        LEARNABLE,
        tokenizer,
        out,
        eval_rows=LEARNABLE,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"]) if kind == "lora" else None,
        learning_rate=2e-2,
        num_train_epochs=20,
        per_device_train_batch_size=6,
        seed=1,
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert before["eval_accuracy"] < 0.9
    assert after["eval_accuracy"] > 0.99
    assert after["eval_loss"] < 0.1 * before["eval_loss"]
    trainer.center_on([{"prompt": row["prompt"], "completion": row["completions"][0]} for row in LEARNABLE])
    trainer.save_model()

    rows = LEARNABLE[0]
    expected = trainer.score([rows["prompt"]] * 3, rows["completions"])
    loaded = load_reward_model(out)
    assert isinstance(loaded, PeftModel) == (kind == "lora")
    assert get_reward_bias(loaded) == get_reward_bias(trainer.model) != 0.0
    again = trainer_on(loaded.requires_grad_(True), LEARNABLE, tokenizer, tmp_path)
    assert again.score([rows["prompt"]] * 3, rows["completions"]) == expected  # bit for bit


def test_resumes_from_a_checkpoint(base_path, tokenizer, tmp_path):
    peft_config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    settings = {
        "peft_config": peft_config,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "save_strategy": "steps",
        "save_steps": 3,
    }
    whole = trainer_on(base_path, LEARNABLE, tokenizer, tmp_path / "run", **settings)
    whole.train()
    assert whole.state.global_step == 6
    assert (tmp_path / "run" / "checkpoint-3" / "config.json").exists()
    resumed = trainer_on(base_path, LEARNABLE, tokenizer, tmp_path / "run", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert resumed.state.global_step == 6
    for (name, a), (_, b) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_bias_comes_back_with_a_checkpoint(kind, base_path, tokenizer, tmp_path):
    settings = {
        "peft_config": LoraConfig(r=4, target_modules=["q_proj"]) if kind == "lora" else None,
        "max_steps": 2,
        "save_strategy": "steps",
        "eval_strategy": "steps",
        "eval_rows": PAIRS,
        "save_steps": 1,
        "eval_steps": 1,
        "learning_rate": 1e-2,
        "metric_for_best_model": "loss",
    }
    first = trainer_on(base_path, PAIRS, tokenizer, tmp_path / "run", **settings)
    set_reward_bias(first.model, 0.75)
    first.train()
    resumed = trainer_on(base_path, PAIRS, tokenizer, tmp_path / "run", **settings)
    assert get_reward_bias(resumed.model) == 0.0
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert get_reward_bias(resumed.model) == 0.75
    best = trainer_on(base_path, PAIRS, tokenizer, tmp_path / "best", load_best_model_at_end=True, **settings)

    class Moves(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            set_reward_bias(best.model, 0.5)

        def on_save(self, args, state, control, **kwargs):  # the checkpoint has the bias at its time
            set_reward_bias(best.model, get_reward_bias(best.model) + 1)

    best.add_callback(Moves())
    best.train()
    step = int(best.state.best_model_checkpoint.rpartition("-")[2])
    assert get_reward_bias(best.model) == 0.5 + (step - 1)


def test_gradient_checkpointing_and_accumulation_change_nothing(base_path, tokenizer, tmp_path):
    def gradients(**overrides):
        trainer = trainer_on(base_path, LEARNABLE[:8], tokenizer, tmp_path, max_steps=1, **overrides)
        seen = {}

        class Spy(TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
                seen.update({name: p.grad.clone() for name, p in model.named_parameters()})

        trainer.add_callback(Spy())
        trainer.train()
        return seen

    whole = gradients(gradient_checkpointing=False, max_grad_norm=0.0)
    split = gradients(
        gradient_checkpointing=True,
        max_grad_norm=0.0,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
    )
    assert whole.keys() == split.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(split[name], gradient, rtol=0, atol=1e-6, msg=name)


def test_bf16_training_keeps_an_fp32_head(base_path, tokenizer, tmp_path):
    losses = {}
    for bf16 in (False, True):
        trainer = trainer_on(base_path, RAGGED, tokenizer, tmp_path, bf16=bf16, max_steps=1)
        trainer.train()
        losses[bf16] = trainer.state.log_history[0]["loss"]
        assert trainer.model.score.weight.dtype == torch.float32
    assert losses[True] != losses[False]  # mixed precision was on
    assert losses[True] == pytest.approx(losses[False], rel=0.02)


def test_new_head_is_drawn_at_our_scale_and_an_old_one_is_kept(base_path, tokenizer, tmp_path):
    unscaled = first_loss(trainer_on(base_path, PAIRS, tokenizer, tmp_path))
    base = AutoModelForCausalLM.from_pretrained(base_path)
    with torch.no_grad():
        base.model.norm.weight *= 20
    base.save_pretrained(base_path)
    fresh = trainer_on(base_path, PAIRS, tokenizer, tmp_path / "rm")
    # The head of the same seed takes the scale out again.
    torch.testing.assert_close(first_loss(fresh), unscaled, rtol=0, atol=1e-5)
    expected = AutoModelForSequenceClassification.from_pretrained(base_path, num_labels=1)
    stds = []
    for seed in range(40):
        torch.manual_seed(seed)
        init_score_head(expected)
        stds.append(expected.score.weight.square().mean().item())
    assert math.sqrt(sum(stds) / len(stds)) == pytest.approx((16 + 1) ** -0.5 / 20, rel=0.1)
    assert fresh.model.score.weight.std().item() == pytest.approx((16 + 1) ** -0.5 / 20, rel=0.6)
    fresh.save_model()
    kept = trainer_on(str(tmp_path / "rm"), PAIRS, tokenizer, tmp_path)
    assert torch.equal(kept.model.score.weight, fresh.model.score.weight)


def test_given_model_keeps_its_weights(reward_model, tokenizer, tmp_path):
    before = copy.deepcopy(reward_model.state_dict())
    trainer = trainer_on(reward_model, PAIRS, tokenizer, tmp_path)
    after = trainer.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_head_is_added_to_the_adapter(base_path, tokenizer, tmp_path):
    given = LoraConfig(r=4, target_modules=["q_proj"])
    trainer = trainer_on(base_path, PAIRS, tokenizer, tmp_path, peft_config=given)
    assert given.modules_to_save is None  # the caller's object is left alone
    trainable = [name for name, p in trainer.model.named_parameters() if p.requires_grad and "score" in name]
    assert len(trainable) == 1
    head = trainer.model.get_base_model().score
    assert torch.equal(head.original_module.weight, head.modules_to_save["default"].weight)
    wrong = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    with pytest.raises(ValueError, match="task_type='SEQ_CLS'"):
        trainer_on(base_path, PAIRS, tokenizer, tmp_path, peft_config=wrong)


def test_peft_model_without_trainable_head_is_refused(reward_model, tokenizer, tmp_path):
    model = get_peft_model(reward_model, LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="would not be saved"):
        trainer_on(model, PAIRS, tokenizer, tmp_path)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_model_loaded_for_scoring_is_not_trained_in_vain(kind, base_path, reward_model, tokenizer, tmp_path):
    model = reward_model
    if kind == "lora":
        base = AutoModelForSequenceClassification.from_pretrained(base_path, num_labels=1)
        model = lora(base, "SEQ_CLS")
    save_reward_model(model, tmp_path / "rm")
    frozen = load_reward_model(tmp_path / "rm")
    if kind == "lora":
        with pytest.raises(ValueError, match="reward_model_from_adapter"):
            trainer_on(frozen, PAIRS, tokenizer, tmp_path)
    else:
        trainer = trainer_on(frozen, PAIRS, tokenizer, tmp_path, eval_rows=PAIRS)
        assert trainer.evaluate()["eval_loss"] > 0  # it may be evaluated
        with pytest.raises(ValueError, match=r"no weight to train.* give its path"):
            trainer.train()
    # the remedies of the message
    again = str(tmp_path / "rm") if kind == "full" else reward_model_from_adapter(tmp_path / "rm")
    trainer = trainer_on(again, PAIRS, tokenizer, tmp_path, max_steps=1, learning_rate=1e-2)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    assert any(not torch.equal(before[name], after[name]) for name in before if "score" in name)


@pytest.mark.parametrize("max_length", [1024, None])
@pytest.mark.parametrize("which", ["train", "eval"])
def test_rows_longer_than_the_models_positions(which, max_length, tokenizer, tmp_path):
    row = {"prompt": "a", "completions": [" cat", " the dog" * 12], "ranks": [1, 2]}
    longest = sum(map(len, build_ids(tokenizer, row["prompt"], row["completions"][1])))
    rows = {"train": PAIRS[:1], "eval": PAIRS[:1], which: [RAGGED[1], row]}

    def on(positions, max_length=max_length):
        torch.manual_seed(0)
        settings = {"vocab_size": 320, "n_embd": 16, "n_layer": 1, "n_head": 2, "num_labels": 1}
        model = GPT2ForSequenceClassification(GPT2Config(n_positions=positions, pad_token_id=0, **settings))
        return trainer_on(model, rows["train"], tokenizer, tmp_path, eval_rows=rows["eval"], max_length=max_length)

    with pytest.raises(
        ValueError,
        match=f"{which} row 1 of the prepared rows: {longest} tokens, but the model has {longest - 1} positions",
    ):
        on(longest - 1)
    trainer = on(longest)
    assert len(trainer.score([row["prompt"]] * 2, row["completions"])) == 2


def test_adapter_path_is_refused(reward_model, tokenizer, tmp_path):
    reward_model.save_pretrained(tmp_path / "base")
    base = type(reward_model).from_pretrained(tmp_path / "base")
    lora(base, "SEQ_CLS").save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="merge it into its base"):
        trainer_on(str(tmp_path / "adapter"), PAIRS, tokenizer, tmp_path)


def test_preparing_twice_changes_nothing(reward_model, tokenizer, tmp_path):
    trainer = trainer_on(reward_model, RAGGED, tokenizer, tmp_path)
    again = trainer._prepare_dataset(trainer.train_dataset, tokenizer, trainer.args, "train")
    assert again.to_list() == trainer.train_dataset.to_list()


def test_other_configs_are_refused(reward_model, tokenizer, tmp_path):
    with pytest.raises(TypeError, match="must be a RankedRewardConfig"):
        RankedRewardTrainer(reward_model, config(tmp_path, RewardConfig), processing_class=tokenizer)


def test_default_config_on_this_machine(tmp_path):
    args = RankedRewardConfig(output_dir=str(tmp_path))
    assert args.bf16 == torch.cuda.is_available()


def test_every_own_field_of_trl_is_decided(tmp_path):
    own = set(RewardConfig.__annotations__)
    assert own == set(HONORED) | set(REFUSED)
    assert not set(HONORED) & set(REFUSED)
    defaults = {field.name: field.default for field in dataclasses.fields(RewardConfig)}
    for name, (allowed, _) in REFUSED.items():
        assert defaults[name] == allowed
    with pytest.raises(ValueError, match=r"pad_token='x' is not supported: .*tokenizer.pad_token"):
        config(tmp_path, pad_token="x")


def test_model_card_names_the_paper(reward_model, tokenizer, tmp_path):
    trainer = trainer_on(reward_model, PAIRS, tokenizer, tmp_path)
    trainer.save_model()
    trainer.create_model_card(model_name="tiny-rm")
    card = (tmp_path / "README.md").read_text()
    assert "Training language models to follow instructions with human feedback" in card
    assert "2203.02155" in card
    assert "- prefopt" in card
    assert "- trl" in card


def test_scores_are_computed_from_the_trainers_ids(reward_model, tokenizer, tmp_path):
    trainer = trainer_on(reward_model, RAGGED, tokenizer, tmp_path)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(RAGGED))])
    present = batch["ranks"] > 0
    direct = sequence_scores(reward_model, batch["input_ids"][present], batch["attention_mask"][present])
    texts = [(row["prompt"], completion) for row in RAGGED for completion in row["completions"]]
    assert direct.tolist() == pytest.approx(trainer.score(*zip(*texts, strict=True)), abs=1e-5)


@pytest.mark.parametrize(
    ("model", "error", "expected"),
    [
        ("reward_model", ValueError, "pass `processing_class`"),
        (None, TypeError, "`model` is None: expected a path"),
    ],
)
def test_what_is_no_model_or_has_no_tokenizer_is_refused(model, error, expected, request, tmp_path):
    model = model and request.getfixturevalue(model)
    with pytest.raises(error, match=expected):
        RankedRewardTrainer(model, RankedRewardConfig(str(tmp_path), report_to="none", use_cpu=True))
