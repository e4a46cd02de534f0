"""Is it better, by how much, how sure are we, what did it cost, and where is it bad?

    prefopt eval all --config evaluation.yaml

runs the stages below in their order, as far as their data are given, and writes results.json, report.html and
report.md into `output_dir`. Each stage also runs alone (`prefopt eval judge --config evaluation.yaml`). One YAML file
has the keys of all. A stage reads and writes files in `output_dir` only, so each can run on another machine, and a
second run of a stage does what is missing.
"""

import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prefopt.evaluation.results import FAILED
from prefopt.evaluation.run import EvaluationArguments, EvaluationRun
from prefopt.evaluation.stages import benchmarks as bench
from prefopt.evaluation.stages import compare, diversity, drift, reward_model, tax
from prefopt.evaluation.stages import generate as generation
from prefopt.evaluation.stages import judge as judges
from prefopt.evaluation.stages import overoptimization as overopt
from prefopt.evaluation.stages import ratings as metadata
from prefopt.evaluation.stages import report as report_stage
from prefopt.recipes.common.arguments import UserError, parse
from prefopt.recipes.common.conversations import prompts_from_messages
from prefopt.recipes.common.errors import run_command
from prefopt.recipes.common.rows import check_fields, load_rows

logger = logging.getLogger(__name__)
Given = dict[type, Any]

# Every stage's keys may stand in the one file, whichever stage is run.
ARGUMENTS = (
    EvaluationArguments,
    generation.GenerateArguments,
    judges.JudgeArguments,
    compare.CompareArguments,
    metadata.MetadataArguments,
    reward_model.RewardModelArguments,
    bench.BenchArguments,
    tax.TaxArguments,
    drift.DriftArguments,
    diversity.DiversityArguments,
    overopt.OveroptArguments,
    report_stage.ReportArguments,
)


def main(
    argv: list[str] | None = None,
    *,
    gold: judges.Gold | None = None,
    wall_seconds: dict[str, float] | None = None,
) -> None:
    """Run one stage, or all.

    Args:
        gold: from Python, a gold reward that has no importable name; in place of `gold_judge`.
        wall_seconds: from Python, the seconds of the steps before, for the report.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] not in (*STAGES, "report", "all"):
        named = f", got {argv[0]!r}" if argv and argv[0] not in ("-h", "--help") else ""
        told = {
            **{name: work.__doc__ for name, work in STAGES.items()},
            "report": report.__doc__,
            "all": everything.__doc__,
        }
        lines = "\n".join(f"  {name:<14} {text}" for name, text in told.items())
        raise UserError(f"expected a stage{named}: prefopt eval <stage> --config evaluation.yaml\n{lines}")
    stage, *rest = argv
    given = {
        type(arguments): arguments for arguments in parse(ARGUMENTS, rest, f"prefopt eval {stage}", __doc__)
    }
    args = given[EvaluationArguments]
    if not args.models:
        raise UserError("models is required: the name of each model and its folder or Hub id")
    if gold is not None:
        given[judges.JudgeArguments].gold_judge = gold
    run = EvaluationRun(Path(args.output_dir))
    try:
        if stage == "all":
            everything(run, args, given, wall_seconds)
        elif stage == "report":
            report(run, args, given, wall_seconds)
        else:
            STAGES[stage](run, args, given)
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        raise UserError(error) from error


def generate(run: EvaluationRun, args: EvaluationArguments, given: Given) -> None:
    """every model draws completions of the same prompts"""
    own = given[generation.GenerateArguments]
    rows = load_rows(
        own.prompts,
        split=own.prompts_split,
        check=check_fields("prompt"),
        convert=prompts_from_messages,
        key="prompts",
    )
    generation.run(run, args, own, list(rows), progress=print)


def judge(run: EvaluationRun, args: EvaluationArguments, given: Given) -> None:
    """judges say which of two models' completions is better"""
    judges.run(run, args, given[judges.JudgeArguments], progress=print)


def compare_models(run: EvaluationRun, args: EvaluationArguments, given: Given) -> None:
    """win rates and strengths from the judgements"""
    compare.run(run, args, given[compare.CompareArguments])


def people(run: EvaluationRun, args: EvaluationArguments, given: Given) -> None:
    """ratings and flags that people gave"""
    labels = given[judges.JudgeArguments].human_judgements
    metadata.run(run, args, given[metadata.MetadataArguments], labels)


def reward_models(run: EvaluationRun, args: EvaluationArguments, given: Given) -> None:
    """how well reward models follow rankings they were not trained on"""
    gold = given[judges.JudgeArguments].gold_judge
    gold = judges.load_callable(gold) if isinstance(gold, str) else gold
    own = given[reward_model.RewardModelArguments]
    reward_model.run(run, args, own, gold=gold, progress=print)


def benchmarks(run: EvaluationRun, args: EvaluationArguments, given: Given) -> None:
    """public NLP and safety benchmarks through lm-eval; the alignment tax"""
    bench.run(run, args, given[bench.BenchArguments])


def alignment_tax(run: EvaluationRun, args: EvaluationArguments, given: Given) -> None:
    """bits per byte and tasks of your own held-out data; the alignment tax"""
    tax.run(run, args, given[tax.TaxArguments], progress=print)


def drifts(run: EvaluationRun, args: EvaluationArguments, given: Given) -> None:
    """KL to the baseline and entropy"""
    drift.run(run, args, given[drift.DriftArguments], progress=print)


def diversities(run: EvaluationRun, args: EvaluationArguments, given: Given) -> None:
    """mode collapse: distinct n-grams, unique answers, self-BLEU"""
    diversity.run(run, args, given[diversity.DiversityArguments], progress=print)


def overoptimization(run: EvaluationRun, args: EvaluationArguments, given: Given) -> None:
    """gold and proxy reward against the KL, best of n"""
    overopt.run(run, args, given[overopt.OveroptArguments], given[judges.JudgeArguments], progress=print)


STAGES: dict[str, Callable[[EvaluationRun, EvaluationArguments, Given], None]] = {
    "generate": generate,
    "judge": judge,
    "compare": compare_models,
    "metadata": people,
    "reward-model": reward_models,
    "bench": benchmarks,
    "tax": alignment_tax,
    "drift": drifts,
    "diversity": diversities,
    "overopt": overoptimization,
}


def report(
    run: EvaluationRun,
    args: EvaluationArguments,
    given: Given,
    wall_seconds: dict[str, float] | None = None,
) -> None:
    """results.json, report.html and report.md from what the other stages found"""
    own = given[report_stage.ReportArguments]
    folder = report_stage.run(run, args, own, wall_seconds=wall_seconds)
    print(f"report: {folder / 'report.html'}")


def everything(
    run: EvaluationRun,
    args: EvaluationArguments,
    given: Given,
    wall_seconds: dict[str, float] | None = None,
) -> None:
    """all stages whose data are given, then the report"""
    seconds, notes = {}, {}
    for name, work in STAGES.items():
        run.forget_stage(name)  # an earlier result of a stage that does not run or breaks now would mislead
        if name == "bench" and not _benchmarks_are_named(given[bench.BenchArguments]):
            notes[name] = (
                "no benchmarks were asked for; name some in `bench_tasks` (rows from the Hub) or in "
                "`bench_data_files` (local files), or run `prefopt eval bench` for all"
            )
            continue
        print(f"{name}: {work.__doc__}", flush=True)
        start = time.monotonic()
        try:
            work(run, args, given)
        except Exception as error:  # one stage must not cost the reader the others
            logger.exception("stage %s failed", name)
            notes[name] = f"{FAILED}{type(error).__name__}: {error}"
        seconds[name] = round(time.monotonic() - start, 2)
        run.write_stage("all", [], {"seconds": seconds, "notes": notes})
    report(run, args, given, wall_seconds)
    broken = [
        f"{name}: {note.removeprefix(FAILED)}" for name, note in notes.items() if note.startswith(FAILED)
    ]
    if broken:
        raise RuntimeError("stages that failed: " + "; ".join(broken))


def _benchmarks_are_named(own: bench.BenchArguments) -> bool:
    """Not by default: all of them would be fetched from the Hub."""
    return bool(own.bench_tasks or own.bench_data_files)


if __name__ == "__main__":
    run_command(main, "eval")
