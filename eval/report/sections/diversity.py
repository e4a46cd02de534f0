"""Stage `diversity` in the report: distinct-n, unique answers and self-BLEU, with the differences to the baseline."""

from collections.abc import Mapping
from typing import Any

from prefopt.evaluation.report.markup import Missing, label
from prefopt.evaluation.report.sections.stage_tables import measure_table, note, stage_data

SCOPES = {
    "across_prompts": "Across prompts, one sample of each",
    "per_prompt": "Among the samples of one prompt",
}
MEASURES = {
    "distinct_1": ("distinct 1-grams", 3),
    "distinct_2": ("distinct 2-grams", 3),
    "distinct_3": ("distinct 3-grams", 3),
    "unique": ("unique answers", 3),
    "self_bleu": ("self-BLEU (100: all alike)", 1),
}


def section(results: Mapping[str, Any]) -> str:
    """HTML of the section."""
    measures, data = results.get("measures") or [], stage_data(results, "diversity")
    baseline = data["baseline"]
    models = [*dict.fromkeys(m["model"] for m in measures if m["name"].startswith("diversity."))]
    if not data["samples_per_prompt"]:
        reasons = [m["reason"] for m in measures if m["name"].startswith("diversity.") and m["reason"]]
        raise Missing(reasons[0] if reasons else "no model was measured")
    rows: list[Any] = []
    for scope, heading in SCOPES.items():
        rows.append(heading)
        for name, (title, decimals) in MEASURES.items():
            rows.append((title, f"diversity.{name}.{scope}", decimals, None))
            rows.append((f"minus {label(baseline)}", f"diversity.{name}.{scope}", decimals, baseline))
    counts = sorted(set(data["samples_per_prompt"].values()))
    told = " or ".join(map(str, counts))
    return measure_table(measures, rows, [(label(m), m, "") for m in models]) + note(
        f"Samples per prompt: {told}. Distinct n-grams: different ones / all, which also falls as answers grow longer. "
        f"Self-BLEU across prompts: in random groups of {data['group']} prompts. ▲ more diverse and ▼ less: the 95 % "
        "interval of the paired difference excludes 0."
    )
