"""Stage `diversity` in the report: distinct-n, unique answers and self-BLEU, with the differences to the baseline."""

from prefopt.evaluation.report.tables import Ask, Block, Results, label

SCOPES = {"across_prompts": "Across prompts, one sample of each", "per_prompt": "Among the samples of one prompt"}
MEASURES = {
    "distinct_1": ("distinct 1-grams", 3),
    "distinct_2": ("distinct 2-grams", 3),
    "distinct_3": ("distinct 3-grams", 3),
    "unique": ("unique answers", 3),
    "self_bleu": ("self-BLEU (100: all alike)", 1),
}


def section(results: Results) -> list[Block]:
    data = results.stage("diversity")
    baseline = data["baseline"]
    if not data["samples_per_prompt"]:
        raise results.missing("diversity.", "no model was measured")
    asks: list[Ask | str] = []
    for scope, heading in SCOPES.items():
        asks.append(heading)
        for name, (title, decimals) in MEASURES.items():
            full = f"diversity.{name}.{scope}"
            asks += [Ask(title, full, decimals), Ask(f"minus {label(baseline)}", full, decimals, baseline)]
    counts = " or ".join(map(str, sorted(set(data["samples_per_prompt"].values()))))
    note = (
        f"Samples per prompt: {counts}. Distinct n-grams: different ones / all, which also falls as answers grow longer. "
        f"Self-BLEU across prompts: in random groups of {data['group']} prompts. ▲ more diverse and ▼ less: the 95 % "
        "interval of the paired difference excludes 0."
    )
    return [*results.table(asks), note]
