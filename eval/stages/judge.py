"""Stage `judge`: who says which of two completions is better.

A judge is anything with `judgements(completions, pairs)`: the completions of every model and the pairs of models to
be compared go in, rows come out. Four are in `judges/`: a gold reward, people, a language model asked in both orders,
and a reward model.

`judgements/<judge>.jsonl`: rows `id` (of the prompt), `decoding`, `a`, `b` (models), `preference` (1: a is better,
.5: a tie, 0: b), and where known `labeler`, `score_a`, `score_b`, `consistent` (same verdict in both orders) and
`first` (share of the orders in which the answer shown first won). `scores/<judge>/<model>.jsonl`: rows `id`,
`decoding`, `score`, `parts` of judges that score.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from prefopt.errors import UserError
from prefopt.evaluation.judges.gold import ScoreJudge, gold_function, gold_scores
from prefopt.evaluation.judges.language_model import TEMPLATE, LanguageModelJudge
from prefopt.evaluation.judges.people import Completions, HumanJudge, Row
from prefopt.evaluation.judges.reward import RewardModel
from prefopt.evaluation.results import Definition, Measures, NoNumber, attempt
from prefopt.evaluation.run import EvaluationArguments, EvaluationRun, Stage, named_rows
from prefopt.inference.engines import Engine, check_engine, engine_state, open_engine
from prefopt.inference.journal import fingerprint_of, kept_rows, set_aside, source_state, take_back
from prefopt.inference.jsonl import write_jsonl
from prefopt.models.loading import load_language_model
from prefopt.statistics.intervals import mean_estimate

logger = logging.getLogger(__name__)
# The first there is has the headline.
JUDGES = {"gold": "gold reward", "human": "people", "lm": "language model", "reward": "reward model"}
_BIAS = "Zheng et al. 2023, arXiv:2306.05685, section 3.4"
MEASURES = Measures(
    {
        "judge_consistency": Definition(
            True,
            "share of the pairs on which the language model gives the same verdict with the two answers exchanged; "
            "interval over prompts",
            _BIAS,
        ),
        "judge_prefers_first": Definition(
            None,
            "share of its verdicts that the language model gives to the answer shown first; .5 is without bias",
            _BIAS,
        ),
    }
)


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
        metadata={"help": "JSONL file of labels by people; prefopt.evaluation.judges.people has its format."},
    )
    lm_judge: str | None = field(
        default=None, metadata={"help": "Language model that is asked, in both orders: folder or Hub id."}
    )
    lm_judge_engine: str | None = field(
        default=None, metadata={"help": "What runs it, as `engine`, which is the default: its server may be another."}
    )
    lm_judge_template: str = field(
        default=TEMPLATE, metadata={"help": "What it is asked, with {prompt}, {a} and {b}; its next word is A or B."}
    )
    reward_judge: str | None = field(
        default=None, metadata={"help": "Reward model whose higher score wins: folder or Hub id."}
    )

    def __post_init__(self) -> None:
        if self.lm_judge_engine is not None:
            check_engine(self.lm_judge_engine)

    def labels(self) -> tuple[Sequence[Row], str]:
        """The labels by people, and where they stand."""
        if not isinstance(self.human_judgements, str):
            return self.human_judgements, "human_judgements"
        return named_rows("human_judgements", self.human_judgements), self.human_judgements


class Judge(Protocol):
    """Gives verdicts on pairs of completions."""

    def judgements(self, completions: Completions, pairs: Sequence[tuple[str, str]]) -> list[dict[str, Any]]: ...


def called(judge: str, source: str | None = None) -> str:
    """A judge in a sentence, with the model that it is.

    >>> called("human"), called("gold"), called("lm", "Qwen/Qwen3-8B")
    ('people', 'the gold reward', 'the language model Qwen/Qwen3-8B')
    """
    name = JUDGES.get(judge, f"judge {judge}")
    of = "" if source is None else f" {Path(source).name if Path(source).exists() else source}"
    return name + of if judge == "human" else f"the {name}{of}"


def judgements_path(run: EvaluationRun, judge: str) -> Path:
    return run.folder / "judgements" / f"{judge}.jsonl"


def scores_path(run: EvaluationRun, judge: str, model: str) -> Path:
    return run.folder / "scores" / judge / f"{model}.jsonl"


def measure(run: EvaluationRun, args: EvaluationArguments, own: JudgeArguments) -> None:
    """Let every named judge judge all pairs of models; a judge that breaks costs its own judgements.

    `stages/judge.json`: how consistent the language model is, and in `data` per judge "ok" or the reason (`judges`) and
    what it is in a sentence (`called`).
    """
    completions = {
        m: run.first_samples(m) + run.completions(m, "greedy") for m in args.models if run.has_completions(m)
    }
    if missing := [model for model in args.models if model not in completions]:
        logger.warning("judge: nothing was generated for %s", ", ".join(missing))
    if not completions:
        raise FileNotFoundError(f"no completions in {run.folder}; run `prefopt eval generate` first")
    makers: dict[str, tuple[Any, Callable[[], Judge]]] = {
        "gold": (own.gold_judge, lambda: ScoreJudge(gold_scores(gold_function(own.gold_judge)))),
        "human": (own.human_judgements, lambda: HumanJudge(*own.labels())),
        "lm": (own.lm_judge, lambda: _lm_judge(run, args, own)),
        "reward": (own.reward_judge, lambda: _reward_judge(run, args, own.reward_judge)),
    }
    measures: list[dict[str, Any]] = []
    counts: dict[str, dict[str, int]] = {}

    def verdicts(name: str, make: Callable[[], Judge]) -> None:
        judge = make()
        rows = judge.judgements(completions, list(combinations(completions, 2)))
        for model, scores in getattr(judge, "scores", {}).items():
            if name != "reward":  # which keeps its own
                write_jsonl(scores_path(run, name, model), scores)
        write_jsonl(judgements_path(run, name), rows)
        counts[name] = {"judgements": len(rows)} | {key: getattr(judge, key, 0) for key in ("stale", "too_long")}
        measures.extend(_consistency(name, rows))

    broken: dict[str, NoNumber | None] = {}
    for name, (wanted, make) in makers.items():
        kept = (judgements_path(run, name), run.folder / "scores" / name)
        if wanted is None:
            for path in kept:
                set_aside(path)
            continue
        for path in kept:
            take_back(path)
        run.progress(f"judge {name}")
        broken[name] = attempt(f"judge {name}", partial(verdicts, name, make))
        if broken[name] is not None:
            set_aside(judgements_path(run, name))
    statuses = {name: "ok" if why is None else str(why) for name, why in broken.items()}
    names = {name: called(name, {"lm": own.lm_judge, "reward": own.reward_judge}.get(name)) for name in broken}
    run.write_stage(STAGE, measures, {"judges": statuses, "counts": counts, "called": names})
    if broken and all(broken.values()):
        reasons = "; ".join(f"{name}: {why.reason}" for name, why in broken.items())
        raise UserError(f"no judge gave a verdict ({reasons})")


def _consistency(judge: str, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """How often a judge that was asked in both orders says the same, and prefers what it was shown first."""
    asked: dict[Any, list[Row]] = {}
    for row in rows:
        if "consistent" in row:
            asked.setdefault(row["id"], []).append(row)
    return [
        MEASURES.record(name, judge, mean_estimate([np.mean([float(r[key]) for r in of]) for of in asked.values()]))
        for name, key in (("judge_consistency", "consistent"), ("judge_prefers_first", "first"))
        if asked
    ]


def _lm_judge(run: EvaluationRun, args: EvaluationArguments, own: JudgeArguments) -> Judge:
    engine = own.lm_judge_engine or args.engine

    def load() -> Engine:
        run.progress(f"judge lm: loading {own.lm_judge}")
        return open_engine(
            engine, own.lm_judge, partial(load_language_model, own.lm_judge, **args.loading), **args.loading
        )

    return LanguageModelJudge(
        load,
        own.lm_judge_template,
        batch_size=args.batch_size,
        folder=run.folder / "judgements" / "lm",
        state=[source_state(own.lm_judge), args.load_in_4bit, args.dtype, *engine_state(engine).values()],
        progress=run.progress,
    )


def _reward_judge(run: EvaluationRun, args: EvaluationArguments, source: str) -> Judge:
    reward_model = RewardModel(source, args, run.progress)

    def score(model: str, rows: Sequence[Row]) -> list[dict[str, Any]]:
        def compute() -> list[dict[str, Any]]:
            run.progress(f"judge reward: {model}")
            return [
                {"id": row["id"], "decoding": row["decoding"], "score": value}
                for row, value in zip(rows, reward_model.scores(model, rows), strict=True)
            ]

        inputs = [source_state(source), args.load_in_4bit, args.dtype, fingerprint_of(list(rows))]
        return kept_rows(scores_path(run, "reward", model), inputs, compute)

    return ScoreJudge(score)


STAGE = Stage(
    "judge",
    "judges say which of two models' completions is better",
    JudgeArguments,
    measure,
    MEASURES,
    of_completions=True,
)
