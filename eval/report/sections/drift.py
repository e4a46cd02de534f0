"""Stage `drift` in the report: KL to the baseline and entropy, in numbers and by position in the completion."""

from collections.abc import Mapping
from typing import Any

from prefopt.evaluation.report import plots
from prefopt.evaluation.report.markup import Missing, label
from prefopt.evaluation.report.sections.stage_tables import figures, measure_table, note, stage_data

TITLES = {"kl": "KL per token, nats", "entropy": "entropy per token, nats"}


def section(results: Mapping[str, Any]) -> str:
    """HTML of the section."""
    measures, data = results.get("measures") or [], stage_data(results, "drift")
    curves = data["by_position"]
    if not curves:
        reasons = [m["reason"] for m in measures if m["name"] == "token_entropy" and m["reason"]]
        raise Missing(reasons[0] if reasons else "no model was measured")
    baseline = data["baseline"]
    rows = [
        ("KL, nats per completion", "kl_to_sft", 3, None),
        ("its one-sample estimate k1", "k1_to_sft", 3, None),
        ("KL, nats per token", "kl_to_sft_per_token", 4, None),
        ("k1, nats per token", "k1_to_sft_per_token", 4, None),
        ("entropy, nats per token", "token_entropy", 3, None),
        (f"minus {label(baseline)}", "token_entropy", 3, baseline),
    ]
    models = [*dict.fromkeys(m["model"] for m in measures if m["name"] == "token_entropy")]
    html = measure_table(measures, rows, [(label(m), m, "") for m in models])
    drawn = []
    for key, title in TITLES.items():
        series = [
            (label(m), [{"x": p["position"], "y": p[key]} for p in points]) for m, points in curves.items()
        ]
        if any(points for _, points in series):
            drawn.append(plots.points_plot(series, title, "token of the completion"))
    return (
        html
        + figures(drawn)
        + note(
            f"KL of the model from {label(baseline)} over the whole vocabulary, along the model's own samples; k1 is "
            "what PPO's log shows, the log-probability ratio of the sampled tokens alone: the same on average, with more "
            "noise. Entropy that falls is mode collapse (Kirk et al. 2023)."
        )
    )
