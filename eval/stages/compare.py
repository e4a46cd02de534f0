"""Stage `compare`: which model is better, from judgements: win rates and Bradley-Terry strengths, with intervals."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit

from prefopt.errors import UserError
from prefopt.evaluation.report import tables
from prefopt.evaluation.report.paper import FIG_3
from prefopt.evaluation.report.plots import bars_plot
from prefopt.evaluation.results import Definition, Failed, Measures, NoNumber, Skipped, attempt, no_number
from prefopt.evaluation.run import EvaluationArguments, EvaluationRun, Question, Stage, parsed_mapping
from prefopt.evaluation.stages.judge import JUDGES, called, scores_path
from prefopt.inference.jsonl import read_jsonl
from prefopt.statistics import bradley_terry
from prefopt.statistics.intervals import Estimate, bootstrap_over_prompts, mean_estimate
from prefopt.statistics.logistic import logistic_fit

Row = Mapping[str, Any]
NO_JUDGE = Skipped(
    "no judgements; name a judge (gold_judge, reward_judge, lm_judge or human_judgements) and run `prefopt eval judge`"
)
NO_USE_CASES = Skipped("the prompts have no `use_case`")
NO_HELDOUT = Skipped("no use case was kept out of training; name it in `heldout_use_case`")
NO_LENGTHS = Skipped("the lengths are unknown: there are no generated completions of these judgements")
NOT_JOINED = Skipped("no chain of judgements joins this model to the baseline")


def win_rate_by(judge: str) -> Definition:
    """The definition of the headline."""
    return Definition(
        True,
        f"per prompt 1 if the model's completion is preferred by {judge}, .5 if neither is, 0 if the baseline's; "
        "one temperature-1 sample each on the same prompts; interval over prompts",
        "Ouyang et al. 2022, Fig. 1, where people judge",
    )


MEASURES = Measures(
    {
        "winrate": win_rate_by("the main judge"),
        "winrate_greedy": Definition(True, "win rate with greedy completions instead of samples", "as win rate"),
        "winrate_heldout_use_case": Definition(
            True,
            "win rate on prompts of the use case kept out of reward-model and RL training",
            "Ouyang et al. 2022, section 5.3 (generalization)",
        ),
        "winrate_use_case": Definition(True, "win rate on the prompts of one use case", "as win rate"),
        "winrate_judge": Definition(
            True, "win rate as a judge other than the main one sees it, named behind the dot", "as win rate"
        ),
        "winrate_labelers": Definition(True, "win rate from the judgements of one group of labelers", "as win rate"),
        "winrate_length_controlled": Definition(
            True,
            "win rate at equal length: sigmoid(theta) of logit P(preferred) = theta + phi tanh(dlen / sd(dlen)), dlen = "
            "difference in characters; interval over prompts",
            "Dubois et al. 2024, arXiv:2404.04475, without prompt difficulty",
        ),
        "bradley_terry": Definition(
            True,
            "strength in log-odds from all pairwise judgements of the main judge, the baseline's being 0; ties half, "
            "half a win added to each side of every pair of models; interval over prompts",
            "Bradley and Terry 1952",
        ),
        "gold_reward": Definition(
            True, "mean gold reward of one temperature-1 sample per prompt; interval over prompts", "sandbox"
        ),
        "gold_reward_greedy": Definition(True, "mean gold reward of the greedy completion", "sandbox"),
        "gold_reward_heldout_use_case": Definition(
            True, "mean gold reward on the use case kept out of training", "sandbox"
        ),
        "gold_component": Definition(
            True, "mean of one part of the gold reward over temperature-1 samples", "sandbox"
        ),
        "gold_component_greedy": Definition(
            True, "mean of one part of the gold reward over greedy completions", "sandbox"
        ),
        "rm_score": Definition(
            None, "mean reward-model score of temperature-1 samples (what PPO maximizes)", "prefopt"
        ),
        "judge_score": Definition(None, "mean score that the judge gave to temperature-1 samples", "prefopt"),
    }
)


@dataclass
class CompareArguments:
    """Which judge the headline is from, and who the labelers are."""

    main_judge: str | None = field(
        default=None,
        metadata={"help": "Judge of the headline win rates; default: the first there is of gold, human, lm, reward."},
    )
    labeler_groups: dict[str, list[str]] | str | None = field(
        default_factory=dict,
        metadata={"help": "Groups of labelers, name: [labelers], whose win rates are reported apart."},
    )

    def __post_init__(self) -> None:
        self.labeler_groups = parsed_mapping("labeler_groups", self.labeler_groups)


# ---- judgements to numbers ------------------------------------------------------------------------------------------
def preferences_by_prompt(judgements: Iterable[Row], model: str, against: str) -> dict[Any, list[float]]:
    """Preferences for `model` over `against` (1 / .5 / 0), by prompt; several where several labelers judged one.

    >>> preferences_by_prompt([{"id": 7, "a": "sft", "b": "ppo", "preference": 0.0}], "ppo", "sft")
    {7: [1.0]}
    """
    found: dict[Any, list[float]] = {}
    for row in judgements:
        if {row["a"], row["b"]} == {model, against}:
            preference = row["preference"] if row["a"] == model else 1 - row["preference"]
            found.setdefault(row["id"], []).append(float(preference))
    return found


def win_rate(by_prompt: Mapping[Any, Sequence[float]]) -> Estimate:
    """Mean over prompts of the preference for the model; labelers of one prompt are averaged first.

        value = 1/N sum over prompts of (1 if preferred, 1/2 if tied, 0 if not)

    >>> win_rate({0: [1.0], 1: [0.5], 2: [0.0, 1.0], 3: [1.0]}).value
    0.75
    """
    estimate = mean_estimate([float(np.mean(p)) for p in by_prompt.values()])
    return replace(estimate, n=sum(len(p) for p in by_prompt.values()))


def length_controlled_win_rate(
    preferences: ArrayLike, length_differences: ArrayLike, *, n_resamples: int = 2000
) -> Estimate:
    """Win rate at equal length (after Dubois et al. 2024, arXiv:2404.04475, without their prompt-difficulty term).

        logit P(model preferred) = theta + phi * tanh(dlen / sd(dlen)),    value = sigmoid(theta)

    Fitted by maximum likelihood over prompts (each with a preference in [0, 1] and the model's length minus the
    other's), a tie being half a win; half a win for each side at equal length and a penalty of phi^2 / 200 keep the fit
    finite where one side always wins. Here the longer answer won, and the model's was longer in three of four:

    >>> length_controlled_win_rate([1, 1, 1, 0] * 25, [9, 9, 9, -9] * 25).value < 0.75
    True
    """
    differences = np.asarray(length_differences, dtype=float)
    spread = differences.std() if len(differences) else 0.0
    controlled = np.tanh(differences / spread) if spread > 0 else np.zeros(len(differences))  # nothing to control for
    return bootstrap_over_prompts(_win_rate_at_equal_length, preferences, controlled, n_resamples=n_resamples)


def _win_rate_at_equal_length(preferences: NDArray, x: NDArray, axis: int) -> NDArray:
    """For all resamples at once; the prompts run over the last axis, and one more stands for half a win of each side."""
    one = np.ones_like(preferences)
    design = np.stack([one, x], axis=-1)
    tie = np.broadcast_to([1.0, 0.0], (*design.shape[:-2], 1, 2))
    wins = np.concatenate([preferences, one[..., :1] / 2], axis=-1)
    fit = logistic_fit(np.concatenate([design, tie], axis=-2), wins, np.ones_like(wins), ridge=[0.0, 0.01])
    return expit(fit[..., 0])


# ---- the stage ------------------------------------------------------------------------------------------------------
def measure(run: EvaluationRun, args: EvaluationArguments, own: CompareArguments) -> None:
    """Write stages/compare.json: win rates and strengths of every judge; those of the main judge in full.

    `data`: `main_judge`, `judges`, `pairs` (win rate of every pair of models under every judge), `matrix` (what the
    Bradley-Terry fit of the main judge says of every pair).
    """
    models = list(args.models)
    others = [model for model in models if model != args.baseline]
    completions = {model: {row["id"]: row for row in run.first_samples(model)} for model in models}
    use_cases = {i: r.get("use_case") for one in completions.values() for i, r in one.items()}
    heldout = {i for i, use_case in use_cases.items() if use_case and use_case == args.heldout_use_case}
    if run.is_stale("judge"):
        raise UserError("the completions are others than those that were judged; run `prefopt eval judge` again")
    every = {path.stem: read_jsonl(path) for path in sorted((run.folder / "judgements").glob("*.jsonl"))}
    judged = (run.stage("judge") or {"data": {}})["data"]
    statuses, sentences = judged.get("judges") or {}, judged.get("called") or {}
    reasons = {judge: no_number(status) for judge, status in statuses.items()}
    broken = {judge: why for judge, why in reasons.items() if isinstance(why, Failed)}
    if own.main_judge and own.main_judge not in {*every, *broken}:
        raise UserError(f"main_judge {own.main_judge!r}: there are judgements of {sorted(every) or 'nobody'}")
    named = [judge for judge in [*JUDGES, *every] if judge in every or judge in broken]
    main = own.main_judge or (named[0] if named else None)  # also one that broke: its headline says so
    measures: list[dict[str, Any]] = []

    def add(
        name: str, model: str, compute: Callable[[], Estimate | NoNumber], judge: str | None, against: str | None
    ) -> None:
        value: Estimate | NoNumber = broken.get(judge, NO_JUDGE)
        if judge and judge not in broken:
            value = attempt(f"compare: {name} of {model}", compute)
            if isinstance(value, Estimate) and value.n == 0:
                kind = "greedy completions" if name == "winrate_greedy" else "such completions"
                value = Skipped(f"judge {judge} was given no {kind} of {model}")
        of_judge = MEASURES | ({"winrate": win_rate_by(sentences.get(judge) or called(judge))} if judge else {})
        measures.append({**Measures(of_judge).record(name, model, value, against=against), "judge": judge})

    def rates(name: str, judge: str | None, keep: Callable[[Row], bool], of: Sequence[str] = others) -> None:
        rows = [row for row in every.get(judge or "", []) if keep(row)]
        itself = {row["id"]: [0.5] for row in rows if args.baseline in (row["a"], row["b"])}
        for model in of:
            by_prompt = itself if model == args.baseline else preferences_by_prompt(rows, model, args.baseline)
            add(name, model, partial(win_rate, by_prompt), judge, args.baseline)

    def is_sampled(row: Row) -> bool:
        return row.get("decoding", "sampled") == "sampled"

    def is_counted(row: Row) -> bool:
        return is_sampled(row) and row["id"] not in heldout

    rates("winrate", main, is_counted, models)
    rates("winrate_greedy", main, lambda row: not is_sampled(row) and row["id"] not in heldout)
    if heldout:
        rates("winrate_heldout_use_case", main, lambda row: is_sampled(row) and row["id"] in heldout)
    else:
        why = NO_HELDOUT if any(use_cases.values()) else NO_USE_CASES
        measures += [MEASURES.record("winrate_heldout_use_case", m, why, against=args.baseline) for m in others]
    for use_case in sorted({u for u in use_cases.values() if u}):
        of_case = {i for i, u in use_cases.items() if u == use_case}
        rates(f"winrate_use_case.{use_case}", main, lambda row, ids=of_case: is_sampled(row) and row["id"] in ids)
    for judge in dict.fromkeys([*every, *broken]):
        if judge != main:
            rates(f"winrate_judge.{judge}", judge, is_counted)
        names = {row.get("labeler") for row in every.get(judge, [])}
        for group, members in own.labeler_groups.items():
            if names & set(members):
                rates(
                    f"winrate_labelers.{group}", judge, lambda r, of=members: is_counted(r) and r.get("labeler") in of
                )
    main_rows = [row for row in every.get(main or "", []) if is_counted(row)]
    for model in others:
        compute = partial(_length_controlled, main_rows, completions, model, args.baseline)
        add("winrate_length_controlled", model, compute, main, args.baseline)
    try:
        strengths = bradley_terry.strengths(main_rows, args.baseline, seed=args.seed) if main else {}
    except UserError:  # the baseline was not judged: nothing to refer to
        strengths = {}
    for model in models:
        add("bradley_terry", model, partial(strengths.get, model, NOT_JOINED), main, None)
    for judge in every:
        measures += _score_measures(run, models, judge, heldout, args.baseline)
    pairs = [
        {"judge": judge, "model": a, "against": b, **asdict(win_rate(preferences))}
        for judge, rows in every.items()
        for a, b in combinations(models, 2)
        if (preferences := preferences_by_prompt(filter(is_counted, rows), a, b))
    ]
    values = {model: strength.value for model, strength in strengths.items()}
    data = {
        "main_judge": main,
        "judges": {judge: len(rows) for judge, rows in every.items()},
        "baseline": args.baseline,
        "heldout_use_case": args.heldout_use_case,
        "pairs": pairs,
        "matrix": {a: {b: float(expit(values[a] - values[b])) for b in values if b != a} for a in values},
    }
    run.write_stage(STAGE, measures, data)


def _length_controlled(
    rows: Sequence[Row], completions: Mapping[str, Mapping[Any, Row]], model: str, against: str
) -> Estimate | NoNumber:
    by_prompt = preferences_by_prompt(rows, model, against)
    ours, theirs = completions[model], completions.get(against, {})
    ids = [i for i in by_prompt if i in ours and i in theirs]
    if by_prompt and not ids:
        return NO_LENGTHS
    return length_controlled_win_rate(
        [float(np.mean(by_prompt[i])) for i in ids],
        [len(ours[i]["completion"]) - len(theirs[i]["completion"]) for i in ids],
    )


def _score_measures(
    run: EvaluationRun, models: Sequence[str], judge: str, heldout: set[Any], baseline: str
) -> list[dict[str, Any]]:
    """Mean scores of a scoring judge, greedy and held out apart, the parts of the score, and differences to the
    baseline."""
    scores = {m: read_jsonl(path) for m in models if (path := scores_path(run, judge, m)).is_file()}
    name = {"gold": "gold_reward", "reward": "rm_score"}.get(judge, f"judge_score.{judge}")
    found = []

    def values(model: str, decoding: str, inside: bool = False, part: str | None = None) -> dict[Any, float]:
        return {
            row["id"]: row["score"] if part is None else row["parts"][part]
            for row in scores[model]
            if row["decoding"] == decoding and (row["id"] in heldout) == inside
        }

    def add(name: str, model: str, by_prompt: Mapping[Any, float], against: str | None = None) -> None:
        if by_prompt:
            value = mean_estimate([*by_prompt.values()])
            found.append({**MEASURES.record(name, model, value, against=against), "judge": judge})

    for model, rows in scores.items():
        add(name, model, values(model, "sampled"))
        if judge == "gold":
            add("gold_reward_greedy", model, values(model, "greedy"))
            add("gold_reward_heldout_use_case", model, values(model, "sampled", inside=True))
            for part in rows[0].get("parts") or {}:
                add(f"gold_component.{part}", model, values(model, "sampled", part=part))
                add(f"gold_component_greedy.{part}", model, values(model, "greedy", part=part))
    for model, against in run.compared(scores, baseline):
        for decoding, suffix in (("sampled", ""), ("greedy", "_greedy"))[: 2 if judge == "gold" else 1]:
            ours, theirs = values(model, decoding), values(against, decoding)
            common = sorted(set(ours) & set(theirs))
            add(name + suffix, model, {i: ours[i] - theirs[i] for i in common}, against)
    return found


# ---- in the report --------------------------------------------------------------------------------------------------
def section(results: tables.Results) -> list[tables.Block]:
    """The win rates of every judge and labeler, and the strengths of all models."""
    data = results.stage("compare")
    main, baseline = data["main_judge"], results.baseline
    if main is None:
        raise results.missing("winrate", "nobody judged the completions")
    judges, labelers = (results.names(f"winrate_{of}.") for of in ("judge", "labelers"))
    asks = [
        f"Judge: {results.settings.get('judge') or JUDGES.get(main, main)}",
        tables.Ask("samples", "winrate", 3, baseline),
        tables.Ask("at equal length", "winrate_length_controlled", 3, baseline),
        tables.Ask("greedy", "winrate_greedy", 3, baseline),
        tables.Ask("held-out use case", "winrate_heldout_use_case", 3, baseline),
        "Other judges",
        *(tables.Ask(JUDGES.get(j, j), f"winrate_judge.{j}", 3, baseline) for j in judges),
        "Labelers",
        *(tables.Ask(group, f"winrate_labelers.{group}", 3, baseline) for group in sorted(labelers)),
    ]
    trust = [
        tables.Ask("same verdict in both orders", "judge_consistency"),
        tables.Ask("verdicts for the first answer (.5: fair)", "judge_prefers_first"),
    ]
    trusted = tables.headed(
        "How far to trust the language model", results.table(trust, [tables.Column(JUDGES["lm"], "lm")])
    )
    note = (
        f"Win rates against {tables.label(baseline)}: .5 is equal, a tie counts half. Intervals of 95 % over prompts."
    )
    return [*results.table(asks, results.others), note, *_strengths(results, data), *trusted]


def use_cases(results: tables.Results) -> list[tables.Block]:
    """Win rates by use case, the held-out one among them."""
    prefix = "winrate_use_case."
    asks = [tables.Ask(name, prefix + name, 2, results.baseline, count=True) for name in results.names(prefix)]
    table = results.table(asks, results.others)
    if not table:
        raise results.missing(prefix, "no win rates by use case were measured; the prompts need a column `use_case`")
    return table


def _strengths(results: tables.Results, data: Mapping[str, Any]) -> list[tables.Block]:
    strengths = {m: results.find("bradley_terry", m) for m in results.models}
    strengths = {m: x for m, x in strengths.items() if x and x["value"] is not None}
    if not strengths:
        return []
    models = sorted(strengths, key=lambda m: -strengths[m]["value"])
    wins: dict[tuple[str, str], float] = {}
    for pair in data["pairs"]:
        if pair["judge"] == data["main_judge"]:
            wins[pair["model"], pair["against"]] = pair["value"]
            wins.setdefault((pair["against"], pair["model"]), 1 - pair["value"])

    def over(model: str, other: str) -> tables.Cell:
        if other == model:
            return tables.Cell("–", tone="none")
        expected = data["matrix"].get(model, {}).get(other)
        return tables.Cell(tables.number(wins.get((model, other)), 2), f"model: {tables.number(expected, 2)}")

    rows = [
        tables.Line(tables.label(m), [tables.measured(strengths[m], 2), *(over(m, other) for other in models)])
        for m in models
    ]
    note = (
        "Bradley-Terry strengths in log-odds from all pairs of models, the baseline's being 0; then how often the row "
        "was preferred over the column, and what the strengths say of it. Where the two differ, one number per model "
        "does not tell the whole."
    )
    bars = [("strength (log-odds)", [(tables.label(m), x) for m, x in strengths.items()])]
    return [
        tables.Heading("Strength of all models"),
        bars_plot(bars, "strengths", percent=False),
        tables.Table(["", "strength", *(f"over {tables.label(m)}" for m in models)], rows),
        note,
    ]


_PAPER = ", ".join(f"{tables.label(m)} {tables.number(FIG_3[m], 2)}" for m in ("ppo", "ppo_ptx"))
STAGE = Stage(
    "compare",
    "win rates and strengths from the judgements",
    CompareArguments,
    measure,
    MEASURES,
    of_completions=True,
    questions=(
        Question("Preferred to {}?", "winrate", paper=_PAPER),
        Question("… when decoding greedily?", "winrate_greedy"),
        Question("… at equal length?", "winrate_length_controlled"),
        Question("… on a use case it was not trained on?", "winrate_heldout_use_case"),
    ),
    title="Who wins: judges, use cases, strengths",
    section=section,
)
