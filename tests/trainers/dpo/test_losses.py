"""The losses, divergences and logs of RankedDPOTrainer against TRL's on pairs and against loops on rankings."""

import copy
import itertools
import math

import pytest
import torch
from datasets import Dataset
from scipy.stats import kendalltau
from trl import DPOConfig, DPOTrainer

from prefopt.losses.divergences import F_DIVERGENCES, divergence_scores
from prefopt.trainers.dpo.config import RANKED_LOSSES, REFUSED_LOSSES, RankedDPOConfig
from prefopt.trainers.dpo.trainer import RankedDPOTrainer, kendall_tau
from tests.trainers.conftest import PAIRS, RAGGED
from tests.trainers.dpo.conftest import BETA, config

RATINGS = [[4.0, 7.0, 1.0], [2.0, 5.0], [6.0, 3.0, 3.0, 1.5, 6.0], [5.0, 4.0]]
RATED = [{**row, "ratings": ratings} for row, ratings in zip(RAGGED, RATINGS, strict=True)]
DIVERGENCES = [
    *[{"f_divergence_type": name} for name in F_DIVERGENCES],
    {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.7},
    {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0},
]


def trainer_on(base, rows, tokenizer, tmp_path, cls=RankedDPOTrainer, eval_rows=None, **overrides):
    """A policy beside its reference `base`."""
    policy = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.08 * torch.randn(parameter.shape, generator=generator))
    return cls(
        model=policy,
        ref_model=copy.deepcopy(base),
        args=config(tmp_path, RankedDPOConfig if cls is RankedDPOTrainer else DPOConfig, **overrides),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=None if eval_rows is None else Dataset.from_list(eval_rows),
        processing_class=tokenizer,
    )


def whole_batch(trainer):
    return trainer.data_collator(list(trainer.train_dataset))  # in the order of the rows


def loss_and_gradients(trainer):
    loss = trainer.compute_loss(trainer.model, whole_batch(trainer))
    loss.backward()
    return loss.detach(), {name: weight.grad for name, weight in trainer.model.named_parameters()}


def assert_same(ours, theirs):
    (our_loss, our_gradients), (their_loss, their_gradients) = ours, theirs
    torch.testing.assert_close(our_loss, their_loss, rtol=1e-6, atol=1e-6)
    assert our_gradients.keys() == their_gradients.keys()
    assert max(gradient.abs().max() for gradient in their_gradients.values()) > 1e-3
    for name, gradient in their_gradients.items():
        torch.testing.assert_close(our_gradients[name], gradient, rtol=1e-5, atol=1e-5, msg=name)


@pytest.fixture
def exact_lm(causal_lm):
    """In float64, so that no kernel's rounding is amplified by the divergences; TRL takes log-probs in fp32 from it."""
    return causal_lm.double()


# ---- equal to TRL on pairs ----


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=lambda options: "-".join(map(str, options.values())))
@pytest.mark.parametrize("loss_type", RANKED_LOSSES)
def test_equals_trl_on_pairs(loss_type, divergence, exact_lm, tokenizer, tmp_path):
    theirs = "sigmoid" if loss_type == "plackett_luce" else loss_type  # the same for two completions
    assert_same(
        *[
            loss_and_gradients(trainer_on(exact_lm, PAIRS, tokenizer, tmp_path, cls=cls, loss_type=name, **divergence))
            for cls, name in ((RankedDPOTrainer, loss_type), (DPOTrainer, theirs))
        ]
    )


@pytest.mark.parametrize("loss_weights", [None, [0.5, 2.0, 0.1]])
def test_several_losses_equal_trl_on_pairs(loss_weights, exact_lm, tokenizer, tmp_path):
    options = {"loss_type": ["sigmoid", "hinge", "ipo"], "loss_weights": loss_weights}
    assert_same(
        *[
            loss_and_gradients(trainer_on(exact_lm, PAIRS, tokenizer, tmp_path, cls=cls, **options))
            for cls in (RankedDPOTrainer, DPOTrainer)
        ]
    )


@pytest.mark.parametrize("row", range(len(PAIRS)))
def test_label_smoothing_is_that_of_trl(row, exact_lm, tokenizer, tmp_path):
    """TRL's sigmoid loss ignores it; its `aot` loss of one pair is cDPO."""
    rows = PAIRS[row : row + 1]
    assert_same(
        *[
            loss_and_gradients(
                trainer_on(exact_lm, rows, tokenizer, tmp_path, cls=cls, loss_type=name, label_smoothing=0.2)
            )
            for cls, name in ((RankedDPOTrainer, "sigmoid"), (DPOTrainer, "aot"))
        ]
    )


@pytest.mark.parametrize("row", range(len(PAIRS)))
def test_the_likelihood_of_the_best_is_trls_sft_term(row, exact_lm, tokenizer, tmp_path):
    theirs = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]}
    assert_same(
        *[
            loss_and_gradients(trainer_on(exact_lm, PAIRS[row : row + 1], tokenizer, tmp_path, cls=cls, **options))
            for cls, options in ((RankedDPOTrainer, {"sft_coef": 0.3}), (DPOTrainer, theirs))
        ]
    )


# ---- equal to loops on rankings ----


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def pair_loss(loss_type, d, target):
    if loss_type in ("sigmoid", "sigmoid_norm"):
        return -target * log_sigmoid(d) - (1 - target) * log_sigmoid(-d)
    if loss_type == "hinge":
        return target * max(0, 1 - d) + (1 - target) * max(0, 1 + d)
    return ((d - (target - 0.5)) / BETA) ** 2


def plackett_luce(scores, ranks):
    """Minus log of the summed probability of every order of the completions that the ranking allows."""
    total = 0.0
    for order in itertools.permutations(range(len(ranks))):
        if [ranks[i] for i in order] == sorted(ranks):
            total += math.prod(
                math.exp(scores[i]) / sum(math.exp(scores[j]) for j in order[place:]) for place, i in enumerate(order)
            )
    return -math.log(total)


def loss_by_loops(log_ratios, lengths, rows, loss_type, ties="drop", smoothing=0.0, margin_coef=0.0):
    per_prompt = []
    for row, row_ratios, row_lengths in zip(rows, log_ratios, lengths, strict=True):
        scores, ranks = [BETA * ratio for ratio in row_ratios], row["ranks"]
        if loss_type in ("ipo", "sigmoid_norm"):
            scores = [score / length for score, length in zip(scores, row_lengths, strict=True)]
        if loss_type == "plackett_luce":
            per_prompt.append(plackett_luce(scores, ranks))
            continue
        losses = []
        for i, j in itertools.combinations(range(len(ranks)), 2):
            better, worse = (i, j) if ranks[i] <= ranks[j] else (j, i)
            d = scores[better] - scores[worse]
            if ranks[better] < ranks[worse]:
                if margin_coef:
                    d -= margin_coef * (row["ratings"][better] - row["ratings"][worse])
                losses.append(pair_loss(loss_type, d, 1 - smoothing))
            elif ties == "half":
                losses.append(pair_loss(loss_type, d, 0.5))
        per_prompt.append(sum(losses) / len(losses))
    return sum(per_prompt) / len(per_prompt)


def log_ratios_and_lengths(trainer):
    """By the plain forward, one completion at a time, no padding."""
    batch = whole_batch(trainer)
    log_ratios, lengths = [], []
    for row in range(len(batch["ranks"])):
        log_ratios.append([])
        lengths.append([])
        for k in range(int((batch["ranks"][row] > 0).sum())):
            ids = batch["input_ids"][row, k][batch["attention_mask"][row, k].bool()]
            start = len(ids) - int(batch["completion_mask"][row, k].sum())
            with torch.no_grad():
                logps = [
                    model(input_ids=ids[None]).logits[0, start - 1 : -1].log_softmax(-1)
                    for model in (trainer.model, trainer.ref_model)
                ]
            totals = [table.gather(1, ids[start:, None]).sum().item() for table in logps]
            log_ratios[-1].append(totals[0] - totals[1])
            lengths[-1].append(len(ids) - start)
    return log_ratios, lengths


@pytest.mark.parametrize(
    ("loss_type", "options"),
    [
        *[(name, {}) for name in RANKED_LOSSES],
        *[(name, {"ties": "half"}) for name in ("sigmoid", "sigmoid_norm", "hinge", "ipo")],
        *[(name, {"label_smoothing": 0.1, "ties": "half"}) for name in ("sigmoid", "sigmoid_norm", "hinge", "ipo")],
        *[(name, {"margin_coef": 0.2}) for name in ("sigmoid", "sigmoid_norm", "hinge")],
        ("sigmoid", {"margin_coef": 0.2, "ties": "half", "label_smoothing": 0.1}),
    ],
)
def test_rankings_equal_loops_over_pairs(loss_type, options, causal_lm, tokenizer, tmp_path):
    trainer = trainer_on(causal_lm, RATED, tokenizer, tmp_path, loss_type=loss_type, **options)
    loss = trainer.compute_loss(trainer.model, whole_batch(trainer))
    settings = {"smoothing": options.get("label_smoothing", 0.0), "ties": options.get("ties", "drop")}
    expected = loss_by_loops(
        *log_ratios_and_lengths(trainer),
        RATED,
        loss_type,
        margin_coef=options.get("margin_coef", 0.0),
        **settings,
    )
    assert loss.item() == pytest.approx(expected, abs=1e-5)


def test_centering_draws_the_implicit_rewards_to_zero(causal_lm, tokenizer, tmp_path):
    plain, centered = (
        trainer_on(causal_lm, RAGGED, tokenizer, tmp_path, center_rewards_coefficient=coefficient)
        for coefficient in (None, 0.7)
    )
    losses = [trainer.compute_loss(trainer.model, whole_batch(trainer)).item() for trainer in (plain, centered)]
    per_prompt = []
    for row, ratios in zip(RAGGED, log_ratios_and_lengths(plain)[0], strict=True):
        ranks = row["ranks"]
        squares = [
            (BETA * (ratios[i] + ratios[j])) ** 2
            for i, j in itertools.combinations(range(len(ranks)), 2)
            if ranks[i] != ranks[j]
        ]
        per_prompt.append(sum(squares) / len(squares))
    expected = 0.7 * sum(per_prompt) / len(per_prompt)
    assert expected > 1e-3
    assert losses[1] - losses[0] == pytest.approx(expected, abs=1e-5)


def test_the_likelihood_of_the_best_equals_loops(causal_lm, tokenizer, tmp_path):
    first_tied = {**RAGGED[0], "ranks": [1 if rank <= 2 else rank - 1 for rank in RAGGED[0]["ranks"]]}
    rows = [first_tied, *RAGGED[1:]]
    plain, with_sft = (trainer_on(causal_lm, rows, tokenizer, tmp_path, sft_coef=coef) for coef in (0.0, 0.3))
    losses = [trainer.compute_loss(trainer.model, whole_batch(trainer)).item() for trainer in (plain, with_sft)]
    per_prompt = []
    for row in plain.train_dataset:
        nlls = []
        for ids, rank in zip(row["completion_ids"], row["ranks"], strict=True):
            if rank == 1:
                with torch.no_grad():
                    logits = plain.model(torch.tensor([[*row["prompt_ids"], *ids]])).logits[0].log_softmax(-1)
                start = len(row["prompt_ids"]) - 1
                nlls.append(-sum(logits[start + i, token].item() for i, token in enumerate(ids)) / len(ids))
        per_prompt.append(sum(nlls) / len(nlls))
    assert losses[1] - losses[0] == pytest.approx(0.3 * sum(per_prompt) / len(rows), abs=1e-5)
    with_sft.train_dataset = plain.train_dataset
    assert with_sft.evaluate(plain.train_dataset)["eval_sft_loss"] == pytest.approx(
        sum(per_prompt) / len(rows), abs=1e-5
    )


def test_a_margin_needs_ratings(causal_lm, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="ratings"):
        trainer_on(causal_lm, RAGGED, tokenizer, tmp_path, margin_coef=0.2)


def test_rows_that_only_tie_count_under_half(causal_lm, tokenizer, tmp_path):
    tied = {"prompt": "the mat", "completions": [" is red", " ran to the dog"], "ranks": [1, 1]}
    trainer = trainer_on(causal_lm, [*RAGGED, tied], tokenizer, tmp_path, ties="half")
    assert len(trainer.train_dataset) == len(RAGGED) + 1
    loss = trainer.compute_loss(trainer.model, whole_batch(trainer))
    expected = loss_by_loops(*log_ratios_and_lengths(trainer), [*RAGGED, tied], "sigmoid", ties="half")
    assert loss.item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("batch_size", "accumulation"), [(1, 4), (2, 2), (3, 2)])
def test_accumulated_batches_equal_one(batch_size, accumulation, causal_lm, tokenizer, tmp_path):
    """One optimizer step on four prompts, however they are divided; a batch of three leaves one of one."""
    weights = []
    for size, steps in ((4, 1), (batch_size, accumulation)):
        trainer = trainer_on(
            causal_lm,
            RAGGED,
            tokenizer,
            tmp_path,
            loss_type=["sigmoid", "ipo"],
            center_rewards_coefficient=0.5,
            sft_coef=0.2,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            optim="sgd",
            learning_rate=0.1,
            max_grad_norm=0,
            max_steps=1,
        )
        before = copy.deepcopy(trainer.model.state_dict())
        trainer.train()
        weights.append({name: w - before[name] for name, w in trainer.model.state_dict().items()})
    for name, change in weights[0].items():
        torch.testing.assert_close(weights[1][name], change, rtol=0, atol=1e-6, msg=name)
    assert max(change.abs().max() for change in weights[0].values()) > 1e-3


# ---- divergences ----


@pytest.mark.parametrize(
    ("divergence", "alpha", "generator"),
    [
        ("reverse_kl", 0.5, lambda t: t * torch.log(t)),
        ("forward_kl", 0.5, lambda t: -torch.log(t) + t),
        ("js_divergence", 0.5, lambda t: t * torch.log(t) - (t + 1) * torch.log((t + 1) / 2)),
        ("alpha_divergence", 0.3, lambda t: (t**0.3 - 0.3 * t - 0.7) / (0.3 * (0.3 - 1))),
    ],
)
def test_scores_are_the_derivative_of_the_divergence(divergence, alpha, generator):
    """f'(t) of the generator f of each divergence, up to a constant, which cancels between completions."""
    t = torch.tensor([0.05, 0.5, 1.0, 2.0, 30.0], dtype=torch.float64, requires_grad=True)
    (derivative,) = torch.autograd.grad(generator(t).sum(), t)
    scores = divergence_scores(t.detach().log(), divergence, alpha)
    torch.testing.assert_close(scores.diff(), derivative.diff(), rtol=0, atol=1e-9)
    assert abs(scores[2].item()) < 1e-12
    assert (scores.diff() > 0).all()


@pytest.mark.parametrize("divergence", F_DIVERGENCES)
def test_extreme_ratios_stay_finite(divergence):
    log_ratios = torch.tensor([-1e4, 1e4], requires_grad=True)
    scores = divergence_scores(log_ratios, divergence)
    scores.sum().backward()
    assert scores.isfinite().all()
    assert log_ratios.grad.isfinite().all()


def test_unknown_divergence_is_refused():
    with pytest.raises(ValueError, match="expected one of reverse_kl"):
        divergence_scores(torch.zeros(1), "kl")


# ---- options ----


@pytest.mark.parametrize("name", REFUSED_LOSSES)
def test_losses_of_pairs_are_refused_with_the_reason(name, tmp_path):
    with pytest.raises(ValueError, match=f"'{name}' is not supported for rankings: .{{20}}"):
        config(tmp_path, loss_type=["sigmoid", name])


def test_every_loss_of_trl_is_decided():
    documented = DPOConfig.__dataclass_fields__["loss_type"].metadata["help"]
    named = set(documented.replace("`", "").split("'")[1::2])
    assert named == set(REFUSED_LOSSES) | (set(RANKED_LOSSES) - {"plackett_luce"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "sigmiod"}, "loss_type=.'sigmiod'.: expected some of sigmoid"),
        ({"loss_type": []}, "expected some of sigmoid"),
        ({"loss_weights": [1.0, 2.0]}, "must have the same length"),
        ({"loss_type": ["sigmoid", "ipo"], "loss_weights": [1.0, -2.0]}, "inverts the ranks"),
        ({"f_divergence_type": "kl"}, "expected one of reverse_kl"),
        ({"f_alpha_divergence_coef": 0.7}, "is used by"),
        ({"loss_type": "plackett_luce", "ties": "half"}, "plackett_luce"),
        ({"loss_type": "plackett_luce", "label_smoothing": 0.1}, "plackett_luce"),
        ({"loss_type": ["sigmoid", "plackett_luce"], "margin_coef": 1.0}, "plackett_luce"),
        ({"loss_type": "ipo", "margin_coef": 1.0}, "ipo"),
        ({"label_smoothing": 0.5}, "label_smoothing"),
        ({"ties": "both"}, "ties"),
        ({"beta": 0.0}, "beta=0.0: expected a positive number"),
        ({"sft_coef": -0.1}, "sft_coef=-0.1: expected a finite number"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


def test_the_config_keeps_its_losses(causal_lm, tokenizer, tmp_path):
    """TRL does not know all of them, and is not shown them."""
    names = ["plackett_luce", "sigmoid_norm"]
    trainer = trainer_on(causal_lm, PAIRS, tokenizer, tmp_path, loss_type=names, f_divergence_type="forward_kl")
    assert trainer.args.loss_type == trainer.loss_types == names
    assert trainer.loss_weights == [1.0, 1.0]
    assert RankedDPOConfig(**{"output_dir": str(tmp_path), "loss_type": "ipo"}).loss_type == ["ipo"]


# ---- logs ----


def test_kendall_tau_equals_scipy():
    generator = torch.Generator().manual_seed(0)
    ranks = torch.randint(0, 4, (60, 6), generator=generator)
    scores = torch.randint(0, 5, (60, 6), generator=generator).float() / 4
    tau, defined = kendall_tau(scores, ranks)
    seen = set()
    for row in range(len(ranks)):
        present = ranks[row] > 0
        expected = kendalltau(scores[row][present], -ranks[row][present]).statistic  # tau-b
        seen.add(bool(defined[row]))
        assert defined[row] == (not math.isnan(expected))
        assert tau[row] == pytest.approx(expected if defined[row] else 0.0, abs=1e-6)
    assert seen == {True, False}


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_logs_equal_loops(batch_size, causal_lm, tokenizer, tmp_path):
    trainer = trainer_on(
        causal_lm,
        RAGGED,
        tokenizer,
        tmp_path,
        eval_rows=RAGGED,
        per_device_eval_batch_size=batch_size,
        loss_type="ipo",
        f_divergence_type="js_divergence",
    )
    metrics = trainer.evaluate()
    log_ratios, _ = log_ratios_and_lengths(trainer)
    taus = [kendalltau(x, [-r for r in row["ranks"]]).statistic for x, row in zip(log_ratios, RAGGED, strict=True)]
    weights = [
        1 / (1 + math.exp(BETA * (ratios[better] - ratios[worse])))
        for ratios, row in zip(log_ratios, RAGGED, strict=True)
        for better, worse in itertools.permutations(range(len(ratios)), 2)
        if row["ranks"][better] < row["ranks"][worse]
    ]
    assert metrics["eval_kendall_tau"] == pytest.approx(sum(taus) / len(taus), abs=1e-6)
    assert metrics["eval_gradient_weight"] == pytest.approx(sum(weights) / len(weights), abs=1e-6)
    assert abs(metrics["eval_gradient_weight"] - 0.5) > 1e-5  # or a flipped sign would not show
