"""Losses against arithmetic, slow loops and the formulas of TRL and transformers."""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from transformers.loss.loss_utils import ForCausalLMLoss

from prefopt import losses
from prefopt.losses import (
    centring_loss,
    clipped_policy_loss,
    clipped_value_loss,
    lm_loss,
    ranking_loss,
    strict_pairs,
)

LOG2 = math.log(2)


def close(actual, expected, tol=1e-6):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), atol=tol, rtol=tol)


def logsigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def random_ranks(rows: int, k: int) -> torch.Tensor:
    """Ties and absent completions; the first two rows are a full ranking and one without a strict pair."""
    ranks = torch.randint(0, 4, (rows, k))
    ranks[0] = torch.randperm(k) + 1
    ranks[1] = 1
    return ranks


# ranking_loss


def ranking_loss_by_loop(scores: torch.Tensor, ranks: torch.Tensor, ties: str) -> list[float | None]:
    """Pair by pair, prompt by prompt; None for a prompt without a pair."""
    per_prompt = []
    for s, r in zip(scores.tolist(), ranks.tolist(), strict=True):
        terms = []
        for i in range(len(s)):
            for j in range(i + 1, len(s)):
                if r[i] == 0 or r[j] == 0:
                    continue
                d = s[i] - s[j]
                if r[i] < r[j]:
                    terms.append(-logsigmoid(d))
                elif r[i] > r[j]:
                    terms.append(-logsigmoid(-d))
                elif ties == "half":
                    terms.append(-0.5 * logsigmoid(d) - 0.5 * logsigmoid(-d))
        per_prompt.append(sum(terms) / len(terms) if terms else None)
    return per_prompt


@pytest.mark.parametrize("ties", ["drop", "half"])
@pytest.mark.parametrize("k", [2, 3, 4, 9])
def test_ranking_loss_equals_the_loop_over_pairs(k, ties):
    torch.manual_seed(k)
    scores, ranks = torch.randn(12, k) * 3, random_ranks(12, k)
    expected = ranking_loss_by_loop(scores, ranks, ties)
    counted = [x for x in expected if x is not None]
    assert len(counted) > 2
    close(ranking_loss(scores, ranks, ties=ties, reduction="none"), [x or 0.0 for x in expected])
    close(ranking_loss(scores, ranks, ties=ties), sum(counted) / len(counted))


def test_ranking_loss_of_two_is_the_loss_of_trl_reward_trainer():
    torch.manual_seed(0)
    logits = torch.randn(2 * 5, 1)  # TRL's layout: five chosen, then five rejected
    rewards_chosen, rewards_rejected = torch.chunk(logits.squeeze(-1), chunks=2)
    trl = -F.logsigmoid(rewards_chosen - rewards_rejected).mean()
    scores = torch.stack([rewards_chosen, rewards_rejected], dim=1)
    close(ranking_loss(scores, torch.tensor([[1, 2]] * 5)), trl)
    close(ranking_loss(scores.flip(1), torch.tensor([[2, 1]] * 5)), trl)


def test_pairs_are_averaged_once_not_divided_by_their_number_twice():
    ranks = torch.arange(1, 10).unsqueeze(0)  # K = 9: 36 pairs
    close(ranking_loss(torch.zeros(1, 9), ranks), LOG2)
    close(ranking_loss(torch.zeros(1, 9), ranks, reduction="none"), [LOG2])


def test_every_prompt_weighs_the_same_whatever_its_number_of_completions():
    scores = torch.tensor([[0.0, 1.0, 0.0, 0.0], [3.0, 2.0, 1.0, 0.0]])
    ranks = torch.tensor([[1, 2, 0, 0], [1, 2, 3, 4]])
    of_two = -logsigmoid(-1.0)
    of_four = -(3 * logsigmoid(1.0) + 2 * logsigmoid(2.0) + logsigmoid(3.0)) / 6
    close(ranking_loss(scores, ranks), (of_two + of_four) / 2)


def test_absent_completions_equal_the_shorter_list():
    scores, ranks = torch.tensor([[0.3, -1.0, 2.0]]), torch.tensor([[2, 3, 1]])
    padded = torch.tensor([[0.3, 50.0, -1.0, 2.0, -50.0]])
    for ties in ("drop", "half"):
        close(
            ranking_loss(padded, torch.tensor([[2, 0, 3, 1, 0]]), ties=ties),
            ranking_loss(scores, ranks, ties=ties),
        )


def test_dropped_ties_are_in_neither_sum_nor_denominator():
    scores = torch.tensor([[1.0, -1.0, 0.5]])  # A = B > C: strict pairs A > C and B > C
    close(ranking_loss(scores, torch.tensor([[1, 1, 2]])), -(logsigmoid(0.5) + logsigmoid(-1.5)) / 2)


def test_half_ties_have_a_target_of_one_half():
    scores = torch.tensor([[1.0, -1.0, 0.5]])
    tie = -0.5 * (logsigmoid(2.0) + logsigmoid(-2.0))
    expected = (tie - logsigmoid(0.5) - logsigmoid(-1.5)) / 3
    close(ranking_loss(scores, torch.tensor([[1, 1, 2]]), ties="half"), expected)
    equal = torch.zeros(1, 2, requires_grad=True)
    ranking_loss(equal, torch.tensor([[1, 1]]), ties="half").backward()
    close(equal.grad, [[0.0, 0.0]])  # equal scores are the optimum of a tie


def test_ranking_loss_is_the_same_in_any_order_and_for_shifted_scores():
    torch.manual_seed(1)
    scores, ranks = torch.randn(6, 5), random_ranks(6, 5)
    order = torch.tensor([3, 0, 4, 1, 2])
    for ties in ("drop", "half"):
        loss = ranking_loss(scores, ranks, ties=ties)
        close(ranking_loss(scores[:, order], ranks[:, order], ties=ties), loss)
        close(ranking_loss(scores + 7.0, ranks, ties=ties), loss, tol=1e-5)


def test_gradient_of_ranking_loss():
    scores = torch.tensor([[0.5, -0.25]], requires_grad=True)
    ranking_loss(scores, torch.tensor([[1, 2]])).backward()
    pull = 1 / (1 + math.exp(0.75))  # sigmoid(-(0.5 + 0.25))
    close(scores.grad, [[-pull, pull]])
    torch.manual_seed(0)
    doubles, ranks = torch.randn(4, 4, dtype=torch.float64, requires_grad=True), random_ranks(4, 4)
    for ties in ("drop", "half"):
        assert torch.autograd.gradcheck(lambda s, ties=ties: ranking_loss(s, ranks, ties=ties), doubles)


@pytest.mark.parametrize("ties", ["drop", "half"])
def test_nothing_to_compare_is_zero_with_finite_gradients(ties):
    scores = torch.tensor([[float("nan"), 1.0, float("inf")]], requires_grad=True)
    loss = ranking_loss(scores, torch.tensor([[0, 1, 0]]), ties=ties)
    loss.backward()
    assert loss.item() == 0
    assert scores.grad.tolist() == [[0.0, 0.0, 0.0]]


def test_absent_nan_scores_reach_neither_value_nor_gradient():
    scores = torch.tensor([[1.0, float("nan"), 0.0]], requires_grad=True)
    loss = ranking_loss(scores, torch.tensor([[1, 0, 2]]))
    loss.backward()
    close(loss.detach(), -logsigmoid(1.0))
    assert scores.grad[0, 1] == 0
    assert scores.grad.isfinite().all()


def test_prompts_without_a_pair_are_not_in_the_mean():
    scores = torch.zeros(3, 2)
    ranks = torch.tensor([[1, 2], [1, 1], [1, 0]])
    close(ranking_loss(scores, ranks), LOG2)
    close(ranking_loss(scores, ranks, reduction="none"), [LOG2, 0.0, 0.0])


@pytest.mark.parametrize("margin", [1000.0, -1000.0])
def test_huge_margins_do_not_overflow(margin):
    scores = torch.tensor([[margin, 0.0]], requires_grad=True)
    loss = ranking_loss(scores, torch.tensor([[1, 2]]))
    loss.backward()
    close(loss.detach(), max(0.0, -margin))
    close(scores.grad, [[0.0, 0.0]] if margin > 0 else [[-1.0, 1.0]])


def test_bf16_scores_are_computed_in_fp32():
    torch.manual_seed(0)
    scores, ranks = torch.randn(3, 9).bfloat16(), random_ranks(3, 9)
    loss = ranking_loss(scores, ranks)
    assert loss.dtype == torch.float32
    assert loss == ranking_loss(scores.float(), ranks)


def test_strict_pairs_equals_the_loop():
    torch.manual_seed(0)
    ranks = random_ranks(8, 5)
    expected = [
        [[0 < row[w] < row[l] for l in range(5)] for w in range(5)]  # noqa: E741
        for row in ranks.tolist()
    ]
    assert strict_pairs(ranks).tolist() == expected


def test_ranking_loss_refuses_bad_input():
    scores, ranks = torch.zeros(2, 3), torch.tensor([[1, 2, 3]] * 2)
    with pytest.raises(ValueError, match=r"shapes differ: scores \(2, 1\), ranks \(2, 3\)"):
        ranking_loss(scores[:, :1], ranks)  # would broadcast
    with pytest.raises(ValueError, match="integers"):
        ranking_loss(scores, ranks.float())
    with pytest.raises(ValueError, match="integers"):
        strict_pairs(ranks[0])
    with pytest.raises(ValueError, match="'drop' or 'half'"):
        ranking_loss(scores, ranks, ties="keep")
    with pytest.raises(ValueError, match="'mean' or 'none'"):
        ranking_loss(scores, ranks, reduction="sum")


# centring_loss


def test_centring_loss_equals_the_loop_over_strict_pairs():
    torch.manual_seed(6)
    scores, ranks = torch.randn(12, 5), random_ranks(12, 5)
    per_prompt = []
    for s, r in zip(scores.tolist(), ranks.tolist(), strict=True):
        terms = [(s[w] + s[x]) ** 2 for w in range(5) for x in range(5) if 0 < r[w] < r[x]]
        if terms:
            per_prompt.append(sum(terms) / len(terms))
    assert 2 < len(per_prompt) < 12
    close(centring_loss(scores, ranks), sum(per_prompt) / len(per_prompt))


def test_centring_loss_of_two_is_the_one_of_trl_reward_trainer():
    torch.manual_seed(7)
    chosen, rejected = torch.randn(2, 5)
    trl = torch.mean((chosen + rejected) ** 2)
    close(centring_loss(torch.stack([chosen, rejected], dim=1), torch.tensor([[1, 2]] * 5)), trl)


def test_centring_loss_leaves_out_absent_completions_and_checks_shapes():
    scores = torch.tensor([[1.0, float("nan"), 2.0], [5.0, 5.0, 5.0]], requires_grad=True)
    loss = centring_loss(scores, torch.tensor([[1, 0, 2], [1, 1, 0]]))
    loss.backward()
    close(loss.detach(), (1.0 + 2.0) ** 2)
    close(scores.grad, [[2 * 3.0, 0.0, 2 * 3.0], [0.0, 0.0, 0.0]])
    scores = torch.ones(2, 2, requires_grad=True)
    nothing = centring_loss(scores, torch.ones(2, 2, dtype=torch.long))
    nothing.backward()
    assert nothing.item() == 0
    assert scores.grad.eq(0).all()
    assert centring_loss(scores.bfloat16(), torch.tensor([[1, 2]] * 2)).dtype == torch.float32
    with pytest.raises(ValueError, match="shapes differ"):
        centring_loss(scores[:, :1], torch.tensor([[1, 2]] * 2))


# clipped_policy_loss


def policy_loss_by_loop(logps, old_logps, advantages, mask, eps) -> float:
    terms = []
    for new, old, a, m in zip(
        *(x.flatten().tolist() for x in (logps, old_logps, advantages, mask)), strict=True
    ):
        if m:
            ratio = math.exp(new - old)
            trusted = min(max(ratio, 1 - eps), 1 + eps)
            terms.append(-min(ratio * a, trusted * a))
    return sum(terms) / len(terms)


def rollout(rows=4, length=6):
    torch.manual_seed(rows * length)
    logps = -torch.rand(rows, length) * 3
    old_logps = logps + 0.3 * torch.randn(rows, length)
    mask = torch.arange(length) < torch.randint(1, length + 1, (rows, 1))
    return logps, old_logps, torch.randn(rows, length), mask


def test_policy_loss_equals_the_loop():
    logps, old_logps, advantages, mask = rollout(8, 7)
    ratio = (logps - old_logps).exp()[mask]
    assert (ratio > 1.2).any()
    assert (ratio < 0.8).any()
    for eps in (0.1, 0.2):
        expected = policy_loss_by_loop(logps, old_logps, advantages, mask, eps)
        close(clipped_policy_loss(logps, old_logps, advantages, mask, clip_range=eps), expected)


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "slope"),
    [  # the slope is d loss / d logp: -ratio * advantage, or 0 where the clipped branch is the smaller
        (1.5, 2.0, -1.2 * 2.0, 0.0),
        (0.5, 2.0, -0.5 * 2.0, -0.5 * 2.0),
        (1.5, -2.0, 1.5 * 2.0, 1.5 * 2.0),
        (0.5, -2.0, 0.8 * 2.0, 0.0),
        (1.0, 2.0, -2.0, -2.0),
    ],
)
def test_policy_loss_takes_the_pessimistic_branch(ratio, advantage, expected, slope):
    logps = torch.tensor([[math.log(ratio)]], requires_grad=True)
    loss = clipped_policy_loss(logps, torch.zeros(1, 1), torch.tensor([[advantage]]), torch.tensor([[True]]))
    loss.backward()
    close(loss.detach(), expected)
    close(logps.grad, [[slope]])


def test_first_policy_step_has_the_policy_gradient():
    logps, _, advantages, mask = rollout()
    logps.requires_grad_()
    clipped_policy_loss(logps, logps.detach(), advantages, mask).backward()
    close(logps.grad, torch.where(mask, -advantages / mask.sum(), 0.0))


# What the losses over tokens have in common


def policy_case():
    logps, old_logps, advantages, mask = rollout()
    return clipped_policy_loss, logps, (old_logps, advantages), mask


def value_case():
    torch.manual_seed(5)
    values, old_values, returns = torch.randn(3, 4, 6)
    return clipped_value_loss, values, (old_values, returns), rollout()[3]


token_losses = pytest.mark.parametrize("case", [policy_case, value_case])


@token_losses
def test_padding_is_the_same_as_shorter_sequences(case):
    loss, x, others, mask = case()
    nan, inf = float("nan"), float("inf")
    expected = sum(
        loss(x[b : b + 1, :n], *(o[b : b + 1, :n] for o in others), mask[b : b + 1, :n]) * n
        for b, n in enumerate(mask.sum(1).tolist())
    )
    assert not mask.all()
    for junk in (7.0, nan, inf, -inf):
        padded = torch.where(mask, x, junk).requires_grad_()
        value = loss(padded, *(torch.where(mask, o, junk) for o in others), mask)
        close(value.detach(), expected / mask.sum())
        value.backward()
        assert padded.grad.isfinite().all()
        assert (padded.grad[~mask] == 0).all()
        assert (padded.grad[mask] != 0).any()


@token_losses
def test_all_masked_is_zero_with_finite_gradients(case):
    loss, x, others, mask = case()
    for num_tokens in (None, 0, 8):
        x = x.detach().requires_grad_()
        value = loss(x, *others, torch.zeros_like(mask), num_tokens=num_tokens)
        value.backward()
        assert value.item() == 0
        assert (x.grad == 0).all()


@token_losses
def test_micro_batches_normalised_by_the_step_add_up_to_the_whole_batch(case):
    loss, x, others, mask = case()
    num_tokens = mask.sum()
    halves = [
        loss(x[s], *(o[s] for o in others), mask[s], num_tokens=num_tokens)
        for s in (slice(0, 1), slice(1, 4))
    ]
    whole = loss(x, *others, mask)
    close(sum(halves), whole)
    two_processes = num_tokens.item() / 2  # DDP averages what each of them divided by this
    close(loss(x, *others, mask, num_tokens=two_processes), 2 * whole)
    close(loss(x, *others, mask, num_tokens=0.5), 2 * whole * num_tokens)  # fewer tokens than processes
    separate = [loss(x[s], *(o[s] for o in others), mask[s]) for s in (slice(0, 1), slice(1, 4))]
    assert abs(sum(separate) / 2 - whole) > 1e-3  # the mean of micro-batch means is something else


@token_losses
def test_token_losses_read_integer_masks_and_compute_in_fp32(case):
    loss, x, others, mask = case()
    whole = loss(x, *others, mask)
    for dtype in (torch.long, torch.float32):
        assert loss(x, *others, mask.to(dtype)) == whole
    halves = [t.bfloat16() for t in (x, *others)]
    value = loss(*halves, mask)
    assert value.dtype == torch.float32
    assert value == loss(*(t.float() for t in halves), mask)


@token_losses
def test_token_losses_do_not_broadcast(case):
    loss, x, others, mask = case()
    with pytest.raises(ValueError, match="shapes differ"):
        loss(x, *others, mask[:, :1])
    with pytest.raises(ValueError, match="shapes differ"):
        loss(x[:1], *others, mask)
    with pytest.raises(ValueError, match="shapes differ"):
        loss(x, others[0], others[1][0], mask)


# clipped_value_loss


def test_value_loss_equals_the_loop():
    torch.manual_seed(3)
    values, old_values, returns = torch.randn(3, 6, 5)
    mask = torch.rand(6, 5) > 0.3
    for eps in (0.2, 0.5):
        terms = []
        for v, old, r, m in zip(
            *(x.flatten().tolist() for x in (values, old_values, returns, mask)), strict=True
        ):
            if m:
                trusted = min(max(v, old - eps), old + eps)
                terms.append(0.5 * max((v - r) ** 2, (trusted - r) ** 2))
        close(clipped_value_loss(values, old_values, returns, mask, clip_range=eps), sum(terms) / len(terms))


@pytest.mark.parametrize(
    ("value", "expected", "slope"),
    [  # old value 0, return 1, clip range 0.2
        (0.1, 0.5 * (0.1 - 1) ** 2, 0.1 - 1),  # inside the range
        (0.9, 0.5 * (0.2 - 1) ** 2, 0.0),  # towards the return but too far: no further gain, no gradient
        (-0.9, 0.5 * (-0.9 - 1) ** 2, -0.9 - 1),  # away from it: the full error
    ],
)
def test_value_loss_takes_the_worse_branch(value, expected, slope):
    values = torch.tensor([[value]], requires_grad=True)
    loss = clipped_value_loss(values, torch.zeros(1, 1), torch.ones(1, 1), torch.tensor([[True]]))
    loss.backward()
    close(loss.detach(), expected)
    close(values.grad, [[slope]])


def test_value_loss_without_clipping_is_half_the_squared_error():
    torch.manual_seed(4)
    values, old_values, returns = torch.randn(3, 2, 5)
    mask = torch.ones(2, 5, dtype=torch.bool)
    loss = clipped_value_loss(values, old_values, returns, mask, clip_range=float("inf"))
    close(loss, 0.5 * F.mse_loss(values, returns))


# lm_loss


def text(rows=3, length=6, vocab=11):
    torch.manual_seed(2)
    labels = torch.randint(0, vocab, (rows, length))
    labels[1, 4:] = -100
    labels[2, 0] = -100
    return torch.randn(rows, length, vocab) * 2, labels


def test_lm_loss_equals_the_loop():
    logits, labels = text()
    nats = []
    for row, row_labels in zip(logits.tolist(), labels.tolist(), strict=True):
        for t in range(len(row_labels) - 1):
            target = row_labels[t + 1]
            if target != -100:
                nats.append(math.log(sum(math.exp(x) for x in row[t])) - row[t][target])
    assert len(nats) == 5 + 3 + 5
    close(lm_loss(logits, labels), sum(nats) / len(nats))


def test_lm_loss_is_the_loss_of_transformers():
    logits, labels = text()
    close(lm_loss(logits, labels), ForCausalLMLoss(logits, labels, vocab_size=11))
    expected = ForCausalLMLoss(logits, labels, vocab_size=11, num_items_in_batch=torch.tensor(20))
    close(lm_loss(logits, labels, num_tokens=20), expected)


def test_lm_loss_of_micro_batches_adds_up():
    logits, labels = text()
    halves = [lm_loss(logits[s], labels[s], num_tokens=13) for s in (slice(0, 2), slice(2, 3))]
    close(sum(halves), lm_loss(logits, labels))


def test_lm_loss_never_scores_the_first_token_or_ignored_ones():
    logits, labels = text()
    changed = labels.clone()
    changed[:, 0] = 3
    assert lm_loss(logits, changed) == lm_loss(logits, labels)
    logits = logits.clone()
    logits[1, 3:] = float("nan")  # predicts ignored labels only
    logits.requires_grad_()
    loss = lm_loss(logits, labels)
    close(loss.detach(), lm_loss(text()[0], labels))
    loss.backward()
    assert logits.grad[1, 3:].eq(0).all()


def test_lm_loss_of_nothing_is_zero_with_finite_gradients():
    logits, labels = text()
    logits.requires_grad_()
    loss = lm_loss(logits, torch.full_like(labels, -100))
    loss.backward()
    assert loss.item() == 0
    assert (logits.grad == 0).all()
    assert lm_loss(logits[:, :1], labels[:, :1]).item() == 0


def test_lm_loss_computes_bf16_in_fp32_and_checks_shapes():
    logits, labels = text()
    halves = logits.bfloat16()
    assert lm_loss(halves, labels) == lm_loss(halves.float(), labels)
    assert lm_loss(halves, labels).dtype == torch.float32
    with pytest.raises(ValueError, match=r"\(3, 6, 11\) and \(3, 5\)"):
        lm_loss(logits, labels[:, 1:])


def test_every_public_function_has_an_example():
    public = [f for name, f in vars(losses).items() if inspect.isfunction(f) and not name.startswith("_")]
    assert ranking_loss in public
    assert all(">>>" in f.__doc__ for f in public)
