"""Stage `drift`: how far every model has moved from the baseline, and how sure of itself it has become."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefopt.evaluation.results import FAILED, measure
from prefopt.evaluation.run import EvaluationArguments, EvaluationRun
from prefopt.evaluation.stages.samples import measured_samples
from prefopt.inference.journal import kept_rows, source_state
from prefopt.inference.likelihood import TokenDivergence, token_divergence
from prefopt.models.loading import load_language_model
from prefopt.statistics.intervals import Estimate, bootstrap_over_prompts, ratio_of_sums

logger = logging.getLogger(__name__)
Progress = Callable[[str], None]

PER_COMPLETION = {"kl_to_sft": "kl", "k1_to_sft": "k1"}
PER_TOKEN = {"kl_to_sft_per_token": "kl", "k1_to_sft_per_token": "k1", "token_entropy": "entropy"}
QUANTITIES = ("kl", "k1", "entropy")


@dataclass
class DriftArguments:
    """How much is measured."""

    drift_prompts: int | None = field(
        default=None, metadata={"help": "Measure drift on the first so many prompts; default: all."}
    )


@dataclass(frozen=True)
class DriftSums:
    """Per prompt `[P]`, over its samples: sums of `kl`, `k1`, `entropy` in nats, of tokens and of completions."""

    ids: NDArray
    sums: Mapping[str, NDArray]
    tokens: NDArray
    completions: NDArray


def drift_sums(rows: Sequence[Mapping[str, Any]]) -> DriftSums:
    """Sums per prompt from rows with `id` and, per token, `kl`, `k1` and `entropy`."""
    ids, at = np.unique([row["id"] for row in rows], return_inverse=True)
    add = {name: np.bincount(at, [float(np.sum(row[name])) for row in rows]) for name in QUANTITIES}
    tokens = np.bincount(at, [float(len(row["kl"])) for row in rows])
    return DriftSums(ids, add, tokens, np.bincount(at).astype(float))


def drift_estimates(found: DriftSums) -> dict[str, Estimate]:
    """Per completion and per token; intervals resample prompts, whose samples stay together.

    mean over completions of the sum over tokens; sum over all tokens / number of tokens
    """
    per_completion = {n: ratio_of_sums(found.sums[q], found.completions) for n, q in PER_COMPLETION.items()}
    return per_completion | {n: ratio_of_sums(found.sums[q], found.tokens) for n, q in PER_TOKEN.items()}


def entropy_difference(a: DriftSums, b: DriftSums) -> Estimate:
    """Token entropy of a minus that of b on the prompts that both answered; the interval is that of the difference."""
    _, in_a, in_b = np.intersect1d(a.ids, b.ids, return_indices=True)
    return bootstrap_over_prompts(
        lambda x, m, y, n, axis: x.sum(axis) / m.sum(axis) - y.sum(axis) / n.sum(axis),
        a.sums["entropy"][in_a],
        a.tokens[in_a],
        b.sums["entropy"][in_b],
        b.tokens[in_b],
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


def run(
    run: EvaluationRun,
    args: EvaluationArguments,
    own: DriftArguments,
    *,
    progress: Progress = logger.info,
) -> None:
    """Measure every model of `args.models` on its own samples against `args.baseline`; write `stages/drift.json`.

    Per token kept in `drift/<model>.jsonl`; a model whose samples and weights are as they were is not forwarded again.
    """
    measures: list[dict[str, Any]] = []
    data: dict[str, Any] = {"baseline": args.baseline, "by_position": {}, "samples": {}}
    reference: list[Any] = []  # loaded once, and only if something is to be computed
    sums: dict[str, DriftSums] = {}
    for name in args.models:
        try:
            rows = _token_rows(run, args, own, name, reference, progress)
            sums[name] = drift_sums(rows)
            for key, estimate in drift_estimates(sums[name]).items():
                measures.append(measure(key, name, estimate))
            data["by_position"][name] = by_position(rows)
            data["samples"][name] = len(rows)
        except FileNotFoundError as error:  # a file of completions
            measures += _without(name, str(error))
        except Exception as error:  # any trouble of one model is that model's
            logger.exception("drift: %s failed", name)
            measures += _without(name, f"{FAILED}{type(error).__name__}: {error}")
    for name in sums:
        if name != args.baseline and args.baseline in sums:
            estimate = entropy_difference(sums[name], sums[args.baseline])
            measures.append(measure("token_entropy", name, estimate, against=args.baseline))
    run.write_stage("drift", measures, data)


def _without(name: str, reason: str) -> list[dict[str, Any]]:
    return [measure(key, name, None, reason=reason) for key in (*PER_COMPLETION, *PER_TOKEN)]


def _token_rows(
    run: EvaluationRun,
    args: EvaluationArguments,
    own: DriftArguments,
    name: str,
    reference: list[Any],
    progress: Progress,
) -> list[dict[str, Any]]:
    if args.baseline not in args.models:
        raise FileNotFoundError(f"no model called {args.baseline!r}, the baseline, in models")
    samples = measured_samples(run, args, name)
    if own.drift_prompts is not None:
        samples = [row for row in samples if row["id"] < own.drift_prompts]

    def compute() -> list[dict[str, Any]]:
        settings = {"load_in_4bit": args.load_in_4bit, "dtype": args.dtype}
        if not reference:
            progress(f"drift: loading {args.baseline}")
            reference.append(load_language_model(args.models[args.baseline], **settings))
        if name == args.baseline:
            model, tokenizer = reference[0]
        else:
            progress(f"drift: loading {name}")
            model, tokenizer = load_language_model(args.models[name], **settings)
        found: list[TokenDivergence] = token_divergence(
            model,
            reference[0][0],
            tokenizer,
            [row["prompt"] for row in samples],
            [row["ids"] for row in samples],
            args.batch_size,
            lambda done, total: progress(f"drift: {name} {done}/{total}"),
        )
        return [
            {"id": row["id"], "sample": row["sample"], **{k: v.tolist() for k, v in asdict(d).items()}}
            for row, d in zip(samples, found, strict=True)
        ]

    inputs = {
        "samples": [[row["prompt"], row["ids"]] for row in samples],
        "models": [source_state(args.models[m]) for m in (name, args.baseline)],
        "load": [args.load_in_4bit, args.dtype],
    }
    return kept_rows(run.folder / "drift" / f"{name}.jsonl", inputs, compute)
