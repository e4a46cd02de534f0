"""Stage `reward-model`: how well reward models follow rankings they were not trained on, and what they mistake.

A policy trained by DPO is a reward model too: r(x, y) = beta * (log pi(y|x) - log ref(y|x)), ref being the baseline.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import combinations
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefopt.errors import UserError
from prefopt.evaluation.benchmarks import reward_yardsticks
from prefopt.evaluation.benchmarks.reward_yardsticks import YARDSTICKS
from prefopt.evaluation.judges.gold import gold_function
from prefopt.evaluation.report import tables
from prefopt.evaluation.report.paper import MARK, REWARD_ACCURACY
from prefopt.evaluation.report.plots import Series, curves_plot
from prefopt.evaluation.results import Definition, Measures, NoNumber, Skipped, attempt
from prefopt.evaluation.run import EvaluationArguments, EvaluationRun, Stage, check_names, named_rows, parsed_mapping
from prefopt.evaluation.stages.judge import JudgeArguments
from prefopt.inference.journal import Journal, continued_rows, fingerprint_of, source_state
from prefopt.inference.likelihood import scored_nats
from prefopt.inference.scoring import score_rows, score_texts
from prefopt.models.checkpoints import load_classifier
from prefopt.models.loading import load_language_model
from prefopt.models.passes import max_positions
from prefopt.rankings.checks import validate_comparisons
from prefopt.rankings.row import from_preference
from prefopt.rankings.tokens import Spans, row_ids, template_kwargs
from prefopt.statistics.intervals import Estimate, mean_estimate
from prefopt.statistics.rankings import pair_accuracy
from prefopt.statistics.reward_models import (
    Pairs,
    accuracy_difference,
    length_correlation,
    longer_wins_accuracy,
    majority_accuracy,
    reliability,
    reward_measures,
    tie_calibrated,
)
from prefopt.statistics.shared_pairs import labeler_agreement

Row = Mapping[str, Any]
Scores = list[dict[str, Any]]  # `scores` and `lengths` in tokens of every ranked row
# Rows that are scored between two writes to disk: so many a kill costs at most.
AT_ONCE = 512
NO_RANKINGS = Skipped("no rankings: give `rankings`, a file for each group of labelers")
NO_SCORER = Skipped("no reward model: give `reward_models` (name: folder) or `implicit_rewards` (policy: beta)")
NO_AGREEMENT = Skipped("no two labelers (by the rows' `labeler`) ranked the same two completions of a prompt")
NO_DEMONSTRATIONS = Skipped("no demonstrations: give `reward_demonstrations`, a file")
_RANKED = "Ouyang et al. 2022, C.2 and E.2"
MEASURES = Measures(
    {f"rm.{name}": yardstick.definition for name, yardstick in YARDSTICKS.items()}
    | {
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
            "share of the pairs of completions that two labelers of the group (by their names, `labeler`) both ranked "
            "and neither tied, that both order the same way",
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
    """Which reward models, and what they are measured on; for `measure`, `yardsticks` are the rows themselves."""

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

    on: str | None = field(
        default=None,
        metadata={
            "help": "A public yardstick to measure on, whose rows are `dataset`; in YAML `yardsticks`.",
            "choices": list(YARDSTICKS),
        },
    )
    dataset: str | None = field(
        default=None,
        metadata={"help": "Rows of `on`, as published: a file, folder or Hub id; default: those on the Hub."},
    )
    yardsticks: dict[str, str] | str | None = field(
        default=None,
        metadata={
            "help": f"Public yardsticks ({', '.join(YARDSTICKS)}) and the rows of each: file, folder or Hub id; null: "
            "those on the Hub."
        },
    )

    def __post_init__(self) -> None:
        for key in ("reward_models", "implicit_rewards", "rankings", "yardsticks"):
            setattr(self, key, parsed_mapping(key, getattr(self, key)))
        if self.dataset and not self.on:
            raise UserError(f"dataset: name the yardstick whose rows these are in `on`: {', '.join(YARDSTICKS)}")
        if self.on:
            self.yardsticks[self.on] = self.dataset
        for name in self.yardsticks:
            if name not in YARDSTICKS:
                raise UserError(f"yardsticks: expected {', '.join(YARDSTICKS)}, got {name!r}")
            if name in self.rankings:
                raise UserError(f"rankings: {name} is the name of a yardstick; rename that group")
        if self.yardsticks and not self.reward_models and not self.implicit_rewards:
            raise UserError(
                f"{', '.join(self.yardsticks)}: nothing to measure; give reward_models, or implicit_rewards"
            )
        check_names("reward_models", self.reward_models)
        check_names("rankings", self.rankings)
        for name, beta in self.implicit_rewards.items():
            if isinstance(beta, bool) or not isinstance(beta, (int, float)) or not 0 < beta < math.inf:
                raise UserError(f"implicit_rewards: {name}: expected the beta of its training, got {beta!r}")
            if name in self.reward_models:
                raise UserError(f"implicit_rewards: {name} is the name of a reward model too; rename that one")


def measure(run: EvaluationRun, args: EvaluationArguments, own: RewardModelArguments, judges: JudgeArguments) -> None:
    """Score rankings and yardsticks with every reward model and measure; write `stages/reward_model.json`.

    Scores are kept in `reward_model/<model>.<group or yardstick>.jsonl`. A reward model that breaks costs its own numbers. The
    accuracy of `judges.gold_judge` on the same rankings is a ceiling.

    Raises:
        UserError: a file of rankings is missing, or a row in it is none.
    """
    gold = None if judges.gold_judge is None else gold_function(judges.gold_judge)
    groups = {group: ranked_rows(group, path, args.heldout_use_case) for group, path in own.rankings.items()}
    scorers = [*own.reward_models, *own.implicit_rewards]
    # Of a policy that is a reward model, the scores are relative to the baseline.
    against = args.baseline if own.implicit_rewards else None
    data: dict[str, Any] = {"baseline": against, "groups": {}, "reliability": {}, "tie_width": {}, "agreement": []}
    data["yardsticks"] = {name: len(rows) for name, rows in own.yardsticks.items()}
    nothing = [why for given, why in ((groups, NO_RANKINGS), (scorers, NO_SCORER)) if not given]
    measures = [MEASURES.record("rm.accuracy", "reward_model", why) for why in nothing]
    scored: dict[tuple[str, str], Scores] = {}

    def of_group(scorer: Scorer, group: str) -> list[dict[str, Any]]:
        found = scorer.scores(group, groups[group])
        add = _of_scores(scorer.name, group, groups[group], found, data)
        scored[scorer.name, group] = found
        return add

    for name in scorers:
        scorer = Scorer(run, args, own, name)
        for group in groups:
            add = attempt(f"reward-model: {name} on {group}", partial(of_group, scorer, group))
            none = isinstance(add, NoNumber)
            measures += [MEASURES.record(f"rm.accuracy.{group}", name, add)] if none else add
        if name in own.reward_models:
            score = NO_DEMONSTRATIONS
            if own.reward_demonstrations is not None:
                what = f"reward-model: the demonstrations for {name}"
                score = attempt(what, partial(scorer.mean_score, own.reward_demonstrations))
            measures.append(MEASURES.record("rm.demonstration_score", name, score))
        for yardstick, rows in own.yardsticks.items():
            what = f"reward-model: {name} on {yardstick}"
            found = attempt(what, partial(scorer.official, yardstick, rows))
            parts = {"overall": found} if isinstance(found, NoNumber) else found
            measures += [MEASURES.record(f"rm.{yardstick}.{part}", name, value) for part, value in parts.items()]
    for group, rows in groups.items():
        here = {name: found for (name, of), found in scored.items() if of == group}
        measures += _of_labels(group, rows, next(iter(here.values()), None), gold, data)
        pairs = Pairs.of([row["ranks"] for row in rows])
        scores = {name: [row["scores"] for row in found] for name, found in here.items()}
        first = scores.pop(scorers[0], None) if scorers else None
        for name, theirs in scores.items() if first is not None else ():
            difference = accuracy_difference(pairs, theirs, first)
            measures.append(MEASURES.record(f"rm.accuracy.{group}", name, difference, against=scorers[0]))
    agreement = labeler_agreement(groups)
    for g, h in (*((group, group) for group in groups), *combinations(groups, 2)):
        name = f"rm.agreement.{g}" if g == h else f"rm.agreement_between.{g}.{h}"
        if (g, h) in agreement or g == h:
            measures.append(MEASURES.record(name, "labelers", agreement.get((g, h), NO_AGREEMENT)))
    run.write_stage(STAGE, measures, data)


def ranked_rows(group: str, path: str, heldout_use_case: str | None = None) -> list[dict[str, Any]]:
    """Ranked comparisons of a file, preference rows converted, those of the held-out use case left out."""
    rows = [from_preference(row) if "chosen" in row else row for row in named_rows(f"rankings: {group}", path)]
    validate_comparisons(rows, source=str(path))
    return [row for row in rows if heldout_use_case is None or row.get("use_case") != heldout_use_case]


class Scorer:
    """A reward model, or a policy with the `beta` of its training, by its implicit reward; loaded when first needed."""

    def __init__(self, run: EvaluationRun, args: EvaluationArguments, own: RewardModelArguments, name: str) -> None:
        self.run, self.args, self.name, self.source = run, args, name, own.reward_models.get(name)
        self.beta = own.implicit_rewards.get(name)
        # groups that ranked the same completions share their scores
        self._known: dict[str, Scores] = {}

    @cached_property
    def loaded(self) -> list[Any]:
        """(model, tokenizer) of the reward model, or of the policy and of the baseline."""
        if self.beta is None:
            return [load_classifier(self.source, **self.args.loading)]
        return [load_language_model(source, **self.args.loading) for source in self._sources()]

    def _sources(self) -> list[str]:
        if self.beta is None:
            return [self.source]
        for name in (self.name, self.args.baseline):
            if name not in self.args.models:
                raise UserError(f"implicit_rewards: no model called {name!r} in models")
        return [self.args.models[self.name], self.args.models[self.args.baseline]]

    def official(self, yardstick: str, rows: Sequence[Row]) -> dict[str, Estimate | Skipped]:
        """The yardstick's own numbers."""
        scored = self.scores(yardstick, rows, reward_yardsticks.posed)
        return YARDSTICKS[yardstick].measures(rows, [row["scores"] for row in scored])

    def scores(
        self, group: str, rows: Sequence[Row], posed: Callable[[Any, Sequence[Row]], Sequence[Row]] | None = None
    ) -> Scores:
        """Rows of `scores` and `lengths` in tokens, one per row; `posed(tokenizer, rows)` makes them the model's."""
        state = [*map(source_state, self._sources()), *([] if self.beta is None else [self.beta])]
        content = fingerprint_of(
            [
                {**{k: row.get(k) for k in ("prompt", "completions", "truncated")}, **template_kwargs(row)}
                for row in rows
            ]
        )

        def compute(journal: Journal) -> Scores:
            if content in self._known:
                return self._known[content]
            self.run.progress(f"reward-model: {self.name} on {group}")
            starts = range(0, len(rows), AT_ONCE)

            def part(number: int) -> Scores:
                of = slice(starts[number], starts[number] + AT_ONCE)
                return self._scored(rows[of], range(len(rows))[of], posed)

            return [row for of_part in journal.entries(len(starts), part) for row in of_part]

        path = self.run.folder / "reward_model" / f"{self.name}.{group}.jsonl"
        self._known[content] = continued_rows(path, [state, self.args.loading, content], compute)
        return self._known[content]

    def _scored(
        self,
        rows: Sequence[Row],
        numbers: Sequence[int],
        posed: Callable[[Any, Sequence[Row]], Sequence[Row]] | None,
    ) -> Scores:
        (model, tokenizer), *reference = self.loaded
        rows = rows if posed is None else posed(tokenizer, rows)
        if reference:
            scores = implicit_rewards(
                model, reference[0][0], tokenizer, rows, self.beta, self.args.batch_size, numbers
            )
        else:
            scores = score_rows(model, tokenizer, rows, self.args.batch_size, numbers)
        lengths = [[len(y) for y in _ids(tokenizer, row)[1]] for row in rows]
        return [{"scores": s, "lengths": n} for s, n in zip(scores, lengths, strict=True)]

    def mean_score(self, demonstrations: str) -> Estimate:
        """Of a file of demonstrations, by the reward model."""
        rows = named_rows("reward_demonstrations", demonstrations)
        texts = ([row[column] for row in rows] for column in ("prompt", "completion"))
        of_rows = [template_kwargs(row) for row in rows]
        return mean_estimate(score_texts(*self.loaded[0], *texts, batch_size=self.args.batch_size, of_rows=of_rows))


def implicit_rewards(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    beta: float,
    batch_size: int = 64,
    numbers: Sequence[int] | None = None,
) -> list[list[float]]:
    """DPO's implicit reward of every completion, up to a term that is the same for all of a prompt.

    beta * sum_t [log pi(y_t | x, y_<t) - log ref(y_t | x, y_<t)]   (arXiv:2305.18290, Eq. 5)

    Of several turns the sum is over the assistant's tokens, as in training. `numbers` are those of the rows in their file.

    Raises:
        UserError: a row without a prompt, or longer than the model has positions.
    """
    ids, longest = [], max_positions(model.config)
    for number, row in zip(range(len(rows)) if numbers is None else numbers, rows, strict=True):
        try:
            x, completions, said = _ids(tokenizer, row)
        except UserError as error:
            raise UserError(f"row {number}: {error}") from error
        if not x:
            raise UserError(f"row {number}: an implicit reward needs a prompt, and it has none")
        for i, (y, spans) in enumerate(zip(completions, said, strict=True)):
            if longest is not None and len(x) + len(y) > longest:
                raise UserError(
                    f"row {number}, completion {i}: {len(x) + len(y)} tokens, prompt included, the model has {longest} "
                    "positions; shorten it or leave it out"
                )
            ids.append((x + y, [len(x) + t for span in spans for t in range(*span)]))
    nats, ref_nats = (scored_nats(m, ids, batch_size) for m in (model, reference))
    flat = iter((beta * (ref_nats - nats)).tolist())
    return [[next(flat) for _ in row["completions"]] for row in rows]


def _ids(tokenizer: PreTrainedTokenizerBase, row: Row) -> tuple[list[int], list[list[int]], list[Spans]]:
    cuts = row.get("truncated") or [False] * len(row["completions"])
    return row_ids(tokenizer, row["prompt"], row["completions"], cuts, template_kwargs(row))


def _of_scores(
    scorer: str, group: str, rows: Sequence[Row], scored: Scores, data: dict[str, Any]
) -> list[dict[str, Any]]:
    """All that one reward model's scores of one group say; what the plots need goes into `data`."""
    scores, ranks = [row["scores"] for row in scored], [row["ranks"] for row in rows]
    found: dict[str, Estimate] = {}
    for name, estimate in reward_measures(scores, ranks, [row["lengths"] for row in scored]).items():
        gap = name.removeprefix("accuracy_gap_")
        found[f"rm.{name}.{group}" if gap == name else f"rm.accuracy_gap.{group}.{gap}"] = estimate
    for column in ("labeler", "use_case"):
        for value in dict.fromkeys(row[column] for row in rows if row.get(column) is not None):
            chosen = [i for i, row in enumerate(rows) if row.get(column) == value]
            estimate = pair_accuracy([scores[i] for i in chosen], [ranks[i] for i in chosen])
            found[f"rm.accuracy_{column}.{group}.{value}"] = estimate
    pairs = Pairs.of(ranks)
    data["reliability"].setdefault(scorer, {})[group] = reliability(pairs, scores)
    data["tie_width"].setdefault(scorer, {})[group] = tie_calibrated(pairs, scores, n_resamples=2)[1]
    measures = []
    for name, value in found.items():
        if not value.n:
            value = Skipped("there is nothing of the kind in these rankings")
        elif name.startswith("rm.calibration_slope") and not math.isfinite(value.value):
            value = Skipped("the scores have all pairs right, or all wrong: any slope fits")
        measures.append(MEASURES.record(name, scorer, value))
    return measures


def _of_labels(
    group: str,
    rows: Sequence[Row],
    scored: Scores | None,
    gold: Callable[[Any, Any], Any] | None,
    data: dict[str, Any],
) -> list[dict[str, Any]]:
    """Baselines, the labelers' own taste for length (in the tokens of a reward model), and the gold reward."""
    ranks = [row["ranks"] for row in rows]
    pairs = Pairs.of(ranks)
    data["groups"][group] = {
        "rows": len(rows),
        "pairs": int(pairs.strict.sum()),
        "tied_pairs": int(pairs.tied.sum()),
        "labelers": len({row.get("labeler") for row in rows}),
    }
    measures = [MEASURES.record(f"rm.accuracy.{group}", "majority", majority_accuracy(pairs))]
    if scored is not None:
        lengths = [row["lengths"] for row in scored]
        longer = longer_wins_accuracy(pairs, lengths)
        measures.append(MEASURES.record(f"rm.accuracy.{group}", "longer_wins", longer))
        taste = length_correlation([[-r for r in row] for row in ranks], lengths)
        measures.append(MEASURES.record(f"rm.length_correlation.{group}", "labelers", taste))
    if gold is not None:

        def of_gold() -> Estimate:
            given = [[gold(row["prompt"], y) for y in row["completions"]] for row in rows]
            return pair_accuracy([[float(getattr(value, "total", value)) for value in row] for row in given], ranks)

        accuracy = attempt(f"reward-model: the gold reward on {group}", of_gold)
        measures.append(MEASURES.record(f"rm.gold_accuracy.{group}", "gold", accuracy))
    return measures


# ---- in the report --------------------------------------------------------------------------------------------------
GROUPS = {"train_labelers": "training labelers", "heldout_labelers": "held-out labelers"}
DETAILS = [
    "Order",
    tables.Ask("accuracy within a prompt, mean", "rm.accuracy_per_prompt"),
    tables.Ask("best of a prompt found", "rm.top1"),
    tables.Ask("Kendall's tau-b", "rm.kendall_tau"),
    "Ties",
    tables.Ask("accuracy, ties included", "rm.tie_accuracy"),
    tables.Ask("margin of ranked pairs", "rm.margin_untied"),
    tables.Ask("margin of tied pairs", "rm.margin_tied"),
    "Calibration",
    tables.Ask("slope (1: calibrated)", "rm.calibration_slope", 2),
    tables.Ask("expected calibration error", "rm.ece"),
    tables.Ask("Brier score (.25: knows nothing)", "rm.brier"),
    tables.Ask("negative log likelihood", "rm.nll"),
    "Length",
    tables.Ask("accuracy, equally long pairs", "rm.accuracy_length_matched"),
    tables.Ask("correlation of score and length", "rm.length_correlation"),
]


def section(results: tables.Results) -> list[tables.Block]:
    """Accuracy against its ceiling, calibration, and what a score mistakes for quality."""
    data = results.stage("reward_model")
    yardsticks = data.get("yardsticks") or {}
    on_yardsticks = [
        m["model"] for m in results.measures if m["name"].startswith(tuple(f"rm.{n}." for n in yardsticks))
    ]
    public = reward_yardsticks.blocks(results, yardsticks, list(dict.fromkeys(on_yardsticks)))
    groups, scorers = data["groups"], [*data["reliability"]]
    if not (groups and scorers) and not public:
        raise results.missing("rm.", "no reward model was measured on rankings")
    return [*(_on_rankings(results, data, scorers) if groups and scorers else []), *public]


def _on_rankings(results: tables.Results, data: Mapping[str, Any], scorers: list[str]) -> list[tables.Block]:
    groups = data["groups"]
    details: list[tables.Block] = []
    for group in groups:
        columns = [tables.Column(tables.label(s), s, f".{group}") for s in (*scorers, "labelers")]
        details += [tables.Heading(_group(group)), *results.table(DETAILS, columns)]
    others = ("longer wins", "majority", "labelers", "gold", "ratio", tables.Cell("paper", MARK, "paper"))
    accuracies = [_accuracies(results, group, about, scorers) for group, about in groups.items()]
    minus = [
        (s, tables.Ask(f"{tables.label(s)} minus {tables.label(scorers[0])}", "rm.accuracy", 3, scorers[0]))
        for s in scorers[1:]
    ]
    return [
        tables.Table(["pairs ranked by", *map(tables.label, scorers), *others], accuracies),
        *(t for s, ask in minus for t in results.table([ask], [tables.Column(_group(g), s, f".{g}") for g in groups])),
        "Share of strictly ranked pairs in the labelers' order. Longer wins and majority (always the first, or always "
        "the last) see no quality. Labelers: how often two of them order a pair alike, within the group where two "
        "ranked the same two completions, else with those of another group; gold: the gold reward's own accuracy. Ratio: "
        "the first reward model to the labelers' agreement, or to gold where nobody's rankings overlap. A policy's "
        "reward is DPO's implicit one, beta times its log-probability ratio to the baseline.",
        *(_reliability(scorer, bins) for scorer, bins in data["reliability"].items()),
        "Reliability: pairs in ten bins of as many each, by how sure the model is of the completion it prefers; below "
        "the line it is too sure. Intervals of 95 % over prompts.",
        tables.Fold("Order, ties, calibration, length", details),
        *_parts(results, list(groups), scorers),
    ]


def _group(group: str) -> str:
    return GROUPS.get(group, group)


def _accuracies(results: tables.Results, group: str, about: Mapping[str, int], scorers: list[str]) -> tables.Line:
    """Accuracy on one labeler group: reward models, baselines, ceilings, and their ratio for the first reward model."""
    ranked = [results.find(f"rm.accuracy.{group}", s) for s in (*scorers, "longer_wins", "majority")]
    between = [name for name in results.names("rm.agreement_between.") if group in name.split(".")]
    agreements = [f"rm.agreement.{group}", *(f"rm.agreement_between.{name}" for name in between[:1])]
    known = [m for name in agreements if (m := results.find(name, "labelers")) and m["value"] is not None]
    agreement = known[0] if known else results.find(agreements[0], "labelers")
    gold = results.find(f"rm.gold_accuracy.{group}", "gold")
    first, ceiling = ranked[0], known[0] if known else gold
    ratio = "–"
    if first and ceiling and first["value"] is not None and ceiling["value"]:
        ratio = tables.number(first["value"] / ceiling["value"], 2)
    value, half = REWARD_ACCURACY.get(group, ("–", None))
    paper = tables.Cell(f"{value}", f"± {half}" if half else "", "paper")
    head = tables.Cell(_group(group), f"{about['pairs']:,} pairs, {about['rows']:,} prompts")
    return tables.Line(head, [*(tables.measured(m, 3) for m in (*ranked, agreement, gold)), ratio, paper])


def _reliability(scorer: str, by_group: Mapping[str, Sequence[Mapping[str, Any]]]) -> tables.Figure:
    keys = {"x": "confidence", "y": "accuracy", "y_low": "ci_low", "y_high": "ci_high"}
    series = [
        Series(_group(group), [{to: b[key] for to, key in keys.items()} for b in bins])
        for group, bins in by_group.items()
    ]
    series.append(Series("calibrated", [{"x": 0.5, "y": 0.5}, {"x": 1.0, "y": 1.0}]))
    return curves_plot(series, f"{tables.label(scorer)}: accuracy", "confidence, sigmoid of the score difference")


def _parts(results: tables.Results, groups: list[str], scorers: list[str]) -> list[tables.Fold]:
    """Accuracy by rank gap, labeler and use case."""
    folds = []
    for kind, title in (("gap", "rank gap"), ("labeler", "labeler"), ("use_case", "use case")):
        blocks: list[tables.Block] = []
        for group in groups:
            prefix = f"rm.accuracy_{kind}.{group}."
            asks = [tables.Ask(name, prefix + name) for name in results.names(prefix)]
            blocks += tables.headed(_group(group), results.table(asks, scorers))
        folds += [tables.Fold(f"Accuracy by {title}", blocks)] if blocks else []
    return folds


STAGE = Stage(
    "reward-model",
    "how well reward models follow rankings they were not trained on",
    RewardModelArguments,
    measure,
    MEASURES,
    reads=(JudgeArguments,),
    title="Reward model",
    section=section,
    headlines=("rm.accuracy.*", "rm.nll.*", "rm.agreement*", *(f"rm.{name}.*" for name in YARDSTICKS)),
)
