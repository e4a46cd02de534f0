"""The sweep of InstructGPT's Figs 33 and 34 on the sandbox: what ptx_coef recovers, and what kl_coef does not.

    prefopt sweep --config recipes/tiny/sweep.yaml
    prefopt sweep --config recipes/tiny/sweep_dpo.yaml      # the same of DPO: ptx_coef, sft_coef and beta

Starts from a finished `prefopt pipeline` run (its SFT model, reward model and data), trains PPO-ptx or DPO once per
coefficient, evaluates every policy as the pipeline does, and writes sweep.json and sweep.html. A finished run is kept
and an interrupted one goes on from its newest checkpoint: run the command again.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from prefopt.errors import UserError
from prefopt.evaluation.results import BASELINE, write_results
from prefopt.evaluation.run import EvaluationArguments, EvaluationRun
from prefopt.evaluation.stages import compare, drift, generate, judge, report, tax
from prefopt.evaluation.sweep import VERDICT, Design, Finding, Point, build_sweep_page, findings
from prefopt.evaluation.training_run import read_run
from prefopt.inference.jsonl import read_json, read_jsonl, write_whole
from prefopt.recipes import dpo
from prefopt.recipes.common.arguments import config_folder, parse, read_config, setting
from prefopt.recipes.common.steps import Steps, command_line
from prefopt.recipes.pipeline import TINY, Pipeline, PipelineArguments
from prefopt.statistics.overoptimization import rollout_gains

# Method -> the steps of the pipeline whose results its sweep uses.
INPUTS = {"ppo-ptx": ("data", "reward", "ppo_start"), "dpo": ("data", "reward", "select")}
SETTINGS = ("prompts", "heldout_use_case", "documents", "tasks", "max_new_tokens", "seed")  # told on the page


@dataclass
class SweepArguments:
    """Which pipeline run to start from, and the coefficients."""

    LEAST: ClassVar[dict[str, float]] = {
        "ptx_coefs": 0,
        "sft_coefs": 0,
        "kl_coefs": 0,
        "betas": 0,
        "save_steps": 1,
        "batch_size": 1,
    }

    run_dir: str = setting("runs/demo", "Folder of a finished `prefopt pipeline` run.")
    output_dir: str | None = setting(None, "Folder of the sweep; default: `sweep` in run_dir.")
    method: str = setting("ppo-ptx", "What is trained: ppo-ptx or dpo.")
    ppo_config: str | None = setting(
        None,
        "Settings of `prefopt ppo-ptx`, the same for every run but for its coefficients; default: ppo_ptx.yaml beside "
        "--config, else that of recipes/tiny.",
    )
    dpo_config: str | None = setting(None, "Settings of `prefopt dpo`, likewise; default: dpo.yaml.")
    ptx_coefs: list[float] = setting(
        lambda: [0, 1, 5, 20, 27.8, 50],
        "ptx_coef of Fig. 33, 0 (no pretraining term) among them; all else at its smallest.",
    )
    kl_coefs: list[float] = setting(
        lambda: [0.05, 0.1, 0.2, 0.5, 1, 2, 5], "kl_coef of Fig. 34, of PPO at ptx_coef 0."
    )
    sft_coefs: list[float] = setting(lambda: [0, 0.01, 0.1, 1], "sft_coef of DPO, 0 among them.")
    betas: list[float] = setting(lambda: [0.1, 0.3, 1], "beta of DPO without an added term.")
    save_steps: int = setting(20, "Steps between checkpoints of a run.")
    batch_size: int = setting(256, "Batch of the evaluation.")


class Sweep:
    """One training run per point, then one evaluation of all of them on the same prompts and documents."""

    def __init__(self, args: SweepArguments) -> None:
        self.args = args
        self.run_dir = Path(args.run_dir)
        self.root = Path(args.output_dir) if args.output_dir else self.run_dir / "sweep"
        if args.method not in INPUTS:
            raise UserError(f"method is {args.method!r}; expected {' or '.join(INPUTS)}")
        self.trainer = args.method.partition("-")[0]
        values = {"ptx_coef": _from_zero("ptx_coefs", args.ptx_coefs)}
        if self.trainer == "dpo":
            values |= {"sft_coef": _from_zero("sft_coefs", args.sft_coefs), "beta": _ascending("betas", args.betas)}
        else:
            values["kl_coef"] = _ascending("kl_coefs", args.kl_coefs)
        self.design = Design(self.trainer.upper(), values)
        self.path = getattr(args, f"{self.trainer}_config")
        self.config = _config(f"{self.trainer}_config", self.path)
        self.pipeline, self.inputs = _finished_pipeline(self.run_dir, INPUTS[args.method])

    def run(self) -> None:
        """Train what is not trained yet, evaluate, and write the page."""
        steps = Steps(self.root, total=len(self.design.points) + 1)
        for point in self.design.points:
            steps.run(
                point.name, f"{self.args.method}, {point.label}", self.settings(point), lambda p=point: self.train(p)
            )
        steps.run("evaluate", "evaluate every policy", [self.settings(p) for p in self.design.points], self.evaluate)
        found = self.report(steps.seconds)
        for finding in found:
            steps.console.print(f"{finding.title}: {VERDICT[finding.holds]}")
        steps.console.print(f"page: {self.root / 'sweep.html'}\nnumbers: {self.root / 'sweep.json'}")

    def settings(self, point: Point) -> dict[str, Any]:
        """All that a point's policy depends on."""
        return {"point": dict(point.coefficients), self.trainer: self.config, "inputs": self.inputs}

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
        keys = dict(point.coefficients) | {
            "output_dir": folder,
            "seed": pipeline.args.seed,
            "save_strategy": "steps",
            "save_steps": self.args.save_steps,
            "save_total_limit": 1,
            "resume_from_checkpoint": "latest",
        }
        if point["ptx_coef"] > 0:
            keys["pretrain_dataset_name"] = pipeline.data / "corpus_train.jsonl"
        if self.trainer == "dpo":
            dpo.main(command_line(self.path, **pipeline.dpo_inputs(), **keys))
        else:
            pipeline.train_ppo(command_line(self.path, **pipeline.ppo_inputs(), **keys))

    def evaluate(self) -> None:
        """The pipeline's prompts, text, tasks and judges, with every paired difference that the findings need."""
        pipeline = self.pipeline
        folders = {BASELINE: pipeline.root / "sft"} | {p.name: self.root / p.name for p in self.design.points}
        run = EvaluationRun(self.root / "evaluation", self.design.contrasts, progress=partial(print, flush=True))
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
        found = findings(measures, self.design)
        # Of DPO there are none.
        rollouts = {p.name: self.rollouts(p) for p in self.design.points if self.design.method == "PPO"}
        settings = {key: evaluation["settings"][key] for key in SETTINGS} | {"run": str(self.run_dir)}
        results = {
            "findings": [asdict(f) for f in found],
            "points": [dict(p.coefficients) | {"name": p.name} for p in self.design.points],
            "settings": settings | {self.trainer: self.config},
            "wall_seconds": wall_seconds,
            "rollouts": rollouts,
            "measures": measures,
        }
        write_results(results, self.root / "sweep.json")
        # A drawing of each would be a wall of plots: plain PPO, the furthest of either sweep.
        drawn = dict.fromkeys([self.design.plain, *(self.design.along(name)[-1] for name in self.design.values)])
        build_sweep_page(
            self.root / "sweep.html",
            design=self.design,
            measures=measures,
            found=found,
            rollouts={p.label: rollouts[p.name] for p in drawn if p.name in rollouts},
            settings=settings,
        )
        return found

    def rollouts(self, point: Point) -> list[dict[str, float]]:
        run = read_run(self.root / point.name)
        return rollout_gains(run.log, run.settings["episodes_per_rollout"])


def _ascending(key: str, values: Sequence[float]) -> list[float]:
    values = sorted(set(map(float, values)))
    if not values or values[0] < 0:
        raise UserError(f"{key}: expected one or more numbers, none below 0")
    return values


def _from_zero(key: str, values: Sequence[float]) -> list[float]:
    values = sorted(set(map(float, values)))
    if not values or values[0] != 0:
        raise UserError(f"{key}: expected numbers from 0 on, with 0 (without the term) among them")
    return values


def _finished_pipeline(folder: Path, inputs: Sequence[str]) -> tuple[Pipeline, dict[str, str]]:
    """The pipeline that a folder is of, with its seed and lengths, and which run of its steps made the inputs."""
    markers = {name: folder / "steps" / f"{name}.json" for name in (*inputs, "evaluate")}
    missing = [path for path in (*markers.values(), folder / "results.json") if not path.is_file()]
    if missing:
        raise UserError(
            f"run_dir: {folder} is not a finished pipeline run ({missing[0]} is missing); run `prefopt pipeline "
            f"--output_dir {folder}` first"
        )
    settings = read_json(folder / "results.json", "settings")["settings"]
    args = PipelineArguments(output_dir=str(folder), seed=settings["seed"], max_new_tokens=settings["max_new_tokens"])
    return Pipeline(args), {name: read_json(markers[name], "run")["run"] for name in inputs}


def _config(key: str, path: str) -> dict[str, Any]:
    try:
        config = read_config(path)
    except UserError as error:
        raise UserError(f"{key}: {error}") from error
    if config.get("kl_target") is not None:
        raise UserError(f"{key}: kl_target of {path} adapts kl_coef, which the sweep holds fixed; drop it")
    return config


def main(argv: list[str] | None = None) -> None:
    """Run the sweep."""
    (args,) = parse((SweepArguments,), argv, "prefopt sweep", __doc__)
    beside = config_folder(argv) or TINY
    args.ppo_config = args.ppo_config or str(beside / "ppo_ptx.yaml")
    args.dpo_config = args.dpo_config or str(beside / "dpo.yaml")
    Sweep(args).run()
