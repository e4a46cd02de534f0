"""Samples to ranked comparisons: by reward models, by a language model that orders all K at once, by a function.

    prefopt rank samples.jsonl --reward_model rm --output rankings.jsonl
    prefopt rank samples.jsonl --reward_model rm0 rm1 rm2 --combine minimum --tie_margin 0.2 --output rankings.jsonl
    prefopt rank samples.jsonl --judge Qwen/Qwen3-8B --orders 4 --output rankings.jsonl
    prefopt rank samples.jsonl --judge Qwen/Qwen3-32B --judge_engine http://host:8000 --output rankings.jsonl
    prefopt rank samples.jsonl --function my_package.scores:helpful --output rankings.jsonl
    prefopt rank samples.jsonl --reward_model rm0 rm1 --people 100 --output rankings.jsonl

Samples are rows of `prompt` and `completions`, as `prefopt sample`, `best-of-n --keep_samples true` and `label next` write
them. A ranking keeps their other fields, and has `ranks`, `ratings` (the score that made them, by which margins are
measured), `scores` [M, K] of each model or order, of several their `disagreement` in bits, and as `labeler` who ranked. With
`--people N` the N prompts that the ranker knows least about go into rankings.people.jsonl, which `prefopt label export`
reads, and are ranked by nobody else. What was asked is kept in rankings.judgements.jsonl, so that another margin or
combination asks nothing; a killed run goes on where it was. rankings.report.json has consistency, bias and cost.
"""

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from string import ascii_uppercase
from typing import Any, ClassVar, Literal

import numpy as np

from prefopt.errors import UserError
from prefopt.evaluation.judges.gold import Gold, gold_function, gold_scores
from prefopt.evaluation.judges.ordering import (
    TEMPLATES,
    By,
    OrderingJudge,
    check_template,
    earlier_wins,
    same_verdicts,
)
from prefopt.evaluation.results import Definition, Measures, jsonable
from prefopt.inference.engines import HELP, Engine, check_engine, engine_state, open_engine
from prefopt.inference.journal import Journal, fingerprint_of, function_state, is_foreign, is_kept, source_state
from prefopt.inference.jsonl import write_json, write_jsonl
from prefopt.inference.scoring import score_rows
from prefopt.labeling.next_tasks import choose_next, pair_uncertainty
from prefopt.models.checkpoints import load_classifier
from prefopt.models.loading import check_language_model, load_language_model
from prefopt.rankings.checks import row_problem
from prefopt.rankings.formats.cleaning import Cleaner
from prefopt.rankings.formats.tables import without_choice
from prefopt.rankings.row import best_and_worst, ranks_from_ratings
from prefopt.rankings.statistics import characters
from prefopt.recipes.common.arguments import parse, setting
from prefopt.recipes.common.preflight import check_reward_models
from prefopt.recipes.common.progress import counting
from prefopt.recipes.common.sources import SourceArguments, check_output, read_rows
from prefopt.recipes.sample import written_rows
from prefopt.statistics.intervals import mean_estimate
from prefopt.statistics.rankings import Pairs
from prefopt.statistics.reward_models import length_correlation, longer_wins_accuracy

logger = logging.getLogger(__name__)
Row = Mapping[str, Any]
# Of them, an entry of the journal.
ROWS_AT_ONCE = 32
# Of a sample, what another ranker said.
OF_ANOTHER = ("ranks", "ratings", "scores", "labeler", "disagreement")
_BIAS = "Zheng et al. 2023, arXiv:2306.05685, section 3.4"
MEASURES = Measures(
    {
        "score": Definition(None, "mean over prompts of the mean score of its completions", "prefopt"),
        "tied_pairs": Definition(None, "share of the pairs of a prompt that tie, mean over prompts", "prefopt"),
        "consistency": Definition(
            True,
            "share of the pairs of completions on which two of the orders in which the judge was asked, or two reward "
            "models, give the same verdict (better, worse, tied); mean over prompts",
            _BIAS,
        ),
        "prefers_first": Definition(
            None,
            "share of the verdicts on pairs that go to the answer shown before the other; .5 is without bias",
            _BIAS,
        ),
        "disagreement": Definition(
            False,
            "mean over the pairs of a prompt of the information that the next ranker would give, in bits",
            "Houlsby et al. 2011, arXiv:1112.5745, Eq. 1",
        ),
        "longer_wins": Definition(
            None,
            "share of the strictly ranked pairs that the longer completion wins, in characters",
            "arXiv:2310.03716",
        ),
        "length_correlation": Definition(
            None, "mean over prompts of Spearman's correlation of rank and length in characters", "arXiv:2310.03716"
        ),
    }
)


@dataclass
class RankArguments:
    """What ranks, and where to write it; one of `reward_model`, `judge` and `function`."""

    LEAST: ClassVar[dict[str, float]] = {"tie_margin": 0, "people": 0, "orders": 1, "batch_size": 1, "seed": 0}

    samples: str | None = setting(None, "Rows of `prompt` and `completions`, as `prefopt sample` writes them.")
    output: str | None = setting(None, "JSONL file for the ranked comparisons.")
    overwrite: bool = setting(False, "Replace what is there of other samples, another ranker or other settings.")
    reward_model: list[str] = setting(list, "Reward models, e.g. of several seeds: folders or Hub ids.")
    combine: Literal["mean", "minimum"] = setting(
        "mean", "Score of several reward models (minimum: arXiv:2310.02743)."
    )
    judge: str | None = setting(None, "Language model that orders all completions of a prompt: folder or Hub id.")
    judge_engine: str = setting("transformers", f"As the judge. {HELP}")
    judge_by: By | None = setting(
        None,
        "letters: the likelihood of each answer's letter; order: the order that it writes; default: letters, and order of a "
        "server that takes no token ids.",
    )
    judge_template: str | None = setting(None, "What the judge is asked, with {prompt} and {answers}.")
    orders: int = setting(2, "Orders in which the judge sees the answers: drawn ones, each of them backwards as well.")
    function: str | None = setting(
        None, '"package.module:name", a function of prompt and completion that gives a number.'
    )
    tie_margin: float = setting(0.0, "Scores that differ by no more tie.")
    keep_tied: bool = setting(False, "Keep rows in which all completions tie; `ties: half` learns from them.")
    keep: Literal["all", "best_and_worst"] = setting(
        "all", "What of a ranking is written; best_and_worst: the pair that DPO on pairs takes of it."
    )
    people: int = setting(0, "Prompts to hand to people, those the ranker is least sure about.")
    people_k: int = setting(4, "Most completions of such a prompt.")
    random_share: float = setting(0.1, "Share of these prompts drawn at random, for an unbiased estimate.")
    load_in_4bit: bool = setting(False, "Quantize the weights of reward models or judge to nf4.")
    dtype: str = setting("auto", "auto (as saved; of a reward model, as trained), float32, bfloat16 or float16.",
                         choices=["auto", "float32", "bfloat16", "float16"])  # fmt: skip
    batch_size: int = setting(64, "Completions scored, or questions asked, at once.")
    seed: int = setting(42, "Seed of the orders, and of what people get at random.")

    @property
    def loading(self) -> dict[str, Any]:
        """How models are loaded."""
        return {"load_in_4bit": self.load_in_4bit, "dtype": self.dtype}


# ---- who ranks ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Ranker:
    """Who ranks: its name as a labeler, all that its judgements depend on, and the parts of it (models) that judge rows.

    A part gives for rows and their numbers as many judgements, with `scores` [M, K].
    """

    name: str
    state: Any
    parts: Sequence[Callable[[Sequence[Row], Sequence[int]], list[dict[str, Any]]]]


def ranker_of(args: RankArguments, gold: Gold | None = None) -> Ranker:
    """The one that the arguments name; `gold` is from Python the function itself.

    Raises:
        UserError: none is named, or more than one, or it is not what it should be.
    """
    named = [key for key in ("reward_model", "judge", "function") if getattr(args, key)]
    if len(named) != 1:
        raise UserError(
            f"{' and '.join(named) or 'no ranker'} given; expected one of reward_model (one or several), judge and function"
        )
    if args.reward_model:
        for source in args.reward_model:
            check_reward_models(reward_model=source)
        places = Counter(map(os.path.realpath, args.reward_model))
        if twice := [source for source in args.reward_model if places[os.path.realpath(source)] > 1]:
            raise UserError(
                f"reward_model: {' and '.join(twice)} are one model, which agrees with itself; name it once"
            )
        state = [[source_state(source) for source in args.reward_model], args.loading, args.batch_size]
        name = (
            f"{args.combine} of {', '.join(args.reward_model)}" if len(args.reward_model) > 1 else args.reward_model[0]
        )
        return Ranker(name, state, [_reward_model(source, args) for source in args.reward_model])
    if args.judge:
        if args.judge_template is not None:
            check_template(args.judge_template)
        check_engine(args.judge_engine)
        if args.judge_engine == "transformers":
            try:
                check_language_model(args.judge)
            except ValueError as error:
                raise UserError(f"judge: {error}") from error
        options = {"orders": args.orders, "batch_size": args.batch_size, "seed": args.seed}
        load = cache(lambda: OrderingJudge(_engine(args), args.judge_by, args.judge_template, **options))
        question = TEMPLATES.get(args.judge_by) if args.judge_template is None else args.judge_template
        asked = [args.judge_by, question, args.loading, options, engine_state(args.judge_engine)]
        return Ranker(
            args.judge, [source_state(args.judge), asked], [lambda rows, numbers: load().judge(rows, numbers)]
        )
    score = gold_scores(gold or gold_function(args.function), "")
    return Ranker(args.function, function_state(args.function), [_function(args.function, score)])


def _engine(args: RankArguments) -> Engine:
    load = partial(load_language_model, args.judge, **args.loading)
    return open_engine(args.judge_engine, str(args.judge), load, **args.loading)


def _reward_model(source: str, args: RankArguments) -> Callable[..., list[dict[str, Any]]]:
    load = cache(lambda: load_classifier(source, **args.loading))

    def judge(rows: Sequence[Row], numbers: Sequence[int]) -> list[dict[str, Any]]:
        try:
            return [{"scores": [scores]} for scores in score_rows(*load(), rows, args.batch_size, numbers)]
        except UserError as error:
            raise UserError(f"{args.samples}, {source}, {error}") from error

    return judge


def _function(name: str, score: Callable[..., list[dict[str, Any]]]) -> Callable[..., list[dict[str, Any]]]:
    def judge(rows: Sequence[Row], numbers: Sequence[int]) -> list[dict[str, Any]]:
        flat = [
            {"id": number, "decoding": "", "prompt": row["prompt"], "completion": completion}
            for row, number in zip(rows, numbers, strict=True)
            for completion in row["completions"]
        ]
        scores = iter([one["score"] for one in score(name, flat)])
        return [{"scores": [[next(scores) for _ in row["completions"]]]} for row in rows]

    return judge


def judgements(ranker: Ranker, rows: Sequence[Row], numbers: Sequence[int], journal: Journal) -> list[dict[str, Any]]:
    """A judgement of every row, its `scores` [M, K] of all parts of the ranker."""
    found: list[dict[str, Any]] = [{"scores": []} for _ in rows]
    starts = range(0, len(rows), ROWS_AT_ONCE)
    with counting("ranked") as progress:
        for number, part in enumerate(ranker.parts):
            slices = [slice(start, start + ROWS_AT_ONCE) for start in starts]
            entries = journal.entries(len(slices), lambda i, part=part, of=slices: part(rows[of[i]], numbers[of[i]]))
            for start, of, entry in zip(starts, slices, entries, strict=True):
                for row, one in zip(found[of], entry, strict=True):
                    row |= {**one, "scores": row["scores"] + one["scores"]}
                progress(number * len(rows) + min(start + ROWS_AT_ONCE, len(rows)), len(rows) * len(ranker.parts))
    return found


# ---- what becomes of it ---------------------------------------------------------------------------------------------
def ranked(row: Row, judgement: Row, args: RankArguments, labeler: str) -> dict[str, Any]:
    """A sample with its ranks, by the mean or the minimum of the scores of all."""
    scores = np.asarray(judgement["scores"])
    of = scores.min(axis=0) if args.combine == "minimum" and args.reward_model else scores.mean(axis=0)
    of_several = {"disagreement": disagreement(scores)} if len(scores) > 1 else {}
    ratings = of.tolist()
    ranks = ranks_from_ratings(ratings, args.tie_margin)
    return {**row, "ranks": ranks, "ratings": ratings, "scores": scores.tolist(), **of_several, "labeler": labeler}


def disagreement(scores: np.ndarray) -> float:
    """Mean over the pairs of completions of `pair_uncertainty` by disagreement, from scores `[M, K]`, in bits."""
    pairs = np.triu_indices(scores.shape[1], 1)
    return float(pair_uncertainty(scores, by="disagreement")[pairs].mean())


def samples_of(args: RankArguments, counts: Counter[str]) -> tuple[list[dict[str, Any]], list[int]]:
    """The rows that can be ranked, without what another ranker said of them, and their numbers in the file.

    Raises:
        UserError: a row that is no sample.
    """
    clean = Cleaner(counts, keep_tied=True)
    rows, numbers = [], []
    for number, row in enumerate(read_rows(SourceArguments(args.samples))):
        row = {name: value for name, value in without_choice(row).items() if name not in OF_ANOTHER}
        if not isinstance(row.get("completions"), list):
            problem = f"field 'completions': expected a list of completions, got {row.get('completions')!r:.80}"
            raise UserError(f"{args.samples} row {number}: {problem}; `prefopt sample` draws them")
        row = {**row, "prompt": row.get("prompt"), "ratings": [0] * len(row["completions"])}
        try:
            cleaned = clean(row)
        except UserError as error:
            raise UserError(f"{args.samples} row {number}: {error}") from error
        if cleaned is None:
            continue
        if problem := row_problem(cleaned, ("prompt", "completions")):
            raise UserError(f"{args.samples} row {number}: {problem}")
        if args.judge and len(cleaned["completions"]) > len(ascii_uppercase):
            raise UserError(
                f"{args.samples} row {number}: {len(cleaned['completions'])} completions; a judge names 26"
            )
        rows.append({name: value for name, value in cleaned.items() if name not in ("ranks", "ratings")})
        numbers.append(number)
    if not rows:
        raise UserError(f"{args.samples}: no row with two different completions. Left out: {dict(counts)}")
    return rows, numbers


def main(argv: list[str] | None = None, *, gold: Gold | None = None) -> None:
    """Rank samples."""
    (args,) = parse((RankArguments,), argv, "prefopt rank", __doc__, positional=("samples",))
    rank(args, gold)


def rank(args: RankArguments, gold: Gold | None = None) -> None:
    """Rank the samples and write rankings, judgements and report.

    Raises:
        UserError: bad arguments or rows, or files of others where this would write.
    """
    if not args.samples or not args.output:
        raise UserError(f"{'output' if args.samples else 'samples'} is required: a .jsonl file")
    out = Path(args.output)
    files = {name: out.with_suffix(f".{name}") for name in ("judgements.jsonl", "report.json", "people.jsonl")}
    for path in (out, *files.values()):
        check_output(path, [args.samples], "output")
    if is_foreign(files["judgements.jsonl"]):
        raise UserError(
            f"output: {files['judgements.jsonl']} is there, and this command did not write it; name another output"
        )
    ranker = ranker_of(args, gold)
    how = {"n": args.people, "k": args.people_k, "random_share": args.random_share, "seed": args.seed}
    if args.people:
        # Without rows it checks the arguments alone.
        choose_next([], [], **how)
    counts: Counter[str] = Counter()
    rows, numbers = samples_of(args, counts)
    inputs = {"rows": fingerprint_of(rows), "ranker": ranker.state}
    if out.exists() and not args.overwrite and not is_kept(files["judgements.jsonl"], inputs):
        raise UserError(
            f"output: {out} is there, of other samples, another ranker or other settings; name another file, or replace it "
            "with --overwrite"
        )
    kept = written_rows(
        replace(args, output=str(files["judgements.jsonl"])),
        inputs,
        lambda journal: judgements(ranker, rows, numbers, journal),
    )
    judged = [(row, one) for row, one in zip(rows, kept, strict=True) if one["scores"]]
    for one in kept:
        if not one["scores"]:
            why = "longer than the judge's context" if one["too_long"] else "of which the judge said no order"
            counts[f"rows {why}"] += 1
    for_people: list[dict[str, Any]] = []
    if args.people:
        scores = [one["scores"] for _, one in judged]
        by = "disagreement" if min(map(len, scores), default=1) > 1 else "margin"
        numbered = [{**row, "_number": number} for number, (row, _) in enumerate(judged)]
        for_people = choose_next(numbered, scores, **how, by=by, source=args.samples)
        taken = {row.pop("_number") for row in for_people}
        judged = [pair for number, pair in enumerate(judged) if number not in taken]
    every = [ranked(row, one, args, ranker.name) for row, one in judged]
    written = list(_written(every, args, counts))
    counts += Counter()
    if not written and not for_people:
        raise UserError(f"{args.samples}: no comparison in {len(rows)} rows. Left out: {_in_words(counts)}")
    write_jsonl(out, written, replace=args.overwrite)
    if for_people:
        write_jsonl(files["people.jsonl"], for_people, replace=args.overwrite)
    elif args.overwrite:
        # Of an earlier call: what stands there is ranked here now.
        files["people.jsonl"].unlink(missing_ok=True)
    report = report_of(ranker, every, [one for _, one in judged], kept, counts)
    write_json(files["report.json"], jsonable(report), replace=args.overwrite)
    _tell(report, args, len(rows), len(written), len(for_people), files)


def _written(rows: Sequence[dict[str, Any]], args: RankArguments, counts: Counter[str]) -> Iterator[dict[str, Any]]:
    for row in rows:
        pair = best_and_worst(row) if args.keep == "best_and_worst" else None
        if pair is not None:
            places = [row["completions"].index(completion) for completion in pair["completions"]]
            yield {**pair, "scores": [[scores[i] for i in places] for scores in row["scores"]]}
        elif len(set(row["ranks"])) == 1 and not args.keep_tied:
            counts["rows in which all completions tie"] += 1
        else:
            yield row


def report_of(
    ranker: Ranker, rows: Sequence[Row], of_rows: Sequence[Row], every: Sequence[Row], counts: Mapping[str, int]
) -> dict[str, Any]:
    """What the rankings say of the ranker: how consistent it is, what it takes for quality, and what it cost."""
    lengths = [[characters(completion) for completion in row["completions"]] for row in rows]
    ranks = [row["ranks"] for row in rows]
    pairs = Pairs.of(ranks)
    found = {
        "score": mean_estimate([float(np.mean(row["ratings"])) for row in rows]),
        "tied_pairs": mean_estimate(
            [float(np.equal.outer(r, r)[np.triu_indices(len(r), 1)].mean()) for r in map(np.asarray, ranks)]
        ),
        "longer_wins": longer_wins_accuracy(pairs, lengths),
        "length_correlation": length_correlation([[-rank for rank in of] for of in ranks], lengths),
    }
    shares = [share for row in rows if (share := same_verdicts(row["scores"])) is not None]
    if shares:
        found["consistency"] = mean_estimate(shares)
        found["disagreement"] = mean_estimate([row["disagreement"] for row in rows if "disagreement" in row])
    shown = [earlier_wins(one["scores"], one["places"]) for one in of_rows if one.get("places")]
    if shown:
        found["prefers_first"] = mean_estimate(shown)
    cost: dict[str, Any] = {"completions": sum(len(row["completions"]) for row in rows) * len(ranker.parts)}
    if any("calls" in one for one in every):
        cost = {
            name: None if any(one[name] is None for one in every) else sum(one[name] for one in every)
            for name in ("calls", "prompt_tokens", "completion_tokens", "unread")
        }
    measures = [MEASURES.record(name, ranker.name, value) for name, value in found.items() if value.n]
    return {"ranker": ranker.name, "rows": len(rows), "left_out": dict(counts), "cost": cost, "measures": measures}


def _tell(report: Row, args: RankArguments, of: int, written: int, people: int, files: Mapping[str, Path]) -> None:
    if report["left_out"]:
        print(f"left out: {_in_words(report['left_out'])}")
    for measure in report["measures"]:
        interval = "" if measure["ci_low"] is None else f" [{measure['ci_low']:.3f}, {measure['ci_high']:.3f}]"
        print(f"{measure['name'].replace('_', ' ')}: {measure['value']:.3f}{interval} (n = {measure['n']:,})")
    if "calls" in report["cost"]:
        names = {"calls": "calls", "prompt_tokens": "tokens read", "completion_tokens": "tokens written"}
        known = [f"{report['cost'][key]:,} {name}" for key, name in names.items() if report["cost"][key] is not None]
        print(f"cost: {', '.join(known)}; {report['cost']['unread']:,} answers without an order in them")
    if people:
        print(f"to export: {files['people.jsonl']} ({people} prompts, which the ranker is least sure about)")
    print(f"ranked comparisons: {args.output} ({written:,} of {of:,} rows by {report['ranker']})")


def _in_words(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n:,} {reason}" for reason, n in counts.items()) or "nothing"
