"""PPOPtxTrainer: references, scored ids, pretraining, checkpoints, refusals, and that it learns."""

import copy
import json
import os

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    TrainerCallback,
)

from prefopt.errors import UserError, UserTypeError
from prefopt.inference.scoring import score_ids
from prefopt.models.checkpoints import save_reward_model
from prefopt.models.reward import sequence_scores, set_reward_bias, token_scores
from prefopt.rankings.tokens import build_ids
from prefopt.trainers.ppo_ptx.config import PPOPtxConfig
from prefopt.trainers.ppo_ptx.roles import VALUE_FILE
from prefopt.trainers.ppo_ptx.trainer import PPOPtxTrainer
from tests.trainers.conftest import in_two_processes
from tests.trainers.ppo_ptx.conftest import PROMPTS, TEXTS, config, first_log, length_reward, lora, rollout_of
from tests.trainers.scale_worker import ScriptedPPO

pytestmark = pytest.mark.slow


def weights_of(trainer):
    policy = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    return policy | {f"value.{n}": p.detach().clone() for n, p in trainer.value_function.module.named_parameters()}


# ---- value warm-up ---
@pytest.mark.parametrize("value_model", [None, "head"])
def test_policy_stays_while_the_value_function_warms_up(value_model, make):
    seen = []

    class Snapshot(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            policy = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
            values = torch.cat([p.detach().flatten() for p in trainer.value_function.parameters])
            seen.append((policy.clone(), values.clone(), trainer.pretraining.position))

    trainer = make(
        ptx_coef=1.0,
        value_warmup_steps=2,
        max_steps=3,
        value_model=value_model,
        callbacks=[Snapshot()],
    )
    start = torch.cat([p.detach().flatten() for p in trainer.model.parameters()]).clone()
    trainer.train()
    policies, values, positions = zip(*seen, strict=True)
    assert torch.equal(policies[0], start)
    assert torch.equal(policies[1], start)
    assert not torch.equal(policies[2], start)
    assert not torch.equal(values[0], values[1])
    assert positions == (0, 0, 2)  # ratio 0.5 of four episodes, in the third step alone
    norms = [log["grad_norm/ppo"] for log in trainer.state.log_history if "grad_norm/ppo" in log]
    assert norms[:2] == [0.0, 0.0]
    assert norms[2] > 0


# ---- the KL reference ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["full", "trained adapter", "new adapter"])
def test_first_kl_is_exactly_zero(kind, kl_coef, make, causal_lm):
    model = lora(causal_lm) if kind == "trained adapter" else causal_lm
    peft_config = LoraConfig(task_type="CAUSAL_LM", r=4) if kind == "new adapter" else None
    trainer = make(model, peft_config=peft_config, kl_coef=kl_coef, max_steps=3)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "objective/kl" in log]
    assert logs[0]["objective/kl"] == logs[0]["kl"] == 0.0
    assert logs[-1]["objective/kl"] != 0.0  # logged whatever kl_coef is


def test_reference_of_trained_adapter_is_not_the_base(make, causal_lm):
    trainer = make(lora(causal_lm))
    ids = torch.randint(5, 300, (2, 9))
    mask = torch.ones_like(ids)
    logps = {}
    for adapter in ("default", "ref"):
        trainer.model.set_adapter(adapter)
        logps[adapter] = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, 4)[0]
    with trainer.model.disable_adapter():
        base = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, 4)[0]
    assert torch.equal(logps["default"], logps["ref"])
    assert not torch.allclose(logps["ref"], base, atol=1e-2)


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_reference_does_not_train(kind, make, causal_lm):
    trainer = make(lora(causal_lm) if kind == "adapter" else causal_lm)

    def reference():
        if kind == "full":
            return {n: p.clone() for n, p in trainer.ref_model.named_parameters()}
        return {n: p.clone() for n, p in trainer.model.named_parameters() if ".ref." in n}

    before = reference()
    assert before
    trainer.train()
    assert all(torch.equal(before[name], p) for name, p in reference().items())
    trainable = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert trainable
    assert not any(".ref." in name for name in trainable)


def test_kl_lowers_the_reward(make, causal_lm):
    """Scores are 0: what is left of the reward is -kl_coef * KL. A flipped sign would reward drifting away."""
    trainer = make(rewards=lambda completions, **kwargs: [0.0] * len(completions), kl_coef=0.5)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    rollout_of(trainer)
    kl, rewards = (trainer._metrics["train"][f"objective/{name}"][0] for name in ("kl", "rewards"))
    assert kl > 0.1
    assert rewards == pytest.approx(-0.5 * kl, rel=1e-5)


# ---- what reward models score -------------------------------------------------------------------------------------
CHAT = [[{"role": "user", "content": text}] for text in ("what is this?", "the cat and the dog")]
PLAIN = ["what is this? a", "the cat"]
CALLS = [
    [*CHAT[0], {"role": "assistant", "content": None, "tool_calls": [{"arguments": arguments}]}, *CHAT[1]]
    for arguments in ({"city": "Rome"}, {"sum": "1 + 1"})
]  # in a Dataset, each has the arguments of both


@pytest.mark.parametrize("truncated", [False, True])
@pytest.mark.parametrize("kind", ["plain", "chat", "calls"])
def test_scored_ids_are_those_of_reward_training(
    kind, truncated, make, tokenizer, chat_tokenizer, reward_model, causal_lm, monkeypatch
):
    tok = tokenizer if kind == "plain" else chat_tokenizer
    causal_lm.generation_config.eos_token_id = tok.eos_token_id
    if kind == "calls":
        said = "{{ m['content'] or m['tool_calls'][0]['arguments'] | tojson }}"
        tok.chat_template = tok.chat_template.replace("{{ m['content'] }}", said)
    data = Dataset.from_dict({"prompt": {"plain": PLAIN, "chat": CHAT, "calls": CALLS}[kind]})
    prompts = data["prompt"][:]
    texts = [" red house", " dog ran to the mat"]
    sampled = [tok(text)["input_ids"] + ([] if truncated else [tok.eos_token_id]) for text in texts]
    scored = []
    set_reward_bias(reward_model, 0.5)
    trainer = make(data=data, per_device_train_batch_size=2, processing_class=tok)
    monkeypatch.setattr(trainer, "_generate_single_turn", lambda *args, **kwargs: (sampled, None))
    monkeypatch.setattr(
        "prefopt.trainers.ppo_ptx.trainer.score_ids",
        lambda model, sequences, *args, **kwargs: (
            scored.extend(sequences) or score_ids(model, sequences, *args, **kwargs)
        ),
    )
    trainer._generate_and_score_completions([{"prompt": prompt} for prompt in prompts])

    expected = []
    for prompt, ids in zip(prompts, sampled, strict=True):
        decoded = tok.decode(ids, skip_special_tokens=True)
        completion = decoded if kind == "plain" else [{"role": "assistant", "content": decoded}]
        expected.append(build_ids(tok, prompt, completion, truncated=truncated))
    assert scored == [prompt + completion for prompt, completion in expected]
    for score, (prompt, completion) in zip(trainer._sampled.scores, expected, strict=True):  # padding does not matter
        ids = torch.tensor([prompt + completion])
        alone = reward_model.score(reward_model.model(ids).last_hidden_state)[0, -1, 0] - 0.5
        assert float(score) == pytest.approx(float(alone), abs=1e-5)


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_reward_model_from_path(kind, make, reward_model, tmp_path):
    if kind == "adapter":
        reward_model.save_pretrained(tmp_path / "base")
        reward_model = LlamaForSequenceClassification.from_pretrained(tmp_path / "base")
        reward_model = lora(reward_model, "SEQ_CLS", modules_to_save=["score"])
    set_reward_bias(reward_model, 0.5)
    save_reward_model(reward_model, tmp_path / "rm")
    trainer = make(rewards=str(tmp_path / "rm"))
    assert isinstance(trainer.reward_models[0], PeftModel) == (kind == "adapter")
    rollout = rollout_of(trainer)
    ids = torch.cat([rollout["prompt_ids"], rollout["completion_ids"]], 1)
    mask = torch.cat([rollout["prompt_mask"], rollout["completion_mask"]], 1)
    torch.testing.assert_close(trainer._sampled.scores, sequence_scores(reward_model, ids, mask), atol=1e-5, rtol=0)
    trainer.train()
    moved = {name for name, p in trainer.value_function.module.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "score" in name for name in moved) == (kind == "adapter")


def test_value_function_starts_as_the_reward_model(make, reward_model):
    """V of the state before token t is the reward model's score of everything up to t - 1, bias included."""
    set_reward_bias(reward_model, 0.5)
    trainer = make(fit_value_head=False)
    assert_values_are_of(reward_model, rollout_of(trainer))


def assert_values_are_of(model, rollout):
    for row in range(8):
        prompt = rollout["prompt_ids"][row][rollout["prompt_mask"][row].bool()]
        completion = rollout["completion_ids"][row][rollout["completion_mask"][row].bool()]
        for t in range(len(completion)):
            state = torch.cat([prompt, completion[:t]]).unsqueeze(0)
            expected = token_scores(model, state, torch.ones_like(state))[0, -1]
            torch.testing.assert_close(rollout["old_values"][row, t], expected, atol=1e-5, rtol=0)


def test_the_head_of_a_copied_reward_model_is_fitted_to_the_first_rollout(make, reward_model):
    set_reward_bias(reward_model, 0.5)
    rewards = reward_model.score.weight.clone()
    explained = {}
    for fits in (False, True):
        trainer = make(fit_value_head=fits)
        values = trainer.value_function.module
        rollout = rollout_of(trainer)
        assert_values_are_of(values, rollout)
        explained[fits] = trainer._metrics["train"]["value/explained_variance"][0]
        assert torch.equal(values.score.weight, rewards) != fits
        head = values.score.weight.clone()
        assert_values_are_of(values, rollout_of(trainer))
        assert torch.equal(values.score.weight, head)
    assert explained[True] > max(0, explained[False])
    assert torch.equal(reward_model.score.weight, rewards)


def test_scores_and_python_functions_are_weighted_and_logged(make, reward_model):
    trainer = make(rewards=[reward_model, length_reward], reward_weights=[2.0, 0.5])
    rollout = rollout_of(trainer)
    metrics = trainer._metrics["train"]
    parts = 2 * metrics["rewards/reward_model/mean"][0] + 0.5 * metrics["rewards/length_reward/mean"][0]
    assert metrics["reward"][0] == pytest.approx(parts, abs=1e-5)
    assert metrics["objective/scores"][0] == pytest.approx(parts, abs=1e-5)
    lengths = rollout["completion_mask"].sum(1).float()
    assert metrics["rewards/length_reward/mean"][0] == pytest.approx(float(lengths.mean()))


def test_missing_eos_is_told_by_all_eos_ids(make, causal_lm, monkeypatch):
    causal_lm.generation_config.eos_token_id = [1, 7]
    trainer = make(rewards=lambda completions, **k: [1.0] * len(completions), missing_eos_penalty=0.25, kl_coef=0.0)
    sampled = [[5, 1], [5, 7], [5, 6], [1]] * 2
    monkeypatch.setattr(trainer, "_generate_single_turn", lambda *args, **kwargs: (sampled, None))
    rollout_of(trainer)
    assert trainer._metrics["train"]["objective/scores"][0] == pytest.approx((1 + 1 + 0.75 + 1) / 4)


@pytest.mark.parametrize("bad", [None, float("nan"), float("inf")])
def test_unscored_rows_are_counted_and_masked(bad, make):
    calls = iter(range(1000))

    def sometimes(completions, **kwargs):
        return [bad if next(calls) % 4 == 0 else 1.0 for _ in completions]

    trainer = make(rewards=sometimes)
    rollout = rollout_of(trainer)
    is_scored = rollout["loss_mask"].any(1)
    assert is_scored.tolist() == [False, True, True, True] * 2
    assert trainer._metrics["train"]["objective/unscored"] == [2.0]
    advantages = rollout["advantages"][rollout["loss_mask"]]
    assert float(advantages.mean()) == pytest.approx(0, abs=1e-6)
    assert float(advantages.std()) == pytest.approx(1, abs=1e-4)
    assert not rollout["advantages"][~is_scored].any()
    trainer.train()
    assert all(p.isfinite().all() for p in weights_of(trainer).values())


@pytest.mark.parametrize(("bad", "expected"), [([float("inf")] * 8, 1), ([float("inf")] * 7 + [1.0], 0)])
def test_a_rollout_without_any_score_is_told_at_once(bad, expected, make, caplog):
    rollout_of(make(rewards=lambda completions, **kwargs: bad))
    assert sum("No episode of this rollout" in record.message for record in caplog.records) == expected


def test_rollout_without_any_score_moves_nothing(make):
    trainer = make(rewards=lambda completions, **kwargs: [None] * len(completions))
    before = weights_of(trainer)
    trainer.train()
    assert all(torch.equal(before[name], p) for name, p in weights_of(trainer).items())


# ---- optimizer steps ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("accumulation", "inner_epochs", "steps"), [(4, 1, 2), (2, 1, 4), (1, 1, 8), (2, 3, 12)])
def test_minibatches_and_inner_epochs_set_the_number_of_steps(accumulation, inner_epochs, steps, make):
    trainer = make(
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulation,
        steps_per_generation=4,
        num_iterations=inner_epochs,
        max_steps=-1,
        num_train_epochs=1,
    )
    trainer.train()
    assert trainer.state.global_step == steps  # 16 prompts: 2 rollouts of 8
    rollouts = [log for log in trainer.state.log_history if "objective/kl" in log]
    assert len(rollouts) == 2


class Gradients(TrainerCallback):
    """Keeps the gradients that the optimizer sees."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def ptx_gradient(make, causal_lm, texts, **kwargs):
    """Gradient of one step in which PPO has no part: no completion is scored."""
    seen = Gradients()
    trainer = make(
        copy.deepcopy(causal_lm),
        rewards=lambda completions, **k: [None] * len(completions),
        callbacks=[seen],
        pretrain_dataset=Dataset.from_dict({"text": texts}),
        max_steps=1,
        max_grad_norm=0.0,
        ptx_coef=3.0,
        **kwargs,
    )
    trainer.train()
    return seen.steps[0], first_log(trainer)


def assert_same(left, right, tolerance=1e-6):
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], atol=tolerance, rtol=1e-5)


def test_ptx_scale_does_not_depend_on_ratio_or_micro_batches(make, causal_lm, tokenizer):
    text = "the cat sat on the mat and the dog ran to the red house"
    length = len(tokenizer(text)["input_ids"]) + 1  # with EOS: every block is this document
    base, log = ptx_gradient(make, causal_lm, [text] * 8, ptx_max_length=length, ptx_batch_ratio=1e-9)  # one block
    ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
    loss = causal_lm(ids, labels=ids).loss
    assert log["loss/ptx"] == pytest.approx(loss.item(), rel=1e-5)
    for parameter, gradient in zip(causal_lm.parameters(), base.values(), strict=True):
        expected = torch.autograd.grad(3.0 * loss, parameter, retain_graph=True)[0]
        torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-5)
    for ratio, size in ((0.5, 1), (1.0, 3), (5.0, 2)):
        sizes = {"ptx_batch_ratio": ratio, "ptx_per_device_batch_size": size, "ptx_max_length": length}
        gradient, other = ptx_gradient(make, causal_lm, [text] * 8, **sizes)
        assert other["loss/ptx"] == pytest.approx(log["loss/ptx"], rel=1e-5)
        assert_same(gradient, base, tolerance=1e-5)


def test_ptx_micro_batches_of_different_lengths_add_up(make, causal_lm):
    texts = TEXTS["text"][:3]  # the last block is shorter
    gradients = [
        ptx_gradient(make, causal_lm, texts, ptx_batch_ratio=1.5, ptx_per_device_batch_size=size)[0]
        for size in (1, 4, 6)
    ]
    assert_same(gradients[1], gradients[0])
    assert_same(gradients[2], gradients[0])


@pytest.mark.parametrize("value_model", ["head", None])
def test_policy_and_value_gradients_are_clipped_apart(value_model, make):
    class Clipped(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            policy = [p.grad for p in trainer.model.parameters() if p.grad is not None]
            self.policy = torch.nn.utils.get_total_norm(policy).item()
            value = [p.grad for p in trainer.value_function.parameters]
            self.value = torch.nn.utils.get_total_norm(value).item()

    seen = Clipped()
    trainer = make(
        callbacks=[seen], max_steps=1, max_grad_norm=0.5, vf_coef=1e3, ptx_coef=1.0, value_model=value_model
    )
    trainer.train()
    log = first_log(trainer)
    assert log["grad_norm"] > 0.5
    assert log["grad_norm/value"] > 0.5
    assert seen.policy == pytest.approx(0.5, rel=1e-3)
    assert seen.value == pytest.approx(0.5, rel=1e-3)


def test_value_function_has_its_own_learning_rate(make):
    trainer = make(learning_rate=0.0, value_learning_rate=1e-2, max_steps=1)
    before = weights_of(trainer)
    trainer.train()
    moved = {name for name, p in weights_of(trainer).items() if not torch.equal(before[name], p)}
    assert moved
    assert all(name.startswith("value.") for name in moved)
    rates = [group["lr"] for group in trainer.optimizer.param_groups]
    assert sorted(set(rates)) == [0.0, 1e-2]
    trained = [id(p) for group in trainer.optimizer.param_groups for p in group["params"]]
    assert len(trained) == len(set(trained))


def test_value_gradients_do_not_leak_into_the_next_step(make):
    """The same rollout twice with learning rate 0: the second step's gradient is the first's, not twice it."""
    trainer = make(learning_rate=0.0, value_learning_rate=0.0, num_iterations=2)
    trainer.train()
    norms = [log["grad_norm/value"] for log in trainer.state.log_history if "grad_norm/value" in log]
    assert norms[0] > 0
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_value_model_argument(checkpointing, make, reward_model):
    value_model = copy.deepcopy(reward_model)
    trainer = make(rewards=length_reward, value_model=value_model, gradient_checkpointing=checkpointing)
    assert trainer.value_function.module is value_model
    before = weights_of(trainer)
    trainer.train()
    after = weights_of(trainer)
    value = [name for name in before if name.startswith("value.")]
    assert all(not torch.equal(before[name], after[name]) for name in value)


def test_evaluation_logs_the_objective(make):
    trainer = make(eval_dataset=PROMPTS.select(range(8)), per_device_eval_batch_size=4, ptx_coef=1.0)
    before = weights_of(trainer)
    metrics = trainer.evaluate()
    names = ("reward", "kl", "objective/scores", "objective/rewards", "loss/policy", "loss/value")
    assert all(f"eval_{name}" in trainer.state.log_history[-1] or f"eval_{name}" in metrics for name in names)
    assert_same(weights_of(trainer), before, tolerance=0.0)
    assert all(p.grad is None for p in trainer.value_function.parameters)


def test_every_logged_key_is_in_the_table(make):
    trainer = make(ptx_coef=1.0)
    trainer.train()
    trl = ("completions/", "rewards/", "clip_ratio/", "train_", "epoch", "step", "num_tokens", "total_flos")
    trl += ("loss", "learning_rate", "reward_std")
    for log in trainer.state.log_history:
        for key in log:
            assert f"`{key}`" in PPOPtxTrainer.__doc__ or key.startswith(trl), key


def test_table_of_completions_shows_ppo_advantages(make):
    trainer = make(log_completions=True, num_completions_to_print=0)
    rollout = rollout_of(trainer)
    means = rollout["advantages"].sum(1) / rollout["loss_mask"].sum(1)
    assert list(trainer._logs["advantages"]) == pytest.approx(means[-4:].tolist(), abs=1e-6)


def test_several_completions_per_prompt(make):
    trainer = make(num_generations=2)
    trainer.train()
    assert trainer.state.global_step == 2


# ---- checkpoints --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("policy", ["full", "adapter"])
@pytest.mark.parametrize("values", ["network", "head"])
@pytest.mark.parametrize("ptx_coef", [0.0, 1.5])
def test_resume_is_bit_exact(policy, values, ptx_coef, make, causal_lm, tmp_path):
    start = lora(causal_lm) if policy == "adapter" else causal_lm
    boundary = 2 if values == "head" else 4  # of rollouts (2 steps each); the second is also that of an epoch

    def run(name, **kwargs):
        options = {
            "output_dir": str(tmp_path / name),
            "value_model": "head" if values == "head" else None,
            "ptx_coef": ptx_coef,
            "gradient_accumulation_steps": 2,
            "per_device_train_batch_size": 2,
            "steps_per_generation": 4,
            "max_steps": 6,
            "save_strategy": "steps",
            "save_steps": boundary,
            "lr_scheduler_type": "linear",
            "ptx_batch_ratio": 0.75,
        }
        return make(copy.deepcopy(start), **{**options, **kwargs})

    whole = run("run")
    whole.train()
    resumed = run("run", save_strategy="no")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{boundary}"))
    assert resumed.state.global_step == 6
    assert_bitwise(weights_of(whole), weights_of(resumed))
    assert whole.state.log_history[-2]["loss"] == resumed.state.log_history[-2]["loss"]
    if ptx_coef:
        state = json.loads((tmp_path / "run" / f"checkpoint-{boundary}" / "ppo_ptx_state.json").read_text())
        assert state["pretraining_sequences"] == boundary * 3
        assert resumed.pretraining.position == 6 * 3


def assert_bitwise(left, right):
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def test_resume_inside_a_rollout_does_not_draw_it_again(make):
    asked = []

    def watch(prompts, trainer_state, **kwargs):
        asked.append((trainer_state.global_step, prompts))
        return [0.0] * len(prompts)

    options = {"num_iterations": 2, "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    make(rewards=watch, **options).train()
    _, _, (_, third) = asked
    assert [step for step, _ in asked] == [0, 2, 4]
    asked.clear()
    trainer = make(rewards=watch, **options)
    trainer.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-3")
    assert asked == [(4, third)]  # the next one comes on time


def test_rollout_divided_otherwise_is_drawn_again(make, caplog):
    asked = []

    def watch(prompts, trainer_state, **kwargs):
        asked.append(trainer_state.global_step)
        return [0.0] * len(prompts)

    options = {"rewards": watch, "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    make(num_iterations=2, **options).train()
    asked.clear()
    trainer = make(num_iterations=4, **options)
    trainer.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-3")
    assert asked == [3, 4]
    assert "divided otherwise" in caplog.text


def test_saved_policy_is_plain_and_value_function_lies_beside_it(make, tmp_path):
    trainer = make()
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not info["missing_keys"]
    assert_bitwise(dict(loaded.named_parameters()), dict(trainer.model.named_parameters()))
    value = load_file(tmp_path / "saved" / VALUE_FILE)
    assert_bitwise(value, dict(trainer.value_function.module.named_parameters()))


def test_checkpoint_without_value_function_is_refused(make, tmp_path):
    make(save_strategy="steps", save_steps=2).train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    with pytest.raises(ValueError, match="another value function"):
        make(value_model="head").train(resume_from_checkpoint=str(checkpoint))
    os.remove(checkpoint / VALUE_FILE)
    with pytest.raises(ValueError, match=VALUE_FILE):
        make().train(resume_from_checkpoint=str(checkpoint))


def test_best_model_comes_with_its_value_function(make, tmp_path):
    trainer = make(
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        eval_dataset=PROMPTS.select(range(8)),
        load_best_model_at_end=True,
        metric_for_best_model="eval_reward",
    )
    trainer.train()
    best = load_file(os.path.join(trainer.state.best_model_checkpoint, VALUE_FILE))
    assert_bitwise(best, dict(trainer.value_function.module.named_parameters()))


def test_model_card_names_the_method(make, tmp_path):
    trainer = make(ptx_coef=1.0)
    trainer.save_model()
    trainer.create_model_card(model_name="x")
    card = (tmp_path / "run" / "README.md").read_text()
    assert all(text in card for text in ("PPO-ptx", "2203.02155", "prefopt", "ppo-ptx", "Ouyang"))


# ---- refusals -----------------------------------------------------------------------------------------------------
def test_refusals(make, causal_lm, reward_model, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="needs pretrain_dataset"):
        make(ptx_coef=1.0, pretrain_dataset=None)
    with pytest.raises(ValueError, match="fewer than the 32 of one rollout"):
        make(per_device_train_batch_size=32)
    with pytest.raises(ValueError, match="column 'prompt'"):
        make(data=Dataset.from_dict({"text": ["a"] * 8}))
    with pytest.raises(ValueError, match="no trainable parameter"):
        make(value_model=copy.deepcopy(reward_model).requires_grad_(False))
    with pytest.raises(ValueError, match="exceeds the model's 256 positions"):
        make(ptx_coef=1.0, ptx_max_length=300)
    with pytest.raises(TypeError, match="PPOPtxConfig"):
        PPOPtxTrainer(causal_lm, length_reward, {"ptx_coef": 0.0}, PROMPTS, processing_class=tokenizer)
    with pytest.raises(TypeError, match="tools"):
        PPOPtxTrainer(causal_lm, length_reward, config(tmp_path), PROMPTS, tools=[len])


def test_other_tokenizer_is_refused(make, reward_model, tokenizer, chat_tokenizer, tmp_path):
    other = copy.deepcopy(reward_model.config)
    other.vocab_size = 400
    with pytest.raises(ValueError, match="another tokenizer"):
        make(rewards=LlamaForSequenceClassification(other))
    reward_model.save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    make(rewards=str(tmp_path / "rm"))
    chat_tokenizer.add_tokens(["<new>"])  # a tokenizer saved beside the reward model says more than its size
    chat_tokenizer.save_pretrained(tmp_path / "rm")
    with pytest.raises(ValueError, match="another tokenizer"):
        make(rewards=str(tmp_path / "rm"))


@pytest.mark.parametrize("at", ["policy", "reward model", "both"])
def test_a_tokenizer_with_an_added_pad_token_is_the_same(at, make, causal_lm, reward_model, tokenizer, tmp_path):
    """As scripts for TRL add one; the value function has no embedding for the policy's."""
    padding = copy.deepcopy(tokenizer)
    padding.add_special_tokens({"pad_token": "[PAD]"})
    reward_model.save_pretrained(tmp_path / "rm")
    (tokenizer if at == "policy" else padding).save_pretrained(tmp_path / "rm")
    if at != "reward model":
        causal_lm.resize_token_embeddings(padding.pad_token_id + 1)
    trainer = make(
        rewards=str(tmp_path / "rm"), processing_class=tokenizer if at == "reward model" else padding, max_steps=1
    )
    trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize("how", ["path", "model"])
def test_a_reward_model_trained_elsewhere_is_read_where_it_was_trained(how, make, reward_model, tmp_path):
    """With EOS for its pad token: at the token before EOS, as transformers reads it."""
    reward_model.config.pad_token_id = 1
    reward_model.eval().save_pretrained(tmp_path / "rm")
    trainer = make(rewards=str(tmp_path / "rm") if how == "path" else copy.deepcopy(reward_model))
    rows = [[5, 6, 7, 1], [8, 9], [10, 11, 12, 13, 1]]
    trainer._sampled.prompt_ids = [[5]] * 3
    scores = trainer._score(trainer.reward_models[0], rows)
    with torch.no_grad():
        expected = [reward_model(torch.tensor([[5, *row]])).logits[0, 0].item() for row in rows]
    assert scores == pytest.approx(expected, abs=1e-5)


def test_policies_that_cannot_train_are_refused(make, causal_lm, tmp_path):
    model = get_peft_model(copy.deepcopy(causal_lm), LoraConfig(task_type="CAUSAL_LM", r=2), adapter_name="policy")
    with pytest.raises(ValueError, match="'default'"):
        make(model)
    with pytest.raises(ValueError, match="is_trainable=True"):
        make(lora(copy.deepcopy(causal_lm)).requires_grad_(False))
    lora(causal_lm).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="is an adapter"):
        make(str(tmp_path / "adapter"))


@pytest.mark.parametrize("rewards", [None, [3.0]])
def test_rewards_must_be_functions_or_models(rewards, make):
    with pytest.raises(TypeError, match="reward_funcs"):
        make(rewards=rewards)


def test_16_bit_policy_starts_at_its_reference(make, causal_lm):
    trainer = make(causal_lm, bf16=True)
    trainer.train()
    assert first_log(trainer)["objective/kl"] == 0.0
    assert all(p.dtype == torch.float32 for p in trainer.value_function.parameters)


def test_mixture_of_experts_is_refused_unless_its_loss_is_off(make):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    experts = MixtralForCausalLM(
        MixtralConfig(vocab_size=320, num_key_value_heads=1, num_local_experts=2, eos_token_id=1, **sizes)
    )
    with pytest.raises(ValueError, match="router_aux_loss_coef"):
        make(experts, rewards=length_reward)
    make(experts, rewards=length_reward, router_aux_loss_coef=0.0)


def test_left_out_prompts_are_counted(make, caplog):
    make(data=PROMPTS.select(range(14)))
    assert "2 of 14 prompts are left out of each epoch" in caplog.text


def test_a_reward_function_that_forgets_to_return_is_named(make):
    def brevity(completion_ids, **columns):
        [-len(ids) for ids in completion_ids]

    trainer = make(rewards=[length_reward, brevity], max_steps=1)
    assert trainer.reward_func_names == ["length_reward", "brevity"]
    with pytest.raises(ValueError, match=r"reward function 'brevity' returned None; expected a list"):
        trainer.train()


@pytest.mark.parametrize(
    ("returned", "told"),
    [
        (lambda n: "x" * n, "returned 'xx"),
        (lambda n: ["1"] * n, r"returned \['1', "),
        (lambda n: 1.0, "returned 1.0; expected a list"),
        (lambda n: torch.tensor(1.0), "returned tensor"),
        (lambda n: [1.0] * (n - 1), r"returned \d+ scores for \d+ completions"),
        (lambda n: [1.0] * (n + 1), r"returned \d+ scores for \d+ completions"),
    ],
)
def test_a_reward_function_that_gives_no_score_per_completion_is_named(make, returned, told):
    def gold(completions, **columns):
        return returned(len(completions))

    with pytest.raises((UserError, UserTypeError), match=f"reward function 'gold' {told}"):
        make(rewards=[length_reward, gold], max_steps=1).train()


def test_a_reward_function_with_other_arguments_is_named(make):
    def judge(prompt, completion):
        return 1.0

    told = r"reward function 'judge' is called with lists completions=, .*prompts=.* \(.*'prompt'\); end .* \*\*kwargs"
    with pytest.raises(UserTypeError, match=told):
        make(rewards=[length_reward, judge], max_steps=1).train()


def test_a_policy_whose_logits_are_no_numbers_is_named_with_its_folder(make, causal_lm):
    policy = copy.deepcopy(causal_lm)
    policy.config._name_or_path = "my/policy"
    with torch.no_grad():
        policy.model.layers[0].mlp.up_proj.weight.fill_(float("nan"))
    with pytest.raises(UserError, match=r"step 1: the policy's logits are not finite \(my/policy\)"):
        make(policy, rewards=length_reward).train()


@pytest.mark.parametrize("kind", [iter, torch.tensor, np.array, tuple])
def test_rewards_may_come_as_any_sequence(make, kind):
    def gold(completions, **columns):
        return kind([float(i) for i in range(len(completions))])

    rollout = rollout_of(make(rewards=gold))
    assert rollout["loss_mask"].any(1).all()


# ---- it learns ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("value_model", ["head", "network"])
def test_learns_to_say_a_token(value_model, make, reward_model):
    """Reward: the share of tokens below 160, about one half at first."""

    def share(completion_ids, **kwargs):
        return [sum(token < 160 for token in ids) / len(ids) for ids in completion_ids]

    trainer = make(
        rewards=share,
        value_model=reward_model if value_model == "network" else "head",
        per_device_train_batch_size=16,
        num_iterations=4,
        max_steps=60,
        learning_rate=5e-2,
        value_learning_rate=1e-2,
        value_clip_range=10.0,
        kl_coef=0.01,
    )
    trainer.train()
    rewards = [log["reward"] for log in trainer.state.log_history if "reward" in log]
    assert sum(rewards[:3]) / 3 < 0.65
    assert sum(rewards[-3:]) / 3 > 0.8
    values = [log["loss/value"] for log in trainer.state.log_history if "loss/value" in log]
    assert values[-1] < values[0]


# ---- two processes ------------------------------------------------------------------------------------------------
def train_every_kind(folder, tokenizer, batch_size):
    for kind in ("network", "head", "lora"):
        policy = LlamaForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32)
        reward = LlamaForSequenceClassification.from_pretrained(folder / "reward", dtype=torch.float32)
        args = PPOPtxConfig(
            output_dir=str(folder / f"out{batch_size}"),
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=2,
            max_steps=3,
            max_completion_length=32,
            warmup_steps=0,
            learning_rate=1e-2,
            value_learning_rate=1e-2,
            ptx_coef=2.0,
            ptx_batch_ratio=0.4,
            ptx_max_length=16,
            save_strategy="no",
            max_grad_norm=0.7,
            logging_steps=1,
            gradient_checkpointing=kind == "lora",
            missing_eos_penalty=0.3,
            shuffle_dataset=False,
            normalize_scores=kind == "head",
            kl_estimator={"network": "k1", "head": "k3", "lora": "full"}[kind],
            kl_target=0.05 if kind == "lora" else None,
            kl_horizon=20,
        )
        trainer = ScriptedPPO(
            policy,
            reward,
            args,
            Dataset.from_dict({"prompt": ["the cat", "a dog ran", "what is", "red"] * 8}),
            processing_class=tokenizer,
            pretrain_dataset=Dataset.from_dict({"text": ["the cat sat on the mat", "a dog ran to the red house"] * 5}),
            value_model="head" if kind == "head" else None,
            peft_config=LoraConfig(task_type="CAUSAL_LM", r=4) if kind == "lora" else None,
        )
        trainer.train()
        if trainer.accelerator.is_main_process:
            names = (
                *("loss", "loss/ptx", "loss/policy", "loss/value", "grad_norm", "grad_norm/ptx", "grad_norm/ppo"),
                *("grad_norm/value", "objective/scores", "objective/kl", "objective/kl_coef", "kl", "entropy"),
                "value/explained_variance",
            )
            logs = [[log[name] for name in names] for log in trainer.state.log_history if "loss/policy" in log]
            path = folder / f"{kind}{trainer.accelerator.num_processes}.pt"
            torch.save({"weights": weights_of(trainer), "logs": logs}, path)


def test_two_processes_equal_one(causal_lm, reward_model, tokenizer, tmp_path):
    """At the same global batch: logs and weights, for full and LoRA policies, value network and head."""
    for name, saved in (("policy", causal_lm), ("reward", reward_model)):
        saved.save_pretrained(tmp_path / name)
    train_every_kind(tmp_path, tokenizer, 4)
    in_two_processes(train_every_kind, tmp_path, tokenizer, 2)
    for kind in ("network", "head", "lora"):
        one, two = (torch.load(tmp_path / f"{kind}{processes}.pt") for processes in (1, 2))
        torch.testing.assert_close(torch.tensor(two["logs"]), torch.tensor(one["logs"]), atol=1e-5, rtol=1e-4)
        assert_same(two["weights"], one["weights"], tolerance=1e-5)
