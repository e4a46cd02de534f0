"""Stage `drift`: how far every model has moved from the baseline, and how sure of itself it has become."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from prefopt.evaluation.report.plots import Series, curves_plot
from prefopt.evaluation.report.tables import Ask, Block, Results, label
from prefopt.evaluation.results import Definition, Measures, NoNumber, attempt
from prefopt.evaluation.run import EvaluationArguments, EvaluationRun, Stage
from prefopt.inference.journal import kept_rows, source_state
from prefopt.inference.likelihood import token_divergence
from prefopt.models.loading import load_language_model
from prefopt.rankings.tokens import template_kwargs
from prefopt.statistics.intervals import Estimate, bootstrap_over_prompts, ratio_of_sums

PER_COMPLETION = {"kl_to_sft": "kl", "k1_to_sft": "k1"}
PER_TOKEN = {"kl_to_sft_per_token": "kl", "k1_to_sft_per_token": "k1", "token_entropy": "entropy"}
QUANTITIES = ("kl", "k1", "entropy")
Sums = dict[str, NDArray]
Load = Callable[[], tuple[Any, Any]]  # gives (model, tokenizer)
MEASURES = Measures(
    {
        "kl_to_sft": Definition(
            None,
            "full-vocabulary KL of the model from the baseline in nats, summed over a completion, mean over "
            "temperature-1 samples; interval over prompts",
            "Ouyang et al. 2022, C.4 (the penalized quantity)",
        ),
        "kl_to_sft_per_token": Definition(None, "the same, divided by tokens", "as kl_to_sft"),
        "k1_to_sft": Definition(
            None,
            "log pi(y) - log baseline(y) of the sampled tokens, summed over a completion: the one-sample estimate of "
            "kl_to_sft",
            "as kl_to_sft",
        ),
        "k1_to_sft_per_token": Definition(None, "the same, divided by tokens", "as kl_to_sft"),
        "token_entropy": Definition(
            None,
            "entropy in nats of the model's distribution over the whole vocabulary, mean over the tokens of its samples",
            "Kirk et al. 2023, arXiv:2310.06452",
        ),
    }
)


@dataclass
class DriftArguments:
    """How much is measured."""

    LEAST: ClassVar[dict[str, float]] = {"drift_prompts": 1}

    drift_prompts: int | None = field(
        default=None, metadata={"help": "Measure drift on the first so many prompts; default: all."}
    )


def drift_sums(rows: Sequence[Mapping[str, Any]]) -> Sums:
    """Of every prompt `[P]` its `id`, and sums over its samples: of `kl`, `k1` and `entropy` in nats, of `tokens` and of
    `completions`; from rows with `id` and, per token, the three quantities."""
    ids, at = np.unique([row["id"] for row in rows], return_inverse=True)
    summed = {name: [float(np.sum(row[name])) for row in rows] for name in QUANTITIES}
    summed |= {"tokens": [float(len(row["kl"])) for row in rows], "completions": [1.0] * len(rows)}
    return {"id": ids} | {name: np.bincount(at, values) for name, values in summed.items()}


def drift_estimates(sums: Sums) -> dict[str, Estimate]:
    """Per completion and per token; intervals resample prompts, whose samples stay together.

    mean over completions of the sum over tokens; sum over all tokens / number of tokens
    """
    per_completion = {name: ratio_of_sums(sums[q], sums["completions"]) for name, q in PER_COMPLETION.items()}
    return per_completion | {name: ratio_of_sums(sums[q], sums["tokens"]) for name, q in PER_TOKEN.items()}


def entropy_difference(a: Sums, b: Sums) -> Estimate:
    """Token entropy of a minus that of b on the prompts that both answered; the interval is that of the difference."""
    _, in_a, in_b = np.intersect1d(a["id"], b["id"], return_indices=True)
    return bootstrap_over_prompts(
        lambda x, m, y, n, axis: x.sum(axis) / m.sum(axis) - y.sum(axis) / n.sum(axis),
        *(a["entropy"][in_a], a["tokens"][in_a]),
        *(b["entropy"][in_b], b["tokens"][in_b]),
    )


def by_position(rows: Sequence[Mapping[str, Any]], least: int = 20) -> list[dict[str, float]]:
    """Mean of each quantity at the first, second, ... token, over the completions that are so long (`least` of them)."""
    points = []
    for position in range(max((len(row["kl"]) for row in rows), default=0)):
        here = [row for row in rows if len(row["kl"]) > position]
        if len(here) < min(least, len(rows)):
            break
        means = {name: float(np.mean([row[name][position] for row in here])) for name in QUANTITIES}
        points.append({"position": position + 1, "n": len(here), **means})
    return points


def measure(run: EvaluationRun, args: EvaluationArguments, own: DriftArguments) -> None:
    """Measure every model of `args.models` on its own samples against `args.baseline`; write `stages/drift.json`.

    Per token kept in `drift/<model>.jsonl`; a model whose samples and weights are as they were is not forwarded again.
    """
    measures: list[dict[str, Any]] = []
    data: dict[str, Any] = {"baseline": args.baseline, "by_position": {}, "samples": {}}
    sums: dict[str, Sums] = {}

    def load(name: str) -> tuple[Any, Any]:
        run.progress(f"drift: loading {name}")
        return load_language_model(args.models[name], **args.loading)

    baseline = cache(partial(load, args.baseline))  # once, and only if something is to be computed

    def of_model(name: str) -> dict[str, Estimate]:
        rows = _token_rows(run, args, own, name, baseline, baseline if name == args.baseline else partial(load, name))
        sums[name] = drift_sums(rows)
        data["by_position"][name], data["samples"][name] = by_position(rows), len(rows)
        return drift_estimates(sums[name])

    for name in args.models:
        # without samples, or where a "model" is a file of completions, there is nothing to measure
        found = attempt(f"drift: {name}", partial(of_model, name), skips=FileNotFoundError)
        for key in (*PER_COMPLETION, *PER_TOKEN):
            measures.append(MEASURES.record(key, name, found if isinstance(found, NoNumber) else found[key]))
    for name in sums:
        if name != args.baseline and args.baseline in sums:
            estimate = entropy_difference(sums[name], sums[args.baseline])
            measures.append(MEASURES.record("token_entropy", name, estimate, against=args.baseline))
    run.write_stage(STAGE, measures, data)


def _token_rows(
    run: EvaluationRun, args: EvaluationArguments, own: DriftArguments, name: str, baseline: Load, load: Load
) -> list[dict[str, Any]]:
    """`id`, `sample` and, per token, `kl`, `k1` and `entropy` of every sample of a model."""
    if args.baseline not in args.models:
        raise FileNotFoundError(f"no model called {args.baseline!r}, the baseline, in models")
    samples = run.measured_samples(name, args.heldout_use_case)
    if own.drift_prompts is not None:
        samples = [row for row in samples if row["id"] < own.drift_prompts]

    def compute() -> list[dict[str, Any]]:
        reference, _ = baseline()
        model, tokenizer = load()
        prompts, ids = ([row[column] for row in samples] for column in ("prompt", "ids"))

        def tell(done: int, total: int) -> None:
            run.progress(f"drift: {name} {done}/{total}")

        of_rows = [template_kwargs(row) for row in samples]
        found = token_divergence(model, reference, tokenizer, prompts, ids, args.batch_size, tell, of_rows)
        return [
            {"id": row["id"], "sample": row["sample"], **{k: v.tolist() for k, v in asdict(d).items()}}
            for row, d in zip(samples, found, strict=True)
        ]

    inputs = {
        "samples": [[row["prompt"], row["ids"], *template_kwargs(row).items()] for row in samples],
        "models": [source_state(args.models[m]) for m in (name, args.baseline)],
        "load": [args.load_in_4bit, args.dtype],
    }
    return kept_rows(run.folder / "drift" / f"{name}.jsonl", inputs, compute)


def section(results: Results) -> list[Block]:
    """KL to the baseline and entropy, in numbers and by position in the completion."""
    data = results.stage("drift")
    curves, baseline = data["by_position"], data["baseline"]
    if not curves:
        raise results.missing("token_entropy", "no model was measured")
    asks = [
        Ask("KL, nats per completion", "kl_to_sft"),
        Ask("its one-sample estimate k1", "k1_to_sft"),
        Ask("KL, nats per token", "kl_to_sft_per_token", 4),
        Ask("k1, nats per token", "k1_to_sft_per_token", 4),
        Ask("entropy, nats per token", "token_entropy"),
        Ask(f"minus {label(baseline)}", "token_entropy", 3, baseline),
    ]
    figures = []
    for key, title in (("kl", "KL per token, nats"), ("entropy", "entropy per token, nats")):
        drawn = {m: [{"x": p["position"], "y": p[key]} for p in points] for m, points in curves.items()}
        if any(drawn.values()):
            series = [Series(label(m), points) for m, points in drawn.items()]
            figures.append(curves_plot(series, title, "token of the completion"))
    note = (
        f"KL of the model from {label(baseline)} over the whole vocabulary, along the model's own samples; k1 is what "
        "PPO's log shows, the log-probability ratio of the sampled tokens alone: the same on average, with more noise. "
        "Entropy that falls is mode collapse (Kirk et al. 2023)."
    )
    return [*results.table(asks), *figures, note]


STAGE = Stage(
    "drift",
    "KL to the baseline and entropy",
    DriftArguments,
    measure,
    MEASURES,
    of_completions=True,
    title="Drift from the baseline",
    section=section,
)
