"""PPOPtxTrainer's rewards and pretraining loss: KL estimators, adaptive coefficient, scores, and no logits kept."""

import copy
import math
import statistics

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from trl.trainer.utils import add_fused_lm_head

from prefopt.losses import lm_loss
from prefopt.models import heads as lm_heads
from prefopt.models.heads import fp32_output
from prefopt.trainers.ppo_ptx import episodes as of_episodes
from prefopt.trainers.ppo_ptx import rollout as module
from prefopt.trainers.ppo_ptx.config import PPOPtxConfig
from prefopt.trainers.ppo_ptx.roles import add_untempered_head
from prefopt.trainers.shared.pretraining import pretraining_loss
from tests.trainers.ppo_ptx.conftest import END_IDS, PROMPTS, logs_of, lora, rollout_of

pytestmark = pytest.mark.slow

VOCABULARY, LENGTH = 320, 6


def move(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)


@pytest.fixture
def make(make):
    """Samples of one seed, a constant reward, larger steps."""
    defaults = {"max_completion_length": LENGTH, "max_steps": 3, "learning_rate": 2e-2}

    def make_with_defaults(reward=lambda completions, **kwargs: [0.5] * len(completions), **options):
        torch.manual_seed(3)
        return make(rewards=reward, **{**defaults, **options})

    return make_with_defaults


@pytest.fixture
def rewarded(monkeypatch):
    """What every call of `kl_shaped_rewards` was given."""
    calls = []

    def watch(scores, kl, mask, kl_coef):
        calls.append({"scores": scores.clone(), "kl": kl, "mask": mask, "kl_coef": kl_coef})
        return original(scores, kl, mask, kl_coef)

    original = module.kl_shaped_rewards
    monkeypatch.setattr(module, "kl_shaped_rewards", watch)
    return calls


# ---- KL estimators ------------------------------------------------------------------------------------------------
def kl_of_row(estimator, policy, reference, prompt, completion, temperature):
    """Of one completion without padding, by the definitions of Schulman 2020, token by token and word by word."""
    logits = [m(torch.tensor([prompt + completion])).logits[0].double() / temperature for m in (policy, reference)]
    per_token = []
    for t, token in enumerate(completion, start=len(prompt) - 1):
        p, q = (x[t].softmax(-1) for x in logits)
        if estimator == "k1":
            per_token.append(math.log(p[token] / q[token]))
        elif estimator == "k3":
            r = (q[token] / p[token]).item()
            per_token.append((r - 1) - math.log(r))
        else:
            per_token.append(sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True)))
    return per_token


@torch.no_grad()
@pytest.mark.parametrize("estimator", ["k1", "k3", "full"])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_kl_equals_the_loop(kind, estimator, make, causal_lm, rewarded, monkeypatch):
    causal_lm.generation_config.eos_token_id = END_IDS
    model = lora(causal_lm) if kind == "lora" else causal_lm
    reference = copy.deepcopy(model)
    monkeypatch.setattr(of_episodes, "KL_POSITIONS", 2 * LENGTH)  # of eight rows two at a time
    trainer = make(model=model, kl_estimator=estimator, kl_coef=0.3, temperature=0.7, missing_eos_penalty=0.25)
    move(trainer.model)
    rollout = rollout_of(trainer)
    (call,) = rewarded
    total, rewards = 0.0, 0.0
    for row in range(8):
        prompt = rollout["prompt_ids"][row][rollout["prompt_mask"][row].bool()].tolist()
        completion = rollout["completion_ids"][row][rollout["completion_mask"][row].bool()].tolist()
        expected = kl_of_row(estimator, trainer.model, reference, prompt, completion, 0.7)
        assert call["kl"][row][: len(completion)].tolist() == pytest.approx(expected, abs=2e-6, rel=1e-5)
        total += sum(expected)
        rewards += 0.5 - 0.25 * (completion[-1] not in END_IDS) - 0.3 * sum(expected)
    metrics = trainer._metrics["train"]
    assert len(set(call["mask"].sum(1).tolist())) > 1  # ragged
    assert total / 8 > 0.01
    assert metrics["objective/kl"] == [pytest.approx(total / 8, rel=1e-5)]
    assert metrics["objective/rewards"] == [pytest.approx(rewards / 8, rel=1e-5)]
    assert metrics["objective/kl_coef"] == [0.3]


@pytest.mark.parametrize("estimator", ["k1", "k3", "full"])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_first_kl_is_zero_and_logged_without_a_penalty(kind, estimator, make, causal_lm):
    model = lora(causal_lm) if kind == "lora" else causal_lm
    trainer = make(model=model, kl_estimator=estimator, kl_coef=0.0, bf16=kind == "full")
    trainer.train()
    kl = logs_of(trainer, "objective/kl")
    assert len(kl) == 3
    assert kl[0] == 0.0
    assert kl[2] != 0.0
    assert logs_of(trainer, "objective/rewards") == logs_of(trainer, "objective/scores")


@torch.no_grad()
def test_cast_of_the_lm_head_reaches_the_exact_kl(make, causal_lm):
    head = causal_lm.lm_head
    hidden = torch.randn(3, 16)
    with fp32_output(head, True), torch.autocast("cpu", torch.bfloat16):
        precise = head(hidden.bfloat16())
    assert precise.dtype == torch.float32
    torch.testing.assert_close(precise, hidden.bfloat16().float() @ head.weight.T)
    with torch.autocast("cpu", torch.bfloat16):  # the hook is gone
        assert head(hidden).dtype == torch.bfloat16
    trainer = make(kl_estimator="full", bf16=True, cast_lm_head_to_fp32=True)
    ids, mask = torch.randint(5, 300, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    exact = trainer.roles.logits(trainer.model, ids, mask, 4)
    trainer.roles.cast_lm_head_to_fp32 = False
    assert not torch.equal(exact, trainer.roles.logits(trainer.model, ids, mask, 4))


# ---- the coefficient ----------------------------------------------------------------------------------------------
def test_coefficient_follows_the_controller(make, rewarded):
    trainer = make(kl_coef=0.1, kl_target=0.5, kl_horizon=10, max_steps=6)
    trainer.train()
    kls, coefficients = logs_of(trainer, "objective/kl"), logs_of(trainer, "objective/kl_coef")
    assert [call["kl_coef"] for call in rewarded] == coefficients  # the coefficient that was used is logged
    expected = 0.1
    for kl, coefficient in zip(kls, coefficients, strict=True):
        assert coefficient == pytest.approx(expected, rel=1e-9)
        expected *= 1 + 4 / 10 * max(-0.2, min(0.2, kl / 0.5 - 1))
    assert trainer.kl_controller.kl_coef == pytest.approx(expected, rel=1e-9)
    assert kls[0] == 0
    assert coefficients[1] == pytest.approx(0.1 * (1 - 0.4 * 0.2))  # a KL below the target: a smaller penalty


def test_evaluation_moves_neither_coefficient_nor_statistics(make):
    trainer = make(
        kl_coef=0.1,
        kl_target=0.5,
        normalize_scores=True,
        eval_dataset=PROMPTS.select(range(4)),
        per_device_eval_batch_size=4,
    )
    trainer.train()
    before = trainer.kl_controller.state_dict(), trainer.score_statistics.state_dict()
    trainer.evaluate()
    assert (trainer.kl_controller.state_dict(), trainer.score_statistics.state_dict()) == before


# ---- scores -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("clip", [None, 0.75])
def test_normalized_then_clipped_then_penalized(clip, make, rewarded, monkeypatch):
    drawn = [3.0, None, -5.0, 4.0, 8.0, 8.0, -1.0, None, 2.0, 2.5, 30.0, 1.0]
    source = iter(drawn)
    trainer = make(
        lambda completions, **kwargs: [next(source) for _ in completions],
        normalize_scores=True,
        score_clip=clip,
        missing_eos_penalty=2.0,
    )
    sampled = [[5, 6], [5, 1], [5, 1], [5, 1]]  # the first has no EOS
    monkeypatch.setattr(trainer, "_generate_single_turn", lambda *args, **kwargs: (sampled, None))
    trainer.train()
    for number, call in enumerate(rewarded):
        seen = [score for score in drawn[: 4 * number + 4] if score is not None]
        mean, deviation = statistics.fmean(seen), statistics.stdev(seen)
        for row, score in enumerate(drawn[4 * number : 4 * number + 4]):
            if score is None:
                assert not call["mask"][row].any()
                continue
            expected = (score - mean) / deviation
            if clip is not None:
                expected = max(-clip, min(clip, expected))
            expected -= 2.0 * (row == 0)
            assert call["scores"][row].item() == pytest.approx(expected, abs=1e-5)
    assert len(rewarded) == 3
    assert trainer.score_statistics.count == 10
    raw = [statistics.fmean(s for s in drawn[i : i + 4] if s is not None) for i in (0, 4, 8)]
    assert logs_of(trainer, "reward") == pytest.approx(raw)  # as the reward functions give them


def test_scores_are_left_alone_by_default(make, rewarded):
    source = iter([3.0, -5.0, 40.0, 8.0])
    rollout_of(make(lambda completions, **kwargs: [next(source) for _ in completions]), rows=4)
    assert rewarded[0]["scores"].tolist() == [3.0, -5.0, 40.0, 8.0]


# ---- pretraining loss ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("kind", ["full", "tied", "lora", "capped"])
def test_pretraining_loss_equals_lm_loss_in_value_and_gradient(kind, temperature, causal_lm, monkeypatch):
    monkeypatch.setattr("trl.kernels.chunked_logprob.TOKEN_CHUNK_SIZE", 7)
    monkeypatch.setattr("trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE", 100)
    if kind == "tied":
        causal_lm.lm_head.weight = causal_lm.model.embed_tokens.weight
    model = lora(causal_lm) if kind == "lora" else causal_lm
    plain = copy.deepcopy(model)
    if kind == "capped":
        causal_lm.config.final_logit_softcapping = 2.0
    add_fused_lm_head(causal_lm, temperature=temperature, outputs=("log_probs", "entropy"))
    if temperature != 1:
        add_untempered_head(model, cast_lm_head_to_fp32=False)
    ids = torch.randint(5, VOCABULARY, (3, 12))
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[2, :4] = -100
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    loss = pretraining_loss(model, batch, 17.0, temperature != 1, False)
    logits = plain(ids, attention_mask=mask).logits
    expected = lm_loss(2.0 * torch.tanh(logits / 2.0) if kind == "capped" else logits, labels, 17.0)
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    trained = [p for p in model.parameters() if p.requires_grad]
    slow = [p for p in plain.parameters() if p.requires_grad]
    for gradient, other in zip(torch.autograd.grad(loss, trained), torch.autograd.grad(expected, slow), strict=True):
        torch.testing.assert_close(gradient, other, atol=1e-6, rtol=1e-5)
    fused = model(**batch, fused_lm_head=True)  # PPO's log-probs keep the temperature; generation its forward
    torch.testing.assert_close(
        fused.loss,
        lm_loss(
            (expected.new_tensor(2.0) * torch.tanh(logits / 2.0) if kind == "capped" else logits) / temperature,
            labels,
        ),
    )
    assert model(ids, attention_mask=mask).logits.shape == (3, 12, VOCABULARY)


@pytest.mark.parametrize(("checkpointing", "adapts_head"), [(False, False), (True, False), (False, True)])
def test_pretraining_loss_of_a_step_is_at_temperature_one(checkpointing, adapts_head, make, causal_lm):
    """Whatever the temperature of the rollouts, whose log-probs have it in them."""
    policy = causal_lm
    if adapts_head:
        causal_lm.config.tie_word_embeddings = True
        causal_lm.tie_weights()
        rows = {"trainable_token_indices": [*range(5, VOCABULARY, 2)]}
        policy = get_peft_model(causal_lm, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], **rows))
        move(policy)
    start = copy.deepcopy(policy)
    trainer = make(
        model=policy,
        ptx_coef=1.0,
        max_steps=1,
        temperature=0.5,
        gradient_checkpointing=checkpointing,
        ptx_per_device_batch_size=2,
    )
    trainer.train()
    trainer.pretraining.text.position = 0
    nats, tokens = 0.0, 0
    for block in trainer.pretraining.text.take(2):
        ids = torch.tensor([block])
        nats += start(ids, labels=ids).loss.item() * (len(block) - 1)
        tokens += len(block) - 1
    assert logs_of(trainer, "loss/ptx")[0] == pytest.approx(nats / tokens, rel=1e-6)
    assert logs_of(trainer, "clip_ratio/region_mean")[0] == 0  # the first ratio is 1


# ---- no logits kept -----------------------------------------------------------------------------------------------
class Largest(TorchDispatchMode):
    """Remembers the largest floating-point tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.numel, self.shape = 0, None

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor) and x.is_floating_point() and x.numel() > self.numel:
                self.numel, self.shape = x.numel(), tuple(x.shape)
        return result


@pytest.mark.parametrize("estimator", ["k1", "full"])
def test_no_tensor_of_batch_time_vocabulary(estimator, make, causal_lm, monkeypatch):
    """Of all operations of a rollout, a policy step and a pretraining step; tiles are of eight positions."""
    monkeypatch.setattr("trl.kernels.chunked_logprob.TOKEN_CHUNK_SIZE", 8)
    monkeypatch.setattr("trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE", 100)
    monkeypatch.setattr(lm_heads, "DENSE_LOGITS", 8 * VOCABULARY)
    monkeypatch.setattr(of_episodes, "KL_POSITIONS", 8)
    trainer = make(ptx_coef=1.0, max_steps=1, temperature=0.9, kl_estimator=estimator, ptx_per_device_batch_size=2)
    limit = 4 * LENGTH * VOCABULARY  # both the rollout (4 x 6) and the text (2 x 16) have at least these positions
    with Largest() as largest:
        trainer.train()
    assert largest.numel < limit, largest.shape
    with Largest() as largest, torch.no_grad():  # so that the check above can fail
        causal_lm(torch.ones(4, LENGTH, dtype=torch.long))
    assert largest.numel >= limit


# ---- rollouts of any size -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(("rows", "completions"), [(1, 1), (3, 1), (3, 3), (4, 2)], ids=lambda value: str(value))
def test_any_rollout_size_and_any_number_of_completions(rows, completions, make, causal_lm):
    causal_lm.generation_config.eos_token_id = END_IDS
    lengths, prompts_seen = [], []

    def reward(prompts, completion_ids, **kwargs):
        prompts_seen.append(prompts)
        lengths.append([(len(ids), ids[-1] in END_IDS) for ids in completion_ids])
        return [float(len(ids)) for ids in completion_ids]

    trainer = make(
        reward,
        per_device_train_batch_size=rows,
        num_generations=completions,
        ptx_coef=1.0,
        kl_target=1.0,
        normalize_scores=True,
    )
    before = copy.deepcopy(causal_lm.state_dict())
    trainer.train()
    assert trainer.state.global_step == 3
    assert all(len(set(prompts)) <= rows // completions for prompts in prompts_seen)
    weights = trainer.model.state_dict()
    assert all(value.isfinite().all() for value in weights.values())
    assert any(not torch.equal(before[name], weights[name]) for name in before)
    mean_length = [statistics.fmean(length for length, _ in rollout) for rollout in lengths]
    without_eos = [statistics.fmean(not has_eos for _, has_eos in rollout) for rollout in lengths]
    assert logs_of(trainer, "completions/mean_length") == pytest.approx(mean_length)
    assert logs_of(trainer, "completions/clipped_ratio") == pytest.approx(without_eos)


# ---- settings -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"kl_estimator": "k2"}, "kl_estimator='k2'"),
        ({"kl_target": 0.0}, "kl_target=0.0"),
        ({"kl_target": float("nan")}, "kl_target=nan"),
        ({"kl_target": 1.0, "kl_coef": 0.0}, "needs kl_coef above 0"),
        ({"kl_target": 1.0, "kl_horizon": 3}, "shorter than a rollout"),
        ({"kl_horizon": -1}, "kl_horizon=-1"),
        ({"score_clip": 0.0}, "score_clip=0.0"),
    ],
)
def test_bad_settings_raise(options, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        PPOPtxConfig(str(tmp_path), use_cpu=True, **options)
