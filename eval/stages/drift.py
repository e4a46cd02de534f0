"""Stage `drift`: how far every model has moved from the baseline, and how sure of itself it has become."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefopt.evaluation.report.sections import drift as drift_section
from prefopt.evaluation.results import Definition, Measures, NoNumber, attempt
from prefopt.evaluation.run import EvaluationArguments, EvaluationRun, Stage
from prefopt.inference.journal import kept_rows, source_state
from prefopt.inference.likelihood import TokenDivergence, token_divergence
from prefopt.models.loading import load_language_model
from prefopt.statistics.intervals import Estimate, bootstrap_over_prompts, ratio_of_sums

PER_COMPLETION = {"kl_to_sft": "kl", "k1_to_sft": "k1"}
PER_TOKEN = {"kl_to_sft_per_token": "kl", "k1_to_sft_per_token": "k1", "token_entropy": "entropy"}
QUANTITIES = ("kl", "k1", "entropy")
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


def measure(run: EvaluationRun, args: EvaluationArguments, own: DriftArguments) -> None:
    """Measure every model of `args.models` on its own samples against `args.baseline`; write `stages/drift.json`.

    Per token kept in `drift/<model>.jsonl`; a model whose samples and weights are as they were is not forwarded again.
    """
    measures: list[dict[str, Any]] = []
    data: dict[str, Any] = {"baseline": args.baseline, "by_position": {}, "samples": {}}
    reference: list[Any] = []  # loaded once, and only if something is to be computed
    sums: dict[str, DriftSums] = {}
    for name in args.models:

        def of_model(name: str = name) -> dict[str, Estimate]:
            rows = _token_rows(run, args, own, name, reference)
            sums[name] = drift_sums(rows)
            data["by_position"][name] = by_position(rows)
            data["samples"][name] = len(rows)
            return drift_estimates(sums[name])

        # without samples, or where a "model" is a file of completions, there is nothing to measure
        found = attempt(f"drift: {name}", of_model, skips=FileNotFoundError)
        for key in (*PER_COMPLETION, *PER_TOKEN):
            value = found if isinstance(found, NoNumber) else found[key]
            measures.append(MEASURES.record(key, name, value))
    for name in sums:
        if name != args.baseline and args.baseline in sums:
            estimate = entropy_difference(sums[name], sums[args.baseline])
            measures.append(MEASURES.record("token_entropy", name, estimate, against=args.baseline))
    run.write_stage(STAGE, measures, data)


def _token_rows(
    run: EvaluationRun, args: EvaluationArguments, own: DriftArguments, name: str, reference: list[Any]
) -> list[dict[str, Any]]:
    if args.baseline not in args.models:
        raise FileNotFoundError(f"no model called {args.baseline!r}, the baseline, in models")
    samples = run.measured_samples(name, args.heldout_use_case)
    if own.drift_prompts is not None:
        samples = [row for row in samples if row["id"] < own.drift_prompts]

    def compute() -> list[dict[str, Any]]:
        settings = {"load_in_4bit": args.load_in_4bit, "dtype": args.dtype}
        if not reference:
            run.progress(f"drift: loading {args.baseline}")
            reference.append(load_language_model(args.models[args.baseline], **settings))
        if name == args.baseline:
            model, tokenizer = reference[0]
        else:
            run.progress(f"drift: loading {name}")
            model, tokenizer = load_language_model(args.models[name], **settings)
        found: list[TokenDivergence] = token_divergence(
            model,
            reference[0][0],
            tokenizer,
            [row["prompt"] for row in samples],
            [row["ids"] for row in samples],
            args.batch_size,
            lambda done, total: run.progress(f"drift: {name} {done}/{total}"),
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


STAGE = Stage(
    "drift",
    "KL to the baseline and entropy",
    DriftArguments,
    measure,
    MEASURES,
    of_completions=True,
    title="Drift from the baseline",
    section=drift_section.section,
)
