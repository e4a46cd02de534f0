"""PPOPtxTrainer's loss and gradients in every optimizer step against a plain PPO-ptx written here, row by row."""

import copy
import math
from itertools import chain

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from prefopt.models.reward import set_reward_bias
from prefopt.trainers.ppo_ptx.trainer import PPOPtxTrainer
from prefopt.trainers.shared.pretraining import PackedText
from tests.trainers.ppo_ptx.conftest import END_IDS, config, lora

pytestmark = pytest.mark.slow

PROMPTS = ["the cat", "a dog ran to the", "question: what is this?", "red house"] * 2
DOCUMENTS = ["the cat sat on the mat and the dog ran to the red house", "a dog", "what is this? a cat"] * 3
TARGETS = ("q_proj", "v_proj")
KL, PTX, VF, GAMMA, LAMBDA, CLIP, VALUE_CLIP, PENALTY = 0.3, 2.0, 0.7, 0.97, 0.9, 0.1, 0.15, 0.4


def token_share(completion_ids, **kwargs):
    return [sum(token % 3 == 0 for token in ids) / len(ids) for ids in completion_ids]


def bare(model):
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def rows_of(batches):
    """(prompt, completion) of every episode, without padding."""
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
    return [
        (p[pm.bool()].tolist(), c[cm.bool()].tolist())
        for batch in batches
        for p, pm, c, cm in zip(*(batch[name] for name in names), strict=True)
    ]


class Reference:
    """InstructGPT Eq. 2 with loops over rows and tokens, on unpadded sequences, without any prefopt function."""

    def __init__(self, trainer, policy, sft, value, score):
        self.trainer, self.policy, self.sft, self.value, self.score = trainer, policy, sft, value, score
        self.start_policy, self.start_value = copy.deepcopy(policy), copy.deepcopy(value)
        self.rollout = None

    def logps(self, model, prompt, completion):
        logits = bare(model)(torch.tensor([prompt + completion])).logits[0]
        logps = (logits - logits.logsumexp(-1, keepdim=True))[len(prompt) - 1 : -1]
        return torch.stack([logps[t, token] for t, token in enumerate(completion)])

    def values(self, policy, value, prompt, completion):
        ids = torch.tensor([prompt + completion])
        if isinstance(value, torch.nn.Linear):
            out = value(bare(policy).model(ids).last_hidden_state)
        else:
            out = bare(value).score(bare(value).model(ids).last_hidden_state) - bare(value).config.reward_bias
        return out[0, len(prompt) - 1 : -1, 0]

    def begin(self):
        """Quantities of the rollout, under the policy and the value function that sampled it."""
        self.rows = rows_of(self.trainer._buffered_inputs)
        self.old, self.old_values, self.returns, self.advantages = [], [], [], []
        with torch.no_grad():
            for prompt, completion in self.rows:
                old = self.logps(self.start_policy, prompt, completion)
                ref = self.logps(self.sft, prompt, completion)
                values = self.values(self.start_policy, self.start_value, prompt, completion).tolist()
                rewards = [-KL * float(a - b) for a, b in zip(old, ref, strict=True)]
                rewards[-1] += self.score(prompt, completion)
                if completion[-1] not in END_IDS:
                    rewards[-1] -= PENALTY
                advantages, following = [0.0] * len(rewards), 0.0
                for t in reversed(range(len(rewards))):
                    next_value = values[t + 1] if t + 1 < len(values) else 0.0
                    delta = rewards[t] + GAMMA * next_value - values[t]
                    following = delta + GAMMA * LAMBDA * following
                    advantages[t] = following
                self.old.append(old)
                self.old_values.append(values)
                self.returns.append([a + v for a, v in zip(advantages, values, strict=True)])
                self.advantages.append(advantages)
        flat = [a for row in self.advantages for a in row]
        mean = sum(flat) / len(flat)
        std = math.sqrt(sum((a - mean) ** 2 for a in flat) / (len(flat) - 1))
        self.advantages = [[(a - mean) / std for a in row] for row in self.advantages]

    def step(self, rows, blocks):
        """Loss terms of one optimizer step on the rows with these numbers and these pretraining blocks."""
        policy, value, tokens = [], [], 0
        for i in rows:
            prompt, completion = self.rows[i]
            logps = self.logps(self.policy, prompt, completion)
            values = self.values(self.policy, self.value, prompt, completion)
            for t in range(len(completion)):
                ratio, advantage = (logps[t] - self.old[i][t]).exp(), self.advantages[i][t]
                clipped = min(max(ratio, torch.tensor(1 - CLIP)), torch.tensor(1 + CLIP))
                policy.append(-min(ratio * advantage, clipped * advantage))
                v, old, target = values[t], self.old_values[i][t], self.returns[i][t]
                near = old + torch.clamp(v - old, -VALUE_CLIP, VALUE_CLIP)
                value.append(0.5 * max((v - target) ** 2, (near - target) ** 2))
                tokens += 1
        nats = []
        for block in blocks:
            logits = bare(self.policy)(torch.tensor([block])).logits[0]
            for t in range(len(block) - 1):
                nats.append(logits[t].logsumexp(-1) - logits[t, block[t + 1]])
        return sum(policy) / tokens, sum(value) / tokens, sum(nats) / len(nats)


class Compare(TrainerCallback):
    """Before each optimizer step: the gradients held by the parameters against autograd on the reference."""

    def __init__(self):
        self.steps, self.minibatches = 0, []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        trainer, reference = self.trainer, self.reference
        if self.steps == 0:
            reference.begin()
        batches, size = trainer._buffered_inputs, args.gradient_accumulation_steps
        first = self.steps * size % len(batches)
        minibatch = rows_of(batches[first : first + size])  # divided anew in every inner epoch
        self.minibatches.append(minibatch)
        policy_loss, value_loss, ptx = reference.step(
            [reference.rows.index(row) for row in minibatch], self.stream.take(3)
        )
        policy = [p for p in trainer.model.parameters() if p.requires_grad]
        value = [p for p in reference.value.parameters() if p.requires_grad]
        total = policy_loss + VF * value_loss + PTX * ptx
        expected = torch.autograd.grad(total, policy + value, retain_graph=True, allow_unused=True)
        for parameter, gradient in zip(policy + value, expected, strict=True):
            if gradient is None:
                assert parameter.grad is None or not parameter.grad.any()
            else:
                scale = max(1.0, gradient.abs().max().item())
                torch.testing.assert_close(parameter.grad, gradient, atol=1e-6 * scale, rtol=1e-4)
        is_head = isinstance(reference.value, torch.nn.Linear)
        ppo = policy_loss + VF * value_loss if is_head else policy_loss
        for name, term, parameters in (
            ("grad_norm/ppo", ppo, policy),
            ("grad_norm/ptx", PTX * ptx, policy),
            ("grad_norm/value", VF * value_loss, value),
        ):
            parts = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
            norm = math.sqrt(sum(float(g.square().sum()) for g in parts if g is not None))
            assert trainer._metrics["train"][name] == [pytest.approx(norm, rel=1e-5)]
        expected_log = {"loss/policy": policy_loss, "loss/value": value_loss, "loss/ptx": ptx, "loss": total}
        self.expected_log = {name: float(x.detach()) for name, x in expected_log.items()}
        self.steps += 1

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss/policy" in logs:
            logged = {name: logs[name] for name in self.expected_log}
            assert logged == pytest.approx(self.expected_log, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "case", ["full, value network", "full, value head", "lora, value network", "lora, value head"]
)
def test_equals_plain_pytorch(case, checkpointing, causal_lm, reward_model, tokenizer, tmp_path):
    causal_lm.generation_config.eos_token_id = END_IDS
    is_lora, has_head = case.startswith("lora"), case.endswith("head")
    set_reward_bias(reward_model, 0.25)
    policy = lora(causal_lm, std=0.3, targets=TARGETS) if is_lora else causal_lm
    if is_lora:
        reward_model = lora(reward_model, "SEQ_CLS", seed=6, std=0.3, targets=TARGETS, modules_to_save=["score"])
    sft = copy.deepcopy(policy)
    scorer = copy.deepcopy(reward_model)

    @torch.no_grad()
    def score(prompt, completion):
        if has_head:
            return token_share([completion])[0]
        model = bare(scorer)
        return float(model.score(model.model(torch.tensor([prompt + completion])).last_hidden_state)[0, -1] - 0.25)

    compare = Compare()
    torch.manual_seed(3)
    trainer = PPOPtxTrainer(
        policy,
        token_share if has_head else reward_model,
        config(
            tmp_path,
            gradient_checkpointing=checkpointing,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            steps_per_generation=4,
            num_iterations=2,
            max_steps=4,
            max_completion_length=7,
            max_grad_norm=0.0,
            warmup_steps=0,
            learning_rate=2e-2,
            value_learning_rate=2e-2,
            kl_coef=KL,
            ptx_coef=PTX,
            vf_coef=VF,
            discount=GAMMA,
            gae_lambda=LAMBDA,
            epsilon=CLIP,
            value_clip_range=VALUE_CLIP,
            missing_eos_penalty=PENALTY,
            fit_value_head=False,
            ptx_batch_ratio=0.75,
            ptx_max_length=11,
            ptx_per_device_batch_size=2,
        ),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        pretrain_dataset=Dataset.from_dict({"text": DOCUMENTS}),
        processing_class=tokenizer,
        callbacks=[compare],
    )
    with torch.no_grad():  # away from the reference, so that the KL in the reward is not 0
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
        for parameter in trainer.value_function.parameters:
            parameter += 0.05 * torch.randn_like(parameter)
    compare.trainer = trainer
    compare.reference = Reference(trainer, trainer.model, sft, trainer.value_function.module, score)
    compare.stream = PackedText(trainer.pretraining.text.blocks, trainer.args.seed)
    trainer.train()

    assert compare.steps == 4  # 2 inner epochs of 2 minibatches
    first, second = (sorted(chain(*compare.minibatches[i : i + 2])) for i in (0, 2))
    assert first == second == sorted(compare.reference.rows)
    assert len({len(completion) for _, completion in compare.reference.rows}) > 1  # ragged
    history = [log for log in trainer.state.log_history if "clip_ratio/region_mean" in log]
    assert history[0]["clip_ratio/region_mean"] == 0
    assert history[3]["clip_ratio/region_mean"] > 0
    assert history[0]["objective/kl"] != 0
