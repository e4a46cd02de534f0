"""The sweep of InstructGPT's Figs 33 and 34 on the sandbox: what ptx_coef recovers, and what kl_coef does not.

    prefopt sweep --config recipes/tiny/sweep.yaml

Starts from a finished `prefopt pipeline` run (its SFT model, reward model and data), trains PPO-ptx once per
coefficient, evaluates every policy as the pipeline does, and writes sweep.json and sweep.html. A finished run is kept
and an interrupted one goes on from its newest checkpoint: run the command again.
"""

import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from prefopt.errors import UserError
from prefopt.evaluation.results import BASELINE, write_results
from prefopt.evaluation.run import EvaluationArguments, EvaluationRun
from prefopt.evaluation.stages import compare, drift, generate, judge, report, tax
from prefopt.evaluation.sweep import VERDICT, Finding, Point, build_sweep_page, contrasts, findings, plain_ppo
from prefopt.evaluation.training_run import read_run
from prefopt.inference.jsonl import read_json, read_jsonl, write_whole
from prefopt.recipes.common.arguments import config_folder, parse, read_config, setting
from prefopt.recipes.common.steps import Steps
from prefopt.recipes.pipeline import TINY, Pipeline, PipelineArguments, command_line
from prefopt.statistics.overoptimization import rollout_gains

INPUTS = ("data", "reward", "ppo_start")  # steps of the pipeline whose results the sweep uses
SETTINGS = ("prompts", "heldout_use_case", "documents", "tasks", "max_new_tokens", "seed")  # told on the page


@dataclass
class SweepArguments:
    """Which pipeline run to start from, and the coefficients."""

    LEAST: ClassVar[dict[str, float]] = {"ptx_coefs": 0, "kl_coefs": 0, "save_steps": 1, "batch_size": 1}

    run_dir: str = setting("runs/demo", "Folder of a finished `prefopt pipeline` run.")
    output_dir: str | None = setting(None, "Folder of the sweep; default: `sweep` in run_dir.")
    ppo_config: str | None = setting(
        None,
        "Settings of `prefopt ppo-ptx`, the same for every run but for its two coefficients; default: "
        "ppo_ptx.yaml beside --config, else that of recipes/tiny.",
    )
    ptx_coefs: list[float] = setting(
        lambda: [0, 1, 5, 20, 27.8, 50],
        "ptx_coef of Fig. 33, 0 (plain PPO) among them; at the smallest of kl_coefs.",
    )
    kl_coefs: list[float] = setting(lambda: [0.05, 0.1, 0.2, 0.5, 1, 2, 5], "kl_coef of Fig. 34, at ptx_coef 0.")
    save_steps: int = setting(20, "Steps between checkpoints of a run.")
    batch_size: int = setting(256, "Batch of the evaluation.")


class Sweep:
    """One training run per point, then one evaluation of all of them on the same prompts and documents."""

    def __init__(self, args: SweepArguments) -> None:
        self.args = args
        self.run_dir = Path(args.run_dir)
        self.root = Path(args.output_dir) if args.output_dir else self.run_dir / "sweep"
        self.config = _ppo_config(args.ppo_config)
        ptx_coefs, kl_coefs = (sorted(set(map(float, c))) for c in (args.ptx_coefs, args.kl_coefs))
        if not ptx_coefs or ptx_coefs[0] != 0:
            raise UserError("ptx_coefs: expected numbers from 0 on, with 0 (plain PPO) among them")
        if not kl_coefs or kl_coefs[0] < 0:
            raise UserError("kl_coefs: expected one or more numbers, none below 0")
        self.pipeline, self.inputs = _finished_pipeline(self.run_dir)
        self.ptx = [Point(c, kl_coefs[0]) for c in ptx_coefs]
        self.kl = [Point(0.0, c) for c in kl_coefs]
        self.points = list(dict.fromkeys([*self.ptx, *self.kl]))

    def run(self) -> None:
        """Train what is not trained yet, evaluate, and write the page."""
        steps = Steps(self.root, total=len(self.points) + 1)
        for point in self.points:
            steps.run(point.name, f"PPO-ptx, {point.label}", self.settings(point), lambda p=point: self.train(p))
        steps.run("evaluate", "evaluate every policy", [self.settings(p) for p in self.points], self.evaluate)
        found = self.report(steps.seconds)
        for finding in found:
            steps.console.print(f"{finding.title}: {VERDICT[finding.holds]}")
        steps.console.print(f"page: {self.root / 'sweep.html'}\nnumbers: {self.root / 'sweep.json'}")

    def settings(self, point: Point) -> dict[str, Any]:
        """All that a point's policy depends on."""
        return {"point": asdict(point), "ppo": self.config, "inputs": self.inputs}

    def train(self, point: Point) -> None:
        folder, settings = self.root / point.name, json.dumps(self.settings(point), sort_keys=True, indent=1)
        known = folder / "settings.json"
        # But for what a kill has left of the settings themselves.
        is_begun = folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir())
        if is_begun and (not known.is_file() or known.read_text(encoding="utf-8") != settings):
            raise UserError(
                f"{folder} was begun with other settings, so it is not gone on with; choose another output_dir, or "
                "delete it to train it anew"
            )
        write_whole(known, settings)
        pipeline = self.pipeline
        keys = pipeline.ppo_inputs() | {
            "output_dir": folder,
            "seed": pipeline.args.seed,
            "ptx_coef": point.ptx_coef,
            "kl_coef": point.kl_coef,
            "save_strategy": "steps",
            "save_steps": self.args.save_steps,
            "save_total_limit": 1,
            "resume_from_checkpoint": "latest",
        }
        if point.ptx_coef > 0:
            keys["pretrain_dataset_name"] = pipeline.data / "corpus_train.jsonl"
        pipeline.train_ppo(command_line(self.args.ppo_config, **keys))

    def evaluate(self) -> None:
        """The pipeline's prompts, text, tasks and judges, with every paired difference that the findings need."""
        pipeline = self.pipeline
        folders = {BASELINE: pipeline.root / "sft"} | {p.name: self.root / p.name for p in self.points}
        run = EvaluationRun(
            self.root / "evaluation", contrasts(self.ptx, self.kl), progress=partial(print, flush=True)
        )
        args = EvaluationArguments(
            output_dir=str(run.folder),
            models={name: str(folder) for name, folder in folders.items()},
            batch_size=self.args.batch_size,
            seed=pipeline.args.seed,
            heldout_use_case=pipeline.world.held_out_use_case,
        )
        prompts = read_jsonl(pipeline.data / "prompts_test.jsonl")
        draw = generate.GenerateArguments(prompts, max_new_tokens=pipeline.args.max_new_tokens)
        generate.measure(run, args, draw)
        judges = judge.JudgeArguments(
            gold_judge=pipeline.world.gold_reward, reward_judge=str(pipeline.root / "reward")
        )
        judge.measure(run, args, judges)
        compare.measure(run, args, compare.CompareArguments())
        held_out = tax.TaxArguments(str(pipeline.data / "corpus_test.jsonl"), str(pipeline.data / "tasks.jsonl"))
        tax.measure(run, args, held_out)
        drift.measure(run, args, drift.DriftArguments())
        write_results(report.collect(run, args, report.ReportArguments()), self.root / "evaluation.json")

    def report(self, wall_seconds: dict[str, float]) -> list[Finding]:
        """Write sweep.json and sweep.html; the findings."""
        evaluation = read_json(self.root / "evaluation.json", "measures")
        measures = evaluation["measures"]
        found = findings(measures, self.ptx, self.kl)
        rollouts = {p.name: self.rollouts(p) for p in self.points}
        settings = {key: evaluation["settings"][key] for key in SETTINGS} | {"run": str(self.run_dir)}
        results = {
            "findings": [asdict(f) for f in found],
            "points": [asdict(p) | {"name": p.name} for p in self.points],
            "settings": settings | {"ppo": self.config},
            "wall_seconds": wall_seconds,
            "rollouts": rollouts,
            "measures": measures,
        }
        write_results(results, self.root / "sweep.json")
        # A drawing of each would be a wall of plots: plain PPO, the furthest of either sweep.
        drawn = dict.fromkeys((plain_ppo(self.ptx), self.ptx[-1], self.kl[-1]))
        build_sweep_page(
            self.root / "sweep.html",
            ptx=self.ptx,
            kl=self.kl,
            measures=measures,
            found=found,
            rollouts={p.label: rollouts[p.name] for p in drawn},
            settings=settings,
        )
        return found

    def rollouts(self, point: Point) -> list[dict[str, float]]:
        run = read_run(self.root / point.name)
        return rollout_gains(run.log, run.settings["episodes_per_rollout"])


def _finished_pipeline(folder: Path) -> tuple[Pipeline, dict[str, str]]:
    """The pipeline that a folder is of, with its seed and lengths, and which run of its steps made the inputs."""
    markers = {name: folder / "steps" / f"{name}.json" for name in (*INPUTS, "evaluate")}
    missing = [path for path in (*markers.values(), folder / "results.json") if not path.is_file()]
    if missing:
        raise UserError(
            f"run_dir: {folder} is not a finished pipeline run ({missing[0]} is missing); run `prefopt pipeline "
            f"--output_dir {folder}` first"
        )
    settings = read_json(folder / "results.json", "settings")["settings"]
    args = PipelineArguments(output_dir=str(folder), seed=settings["seed"], max_new_tokens=settings["max_new_tokens"])
    inputs = {name: read_json(markers[name], "run")["run"] for name in INPUTS}
    return Pipeline(args), inputs


def _ppo_config(path: str) -> dict[str, Any]:
    try:
        config = read_config(path)
    except UserError as error:
        raise UserError(f"ppo_config: {error}") from error
    if config.get("kl_target") is not None:
        raise UserError(f"ppo_config: kl_target of {path} adapts kl_coef, which the sweep holds fixed; drop it")
    return config


def main(argv: list[str] | None = None) -> None:
    """Run the sweep."""
    (args,) = parse((SweepArguments,), argv, "prefopt sweep", __doc__)
    args.ppo_config = args.ppo_config or str((config_folder(argv) or TINY) / "ppo_ptx.yaml")
    Sweep(args).run()
