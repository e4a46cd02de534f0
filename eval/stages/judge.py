"""Stage `judge`: who says which of two completions is better.

A judge is anything with `judgements(completions, pairs)`: the completions of every model and the pairs of models to
be compared go in, rows come out. Four are here: a gold reward, people, a language model asked in both orders, and a
reward model.

`judgements/<judge>.jsonl`: rows `id` (of the prompt), `decoding`, `a`, `b` (models), `preference` (1: a is better,
.5: a tie, 0: b), and where known `labeler`, `score_a`, `score_b`, `consistent` (same verdict in both orders) and
`first` (share of the orders in which the answer shown first won). `scores/<judge>/<model>.jsonl`: rows `id`,
`decoding`, `score`, `parts` of judges that score.
"""

import importlib
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from prefopt.evaluation.judges.labels import Completions, Row, check_labels, preferences
from prefopt.evaluation.judges.language_model import TEMPLATE, LanguageModelJudge
from prefopt.evaluation.results import FAILED, measure
from prefopt.evaluation.run import EvaluationArguments, EvaluationRun
from prefopt.inference.generate import Completion
from prefopt.inference.journal import fingerprint_of, kept_rows, source_state
from prefopt.inference.jsonl import read_jsonl, write_jsonl
from prefopt.inference.scoring import score_samples
from prefopt.models.loading import known_tokenizer, load_classifier, load_language_model
from prefopt.statistics.intervals import mean_estimate

logger = logging.getLogger(__name__)
Gold = Callable[[Any, str], Any]
JUDGES = ("gold", "human", "lm", "reward")  # the first there is has the headline


@dataclass
class JudgeArguments:
    """Every judge that is named here judges; from Python, `gold_judge` may be the function and `human_judgements` the
    rows themselves."""

    gold_judge: str | None = field(
        default=None,
        metadata={
            "help": 'A function "package.module:name" of (prompt, completion) that gives a number, or an object with '
            "`total` whose other fields are its parts."
        },
    )
    human_judgements: str | None = field(
        default=None,
        metadata={"help": "JSONL file of labels by people; prefopt.evaluation.judges.labels has its format."},
    )
    lm_judge: str | None = field(
        default=None, metadata={"help": "Language model that is asked, in both orders: folder or Hub id."}
    )
    lm_judge_template: str = field(
        default=TEMPLATE,
        metadata={"help": "What it is asked, with {prompt}, {a} and {b}; its next word is A or B."},
    )
    reward_judge: str | None = field(
        default=None, metadata={"help": "Reward model whose higher score wins: folder or Hub id."}
    )


class Judge(Protocol):
    """Gives verdicts on pairs of completions."""

    def judgements(
        self, completions: Completions, pairs: Sequence[tuple[str, str]]
    ) -> list[dict[str, Any]]: ...


class ScoreJudge:
    """The completion with the higher score is preferred; an equal score is a tie.

    Args:
        score: (model, its rows of completions) -> rows `id`, `decoding`, `score`, and `parts` where it has any.
    """

    def __init__(self, score: Callable[[str, Sequence[Row]], list[dict[str, Any]]]) -> None:
        self.score = score
        self.scores: dict[str, list[dict[str, Any]]] = {}

    def judgements(self, completions: Completions, pairs: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
        for model, rows in completions.items():
            self.scores[model] = self.score(model, rows)
        found = []
        for a, b in pairs:
            theirs = {(row["id"], row["decoding"]): row["score"] for row in self.scores[b]}
            for row in self.scores[a]:
                key, score = (row["id"], row["decoding"]), row["score"]
                if key in theirs:
                    found.append({"id": key[0], "decoding": key[1], "a": a, "b": b,
                                  "preference": 0.5 * (1 + (score > theirs[key]) - (score < theirs[key])),
                                  "score_a": score, "score_b": theirs[key]})  # fmt: skip
        return found


class HumanJudge:
    """People's labels of the samples. `stale` counts those left out because they are of other completions."""

    def __init__(self, labels: Sequence[Row], source: str = "human_judgements") -> None:
        self.labels, self.source, self.stale = labels, source, 0

    def judgements(self, completions: Completions, pairs: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
        sampled = {m: [r for r in rows if r["decoding"] == "sampled"] for m, rows in completions.items()}
        labels, self.stale = check_labels(self.labels, sampled, self.source)
        compared = {frozenset(pair) for pair in pairs}
        every = preferences(labels)
        found = [{"decoding": "sampled", **row} for row in every if {row["a"], row["b"]} in compared]
        if len(found) < len(every):
            logger.warning("%s: %d of %d judgements are of models that are not compared here",
                           self.source, len(every) - len(found), len(every))  # fmt: skip
        return found


def gold_scores(gold: Gold) -> Callable[[str, Sequence[Row]], list[dict[str, Any]]]:
    """Scores of a function of prompt and text, for `ScoreJudge`."""

    def score(model: str, rows: Sequence[Row]) -> list[dict[str, Any]]:
        found = []
        for row in rows:
            given = gold(row["prompt"], row["completion"])
            names = [f.name for f in fields(given) if f.name != "total"] if is_dataclass(given) else []
            value = float(getattr(given, "total", given))
            if not np.isfinite(value):
                raise ValueError(
                    f"gold reward of {model}, prompt {row['id']}: {value} is not a finite number"
                )
            parts = {"parts": {name: float(getattr(given, name)) for name in names}} if names else {}
            found.append({"id": row["id"], "decoding": row["decoding"], "score": value, **parts})
        return found

    return score


def load_callable(name: str) -> Callable[..., Any]:
    """The function called "package.module:name".

    >>> load_callable("math:sqrt")(9.0)
    3.0
    """
    module, _, attributes = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for attribute in attributes.split("."):
            found = getattr(found, attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f'cannot import {name!r}: expected "package.module:function" ({error})') from error
    if not callable(found):
        raise ValueError(f"{name!r} is no function but {type(found).__name__}")
    return found


def judgements_path(run: EvaluationRun, judge: str) -> Path:
    return run.folder / "judgements" / f"{judge}.jsonl"


def scores_path(run: EvaluationRun, judge: str, model: str) -> Path:
    return run.folder / "scores" / judge / f"{model}.jsonl"


def run(
    run: EvaluationRun,
    args: EvaluationArguments,
    own: JudgeArguments,
    *,
    progress: Callable[[str], None] = logger.info,
) -> None:
    """Let every named judge judge all pairs of models; a judge that breaks costs its own judgements.

    `stages/judge.json`: how consistent the language model is, and in `data["judges"]` "ok" or the reason per judge.
    """
    completions: dict[str, list[dict[str, Any]]] = {}
    for model in args.models:
        try:
            sampled = [row for row in run.completions(model) if row["sample"] == 0]
        except FileNotFoundError:
            logger.warning("judge: nothing was generated for %s", model)
            continue
        completions[model] = sampled + run.completions(model, "greedy")
    if not completions:
        raise FileNotFoundError(f"no completions in {run.folder}; run `prefopt eval generate` first")
    pairs = list(combinations(completions, 2))
    makers: dict[str, tuple[Any, Callable[[], Judge]]] = {
        "gold": (own.gold_judge, lambda: _gold_judge(own.gold_judge)),
        "human": (own.human_judgements, lambda: _human_judge(own.human_judgements)),
        "lm": (own.lm_judge, lambda: _lm_judge(run, args, own, progress)),
        "reward": (own.reward_judge, lambda: _reward_judge(run, args, own.reward_judge, progress)),
    }
    measures, statuses, counts = [], {}, {}
    for name, (wanted, make) in makers.items():
        path = judgements_path(run, name)
        if wanted is None:
            path.unlink(missing_ok=True)
            shutil.rmtree(run.folder / "scores" / name, ignore_errors=True)
            continue
        progress(f"judge {name}")
        try:
            judge = make()
            rows = judge.judgements(completions, pairs)
            for model, scores in getattr(judge, "scores", {}).items():
                if name != "reward":  # which keeps its own
                    write_jsonl(scores_path(run, name, model), scores)
            write_jsonl(path, rows)
            statuses[name] = "ok"
            counts[name] = {
                "judgements": len(rows),
                "stale": getattr(judge, "stale", 0),
                "too_long": getattr(judge, "too_long", 0),
            }
            measures += _consistency(name, rows)
        except Exception as error:  # any trouble of one judge is that judge's
            logger.exception("judge %s failed", name)
            path.unlink(missing_ok=True)
            statuses[name] = f"{FAILED}{type(error).__name__}: {error}"
    run.write_stage("judge", measures, {"judges": statuses, "counts": counts})
    if statuses and "ok" not in statuses.values():
        said = "; ".join(f"{name}: {status.removeprefix(FAILED)}" for name, status in statuses.items())
        raise ValueError(f"no judge gave a verdict ({said})")


def _consistency(judge: str, rows: Sequence[Row]) -> list[dict[str, Any]]:
    asked: dict[Any, list[Row]] = {}
    for row in rows:
        if "consistent" in row:
            asked.setdefault(row["id"], []).append(row)
    if not asked:
        return []
    return [
        measure(name, judge, mean_estimate([np.mean([float(r[key]) for r in of]) for of in asked.values()]))
        for name, key in (("judge_consistency", "consistent"), ("judge_prefers_first", "first"))
    ]


def _gold_judge(gold: str | Gold) -> Judge:
    return ScoreJudge(gold_scores(load_callable(gold) if isinstance(gold, str) else gold))


def _human_judge(labels: str | Sequence[Row]) -> Judge:
    if not isinstance(labels, str):
        return HumanJudge(labels)
    if not Path(labels).is_file():
        raise ValueError(f"human_judgements: no file {labels!r}")
    return HumanJudge(read_jsonl(labels), labels)


def _lm_judge(
    run: EvaluationRun, args: EvaluationArguments, own: JudgeArguments, progress: Callable[[str], None]
) -> Judge:
    def load() -> Any:
        progress(f"judge lm: loading {own.lm_judge}")
        return load_language_model(own.lm_judge, load_in_4bit=args.load_in_4bit, dtype=args.dtype)

    state = [source_state(own.lm_judge), args.load_in_4bit, args.dtype]
    folder = run.folder / "judgements" / "lm"
    return LanguageModelJudge(
        load, own.lm_judge_template, batch_size=args.batch_size, folder=folder, state=state, progress=progress
    )


def _reward_judge(
    run: EvaluationRun, args: EvaluationArguments, source: str, progress: Callable[[str], None]
) -> Judge:
    """Scores are of the ids as they were sampled where the policy has the reward model's tokens, else of the text."""
    loaded: list[Any] = []

    def compute(model: str, rows: Sequence[Row]) -> list[dict[str, Any]]:
        if not loaded:
            progress(f"judge reward: loading {source}")
            loaded.append(load_classifier(source, load_in_4bit=args.load_in_4bit))
        progress(f"judge reward: {model}")
        reward_model, tokenizer = loaded[0]
        prompts = [row["prompt"] for row in rows]
        drawn = [Completion(row["completion"], row["ids"], row["truncated"]) for row in rows]
        policy = known_tokenizer(args.models[model])
        values = score_samples(reward_model, tokenizer, policy, prompts, drawn, args.batch_size)
        return [
            {"id": row["id"], "decoding": row["decoding"], "score": value}
            for row, value in zip(rows, values, strict=True)
        ]

    def score(model: str, rows: Sequence[Row]) -> list[dict[str, Any]]:
        inputs = [source_state(source), args.load_in_4bit, fingerprint_of(list(rows))]
        return kept_rows(scores_path(run, "reward", model), inputs, lambda: compute(model, rows))

    return ScoreJudge(score)
