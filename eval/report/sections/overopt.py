"""Stage `overopt` in the report: proxy and gold reward against √KL, with Gao's fits."""

from prefopt.evaluation.report.gains import NAMES, gain_plot, where_it_turns
from prefopt.evaluation.report.tables import Ask, Block, Column, Fold, Items, Results, label
from prefopt.statistics.overoptimization import best_of_n_design, rl_design


def section(results: Results) -> list[Block]:
    data = results.stage("overopt")
    figures, said = [], []
    if best := data["best_of_n"]:
        fit, title = best["fits"].get("gold"), f"best of n of {label(data['baseline'])}: gain"
        figures.append(gain_plot(best["points"], title, fit, best_of_n_design))
        said.append(("Best of n:", where_it_turns(best["points"], fit, f"best of {best['samples']}")))
    for model, run in data["rollouts"].items():
        if len(run["points"]) > 1:
            fit, title = run["fits"].get("gold"), f"{label(model)}, rollouts of training: gain"
            figures.append(gain_plot(run["points"], title, fit, rl_design))
            said.append((f"{label(model)}:", where_it_turns(run["points"], fit, "the run")))
    models = [{**p, "label": label(m)} for m, p in data["models"].items() if p["distance"] is not None]
    if sum("gold" in p or "proxy" in p for p in models) > 1:
        figures.append(gain_plot(models, "the models: gain"))
    if not figures:
        raise results.missing("overopt.", "nothing was measured")
    asks: list[Ask | str] = []
    for kind, title in (("best_of_n", "Best of n, d (α − β d)"), ("rl", "RL, d (α − β log d)")):
        asks.append(title)
        for name, what in NAMES.items():
            for coefficient, sign in (("alpha", "α"), ("beta", "β")):
                asks.append(Ask(f"{sign}, {what}", f"overopt.{kind}_fit.{name}.{coefficient}"))
    columns = [Column(label(m), m) for m in dict.fromkeys([data["baseline"], *data["rollouts"]])]
    coefficients = results.table(asks, columns)
    note = (
        "Gains over the baseline (over the first rollout) in standard deviations of its samples; intervals of 95 % over "
        "prompts (over the episodes of a rollout). After Gao et al. 2022 (arXiv:2210.10760): d = √KL, under best of n "
        "√(log n − (n − 1)/n); gold gain d (α − β d) under best of n, d (α − β log d) under RL. A reward model's score "
        "that rises while the gold reward falls is over-optimization."
    )
    return [
        *figures,
        *([Items(said)] if said else []),
        *([Fold("Coefficients of the fits", coefficients)] if coefficients else []),
        note,
    ]
