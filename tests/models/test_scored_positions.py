"""PPO's forward passes compute what is read and give what the plain ones give: against loops over rows and tokens."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from trl.trainer.utils import add_fused_lm_head

from prefopt.inference.scoring import score_ids
from prefopt.models import heads as lm_heads
from prefopt.models.heads import token_logps
from prefopt.models.passes import last_mlp_at
from prefopt.models.reward import checkpoint_activations, sequence_scores, token_scores
from prefopt.trainers.ppo_ptx.config import PPOPtxConfig
from prefopt.trainers.ppo_ptx.episodes import Episodes
from prefopt.trainers.ppo_ptx.trainer import PPOPtxTrainer

VOCABULARY = 320
PROMPTS, COMPLETIONS = [4, 2, 5], [3, 6, 1]  # tokens of three episodes
LENGTH = 6
WIDTH = 5 + LENGTH


def lora(model):
    torch.manual_seed(5)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj", "up_proj"])
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def episodes():
    """Ids and mask `[3, 11]`: prompts padded on the left, completions on the right."""
    torch.manual_seed(7)
    ids, mask = torch.zeros(3, WIDTH, dtype=torch.long), torch.zeros(3, WIDTH, dtype=torch.long)
    for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        ids[row, 5 - prompt : 5 + completion] = torch.randint(5, VOCABULARY, (prompt + completion,))
        mask[row, 5 - prompt : 5 + completion] = 1
    return ids, mask


def slow_logps(model, ids, mask, temperature):
    """Row by row without padding, token by token, in double precision."""
    logps = torch.zeros(3, LENGTH, dtype=torch.float64)
    entropies = torch.zeros_like(logps)
    for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        tokens = ids[row][mask[row].bool()]
        logits = model(tokens[None]).logits[0] / temperature
        for t in range(completion):
            p = logits[prompt + t - 1].softmax(-1)
            logps[row, t] = p[tokens[prompt + t]].log()
            entropies[row, t] = -sum(x * x.log() for x in p)
    return logps, entropies


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("logits", ["dense", "fused"])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_logps_and_gradients_equal_a_loop(kind, logits, temperature, causal_lm, episodes, monkeypatch):
    count = sum(COMPLETIONS)
    monkeypatch.setattr(lm_heads, "DENSE_LOGITS", count * VOCABULARY - (logits == "fused"))
    model = lora(causal_lm) if kind == "lora" else causal_lm
    plain = copy.deepcopy(model).double()
    add_fused_lm_head(causal_lm, temperature=temperature, outputs=("log_probs", "entropy"))
    projected = []
    causal_lm.lm_head.register_forward_hook(lambda module, args, output: projected.append(output.numel()))
    ids, mask = episodes
    batch = Episodes.of(ids, mask, LENGTH)
    both = token_logps(model, batch.batches[0], temperature=temperature, compute_entropy=True)[:2]
    logps, entropies = (batch.in_rows([x]) for x in both)
    expected, slow_entropies = slow_logps(plain, ids, mask, temperature)
    torch.testing.assert_close(logps, expected.float(), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(entropies, slow_entropies.float(), atol=1e-6, rtol=1e-6)
    assert not entropies.requires_grad
    assert projected == ([count * VOCABULARY] if logits == "dense" else [])  # the fused head is no module
    weights = torch.randn(3, LENGTH)
    fast = torch.autograd.grad((logps * weights).sum(), [p for p in model.parameters() if p.requires_grad])
    slow = torch.autograd.grad((expected * weights).sum(), [p for p in plain.parameters() if p.requires_grad])
    assert len(fast) == len(slow) > 4
    for gradient, other in zip(fast, slow, strict=True):
        # In fp32 rounding grows with the tensor's largest gradients.
        assert (gradient - other).norm() <= 3e-6 * other.norm()


# ---- the last layer's MLP -----------------------------------------------------------------------------------------
def watch_mlp(model):
    """Tokens that the MLP of each layer is given, by layer; grows with every forward."""
    tokens = [[], []]
    for layer, seen in zip(model.base_model.layers, tokens, strict=True):
        # `down_proj`, as a hook on `mlp` itself would come before those under test
        layer.mlp.down_proj.register_forward_hook(
            lambda module, args, output, seen=seen: seen.append(output.shape[:-1].numel())
        )
    return tokens


def test_values_and_gradients_equal_the_plain_ones(reward_model, episodes):
    ids, mask = episodes
    plain = copy.deepcopy(reward_model)
    tokens = watch_mlp(reward_model)
    with last_mlp_at(reward_model, WIDTH - LENGTH - 1, WIDTH - 1):
        values = token_scores(reward_model, ids, mask)[:, -LENGTH - 1 : -1]
    assert tokens == [[3 * WIDTH], [3 * LENGTH]]
    expected = torch.zeros(3, LENGTH)
    for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        real = ids[row][mask[row].bool()][None]
        scores = token_scores(plain, real, torch.ones_like(real))[0]
        expected[row, :completion] = scores[prompt - 1 : prompt + completion - 1]
    counts = mask[:, -LENGTH:].bool()
    torch.testing.assert_close(values[counts], expected[counts], atol=1e-6, rtol=1e-6)
    for gradient, other in zip(
        torch.autograd.grad(values[counts].square().sum(), [*reward_model.parameters()]),
        torch.autograd.grad(expected[counts].square().sum(), [*plain.parameters()]),
        strict=True,
    ):
        assert (gradient - other).norm() <= 2e-6 * other.norm()
    token_scores(reward_model, ids, mask)
    assert tokens[1][1:] == [3 * WIDTH]  # the hooks are gone


@pytest.mark.parametrize("reward_token", [None, 3])
def test_scores_of_ids_equal_those_of_single_rows(reward_token, reward_model, episodes):
    ids, mask = episodes
    reward_model.config.reward_token_id = reward_token
    tokens = watch_mlp(reward_model)
    rows = [row[real.bool()].tolist() for row, real in zip(ids, mask, strict=True)]  # of 7, 8 and 6 tokens
    scores = score_ids(reward_model, rows, 2)
    extra = reward_token is not None
    # From where the shorter row is read on.
    assert tokens == [[2 * (8 + extra), 6 + extra], [2 * 2, 1]]
    for score, row in zip(scores, rows, strict=True):
        single = torch.tensor([row])
        expected = sequence_scores(reward_model, single, torch.ones_like(single)).item()
        assert score == pytest.approx(expected, abs=1e-6)


def test_nothing_is_cut_where_checkpointing_runs_the_forward_again(reward_model, episodes):
    checkpoint_activations(reward_model)
    tokens = watch_mlp(reward_model)
    with last_mlp_at(reward_model, 4, 6):
        token_scores(reward_model, *episodes)
    with torch.no_grad(), last_mlp_at(reward_model, 4, 6):
        token_scores(reward_model, *episodes)
    assert tokens == [[3 * WIDTH] * 2, [3 * WIDTH, 3 * 2]]  # without a backward pass no forward is run again


# ---- padding ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("size", "multiple", "expected_widths"),
    [(1, None, [8, 7, 6]), (2, None, [8, 6]), (1, 3, [9, 9, 6]), (2, 5, [10, 10])],
)
@pytest.mark.parametrize("value", ["head", "network"])
def test_forwards_end_with_the_longest_episode(
    value, size, multiple, expected_widths, causal_lm, reward_model, tokenizer, episodes, tmp_path
):
    args = PPOPtxConfig(
        str(tmp_path),
        use_cpu=True,
        report_to="none",
        per_device_train_batch_size=2,
        ptx_coef=0.0,
        pad_to_multiple_of=multiple,
        disable_tqdm=True,
        gradient_checkpointing=False,
    )
    trainer = PPOPtxTrainer(
        causal_lm,
        lambda completions, **kwargs: [0.0] * len(completions),
        args,
        Dataset.from_dict({"prompt": ["a"] * 8}),
        processing_class=tokenizer,
        value_model="head" if value == "head" else reward_model.requires_grad_(True),
    )
    if value == "head":
        torch.nn.init.normal_(trainer.value_function.module.weight, std=0.1)
    ids, mask = (F.pad(x, (1, 0)) for x in episodes)  # 12 columns, rows of 7, 8 and 6 tokens
    ids, mask, length = F.pad(ids, (0, 4)), F.pad(mask, (0, 4)), LENGTH + 4
    widths = []
    trunk = causal_lm.model if value == "head" else reward_model.model
    trunk.register_forward_hook(lambda module, args, output: widths.append(output[0].shape[1]))
    with torch.no_grad():
        logps, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, length, size)
        if value == "network":
            values = trainer.roles.values(trainer.roles.episodes(ids, mask, length, size))
        else:
            values = trainer._sampled.of_policy.values
        assert widths == expected_widths
        batch = Episodes.of(ids, mask, length)
        whole = batch.in_rows([token_logps(trainer.model, batch.batches[0])[0]])
        counts = mask[:, -length:].bool()
        torch.testing.assert_close(logps, whole, atol=1e-6, rtol=1e-6)
        if value == "network":
            expected = token_scores(reward_model, ids, mask)[:, -length - 1 : -1]
        else:
            hidden_states = causal_lm.model(ids, attention_mask=mask).last_hidden_state
            expected = trainer.value_function.module(hidden_states).squeeze(-1)[:, -length - 1 : -1]
    assert values.shape == (3, length)
    torch.testing.assert_close(values[counts], expected[counts], atol=1e-6, rtol=1e-6)
