"""Stage `reward-model`: how well reward models follow rankings they were not trained on, and what they mistake.

A policy trained by DPO is a reward model too: r(x, y) = beta * (log pi(y|x) - log ref(y|x)), ref being the baseline.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefopt.errors import UserError
from prefopt.evaluation.judges.gold import gold_function
from prefopt.evaluation.report.sections import reward_model as reward_model_section
from prefopt.evaluation.results import Definition, Measures, NoNumber, Skipped, attempt
from prefopt.evaluation.run import EvaluationArguments, EvaluationRun, Stage, check_names, parsed_mapping
from prefopt.evaluation.stages.judge import JudgeArguments
from prefopt.inference.journal import fingerprint_of, kept_rows, source_state
from prefopt.inference.jsonl import read_jsonl
from prefopt.inference.likelihood import scored_nats
from prefopt.inference.scoring import score_rows, score_texts
from prefopt.models.checkpoints import load_classifier
from prefopt.models.loading import load_language_model
from prefopt.rankings.checks import validate_comparisons
from prefopt.rankings.row import from_preference
from prefopt.rankings.tokens import build_ids
from prefopt.statistics.intervals import Estimate, mean_estimate, pair_accuracy
from prefopt.statistics.reward_models import (
    Pairs,
    accuracy_difference,
    labeler_agreement,
    length_correlation,
    longer_wins_accuracy,
    majority_accuracy,
    reliability,
    reward_measures,
    tie_calibrated,
)

Row = Mapping[str, Any]
NO_RANKINGS = Skipped("no rankings: give `rankings`, a file for each group of labelers")
NO_SCORER = Skipped("no reward model: give `reward_models` (name: folder) or `implicit_rewards` (policy: beta)")
NO_DEMONSTRATIONS = Skipped("no demonstrations: give `reward_demonstrations`, a file")
_RANKED = "Ouyang et al. 2022, C.2 and E.2"
MEASURES = Measures(
    {
        "rm.accuracy": Definition(
            True,
            "share of strictly ranked pairs that the reward model orders as the labelers did; equal scores count half; "
            "interval over prompts",
            _RANKED,
        ),
        "rm.gold_accuracy": Definition(
            True,
            "the same accuracy for the gold reward itself: what a perfect reward model could reach on these noisy "
            "labels",
            "sandbox",
        ),
        "rm.accuracy_per_prompt": Definition(
            True, "mean over prompts of the accuracy within the prompt, as the loss weighs pairs", _RANKED
        ),
        "rm.accuracy_gap": Definition(
            True, "accuracy on the pairs whose ranks differ by so many", "Llama 2, arXiv:2307.09288, Table 8"
        ),
        "rm.accuracy_labeler": Definition(True, "accuracy on the rankings of one labeler", _RANKED),
        "rm.accuracy_use_case": Definition(True, "accuracy on the rankings of one use case", _RANKED),
        "rm.accuracy_length_matched": Definition(
            True,
            "accuracy on the pairs whose lengths in tokens differ by at most a tenth of the longer one",
            "prefopt",
        ),
        "rm.top1": Definition(
            True,
            "share of prompts on which the completion with the highest score is among those ranked best; equal scores "
            "share",
            "RewardBench 2, arXiv:2506.01937",
        ),
        "rm.kendall_tau": Definition(
            True, "mean over prompts of the rank correlation tau-b of scores and ranks", "Kendall 1945"
        ),
        "rm.brier": Definition(
            False,
            "mean squared error of sigmoid(score of the better - score of the worse); .25 knows nothing",
            "Brier 1950",
        ),
        "rm.nll": Definition(
            False,
            "mean of -log sigmoid(score of the better - score of the worse); log 2 knows nothing",
            "Ouyang et al. 2022, Eq. 1",
        ),
        "rm.ece": Definition(
            False,
            "expected calibration error: mean over ten bins of as many pairs each of |accuracy - confidence|, "
            "confidence = sigmoid(|score difference|)",
            "Guo et al. 2017, arXiv:1706.04599",
        ),
        "rm.calibration_slope": Definition(
            None,
            "factor on score differences that makes them calibrated: 1 is calibrated, below 1 too sure, above not sure "
            "enough",
            "Cox 1958",
        ),
        "rm.tie_accuracy": Definition(
            True,
            "accuracy on all pairs, ties included, where scores that differ by less than a width say 'tied'; the width "
            "is the best one on the same pairs",
            "Deutsch et al. 2023, arXiv:2305.14324",
        ),
        "rm.margin_untied": Definition(
            None, "mean |score difference| of pairs that the labeler ranked strictly", "prefopt"
        ),
        "rm.margin_tied": Definition(
            None, "mean |score difference| of pairs that the labeler ranked equal", "prefopt"
        ),
        "rm.length_correlation": Definition(
            None,
            "mean over prompts of Spearman's correlation of score and length in tokens among the completions of a "
            "prompt; of the labelers, with their ranks in place of scores",
            "Singhal et al. 2023, arXiv:2310.03716",
        ),
        "rm.agreement": Definition(
            None,
            "share of pairs, untied by two labelers of the group who ranked the same completions, that both order the "
            "same way",
            "Ouyang et al. 2022, section 3.4",
        ),
        "rm.agreement_between": Definition(
            None, "the same for a labeler of each of two groups", "Ouyang et al. 2022, section 3.4"
        ),
        "rm.demonstration_score": Definition(
            None,
            "mean score of the demonstrations, which the reward bias sets to 0",
            "Ouyang et al. 2022, section 3.5",
        ),
    }
)


@dataclass
class RewardModelArguments:
    """Which reward models, and the rankings they are measured on."""

    reward_models: dict[str, str] | str | None = field(
        default=None,
        metadata={"help": "Name of each reward model and its folder or Hub id; on the command line as JSON."},
    )
    implicit_rewards: dict[str, float] | str | None = field(
        default=None,
        metadata={"help": "Policies of `models` whose DPO reward is measured as well, and the beta of each."},
    )
    rankings: dict[str, str] | str | None = field(
        default=None,
        metadata={"help": "Held-out rankings: a JSONL file for each group of labelers (train_labelers, ...)."},
    )
    reward_demonstrations: str | None = field(
        default=None, metadata={"help": "JSONL file of `prompt`, `completion`; their mean score should be 0."}
    )

    def __post_init__(self) -> None:
        for key in ("reward_models", "implicit_rewards", "rankings"):
            setattr(self, key, parsed_mapping(key, getattr(self, key)))
        check_names("reward_models", self.reward_models)
        check_names("rankings", self.rankings)
        for name, beta in self.implicit_rewards.items():
            if isinstance(beta, bool) or not isinstance(beta, (int, float)):
                raise UserError(f"implicit_rewards: {name}: expected the beta of its training, got {beta!r}")
            if name in self.reward_models:
                raise UserError(f"implicit_rewards: {name} is the name of a reward model too; rename that one")


def measure(run: EvaluationRun, args: EvaluationArguments, own: RewardModelArguments, judges: JudgeArguments) -> None:
    """Score the rankings with every reward model and measure; write `stages/reward_model.json`.

    Scores are kept in `reward_model/<model>.<group>.jsonl`. A reward model that breaks costs its own numbers. The
    accuracy of `judges.gold_judge` on the same rankings is a ceiling.

    Raises:
        UserError: a file of rankings is missing, or a row in it is none.
    """
    gold = None if judges.gold_judge is None else gold_function(judges.gold_judge)
    groups = {group: ranked_rows(group, path, args.heldout_use_case) for group, path in own.rankings.items()}
    scorers = [*own.reward_models, *own.implicit_rewards]
    measures: list[dict[str, Any]] = []
    # Of a policy that is a reward model, the scores are relative to the baseline.
    against = args.baseline if own.implicit_rewards else None
    data: dict[str, Any] = {"baseline": against, "groups": {}, "reliability": {}, "tie_width": {}, "agreement": []}
    scored: dict[tuple[str, str], list[list[float]]] = {}
    if not groups:
        measures.append(MEASURES.record("rm.accuracy", "reward_model", NO_RANKINGS))
    if not scorers:
        measures.append(MEASURES.record("rm.accuracy", "reward_model", NO_SCORER))
    for scorer in scorers:
        loaded: list[Any] = []
        # groups that ranked the same completions share their scores
        known: dict[str, list[dict[str, Any]]] = {}

        def of_group(
            group: str,
            scorer: str = scorer,
            loaded: list[Any] = loaded,
            known: dict[str, list[dict[str, Any]]] = known,
        ) -> list[dict[str, Any]]:
            rows = groups[group]
            found = _scores(run, args, own, scorer, group, rows, loaded, known)
            scored[scorer, group] = scores = [row["scores"] for row in found]
            return _of_scorer(scorer, group, rows, scores, [row["lengths"] for row in found], data)

        for group in groups:
            add = attempt(f"reward-model: {scorer} on {group}", partial(of_group, group))
            if isinstance(add, NoNumber):
                add = [MEASURES.record(f"rm.accuracy.{group}", scorer, add)]
            measures += add
        if scorer in own.reward_models:
            score = NO_DEMONSTRATIONS
            if own.reward_demonstrations is not None:
                score = attempt(
                    f"reward-model: the demonstrations for {scorer}",
                    partial(_demonstrations, args, own, scorer, loaded),
                )
            measures.append(MEASURES.record("rm.demonstration_score", scorer, score))
    for group, rows in groups.items():
        lengths = _any_lengths(run, scorers, group)
        measures += _of_labels(group, rows, lengths, gold, data)
        pairs = Pairs.of([row["ranks"] for row in rows])
        first = scored.get((scorers[0], group)) if scorers else None
        for scorer in scorers[1:]:
            if first is not None and (scorer, group) in scored:
                difference = accuracy_difference(pairs, scored[scorer, group], first)
                measures.append(MEASURES.record(f"rm.accuracy.{group}", scorer, difference, against=scorers[0]))
    for (g, h), estimate in labeler_agreement(groups).items():
        name = f"rm.agreement.{g}" if g == h else f"rm.agreement_between.{g}.{h}"
        measures.append(MEASURES.record(name, "labelers", estimate))
    run.write_stage(STAGE, measures, data)


def ranked_rows(group: str, path: str, heldout_use_case: str | None = None) -> list[dict[str, Any]]:
    """Ranked comparisons of a file, preference rows converted, those of the held-out use case left out."""
    if not Path(path).is_file():
        raise UserError(f"rankings: no file {path!r} for {group}")
    rows = [from_preference(row) if "chosen" in row else row for row in read_jsonl(path)]
    validate_comparisons(rows, source=str(path))
    if heldout_use_case is not None:
        rows = [row for row in rows if row.get("use_case") != heldout_use_case]
    return rows


def implicit_rewards(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    beta: float,
    batch_size: int = 64,
) -> list[list[float]]:
    """DPO's implicit reward of every completion, up to a term that is the same for all of a prompt.

    beta * sum_t [log pi(y_t | x, y_<t) - log ref(y_t | x, y_<t)]   (arXiv:2305.18290, Eq. 5)
    """
    ids = []
    for x, y in (pair for row in rows for pair in _ids(tokenizer, row)):
        if not x:
            raise UserError("an implicit reward needs a prompt: one of the rows has none")
        ids.append((x + y, len(x)))
    nats, ref_nats = (scored_nats(m, ids, batch_size) for m in (model, reference))
    flat = iter((beta * (ref_nats - nats)).tolist())
    return [[next(flat) for _ in row["completions"]] for row in rows]


def _ids(tokenizer: PreTrainedTokenizerBase, row: Row) -> list[tuple[list[int], list[int]]]:
    cuts = row.get("truncated") or [False] * len(row["completions"])
    return [
        build_ids(tokenizer, row["prompt"], y, truncated=cut) for y, cut in zip(row["completions"], cuts, strict=True)
    ]


def _scores(
    run: EvaluationRun,
    args: EvaluationArguments,
    own: RewardModelArguments,
    scorer: str,
    group: str,
    rows: Sequence[Row],
    loaded: list[Any],
    known: dict[str, list[dict[str, Any]]],
) -> list[dict[str, Any]]:
    """Rows of `scores` and `lengths` in tokens, one per ranked row."""
    settings = {"load_in_4bit": args.load_in_4bit, "dtype": args.dtype}
    if scorer in own.reward_models:
        sources = [own.reward_models[scorer]]
    else:
        for name in (scorer, args.baseline):
            if name not in args.models:
                raise UserError(f"implicit_rewards: no model called {name!r} in models")
        sources = [args.models[scorer], args.models[args.baseline], own.implicit_rewards[scorer]]

    labels = [{k: row.get(k) for k in ("prompt", "completions", "truncated")} for row in rows]
    content = fingerprint_of(labels)

    def compute() -> list[dict[str, Any]]:
        if content in known:
            return known[content]
        run.progress(f"reward-model: {scorer} on {group}")
        _load(loaded, sources, settings)
        if len(sources) == 1:
            model, tokenizer = loaded[0]
            scores = score_rows(model, tokenizer, rows, args.batch_size)
        else:
            (model, tokenizer), (reference, _) = loaded
            scores = implicit_rewards(model, reference, tokenizer, rows, sources[2], args.batch_size)
        lengths = [[len(y) for _, y in _ids(tokenizer, row)] for row in rows]
        return [{"scores": s, "lengths": n} for s, n in zip(scores, lengths, strict=True)]

    state = [source_state(source) if isinstance(source, str) else source for source in sources]
    path = run.folder / "reward_model" / f"{scorer}.{group}.jsonl"
    known[content] = kept_rows(path, [state, settings, content], compute)
    return known[content]


def _load(loaded: list[Any], sources: Sequence[Any], settings: Mapping[str, Any]) -> None:
    """One reward model, or policy and reference, once for all groups."""
    if loaded:
        return
    if len(sources) == 1:
        loaded.append(load_classifier(sources[0], load_in_4bit=settings["load_in_4bit"]))
    else:
        loaded += [load_language_model(source, **settings) for source in sources[:2]]


def _of_scorer(
    scorer: str,
    group: str,
    rows: Sequence[Row],
    scores: list[list[float]],
    lengths: list[list[float]],
    data: dict[str, Any],
) -> list[dict[str, Any]]:
    ranks = [row["ranks"] for row in rows]
    found: dict[str, Estimate] = {}
    for name, estimate in reward_measures(scores, ranks, lengths).items():
        gap = name.removeprefix("accuracy_gap_")
        found[f"rm.{name}.{group}" if gap == name else f"rm.accuracy_gap.{group}.{gap}"] = estimate
    for column in ("labeler", "use_case"):
        members = dict.fromkeys(row[column] for row in rows if row.get(column) is not None)
        for value in members:
            chosen = [i for i, row in enumerate(rows) if row.get(column) == value]
            estimate = pair_accuracy([scores[i] for i in chosen], [ranks[i] for i in chosen])
            found[f"rm.accuracy_{column}.{group}.{value}"] = estimate
    pairs = Pairs.of(ranks)
    data["reliability"].setdefault(scorer, {})[group] = reliability(pairs, scores)
    data["tie_width"].setdefault(scorer, {})[group] = tie_calibrated(pairs, scores, n_resamples=2)[1]
    return [_measured(name, scorer, estimate) for name, estimate in found.items()]


def _measured(name: str, scorer: str, estimate: Estimate) -> dict[str, Any]:
    value: Estimate | NoNumber = estimate
    if not estimate.n:
        value = Skipped("there is nothing of the kind in these rankings")
    elif name.startswith("rm.calibration_slope") and not math.isfinite(estimate.value):
        value = Skipped("the scores have all pairs right, or all wrong: any slope fits")
    return MEASURES.record(name, scorer, value)


def _of_labels(
    group: str,
    rows: Sequence[Row],
    lengths: list[list[float]] | None,
    gold: Callable[[Any, Any], Any] | None,
    data: dict[str, Any],
) -> list[dict[str, Any]]:
    """Baselines, the labelers' own taste for length, and the gold reward."""
    ranks = [row["ranks"] for row in rows]
    pairs = Pairs.of(ranks)
    data["groups"][group] = {
        "rows": len(rows),
        "pairs": int(pairs.strict.sum()),
        "tied_pairs": int(pairs.tied.sum()),
        "labelers": len({row.get("labeler") for row in rows}),
    }
    measures = [MEASURES.record(f"rm.accuracy.{group}", "majority", majority_accuracy(pairs))]
    if lengths is not None:
        longer = longer_wins_accuracy(pairs, lengths)
        measures.append(MEASURES.record(f"rm.accuracy.{group}", "longer_wins", longer))
        taste = length_correlation([[-r for r in row] for row in ranks], lengths)
        measures.append(MEASURES.record(f"rm.length_correlation.{group}", "labelers", taste))
    if gold is not None:

        def of_gold() -> Estimate:
            given = [[gold(row["prompt"], y) for y in row["completions"]] for row in rows]
            scores = [[float(getattr(value, "total", value)) for value in row] for row in given]
            return pair_accuracy(scores, ranks)

        accuracy = attempt(f"reward-model: the gold reward on {group}", of_gold)
        measures.append(MEASURES.record(f"rm.gold_accuracy.{group}", "gold", accuracy))
    return measures


def _any_lengths(run: EvaluationRun, scorers: Sequence[str], group: str) -> list[list[float]] | None:
    """Lengths in tokens of the first reward model that scored the group."""
    for scorer in scorers:
        path = run.folder / "reward_model" / f"{scorer}.{group}.jsonl"
        if path.with_name(path.name + ".inputs").is_file():
            return [row["lengths"] for row in read_jsonl(path)]
    return None


def _demonstrations(args: EvaluationArguments, own: RewardModelArguments, scorer: str, loaded: list[Any]) -> Estimate:
    rows = read_jsonl(own.reward_demonstrations)
    settings = {"load_in_4bit": args.load_in_4bit, "dtype": args.dtype}
    _load(loaded, [own.reward_models[scorer]], settings)
    texts = [[row[column] for row in rows] for column in ("prompt", "completion")]
    return mean_estimate(score_texts(*loaded[0], *texts, batch_size=args.batch_size))


STAGE = Stage(
    "reward-model",
    "how well reward models follow rankings they were not trained on",
    RewardModelArguments,
    measure,
    MEASURES,
    reads=(JudgeArguments,),
    title="Reward model",
    section=reward_model_section.section,
)
