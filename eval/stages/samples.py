"""The samples that a stage measures: those of one model without the use case kept out of training."""

from typing import Any

from prefopt.evaluation.run import EvaluationArguments, EvaluationRun


def measured_samples(run: EvaluationRun, args: EvaluationArguments, model: str) -> list[dict[str, Any]]:
    """Sampled completions by prompt and sample; rows whose `use_case` is the held-out one are in no number.

    Raises:
        FileNotFoundError: there are none.
    """
    rows = run.completions(model)
    if args.heldout_use_case is not None:
        rows = [row for row in rows if row.get("use_case") != args.heldout_use_case]
    if not rows:
        raise FileNotFoundError(f"no samples of {model!r}; run `prefopt eval generate` first")
    return rows
