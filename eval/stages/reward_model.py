"""Stage `reward-model`: how well reward models follow rankings they were not trained on, and what they mistake.

A policy trained by DPO is a reward model too: r(x, y) = beta * (log pi(y|x) - log ref(y|x)), ref being the baseline.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefopt.evaluation.results import FAILED, measure
from prefopt.evaluation.run import EvaluationArguments, EvaluationRun, check_names, parsed_mapping
from prefopt.inference.journal import fingerprint_of, kept_rows, source_state
from prefopt.inference.jsonl import read_jsonl
from prefopt.inference.likelihood import scored_nats
from prefopt.inference.scoring import score_rows, score_texts
from prefopt.models.loading import load_classifier, load_language_model
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

logger = logging.getLogger(__name__)
Progress = Callable[[str], None]
Row = Mapping[str, Any]


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
        metadata={
            "help": "Held-out rankings: a JSONL file for each group of labelers (train_labelers, ...)."
        },
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
                raise ValueError(f"implicit_rewards: {name}: expected the beta of its training, got {beta!r}")
            if name in self.reward_models:
                raise ValueError(
                    f"implicit_rewards: {name} is the name of a reward model too; rename that one"
                )


def run(
    run: EvaluationRun,
    args: EvaluationArguments,
    own: RewardModelArguments,
    *,
    gold: Callable[[Any, Any], Any] | None = None,
    progress: Progress = logger.info,
) -> None:
    """Score the rankings with every reward model and measure; write `stages/reward_model.json`.

    Scores are kept in `reward_model/<model>.<group>.jsonl`. A reward model that breaks costs its own numbers.

    Args:
        gold: (prompt, completion) -> a number, or an object with `total`: its accuracy on the same rankings is a
            ceiling.

    Raises:
        ValueError: a file of rankings is missing, or a row in it is none.
    """
    groups = {group: ranked_rows(group, path, args.heldout_use_case) for group, path in own.rankings.items()}
    scorers = [*own.reward_models, *own.implicit_rewards]
    measures: list[dict[str, Any]] = []
    # Of a policy that is a reward model, the scores are relative to the baseline.
    against = args.baseline if own.implicit_rewards else None
    data: dict[str, Any] = {
        "baseline": against,
        "groups": {},
        "reliability": {},
        "tie_width": {},
        "agreement": [],
    }
    scored: dict[tuple[str, str], list[list[float]]] = {}
    if not groups:
        reason = "no rankings: give `rankings`, a file for each group of labelers"
        measures.append(measure("rm.accuracy", "reward_model", None, reason=reason))
    if not scorers:
        reason = "no reward model: give `reward_models` (name: folder) or `implicit_rewards` (policy: beta)"
        measures.append(measure("rm.accuracy", "reward_model", None, reason=reason))
    for scorer in scorers:
        loaded: list[Any] = []
        known: dict[
            str, list[dict[str, Any]]
        ] = {}  # groups that ranked the same completions share their scores
        for group, rows in groups.items():
            try:
                found = _scores(run, args, own, scorer, group, rows, loaded, known, progress)
                scored[scorer, group] = scores = [row["scores"] for row in found]
                add = _of_scorer(scorer, group, rows, scores, [row["lengths"] for row in found], data)
                measures += add
            except Exception as error:  # any trouble of one reward model is that model's
                logger.exception("reward-model: %s on %s failed", scorer, group)
                reason = f"{FAILED}{type(error).__name__}: {error}"
                measures.append(measure(f"rm.accuracy.{group}", scorer, None, reason=reason))
        if scorer in own.reward_models:
            measures.append(_demonstrations(args, own, scorer, loaded))
    for group, rows in groups.items():
        lengths = _any_lengths(run, scorers, group)
        measures += _of_labels(group, rows, lengths, gold, data)
        pairs = Pairs.of([row["ranks"] for row in rows])
        first = scored.get((scorers[0], group)) if scorers else None
        for scorer in scorers[1:]:
            if first is not None and (scorer, group) in scored:
                difference = accuracy_difference(pairs, scored[scorer, group], first)
                measures.append(measure(f"rm.accuracy.{group}", scorer, difference, against=scorers[0]))
    for (g, h), estimate in labeler_agreement(groups).items():
        name = f"rm.agreement.{g}" if g == h else f"rm.agreement_between.{g}.{h}"
        measures.append(measure(name, "labelers", estimate))
    run.write_stage("reward_model", measures, data)


def ranked_rows(group: str, path: str, heldout_use_case: str | None = None) -> list[dict[str, Any]]:
    """Ranked comparisons of a file, preference rows converted, those of the held-out use case left out."""
    if not Path(path).is_file():
        raise ValueError(f"rankings: no file {path!r} for {group}")
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
            raise ValueError("an implicit reward needs a prompt: one of the rows has none")
        ids.append((x + y, len(x)))
    nats, ref_nats = (scored_nats(m, ids, batch_size) for m in (model, reference))
    flat = iter((beta * (ref_nats - nats)).tolist())
    return [[next(flat) for _ in row["completions"]] for row in rows]


def _ids(tokenizer: PreTrainedTokenizerBase, row: Row) -> list[tuple[list[int], list[int]]]:
    cuts = row.get("truncated") or [False] * len(row["completions"])
    return [
        build_ids(tokenizer, row["prompt"], y, truncated=cut)
        for y, cut in zip(row["completions"], cuts, strict=True)
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
    progress: Progress,
) -> list[dict[str, Any]]:
    """Rows of `scores` and `lengths` in tokens, one per ranked row."""
    settings = {"load_in_4bit": args.load_in_4bit, "dtype": args.dtype}
    if scorer in own.reward_models:
        sources = [own.reward_models[scorer]]
    else:
        for name in (scorer, args.baseline):
            if name not in args.models:
                raise ValueError(f"implicit_rewards: no model called {name!r} in models")
        sources = [args.models[scorer], args.models[args.baseline], own.implicit_rewards[scorer]]

    labels = [{k: row.get(k) for k in ("prompt", "completions", "truncated")} for row in rows]
    content = fingerprint_of(labels)

    def compute() -> list[dict[str, Any]]:
        if content in known:
            return known[content]
        progress(f"reward-model: {scorer} on {group}")
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
    if not estimate.n:
        return measure(name, scorer, None, reason="there is nothing of the kind in these rankings")
    if name.startswith("rm.calibration_slope") and not math.isfinite(estimate.value):
        return measure(
            name, scorer, None, reason="the scores have all pairs right, or all wrong: any slope fits"
        )
    return measure(name, scorer, estimate)


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
    measures = [measure(f"rm.accuracy.{group}", "majority", majority_accuracy(pairs))]
    if lengths is not None:
        longer = longer_wins_accuracy(pairs, lengths)
        measures.append(measure(f"rm.accuracy.{group}", "longer_wins", longer))
        taste = length_correlation([[-r for r in row] for row in ranks], lengths)
        measures.append(measure(f"rm.length_correlation.{group}", "labelers", taste))
    if gold is not None:
        try:
            given = [[gold(row["prompt"], y) for y in row["completions"]] for row in rows]
            scores = [[float(getattr(value, "total", value)) for value in row] for row in given]
            measures.append(measure(f"rm.gold_accuracy.{group}", "gold", pair_accuracy(scores, ranks)))
        except Exception as error:
            logger.exception("reward-model: the gold reward failed on %s", group)
            reason = f"{FAILED}{type(error).__name__}: {error}"
            measures.append(measure(f"rm.gold_accuracy.{group}", "gold", None, reason=reason))
    return measures


def _any_lengths(run: EvaluationRun, scorers: Sequence[str], group: str) -> list[list[float]] | None:
    """Lengths in tokens of the first reward model that scored the group."""
    for scorer in scorers:
        path = run.folder / "reward_model" / f"{scorer}.{group}.jsonl"
        if path.with_name(path.name + ".inputs").is_file():
            return [row["lengths"] for row in read_jsonl(path)]
    return None


def _demonstrations(
    args: EvaluationArguments, own: RewardModelArguments, scorer: str, loaded: list[Any]
) -> dict[str, Any]:
    name = "rm.demonstration_score"
    if own.reward_demonstrations is None:
        return measure(name, scorer, None, reason="no demonstrations: give `reward_demonstrations`, a file")
    try:
        rows = read_jsonl(own.reward_demonstrations)
        settings = {"load_in_4bit": args.load_in_4bit, "dtype": args.dtype}
        _load(loaded, [own.reward_models[scorer]], settings)
        texts = [[row[column] for row in rows] for column in ("prompt", "completion")]
        return measure(
            name, scorer, mean_estimate(score_texts(*loaded[0], *texts, batch_size=args.batch_size))
        )
    except Exception as error:
        logger.exception("reward-model: the demonstrations failed for %s", scorer)
        return measure(name, scorer, None, reason=f"{FAILED}{type(error).__name__}: {error}")
