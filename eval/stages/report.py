"""Stage `report`: results.json, report.html and report.md from what the other stages left in the folder."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike

from prefopt.evaluation.report.page import build_report
from prefopt.evaluation.report.tables import label
from prefopt.evaluation.results import Definition, Measures, Skipped, build_results, write_results
from prefopt.evaluation.run import EvaluationArguments, EvaluationRun, Stage, check_baseline, parsed_mapping
from prefopt.evaluation.stages import STAGES
from prefopt.evaluation.stages.judge import called, judgements_path
from prefopt.inference.jsonl import read_json, read_jsonl
from prefopt.statistics.intervals import mean_estimate

Row = Mapping[str, Any]

MEASURES = Measures(
    {
        "completion_tokens": Definition(
            None, "mean length of temperature-1 samples in tokens, end token included", "prefopt"
        ),
        "truncated": Definition(
            False, "share of temperature-1 samples that hit the length limit before they ended", "prefopt"
        ),
    }
)


@dataclass
class ReportArguments:
    """What the report shows besides the stages."""

    LEAST: ClassVar[dict[str, float]] = {"worst_samples": 0}

    worst_samples: int = field(
        default=20, metadata={"help": "Prompts on which the main model loses most that the report shows."}
    )
    rl_runs: dict[str, str] | str | None = field(
        default=None,
        metadata={
            "help": "Name of an RL run and its folder with trainer_state.json, for the curves; default: models that have one."
        },
    )
    report_dir: str | None = field(
        default=None, metadata={"help": "Folder of results.json, report.html and report.md; default: output_dir."}
    )
    sft_selection: str | None = field(
        default=None,
        metadata={"help": "JSON file of the SFT epochs and the chosen one, as `prefopt pipeline` writes it."},
    )

    def __post_init__(self) -> None:
        self.rl_runs = parsed_mapping("rl_runs", self.rl_runs)


def measure(
    run: EvaluationRun,
    args: EvaluationArguments,
    own: ReportArguments,
    *,
    wall_seconds: Mapping[str, float] | None = None,
) -> Path:
    """Write results.json, report.html and report.md, and return their folder.

    Args:
        wall_seconds: of steps that the report shows instead of those of the evaluation.
    """
    folder = Path(own.report_dir) if own.report_dir else run.folder
    results = collect(run, args, own, wall_seconds=wall_seconds)
    write_results(results, folder / "results.json")
    build_report(results, folder)
    return folder


def collect(
    run: EvaluationRun,
    args: EvaluationArguments,
    own: ReportArguments,
    *,
    wall_seconds: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """The content of results.json from the files of all stages that ran.

    What `prefopt eval all` knows of them stands in stages/all.json: `seconds`, and `notes` on why one did not run.

    Raises:
        UserError: a stage measured against another baseline.
    """
    every = (run.stage("all") or {"data": {}})["data"]
    found = {stage.key: content for stage in STAGES if (content := run.stage(stage.key)) is not None}
    stages = {key: content["data"] for key, content in found.items()}
    check_baseline(stages, args)
    completions = {model: run.first_samples(model) for model in args.models}
    measures = [m for content in found.values() for m in content["measures"]]
    measures += [m for model, rows in completions.items() for m in _lengths(model, rows, args.heldout_use_case)]
    tax = stages.get("tax") or {}
    judge = (stages.get("compare") or {}).get("main_judge")
    names = (stages.get("judge") or {}).get("called") or {}
    settings = {
        "judge": judge and (names.get(judge) or called(judge)),
        "baseline": args.baseline,
        "models": list(args.models),
        "heldout_use_case": args.heldout_use_case,
        "prompts": max(map(len, completions.values()), default=0),
        "max_new_tokens": (stages.get("generate") or {}).get("settings", {}).get("max_new_tokens"),
        "documents": tax.get("documents"),
        "tasks": tax.get("tasks"),
        "seed": args.seed,
        "load_in_4bit": args.load_in_4bit,
    }
    return build_results(
        measures,
        wall_seconds=every.get("seconds") if wall_seconds is None else wall_seconds,
        settings=settings,
        samples=_samples(run, args, own, completions, judge),
        curves=_curves(args, own),
        stages=stages,
        notes={name: note for name, note in every.get("notes", {}).items() if run.stage(name) is None},
    )


def _lengths(model: str, rows: Sequence[Row], heldout: str | None) -> list[dict[str, Any]]:
    rows = [row for row in rows if heldout is None or row.get("use_case") != heldout]
    if not rows:
        nothing = Skipped("nothing was generated; `prefopt eval generate` does")
        return [MEASURES.record(name, model, nothing) for name in MEASURES]
    tokens = mean_estimate([float(len(row["ids"])) for row in rows])
    # even an empty completion has its end token
    if not all(row["ids"] for row in rows):
        tokens = Skipped("its file of completions has no `ids`")
    truncated = mean_estimate([float(row["truncated"]) for row in rows])
    return [MEASURES.record("completion_tokens", model, tokens), MEASURES.record("truncated", model, truncated)]


def _samples(
    run: EvaluationRun,
    args: EvaluationArguments,
    own: ReportArguments,
    completions: Mapping[str, Sequence[Row]],
    judge: str | None,
) -> list[dict[str, Any]]:
    """The worst by the main judge, on the prompts that all models answered."""
    drawn = {model: {row["id"]: row for row in rows} for model, rows in completions.items() if rows}
    ids = sorted(set.intersection(*map(set, drawn.values()))) if drawn else []
    if not ids:
        return []
    shown: dict[str, dict[Any, dict[str, Any]]] = {
        model: {i: {"text": rows[i]["completion"], "truncated": rows[i]["truncated"]} for i in ids}
        for model, rows in drawn.items()
    }
    judged = sorted((run.folder / "scores").glob("*/*.jsonl")) if not run.is_stale("judge") else []
    for path in judged:
        for row in read_jsonl(path) if path.stem in shown else []:
            if row["decoding"] == "sampled" and row["id"] in shown[path.stem]:
                shown[path.stem][row["id"]][path.parent.name] = row["score"]
    rows = [next(iter(drawn.values()))[i] for i in ids]
    main = main_model(list(drawn), args.baseline)
    use_cases = [str(row.get("use_case") or "") for row in rows]
    return pick_samples(
        [row["prompt"] for row in rows],
        use_cases,
        {model: [one[i] for i in ids] for model, one in shown.items()},
        _gain(run, judge, main, args.baseline, ids) if judged and judge and main else None,
        main or "",
        baseline=args.baseline,
        heldout=[bool(u) and u == args.heldout_use_case for u in use_cases],
        seed=args.seed,
        worst=own.worst_samples,
    )


def main_model(models: Sequence[str], baseline: str) -> str | None:
    """The model whose worst samples are looked for: PPO-ptx, or else the last that is not the baseline."""
    others = [model for model in models if model != baseline]
    return "ppo_ptx" if "ppo_ptx" in others else others[-1] if others else None


def pick_samples(
    prompts: Sequence[Any],
    labels: Sequence[str],
    drawn: Mapping[str, Sequence[Mapping[str, Any]]],
    gain: ArrayLike | None = None,
    main: str = "",
    *,
    baseline: str = "sft",
    heldout: Sequence[bool] | None = None,
    seed: int = 0,
    worst: int = 20,
    best: int = 2,
    at_random: int = 5,
) -> list[dict[str, Any]]:
    """Prompts with all models' samples side by side: where `main` loses most against the baseline, a few where it gains
    most, some drawn at random, and two of the held-out use case.

    Args:
        labels: use case of every prompt.
        drawn: model -> one {`text`, `truncated`, scores ...} per prompt.
        gain: by how much `main` is better than the baseline on every prompt; not a number counts as the worst.

    Example:
        >>> drawn = {"sft": [{"text": "a"}, {"text": "b"}], "ppo": [{"text": "c"}, {"text": "d"}]}
        >>> picked = pick_samples(["x", "y"], ["", ""], drawn, [1.0, -2.0], "ppo")
        >>> [(sample["prompt"], sample["why"]) for sample in picked]
        [('y', '1. worst for PPO against SFT (-2.00)'), ('x', '1. best for PPO against SFT (+1.00)')]
    """
    if not drawn:
        return []
    generator = random.Random(seed)
    shuffled = generator.sample(range(len(prompts)), len(prompts))  # breaks ties between equal gains
    picked: dict[int, str] = {}

    def take(candidates: Sequence[int], count: int, why: Callable[[int, int], str]) -> None:
        for n, i in enumerate([i for i in candidates if i not in picked][:count], start=1):
            picked[i] = why(n, i)

    if gain is not None:
        by = np.asarray(gain, dtype=float)
        order = sorted(shuffled, key=lambda i: by[i] if np.isfinite(by[i]) else -np.inf)
        against = f"for {label(main)} against {label(baseline)}"
        for word, candidates, count in (
            # Of few prompts there are fewer: where it gains it is not at its worst.
            ("worst", [i for i in order if not by[i] > 0], worst),
            ("best", [i for i in order[::-1] if by[i] > 0], best),
        ):
            take(candidates, count, lambda n, i, word=word: f"{n}. {word} {against} ({by[i]:+.2f})")
    apart = list(heldout) if heldout is not None else [False] * len(prompts)
    take([i for i in shuffled if not apart[i]], at_random, lambda n, i: "drawn at random")
    take([i for i in shuffled if apart[i]], 2, lambda n, i: "held-out use case, drawn at random")
    return [
        {
            "prompt": prompts[i],
            "use_case": labels[i],
            "why": why,
            "completions": {model: dict(completions[i]) for model, completions in drawn.items()},
        }
        for i, why in picked.items()
    ]


def _gain(run: EvaluationRun, judge: str, model: str, against: str, ids: Sequence[Any]) -> np.ndarray | None:
    """By how much the judge likes `model` more on every prompt: difference of its scores, else of its verdicts."""
    found: dict[Any, list[float]] = {}
    for row in read_jsonl(judgements_path(run, judge)) if judgements_path(run, judge).is_file() else []:
        if {row["a"], row["b"]} == {model, against} and row.get("decoding", "sampled") == "sampled":
            scored = row.get("score_a") is not None and row.get("score_b") is not None
            gain = row["score_a"] - row["score_b"] if scored else 2 * row["preference"] - 1
            found.setdefault(row["id"], []).append(gain if row["a"] == model else -gain)
    if not found:
        return None
    # What nobody judged is neither better nor worse.
    return np.array([float(np.mean(found[i])) if i in found else 0.0 for i in ids])


def _curves(args: EvaluationArguments, own: ReportArguments) -> dict[str, Any]:
    """Training curves: the SFT epochs, and reward and KL over the steps of RL."""
    curves: dict[str, Any] = {}
    if own.sft_selection is not None:
        selection = read_json(own.sft_selection, "epochs", "chosen")
        curves = {"sft_epochs": selection["epochs"], "sft_chosen_epoch": selection["chosen"]["epoch"]}
    for name, folder in {**args.models, **own.rl_runs}.items():
        state = Path(folder) / "trainer_state.json"
        history = read_json(state, "log_history")["log_history"] if state.is_file() else []
        log = [{**entry, "gold": entry.get("rewards/gold/mean")} for entry in history if "objective/scores" in entry]
        curves |= {name: log} if log else {}
    return curves


STAGE = Stage(
    "report",
    "results.json, report.html and report.md from what the other stages found",
    ReportArguments,
    measure,
    MEASURES,
)
