"""Is it better, by how much, how sure are we, what did it cost, and where is it bad?

    prefopt eval generate --config evaluation.yaml
    prefopt eval judge --config evaluation.yaml
    prefopt eval compare --config evaluation.yaml

One YAML file has the keys of all stages. A stage reads and writes files in `output_dir` only, so each can run on
another machine, and a second run of a stage does what is missing.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prefopt.evaluation import compare, generation, judges, metadata
from prefopt.evaluation.run import EvaluationArguments, EvaluationRun
from prefopt.recipes.arguments import UserError, parse
from prefopt.recipes.data import check_fields, load_rows

# Every stage's keys may stand in the one file, whichever stage is run.
ARGUMENTS = (
    EvaluationArguments,
    generation.GenerateArguments,
    judges.JudgeArguments,
    compare.CompareArguments,
    metadata.MetadataArguments,
)


def main(argv: list[str] | None = None) -> None:
    """Run one stage."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] not in STAGES:
        named = f", got {argv[0]!r}" if argv and argv[0] not in ("-h", "--help") else ""
        lines = "\n".join(f"  {name:<14} {work.__doc__}" for name, work in STAGES.items())
        raise UserError(f"expected a stage{named}: prefopt eval <stage> --config evaluation.yaml\n{lines}")
    stage, *rest = argv
    given = {type(arguments): arguments for arguments in parse(ARGUMENTS, rest, f"prefopt eval {stage}")}
    args = given[EvaluationArguments]
    if not args.models:
        raise UserError("models is required: the name of each model and its folder or Hub id")
    try:
        STAGES[stage](EvaluationRun(Path(args.output_dir)), args, given)
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        raise UserError(error) from error


def generate(run: EvaluationRun, args: EvaluationArguments, given: dict[type, Any]) -> None:
    """every model draws completions of the same prompts"""
    own = given[generation.GenerateArguments]
    rows = load_rows(own.prompts, split=own.prompts_split, check=check_fields("prompt"), key="prompts")
    generation.run(run, args, own, list(rows), progress=print)


def judge(run: EvaluationRun, args: EvaluationArguments, given: dict[type, Any]) -> None:
    """judges say which of two models' completions is better"""
    judges.run(run, args, given[judges.JudgeArguments], progress=print)


def compare_models(run: EvaluationRun, args: EvaluationArguments, given: dict[type, Any]) -> None:
    """win rates and strengths from the judgements"""
    compare.run(run, args, given[compare.CompareArguments])


def people(run: EvaluationRun, args: EvaluationArguments, given: dict[type, Any]) -> None:
    """ratings and flags that people gave"""
    labels = given[judges.JudgeArguments].human_judgements
    metadata.run(run, args, given[metadata.MetadataArguments], labels)


STAGES: dict[str, Callable[[EvaluationRun, EvaluationArguments, dict[type, Any]], None]] = {
    "generate": generate,
    "judge": judge,
    "compare": compare_models,
    "metadata": people,
}


if __name__ == "__main__":
    main()
