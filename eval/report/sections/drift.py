"""Stage `drift` in the report: KL to the baseline and entropy, in numbers and by position in the completion."""

from prefopt.evaluation.report.plots import Series, curves_plot
from prefopt.evaluation.report.tables import Ask, Block, Results, label

TITLES = {"kl": "KL per token, nats", "entropy": "entropy per token, nats"}


def section(results: Results) -> list[Block]:
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
    for key, title in TITLES.items():
        series = [
            Series(label(m), [{"x": p["position"], "y": p[key]} for p in points]) for m, points in curves.items()
        ]
        if any(s.points for s in series):
            figures.append(curves_plot(series, title, "token of the completion"))
    note = (
        f"KL of the model from {label(baseline)} over the whole vocabulary, along the model's own samples; k1 is what "
        "PPO's log shows, the log-probability ratio of the sampled tokens alone: the same on average, with more noise. "
        "Entropy that falls is mode collapse (Kirk et al. 2023)."
    )
    return [*results.table(asks), *figures, note]
