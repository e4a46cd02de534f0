"""Rewards, advantages and whitening against arithmetic and slow loops."""

import inspect
import math
import statistics

import pytest
import torch

from prefopt.losses import advantages
from prefopt.losses import kl_control as rollout_statistics
from prefopt.losses.advantages import (
    clip_scores,
    full_kl,
    gae,
    k1,
    k3,
    kl_shaped_rewards,
    masked_whiten,
)
from prefopt.losses.kl_control import KLController, RunningStatistics

NAN = float("nan")


def close(actual, expected, tol=1e-6):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), atol=tol, rtol=tol)


def right_padded(rows=6, length=7):
    torch.manual_seed(length)
    return torch.arange(length) < torch.randint(1, length, (rows, 1))


def with_holes(rows=6, length=7):
    torch.manual_seed(length)
    return torch.rand(rows, length) < 0.6


# kl_shaped_rewards


@pytest.mark.parametrize("mask", [right_padded(), with_holes()])
def test_rewards_equal_the_loop(mask):
    torch.manual_seed(0)
    scores, logps, ref_logps = torch.randn(6), torch.randn(6, 7), torch.randn(6, 7)
    expected = torch.zeros(6, 7)
    for b in range(6):
        tokens = [t for t in range(7) if mask[b, t]]
        for t in tokens:
            expected[b, t] = -0.3 * (logps[b, t] - ref_logps[b, t])
        if tokens:
            expected[b, tokens[-1]] += scores[b]
    close(kl_shaped_rewards(scores, k1(logps, ref_logps), mask, kl_coef=0.3), expected)


def test_score_is_given_once_to_the_last_token_not_to_every_token():
    zeros = torch.zeros(2, 4)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    rewards = kl_shaped_rewards(torch.tensor([3.0, -2.0]), zeros, mask, kl_coef=0.02)
    assert rewards.tolist() == [[0, 0, 0, 3.0], [0, -2.0, 0, 0]]


def test_score_lands_on_the_eos_not_one_position_after_it_when_pad_is_eos():
    eos = 2
    ids = torch.tensor([[5, 6, eos, eos, eos], [5, 6, 7, 8, 9]])  # EOS at 2 then padding; cut at the length limit
    is_eos = ids == eos
    mask = (is_eos.cumsum(1) - is_eos.long()) == 0  # up to the first EOS, itself included
    zeros = torch.zeros(2, 5)
    rewards = kl_shaped_rewards(torch.tensor([1.0, 1.0]), zeros, mask, kl_coef=0.02)
    assert rewards.argmax(1).tolist() == [2, 4]
    assert rewards.sum(1).tolist() == [1.0, 1.0]


def test_kl_is_not_clamped_at_zero():
    mask = torch.tensor([[True, True]])
    rewards = kl_shaped_rewards(
        torch.zeros(1), k1(torch.tensor([[-3.0, -1.0]]), torch.tensor([[-1.0, -3.0]])), mask, kl_coef=0.5
    )
    close(rewards, [[0.5 * 2.0, -0.5 * 2.0]])  # less likely than under the reference: a bonus


def test_kl_estimate_is_unbiased():
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.3, 0.3, 0.4])
    each_token = torch.ones(3, 1, dtype=torch.bool)  # all outcomes of one step, weighted by p below
    rewards = kl_shaped_rewards(torch.zeros(3), k1(p.log(), q.log())[:, None], each_token, kl_coef=1.0)
    kl = 0.7 * math.log(0.7 / 0.3) + 0.2 * math.log(0.2 / 0.3) + 0.1 * math.log(0.1 / 0.4)
    close((p * rewards[:, 0]).sum(), -kl)


def test_total_reward_is_the_bracket_of_equation_2():
    torch.manual_seed(1)
    mask, scores = right_padded(), torch.randn(6)
    logps, ref_logps = -torch.rand(6, 7), -torch.rand(6, 7)
    log_ratio = [(logps[b, mask[b]].sum() - ref_logps[b, mask[b]].sum()).item() for b in range(6)]
    expected = [scores[b].item() - 0.02 * log_ratio[b] for b in range(6)]
    close(kl_shaped_rewards(scores, k1(logps, ref_logps), mask, kl_coef=0.02).sum(1), expected)


def test_rows_without_tokens_and_padding_do_not_leak():
    mask = torch.tensor([[False, False], [True, False]])
    junk = torch.tensor([[NAN, NAN], [0.0, -math.inf]])
    rewards = kl_shaped_rewards(torch.tensor([NAN, 2.0]), k1(junk, junk), mask, kl_coef=0.1)
    assert rewards.tolist() == [[0.0, 0.0], [2.0, 0.0]]


def test_rewards_refuse_other_shapes():
    x, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"scores \[B\]"):
        kl_shaped_rewards(torch.zeros(2, 1), x, mask, 0.1)
    with pytest.raises(ValueError, match=r"scores \[B\]"):
        kl_shaped_rewards(torch.zeros(3), x, mask, 0.1)
    with pytest.raises(ValueError, match="shapes differ"):
        kl_shaped_rewards(torch.zeros(2), x[:, :1], mask, 0.1)


# KL estimates


def kl_by_loop(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


@pytest.mark.parametrize("temperature", [0.3, 3.0])
def test_sampled_estimates_average_to_the_exact_kl(temperature):
    """Their expectation under the policy, as a sum over the vocabulary, is the KL of the loop."""
    torch.manual_seed(11)
    logits, ref_logits = torch.randn(2, 4, 9).double() / temperature
    p, q = logits.softmax(-1), ref_logits.softmax(-1)
    exact = torch.tensor([kl_by_loop(a.tolist(), b.tolist()) for a, b in zip(p, q, strict=True)], dtype=p.dtype)
    close(full_kl(logits, ref_logits), exact, tol=1e-12)
    for estimate in (k1, k3):
        close((p * estimate(p.log(), q.log())).sum(-1), exact, tol=1e-12)
    swapped = torch.tensor([kl_by_loop(b.tolist(), a.tolist()) for a, b in zip(p, q, strict=True)])
    assert (exact - swapped).abs().max() > 1e-3  # so that a swap of the two would be seen


def test_k1_and_k3_by_arithmetic():
    logps, ref_logps = torch.tensor([-1.0, -4.0, -2.0]), torch.tensor([-1.5, -1.0, -2.0])
    close(k1(logps, ref_logps), [0.5, -3.0, 0.0])
    close(k3(logps, ref_logps), [math.exp(-0.5) - 1 + 0.5, math.exp(3.0) - 1 - 3.0, 0.0])
    near = (
        torch.tensor([-5.0]),
        torch.tensor([-5.0 + 2**-12]),
    )  # exact in fp32; exp(x) - 1 - x would round to 0
    close(k3(*near), [2**-25 + 2**-36 / 6], tol=1e-10)


def test_k3_is_never_negative():
    torch.manual_seed(12)
    logps, ref_logps = -5 * torch.rand(2, 1000)
    assert (k3(logps, ref_logps) >= 0).all()
    assert (k1(logps, ref_logps) < 0).any()


def test_full_kl_in_chunks_equals_whole_of_any_shape_and_dtype():
    torch.manual_seed(13)
    logits, ref_logits = torch.randn(2, 3, 257, 5)  # 771 positions: three chunks and a rest
    p, q = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    close(full_kl(logits, ref_logits), (p.exp() * (p - q)).sum(-1))
    half = full_kl(logits.bfloat16(), ref_logits.bfloat16())
    assert half.dtype == torch.float32
    close(half, full_kl(logits.bfloat16().float(), ref_logits.bfloat16().float()))
    assert full_kl(logits, logits).abs().max() == 0


def test_full_kl_of_excluded_tokens():
    inf = math.inf
    close(full_kl(torch.tensor([-inf, 0.0]), torch.tensor([0.0, 0.0])), math.log(2))
    close(full_kl(torch.tensor([-inf, 0.0]), torch.tensor([-inf, 0.0])), 0.0)
    assert full_kl(torch.tensor([0.0, 0.0]), torch.tensor([-inf, 0.0])).item() == inf


def test_kl_estimates_carry_no_gradient_and_refuse_other_shapes():
    x = torch.randn(2, 3, requires_grad=True)
    for estimate in (k1, k3, full_kl):
        assert not estimate(x, x).requires_grad
        with pytest.raises(ValueError, match="shapes differ"):
            estimate(x, x[:, :1])


# the KL coefficient


def test_controller_equals_the_equation_of_ziegler():
    kls, coefficient = [9.0, 100.0, 6.0, 5.7, 0.1, -3.0, 6.6], 0.02
    controller = KLController(0.02, target=6.0, horizon=10_000)
    for kl in kls:
        error = max(-0.2, min(0.2, kl / 6.0 - 1))
        coefficient = coefficient * (1 + 512 / 10_000 * error)
        assert controller.update(kl, episodes=512) == pytest.approx(coefficient, rel=1e-12)
        assert controller.kl_coef == controller.update(math.nan, 512) == controller.update(kl, 0)


def test_controller_brings_a_kl_that_falls_with_the_coefficient_to_its_target():
    controller = KLController(1.0, target=2.0, horizon=1000)
    for _ in range(200):
        controller.update(kl=0.5 / controller.kl_coef, episodes=500)
    assert controller.kl_coef == pytest.approx(0.25, rel=1e-3)


def test_controller_state_resumes_and_a_fixed_coefficient_is_the_configured_one():
    first, second = (KLController(0.1, target=1.0, horizon=100) for _ in range(2))
    first.update(3.0, 50)
    second.load_state_dict(first.state_dict())
    assert first.update(0.9, 50) == second.update(0.9, 50)
    fixed = KLController(0.05)
    fixed.load_state_dict(first.state_dict())
    assert fixed.update(100.0, 50) == 0.05


def test_controller_refuses_what_would_turn_or_stop_the_coefficient():
    for bad in ({"target": 0.0}, {"target": math.nan}, {"kl_coef": 0.0, "target": 1.0}):
        with pytest.raises(ValueError, match="positive"):
            KLController(**{"kl_coef": 0.1, **bad})
    with pytest.raises(ValueError, match="longer than the horizon"):
        KLController(0.1, target=1.0, horizon=10).update(1.0, episodes=11)


# scores


def test_clip_scores():
    scores = torch.tensor([-3.0, -1.0, 0.5, NAN, 7.0])
    assert clip_scores(scores, None) is scores
    close(clip_scores(scores, 2.0)[[0, 1, 2, 4]], [-2.0, -1.0, 0.5, 2.0])
    for bad in (0.0, -1.0, NAN):
        with pytest.raises(ValueError, match="score_clip"):
            clip_scores(scores, bad)


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_running_statistics_equal_the_statistics_module(offset):
    torch.manual_seed(14)
    running, seen = RunningStatistics(), []
    for size in (1, 5, 3, 0, 8):
        x, mask = torch.randn(size).double() * 3 + offset, torch.rand(size) < 0.7
        if size == 1:
            mask[:] = True
        running.update(torch.where(mask, x, NAN), mask)
        seen += x[mask].tolist()
        assert running.count == len(seen)
        assert running.mean == pytest.approx(statistics.fmean(seen), rel=1e-12)
        if len(seen) > 1:
            assert running.variance == pytest.approx(statistics.variance(seen), rel=1e-7)
    deviation = math.sqrt(statistics.variance(seen) + 1e-8)
    close(running.normalize(x), [(v - statistics.fmean(seen)) / deviation for v in x.tolist()], tol=1e-6)


def test_running_statistics_span_all_processes():
    torch.manual_seed(15)
    batches = [torch.randn(2, 4) + torch.tensor([[0.0], [5.0]]) for _ in range(3)]
    counts = torch.ones(4, dtype=torch.bool)
    whole, shards = RunningStatistics(), [RunningStatistics(), RunningStatistics()]
    sent: list[torch.Tensor] = []

    def send(t: torch.Tensor) -> torch.Tensor:
        sent.append(t)
        return t

    for batch in batches:
        whole.update(batch, torch.ones(2, 4))
        sent.clear()
        for part in batch:  # what each process would send
            trial = RunningStatistics()
            trial.load_state_dict(shards[0].state_dict())
            trial.update(part, counts, reduce=send)
        for shard, part in zip(shards, batch, strict=True):
            shard.update(part, counts, reduce=lambda _: sent[0] + sent[1])
    assert shards[0].state_dict() == shards[1].state_dict()
    assert shards[0].state_dict() == pytest.approx(whole.state_dict(), rel=1e-12)


def test_running_statistics_of_nothing_one_and_equal_values():
    running = RunningStatistics()
    x = torch.tensor([3.0, 3.0])
    running.update(x, torch.zeros(2))
    assert running.normalize(x).tolist() == x.tolist()
    running.update(x[:1], torch.ones(1))
    assert (running.variance, running.normalize(x).tolist()) == (0.0, [0.0, 0.0])
    running.update(x, torch.ones(2))
    assert running.normalize(x).tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match="shapes differ"):
        running.update(x, torch.ones(1))


# gae


def gae_by_recursion(rewards: list[float], values: list[float], discount: float, lam: float) -> list[float]:
    """Of one completion without padding, by the definition A(t) = delta(t) + discount * lambda * A(t + 1)."""

    def advantage(t: int) -> float:
        if t == len(rewards):
            return 0.0
        next_value = values[t + 1] if t + 1 < len(values) else 0.0
        return rewards[t] + discount * next_value - values[t] + discount * lam * advantage(t + 1)

    return [advantage(t) for t in range(len(rewards))]


@pytest.mark.parametrize(("discount", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.9, 0.0)])
@pytest.mark.parametrize("mask", [right_padded(), with_holes()])
def test_gae_equals_the_naive_recursion_on_unpadded_rows(mask, discount, lam):
    torch.manual_seed(2)
    rewards, values = torch.randn(6, 7), torch.randn(6, 7)
    advantages, returns = gae(rewards, values, mask, discount, lam)
    for b in range(6):
        expected = gae_by_recursion(rewards[b, mask[b]].tolist(), values[b, mask[b]].tolist(), discount, lam)
        close(advantages[b, mask[b]], expected)
        close(returns[b, mask[b]], [a + v for a, v in zip(expected, values[b, mask[b]].tolist(), strict=True)])
    assert (advantages[~mask] == 0).all()
    assert (returns[~mask] == 0).all()


def test_gae_equals_the_sum_of_equation_16():
    torch.manual_seed(3)
    rewards, values = torch.randn(2, 1, 5)
    advantages, _ = gae(rewards, values, torch.ones(1, 5), discount=0.9, gae_lambda=0.8)
    following = [*values[0, 1:].tolist(), 0.0]
    delta = [rewards[0, t].item() + 0.9 * following[t] - values[0, t].item() for t in range(5)]
    close(advantages[0], [sum((0.9 * 0.8) ** k * delta[t + k] for k in range(5 - t)) for t in range(5)])


def test_gae_defaults_are_the_papers():
    score_at_the_end, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.zeros(1, 3)
    advantages, _ = gae(score_at_the_end, values, torch.ones(1, 3))
    close(advantages, [[0.95**2, 0.95, 1.0]])


def test_returns_at_lambda_one_are_discounted_sums_of_rewards():
    rewards, values = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[9.0, -7.0, 5.0]])
    _, returns = gae(rewards, values, torch.ones(1, 3), discount=0.5, gae_lambda=1.0)
    close(returns, [[1 + 0.5 * (2 + 0.5 * 4), 2 + 0.5 * 4, 4.0]])


def test_gae_ignores_what_stands_in_the_padding():
    mask = torch.tensor([[True, True, False, False]])
    clean = gae(torch.tensor([[1.0, 2.0, 0.0, 0.0]]), torch.tensor([[0.5, 0.25, 0.0, 0.0]]), mask)
    dirty = gae(torch.tensor([[1.0, 2.0, NAN, 9.0]]), torch.tensor([[0.5, 0.25, 7.0, NAN]]), mask)
    for a, b in zip(clean, dirty, strict=True):
        assert a.tolist() == b.tolist()


def test_gae_of_nothing_and_bad_shapes():
    x = torch.ones(2, 3)
    advantages, returns = gae(x, x, torch.zeros(2, 3, dtype=torch.bool))
    assert (advantages == 0).all()
    assert (returns == 0).all()
    with pytest.raises(ValueError, match="shapes differ"):
        gae(x, x[:, :1], torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"\[B, T\]"):
        gae(x[0], x[0], torch.ones(3))


def test_targets_carry_no_gradient_and_bf16_is_computed_in_fp32():
    torch.manual_seed(4)
    scores, logps, ref_logps, values = torch.randn(2), *torch.randn(3, 2, 5)
    mask = torch.ones(2, 5, dtype=torch.bool)
    halves = [x.bfloat16().requires_grad_() for x in (scores, logps, ref_logps, values)]
    singles = [x.detach().float() for x in halves]

    def targets(scores, logps, ref_logps, values):
        rewards = kl_shaped_rewards(scores, k1(logps, ref_logps), mask, 0.02)
        return rewards, *gae(rewards, values, mask), masked_whiten(values, mask)

    for half, single in zip(targets(*halves), targets(*singles), strict=True):
        assert half.dtype == torch.float32
        assert not half.requires_grad
        assert half.tolist() == single.tolist()


# masked_whiten


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_whitening_equals_the_statistics_module(offset):
    torch.manual_seed(6)
    mask = with_holes()
    x = torch.randn(6, 7) * 3 + offset
    counted = [v.item() for v in x[mask]]
    mean, deviation = statistics.fmean(counted), statistics.stdev(counted)
    expected = torch.where(mask, (x.double() - mean) / deviation, 0.0)
    close(masked_whiten(torch.where(mask, x, NAN), mask), expected.float(), tol=1e-5)
    close(masked_whiten(x, mask.long()), expected.float(), tol=1e-5)


def test_whitening_spans_the_global_batch_not_one_process():
    torch.manual_seed(7)
    x, mask = torch.randn(6, 7), right_padded()
    x[3:] += 5.0  # the second process drew easier prompts
    shards = [(x[:3], mask[:3]), (x[3:], mask[3:])]
    sent: list[torch.Tensor] = []

    def send(t: torch.Tensor) -> torch.Tensor:
        sent.append(t)
        return t

    alone = torch.cat([masked_whiten(*shard, reduce=send) for shard in shards])
    together = torch.cat([masked_whiten(*shard, reduce=lambda _: sent[0] + sent[1]) for shard in shards])
    whole = masked_whiten(x, mask)
    close(together, whole)
    assert [t.shape for t in sent] == [(3,), (3,)]
    assert (alone - whole)[mask].abs().max() > 0.5  # so the check above can fail


def test_whitening_of_nothing_of_one_entry_and_of_equal_entries_is_zero():
    x = torch.full((2, 3), 0.1)
    one = torch.zeros(2, 3, dtype=torch.bool)
    one[0, 1] = True
    for mask in (torch.zeros_like(one), one, torch.ones_like(one)):
        assert masked_whiten(x, mask).abs().max() < 1e-3
    assert masked_whiten(torch.full((1, 2), NAN), torch.zeros(1, 2)).tolist() == [[0.0, 0.0]]
    with pytest.raises(ValueError, match="shapes differ"):
        masked_whiten(x, one[:1])


@pytest.mark.parametrize(("module", "known"), [(advantages, gae), (rollout_statistics, KLController)])
def test_every_public_function_has_an_example(module, known):
    own = [x for name, x in vars(module).items() if not name.startswith("_") and inspect.getmodule(x) is module]
    public = [x for x in own if inspect.isfunction(x) or inspect.isclass(x)]
    assert known in public
    assert all(">>>" in f.__doc__ for f in public)
