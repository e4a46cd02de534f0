"""Losses against arithmetic, slow loops and the formulas of TRL and transformers."""

import inspect
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from transformers.loss.loss_utils import ForCausalLMLoss

from prefopt import losses
from prefopt.losses import (
    best_likelihood_loss,
    centering_loss,
    clipped_policy_loss,
    clipped_value_loss,
    lm_loss,
    ranking_loss,
    rating_margins,
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


def pair_loss(loss_type: str, d: float, target: float) -> float:
    """The loss of one pair, written as an expectation over labels: target is the probability of `w > l`."""
    if loss_type == "sigmoid":
        return -target * logsigmoid(d) - (1 - target) * logsigmoid(-d)
    if loss_type == "hinge":
        return target * max(0.0, 1 - d) + (1 - target) * max(0.0, 1 + d)
    # IPO: the two squares for the two labels, without the variance of the label.
    return target * (d - 0.5) ** 2 + (1 - target) * (d + 0.5) ** 2 - target * (1 - target)


def ranking_loss_by_loop(
    scores: torch.Tensor,
    ranks: torch.Tensor,
    ties: str,
    loss_type: str = "sigmoid",
    smoothing: float = 0.0,
    margins: torch.Tensor | None = None,
) -> list[float | None]:
    """Pair by pair, prompt by prompt; None for a prompt without a pair."""
    per_prompt = []
    for b, (s, r) in enumerate(zip(scores.tolist(), ranks.tolist(), strict=True)):
        terms = []
        for i in range(len(s)):
            for j in range(i + 1, len(s)):
                if r[i] == 0 or r[j] == 0:
                    continue
                if r[i] == r[j]:
                    if ties == "half":
                        terms.append(pair_loss(loss_type, s[i] - s[j], 0.5))
                    continue
                w, x = (i, j) if r[i] < r[j] else (j, i)
                margin = 0.0 if margins is None else margins[b, w, x].item()
                terms.append(pair_loss(loss_type, s[w] - s[x] - margin, 1 - smoothing))
        per_prompt.append(sum(terms) / len(terms) if terms else None)
    return per_prompt


def equals_the_loop(scores, ranks, loop_options, options):
    expected = ranking_loss_by_loop(scores, ranks, *loop_options)
    counted = [x for x in expected if x is not None]
    assert len(counted) > 2
    close(ranking_loss(scores, ranks, reduction="none", **options), [x or 0.0 for x in expected], tol=3e-6)
    close(ranking_loss(scores, ranks, **options), sum(counted) / len(counted), tol=3e-6)


@pytest.mark.parametrize("ties", ["drop", "half"])
@pytest.mark.parametrize("k", [2, 3, 4, 9])
def test_ranking_loss_equals_the_loop_over_pairs(k, ties):
    torch.manual_seed(k)
    scores, ranks = torch.randn(12, k) * 3, random_ranks(12, k)
    equals_the_loop(scores, ranks, (ties,), {"ties": ties})


@pytest.mark.parametrize("ties", ["drop", "half"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo"])
def test_pair_losses_with_smoothed_labels_equal_the_loop(loss_type, smoothing, ties):
    torch.manual_seed(3)
    scores, ranks = torch.randn(12, 5), random_ranks(12, 5)
    options = {"loss_type": loss_type, "ties": ties, "label_smoothing": smoothing}
    equals_the_loop(scores, ranks, (ties, loss_type, smoothing), options)


@pytest.mark.parametrize("ties", ["drop", "half"])
@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge"])
def test_margins_equal_the_loop(loss_type, ties):
    torch.manual_seed(4)
    scores, ranks, margins = torch.randn(12, 5), random_ranks(12, 5), torch.randn(12, 5, 5)
    options = {"loss_type": loss_type, "ties": ties, "label_smoothing": 0.1, "margins": margins}
    equals_the_loop(scores, ranks, (ties, loss_type, 0.1, margins), options)


def test_ranking_loss_of_two_is_the_loss_of_trl_reward_trainer():
    torch.manual_seed(0)
    logits = torch.randn(2 * 5, 1)  # TRL's layout: five chosen, then five rejected
    rewards_chosen, rewards_rejected = torch.chunk(logits.squeeze(-1), chunks=2)
    trl = -F.logsigmoid(rewards_chosen - rewards_rejected).mean()
    scores = torch.stack([rewards_chosen, rewards_rejected], dim=1)
    close(ranking_loss(scores, torch.tensor([[1, 2]] * 5)), trl)
    close(ranking_loss(scores.flip(1), torch.tensor([[2, 1]] * 5)), trl)


def chosen_and_rejected():
    torch.manual_seed(8)
    chosen, rejected = torch.randn(2, 16)
    return chosen, rejected, torch.stack([chosen, rejected], dim=1), torch.tensor([[1, 2]] * 16)


def test_margins_of_two_are_those_of_trl_reward_trainer():
    rewards_chosen, rewards_rejected, scores, ranks = chosen_and_rejected()
    margin = torch.rand(16) * 3
    trl = -F.logsigmoid(rewards_chosen - rewards_rejected - margin).mean()
    ratings = torch.stack([margin, torch.zeros(16)], dim=1)
    close(ranking_loss(scores, ranks, margins=rating_margins(ratings, 1.0)), trl)
    flipped = rating_margins(ratings.flip(1), 1.0)
    close(ranking_loss(scores.flip(1), ranks.flip(1), margins=flipped), trl)
    without = ranking_loss(scores, ranks)
    assert ranking_loss(scores, ranks, margins=rating_margins(ratings, 0.0)) == without
    assert trl > without + 0.1  # a positive margin asks for more


def test_hinge_and_ipo_of_two_are_those_of_trl_dpo_trainer():
    chosen_scores, rejected_scores, _, ranks = chosen_and_rejected()  # log-ratios
    beta, delta_score = 0.7, chosen_scores - rejected_scores
    hinge = torch.relu(1 - beta * delta_score)
    assert 0 < (hinge == 0).sum() < 16
    scores = beta * torch.stack([chosen_scores, rejected_scores], dim=1)
    close(ranking_loss(scores, ranks, loss_type="hinge"), hinge.mean())

    lengths = torch.randint(1, 9, (16, 2)).float()
    ipo_delta = chosen_scores / lengths[:, 0] - rejected_scores / lengths[:, 1]
    ipo = (ipo_delta - 1 / (2 * beta)) ** 2
    close(ranking_loss(scores / lengths, ranks, loss_type="ipo") / beta**2, ipo.mean())


def test_conservative_dpo_of_two():
    """Label smoothing as in the reference implementation of DPO."""
    chosen, rejected, scores, ranks = chosen_and_rejected()
    logits = chosen - rejected
    expected = -F.logsigmoid(logits) * (1 - 0.1) - F.logsigmoid(-logits) * 0.1
    close(ranking_loss(scores, ranks, label_smoothing=0.1), expected.mean())


@pytest.mark.parametrize(
    ("options", "d", "loss", "slope"),
    [
        ({"loss_type": "hinge"}, 0.25, 0.75, -1.0),
        ({"loss_type": "hinge"}, 1.5, 0.0, 0.0),
        ({"loss_type": "hinge", "margins": 1.0}, 1.5, 0.5, -1.0),
        ({"loss_type": "hinge", "label_smoothing": 0.25}, 2.0, 0.25 * 3, 0.25),
        ({"loss_type": "ipo"}, 0.25, 0.25**2, 2 * (0.25 - 0.5)),
        ({"loss_type": "ipo", "label_smoothing": 0.25}, 0.25, 0.0, 0.0),
        ({"margins": 1.0}, 1.0, LOG2, -0.5),
        (
            {"label_smoothing": 0.25},
            math.log(3.0),
            -0.75 * logsigmoid(math.log(3.0)) + 0.25 * math.log(4),
            0.0,
        ),
    ],
)
def test_values_and_slopes_of_one_pair(options, d, loss, slope):
    if "margins" in options:
        margin = options["margins"]
        options = {**options, "margins": torch.tensor([[[0.0, margin], [-margin, 0.0]]])}
    scores = torch.tensor([[d, 0.0]], requires_grad=True)
    value = ranking_loss(scores, torch.tensor([[1, 2]]), **options)
    value.backward()
    close(value.detach(), loss)
    close(scores.grad, [[slope, -slope]])


def test_margins_ask_nothing_of_ties_and_of_the_absent():
    scores, ranks = torch.tensor([[1.0, 2.0, -0.5, 0.0]]), torch.tensor([[1, 1, 2, 0]])
    margins = torch.full((1, 4, 4), float("nan"))
    margins[0, 0, 2], margins[0, 1, 2] = 0.5, 0.25
    pairs = -logsigmoid(1.5 - 0.5) - logsigmoid(2.5 - 0.25)
    scores.requires_grad_()
    loss = ranking_loss(scores, ranks, margins=margins)
    loss.backward()
    close(loss.detach(), pairs / 2)
    assert scores.grad.isfinite().all()
    tie = -0.5 * (logsigmoid(1.0) + logsigmoid(-1.0))
    close(ranking_loss(scores, ranks, ties="half", margins=margins).detach(), (pairs + tie) / 3)


def test_rating_margins_equal_the_loop():
    torch.manual_seed(9)
    ratings = torch.randint(1, 8, (3, 4))
    expected = [[[0.3 * (w - x) for x in row] for w in row] for row in ratings.tolist()]
    close(rating_margins(ratings, 0.3), expected)
    close(rating_margins(ratings.double(), 0.3), expected)
    assert rating_margins(ratings.half(), 0.3).dtype == torch.float32
    for bad in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="margin_coef must be a finite number from 0"):
            rating_margins(ratings, bad)
    with pytest.raises(ValueError, match=r"ratings must be \[B, K\], got \(4,\)"):
        rating_margins(ratings[0], 1.0)


LOSSES = [
    {"loss_type": "sigmoid"},
    {"loss_type": "sigmoid", "ties": "half", "label_smoothing": 0.1},
    {"loss_type": "hinge"},
    {"loss_type": "hinge", "ties": "half"},
    {"loss_type": "ipo"},
    {"loss_type": "ipo", "ties": "half", "label_smoothing": 0.1},
    {"loss_type": "plackett_luce"},
]
every_loss = pytest.mark.parametrize("options", LOSSES, ids=lambda o: "-".join(map(str, o.values())))


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


@every_loss
def test_absent_completions_equal_the_shorter_list(options):
    torch.manual_seed(10)
    scores = torch.randn(6, 4)
    ranks = torch.tensor([[2, 3, 1, 1], [1, 2, 3, 4], [1, 1, 1, 2], [1, 2, 2, 2], [4, 3, 2, 1], [1, 1, 1, 1]])
    place = [0, 2, 3, 5]
    for junk in (50.0, -50.0, float("nan"), float("inf"), -float("inf")):
        padded = torch.full((6, 6), junk)
        padded[:, place] = scores
        padded.requires_grad_()
        short = scores.clone().requires_grad_()
        padded_ranks = torch.zeros(6, 6, dtype=torch.long)
        padded_ranks[:, place] = ranks
        for reduction in ("none", "mean"):
            loss = ranking_loss(padded, padded_ranks, reduction=reduction, **options)
            expected = ranking_loss(short, ranks, reduction=reduction, **options)
            close(loss, expected)
        loss.backward()
        expected.backward()
        close(padded.grad[:, place], short.grad)
        assert padded.grad[:, [1, 4]].eq(0).all()


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


@every_loss
def test_ranking_loss_is_the_same_in_any_order_and_for_shifted_scores(options):
    torch.manual_seed(1)
    scores, ranks = torch.randn(6, 5), random_ranks(6, 5)
    order = torch.tensor([3, 0, 4, 1, 2])
    loss = ranking_loss(scores, ranks, **options)
    close(ranking_loss(scores[:, order], ranks[:, order], **options), loss)
    close(ranking_loss(scores + 7.0, ranks, **options), loss, tol=1e-5)


@every_loss
def test_a_better_order_has_a_lower_loss_and_descent_finds_it(options):
    ranks = torch.tensor([[3, 1, 2, 0], [1, 2, 2, 3]])
    scores = torch.zeros(2, 4, requires_grad=True)
    right = torch.tensor([[1.0, 3.0, 2.0, 0.0], [3.0, 2.0, 2.0, 1.0]]) / 4
    assert ranking_loss(right, ranks, **options) < ranking_loss(-right, ranks, **options) - 0.1
    ranking_loss(scores, ranks, **options).backward()
    downhill = -scores.grad
    assert downhill[0, 1] > downhill[0, 2] > downhill[0, 0]
    assert downhill[0, 1] > 0 > downhill[0, 0]
    assert downhill[0, 3] == 0
    assert downhill[1, 0] > 0 > downhill[1, 3]
    close(downhill[1, 1], downhill[1, 2])


def test_gradient_of_ranking_loss():
    scores = torch.tensor([[0.5, -0.25]], requires_grad=True)
    ranking_loss(scores, torch.tensor([[1, 2]])).backward()
    pull = 1 / (1 + math.exp(0.75))  # sigmoid(-(0.5 + 0.25))
    close(scores.grad, [[-pull, pull]])


@every_loss
def test_gradients_are_those_of_finite_differences(options):
    torch.manual_seed(0)
    doubles, ranks = torch.randn(4, 4, dtype=torch.float64, requires_grad=True), random_ranks(4, 4)
    assert torch.autograd.gradcheck(lambda s: ranking_loss(s, ranks, **options), doubles)
    if options["loss_type"] in ("sigmoid", "hinge"):
        margins = torch.rand(4, 4, 4, dtype=torch.float64)
        loss = partial(ranking_loss, ranks=ranks, margins=margins, **options)
        assert torch.autograd.gradcheck(loss, doubles)


@every_loss
def test_nothing_to_compare_is_zero_with_finite_gradients(options):
    scores = torch.tensor([[float("nan"), 1.0, float("inf")]], requires_grad=True)
    loss = ranking_loss(scores, torch.tensor([[0, 1, 0]]), **options)
    loss.backward()
    assert loss.item() == 0
    assert scores.grad.tolist() == [[0.0, 0.0, 0.0]]


def test_prompts_without_a_pair_are_not_in_the_mean():
    scores = torch.zeros(3, 2)
    ranks = torch.tensor([[1, 2], [1, 1], [1, 0]])
    for loss_type, of_equals in (("sigmoid", LOG2), ("plackett_luce", LOG2), ("hinge", 1.0), ("ipo", 0.25)):
        close(ranking_loss(scores, ranks, loss_type=loss_type), of_equals)
        close(ranking_loss(scores, ranks, loss_type=loss_type, reduction="none"), [of_equals, 0.0, 0.0])


@pytest.mark.parametrize("margin", [1000.0, -1000.0])
def test_huge_margins_do_not_overflow(margin):
    scores = torch.tensor([[margin, 0.0]], requires_grad=True)
    loss = ranking_loss(scores, torch.tensor([[1, 2]]))
    loss.backward()
    close(loss.detach(), max(0.0, -margin))
    close(scores.grad, [[0.0, 0.0]] if margin > 0 else [[-1.0, 1.0]])


@every_loss
@pytest.mark.parametrize("size", [1e4, 1e8, 1e15])
def test_extreme_scores_stay_finite(options, size):
    torch.manual_seed(11)
    scores, ranks = (torch.randn(6, 5) * size).requires_grad_(), random_ranks(6, 5)
    loss = ranking_loss(scores, ranks, **options)
    loss.backward()
    assert loss.isfinite()
    assert loss > size / 1e3
    assert scores.grad.isfinite().all()
    assert scores.grad.ne(0).any()


@every_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_fp32(dtype, options):
    torch.manual_seed(0)
    scores, ranks = torch.randn(3, 9).to(dtype), random_ranks(3, 9)
    loss = ranking_loss(scores, ranks, **options)
    assert loss.dtype == torch.float32
    assert loss == ranking_loss(scores.float(), ranks, **options)
    scores.requires_grad_()
    ranking_loss(scores, ranks, **options).backward()
    assert scores.grad.dtype == dtype
    assert scores.grad.isfinite().all()


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
    for loss in (ranking_loss, centering_loss):
        with pytest.raises(ValueError, match="'mean' or 'none'"):
            loss(scores, ranks, reduction="sum")
    with pytest.raises(ValueError, match="one of sigmoid, plackett_luce, hinge, ipo, got 'listnet'"):
        ranking_loss(scores, ranks, loss_type="listnet")
    for smoothing in (-0.1, 0.5, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"label_smoothing must be at least 0 and below 0\.5"):
            ranking_loss(scores, ranks, label_smoothing=smoothing)
    margins = torch.zeros(2, 3, 3)
    for options in ({"ties": "half"}, {"label_smoothing": 0.1}, {"margins": margins}):
        with pytest.raises(ValueError, match="there are no pairs that ties='half', label_smoothing or margins"):
            ranking_loss(scores, ranks, loss_type="plackett_luce", **options)
    with pytest.raises(ValueError, match=r"from both sides, so a margin .* has no meaning"):
        ranking_loss(scores, ranks, loss_type="ipo", margins=margins)
    for bad in (margins[:, 0], margins[:1], margins[:, :, :1]):  # would broadcast
        with pytest.raises(ValueError, match="shapes differ: margins"):
            ranking_loss(scores, ranks, margins=bad)


# centering_loss


def test_centering_loss_equals_the_loop_over_strict_pairs():
    torch.manual_seed(6)
    scores, ranks = torch.randn(12, 5), random_ranks(12, 5)
    per_prompt = []
    for s, r in zip(scores.tolist(), ranks.tolist(), strict=True):
        terms = [(s[w] + s[x]) ** 2 for w in range(5) for x in range(5) if 0 < r[w] < r[x]]
        if terms:
            per_prompt.append(sum(terms) / len(terms))
        else:
            per_prompt.append(None)
    counted = [x for x in per_prompt if x is not None]
    assert 2 < len(counted) < 12
    close(centering_loss(scores, ranks), sum(counted) / len(counted))
    close(centering_loss(scores, ranks, reduction="none"), [x or 0.0 for x in per_prompt])


def test_centering_loss_of_two_is_the_one_of_trl_reward_trainer():
    torch.manual_seed(7)
    chosen, rejected = torch.randn(2, 5)
    trl = torch.mean((chosen + rejected) ** 2)
    close(centering_loss(torch.stack([chosen, rejected], dim=1), torch.tensor([[1, 2]] * 5)), trl)


def test_centering_loss_leaves_out_absent_completions_and_checks_shapes():
    scores = torch.tensor([[1.0, float("nan"), 2.0], [5.0, 5.0, 5.0]], requires_grad=True)
    loss = centering_loss(scores, torch.tensor([[1, 0, 2], [1, 1, 0]]))
    loss.backward()
    close(loss.detach(), (1.0 + 2.0) ** 2)
    close(scores.grad, [[2 * 3.0, 0.0, 2 * 3.0], [0.0, 0.0, 0.0]])
    scores = torch.ones(2, 2, requires_grad=True)
    nothing = centering_loss(scores, torch.ones(2, 2, dtype=torch.long))
    nothing.backward()
    assert nothing.item() == 0
    assert scores.grad.eq(0).all()
    assert centering_loss(scores.bfloat16(), torch.tensor([[1, 2]] * 2)).dtype == torch.float32
    with pytest.raises(ValueError, match="shapes differ"):
        centering_loss(scores[:, :1], torch.tensor([[1, 2]] * 2))


# clipped_policy_loss


def policy_loss_by_loop(logps, old_logps, advantages, mask, eps) -> float:
    terms = []
    for new, old, a, m in zip(*(x.flatten().tolist() for x in (logps, old_logps, advantages, mask)), strict=True):
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
def test_micro_batches_normalized_by_the_step_add_up_to_the_whole_batch(case):
    loss, x, others, mask = case()
    num_tokens = mask.sum()
    halves = [loss(x[s], *(o[s] for o in others), mask[s], num_tokens=num_tokens) for s in (slice(0, 1), slice(1, 4))]
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
        for v, old, r, m in zip(*(x.flatten().tolist() for x in (values, old_values, returns, mask)), strict=True):
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


# best_likelihood_loss


def test_best_likelihood_loss_equals_the_loop_over_the_best():
    torch.manual_seed(8)
    log_probs, num_tokens, ranks = -10 * torch.rand(12, 5), torch.randint(1, 9, (12, 5)), random_ranks(12, 5)
    ranks[2] = 0
    per_prompt = []
    for logps, tokens, row in zip(log_probs.tolist(), num_tokens.tolist(), ranks.tolist(), strict=True):
        first = min((rank for rank in row if rank), default=None)
        best = [-logp / n for logp, n, rank in zip(logps, tokens, row, strict=True) if rank and rank == first]
        per_prompt.append(sum(best) / len(best) if best else 0.0)
    assert any((row == row[row > 0].min()).sum() > 1 for row in ranks if row.any())
    close(best_likelihood_loss(log_probs, num_tokens, ranks, reduction="none"), per_prompt)
    close(best_likelihood_loss(log_probs, num_tokens, ranks), sum(per_prompt) / 11)


def test_best_likelihood_loss_leaves_out_absent_completions_and_checks_shapes():
    log_probs = torch.tensor([[float("nan"), -6.0, -1.0]], requires_grad=True)
    loss = best_likelihood_loss(log_probs, torch.tensor([[0, 3, 1]]), torch.tensor([[0, 1, 2]]))
    loss.backward()
    close(loss.detach(), 6 / 3)
    close(log_probs.grad, [[0.0, -1 / 3, 0.0]])
    with pytest.raises(ValueError, match="shapes differ"):
        best_likelihood_loss(log_probs, torch.tensor([3, 1]), torch.tensor([[1, 2, 3]]))
    with pytest.raises(ValueError, match="'mean' or 'none'"):
        best_likelihood_loss(log_probs, torch.ones(1, 3), torch.tensor([[1, 2, 3]]), reduction="sum")
