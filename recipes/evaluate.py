"""Is it better, by how much, how sure are we, what did it cost, and where is it bad?

    prefopt eval all --config evaluation.yaml

runs the stages below in their order, as far as their data are given, and writes results.json, report.html and
report.md into `output_dir`. Each stage also runs alone (`prefopt eval judge --config evaluation.yaml`). One YAML file
has the keys of all. A stage reads and writes files in `output_dir` only, so each can run on another machine, and a
second run of a stage does what is missing. `engine` says what draws and likelihoods are read by; the processes of
`accelerate launch -m prefopt.recipes.evaluate generate` share the prompts.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from prefopt.errors import UserError
from prefopt.evaluation.benchmarks.reward_yardsticks import YARDSTICKS
from prefopt.evaluation.judges.gold import Gold
from prefopt.evaluation.results import Failed, NoNumber, Skipped, attempt, no_number
from prefopt.evaluation.run import EvaluationArguments, EvaluationRun, Stage
from prefopt.evaluation.stages import STAGES, benchmarks, generate, report, reward_model
from prefopt.evaluation.stages.judge import JudgeArguments
from prefopt.inference import processes
from prefopt.recipes.common.arguments import choose, parse
from prefopt.recipes.common.conversations import prompts_from_messages
from prefopt.recipes.common.rows import check_fields, load_rows

# Every stage's keys may stand in the one file, whichever stage is run.
ARGUMENTS = (EvaluationArguments, *(stage.arguments for stage in (*STAGES, report.STAGE)))
NO_BENCHMARKS = Skipped(
    "no benchmarks were asked for; name some in `bench_tasks` (rows from the Hub) or in `bench_data_files` (local "
    "files), or run `prefopt eval bench` for all"
)


def main(
    argv: list[str] | None = None, *, gold: Gold | None = None, wall_seconds: dict[str, float] | None = None
) -> None:
    """Run one stage, or all.

    Args:
        gold: from Python, a gold reward that has no importable name; in place of `gold_judge`.
        wall_seconds: from Python, the seconds of the steps before, for the report.
    """
    stages = {stage.name: stage for stage in (*STAGES, report.STAGE, ALL)}
    texts = {name: stage.answers for name, stage in stages.items()}
    name, rest = choose("stage", texts, argv, "prefopt eval <stage> --config evaluation.yaml")
    evaluation = Evaluation(parse(ARGUMENTS, rest, f"prefopt eval {name}", __doc__), wall_seconds)
    evaluation.check_models(name)
    if gold is not None:
        evaluation.given[JudgeArguments].gold_judge = gold
    try:
        if not processes.is_main():
            # All draw; the rest is the first one's.
            if name in (generate.STAGE.name, "all"):
                evaluation.measure(generate.STAGE)
        elif name == "all":
            evaluation.all()
        elif name == "report":
            evaluation.report()
        else:
            evaluation.one(stages[name])
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        raise UserError(error) from error


class Evaluation:
    """The stages with the arguments of the command.

    Args:
        arguments: an instance of each of `ARGUMENTS`.
        wall_seconds: of the steps before, for the report.
    """

    def __init__(self, arguments: Sequence[Any], wall_seconds: dict[str, float] | None = None) -> None:
        self.given: dict[type, Any] = {type(one): one for one in arguments}
        self.args: EvaluationArguments = self.given[EvaluationArguments]
        self.run = EvaluationRun(Path(self.args.output_dir), progress=print)
        self.wall_seconds = wall_seconds
        before = (self.run.stage(ALL.name) or {"data": {}})["data"]
        self.seconds: dict[str, float] = dict(before.get("seconds", {}))
        self.notes: dict[str, NoNumber] = {name: no_number(why) for name, why in before.get("notes", {}).items()}

    def check_models(self, stage: str) -> None:
        """Rankings are scored by reward models; every other stage is about the policies."""
        implicit = self.given[reward_model.RewardModelArguments].implicit_rewards
        if not self.args.models and (implicit or stage not in (reward_model.STAGE.name, report.STAGE.name)):
            raise UserError("models is required: the name of each model and its folder or Hub id")

    def measure(self, stage: Stage) -> None:
        own = self.given[stage.arguments]
        if stage is generate.STAGE:
            own = replace(own, prompts=held_out_prompts(own))
        elif stage is reward_model.STAGE:
            own = replace(own, on=None, dataset=None, yardsticks=_yardsticks(own))
        stage.measure(self.run, self.args, own, *(self.given[arguments] for arguments in stage.reads))

    def timed(self, stage: Stage) -> None:
        """Measure, and add the seconds to those of earlier runs, whose work this one goes on with."""
        start = time.monotonic()
        try:
            self.measure(stage)
        finally:
            self.seconds[stage.name] = round(self.seconds.get(stage.name, 0.0) + time.monotonic() - start, 2)
            self.write_state()

    def write_state(self) -> None:
        """What the report shows of all runs so far."""
        notes = {name: str(why) for name, why in self.notes.items()}
        self.run.write_stage(ALL, [], {"seconds": self.seconds, "notes": notes})

    def one(self, stage: Stage) -> None:
        """A stage by itself.

        Raises:
            UserError: a part of it failed; what it found otherwise is kept.
        """
        self.timed(stage)
        content = self.run.stage(stage.key)
        for line in self.run.headlines(stage):
            print(line)
        print(f"written: {self.run.stage_path(stage.key)}")
        found = [(f"{m['name']} of {m['model']}", m["reason"]) for m in content["measures"] if m["status"] == "failed"]
        # "ok" or the reason for each model that is generated for or scored, and for each judge.
        of_stage = {"generate": "models", "judge": "judges", "overopt": "scored"}
        statuses = content["data"].get(of_stage.get(stage.name, ""), {})
        found += [(name, why.reason) for name, text in statuses.items() if isinstance(why := no_number(text), Failed)]
        if found:
            more = f" ({len(found) - 1} more failed)" if len(found) > 1 else ""
            raise UserError(f"{stage.name}: {found[0][0]} failed: {found[0][1]}{more}; what else it found is kept")

    def report(self) -> None:
        own = self.given[report.ReportArguments]
        folder = report.measure(self.run, self.args, own, wall_seconds=self.wall_seconds)
        print(f"report: {folder / 'report.html'}")

    def all(self) -> None:
        """All stages whose data are given, then the report; a stage that breaks does not cost the reader the others."""
        # Every stage measures completions of these, so a mistake in them ends the command before the first.
        held_out_prompts(self.given[generate.GenerateArguments])
        self.notes.clear()
        for stage in STAGES:
            # An earlier result of what does not run or breaks now would mislead.
            self.run.forget_stage(stage.name)
            if stage is benchmarks.STAGE and not self._benchmarks_are_named():
                self.notes[stage.name] = NO_BENCHMARKS
                self.seconds.pop(stage.name, None)
                continue
            print(f"{stage.name}: {stage.answers}", flush=True)
            broken = attempt(f"stage {stage.name}", partial(self.timed, stage))
            if broken is not None:
                self.notes[stage.name] = broken
        self.write_state()
        self.report()
        failed = [f"{name}: {why.reason}" for name, why in self.notes.items() if isinstance(why, Failed)]
        if failed:
            raise RuntimeError("stages that failed: " + "; ".join(failed))

    def _benchmarks_are_named(self) -> bool:
        """Not by default: all of them would be fetched from the Hub."""
        own = self.given[benchmarks.BenchArguments]
        return bool(own.bench_tasks or own.bench_data_files)


ALL = Stage("all", "all stages whose data are given, then the report", EvaluationArguments, Evaluation.all)


def held_out_prompts(own: generate.GenerateArguments) -> list[dict[str, Any]]:
    """The rows that the models answer, checked."""
    rows = load_rows(
        own.prompts,
        split=_split(own.prompts, own.prompts_split) if own.prompts_split == "test" else own.prompts_split,
        check=check_fields("prompt"),
        convert=prompts_from_messages,
        key="prompts",
    )
    return list(rows)


def _yardsticks(own: reward_model.RewardModelArguments) -> dict[str, list[dict[str, Any]]]:
    """The rows of every yardstick that is asked for, each checked before a model is loaded."""
    found = {}
    for name, source in own.yardsticks.items():
        published = YARDSTICKS[name]
        found[name] = load_rows(
            source or published.hub,
            split=_split(source, published.split),
            # Reading them is the check.
            check=lambda rows, source: None,
            convert=published.read,
            key=f"yardsticks: {name}",
        ).to_list()
    return found


def _split(source: str | None, published: str) -> str:
    """A file has no split but its own; `published` is for what has several."""
    return "train" if source is not None and Path(str(source)).is_file() else published
