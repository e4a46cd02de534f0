"""The models in numbers: rewards, alignment tax, drift, each with its difference to the baseline."""

from collections.abc import Mapping
from html import escape
from typing import Any

from prefopt.evaluation.report.markup import Missing, baseline_name, cell, label, model_names, scroll_table
from prefopt.evaluation.results import find

# (title, measure, difference to the baseline?, decimals); a title alone starts a group of rows
_ROWS: list[tuple[str, str, bool, int] | str] = [
    "Is it better? Gold reward as the judge",
    ("win rate, samples at T = 1", "winrate", True, 3),
    ("win rate, greedy", "winrate_greedy", True, 3),
    ("win rate, held-out use case", "winrate_heldout_use_case", True, 3),
    ("gold reward, T = 1", "gold_reward", False, 3),
    ("minus {}", "gold_reward", True, 3),
    ("gold reward, greedy", "gold_reward_greedy", False, 3),
    ("minus {}", "gold_reward_greedy", True, 3),
    ("gold reward, held-out use case", "gold_reward_heldout_use_case", False, 3),
    "What did it cost? The alignment tax",
    ("bits per byte of pretraining text (lower is better)", "pretraining_bits_per_byte", False, 3),
    ("minus {}", "pretraining_bits_per_byte", True, 4),
    ("accuracy on held-out tasks", "heldout_task_accuracy", False, 3),
    ("minus {}", "heldout_task_accuracy", True, 3),
    "How far did it move?",
    ("KL to {}, nats per completion", "kl_to_sft", False, 3),
    ("KL to {}, nats per token", "kl_to_sft_per_token", False, 4),
    ("reward-model score", "rm_score", False, 3),
    ("tokens per completion", "completion_tokens", False, 1),
    ("share cut at the length limit", "truncated", False, 3),
]
_AGAINST_PPO = [
    ("bits per byte (lower is better)", "pretraining_bits_per_byte", 4),
    ("accuracy on held-out tasks", "heldout_task_accuracy", 3),
    ("gold reward, T = 1", "gold_reward", 3),
    ("gold reward, greedy", "gold_reward_greedy", 3),
]


def section(results: Mapping[str, Any]) -> str:
    """HTML of the table."""
    measures, models = results.get("measures") or [], model_names(results)
    baseline = baseline_name(results)
    if not measures:
        raise Missing("no measures in the results")
    rows: list[str] = []
    group = ""
    for row in _ROWS:
        if isinstance(row, str):
            group = f'<tr class="group"><th colspan="{len(models) + 1}"><span>{escape(row)}</span></th></tr>'
            continue
        title, name, difference, decimals = row
        found = [find(measures, name, m, baseline if difference else None) for m in models]
        if not any(found):
            continue
        cells = "".join(cell(m, decimals, difference, model) for m, model in zip(found, models, strict=True))
        indent = ' class="difference"' if title.startswith("minus") else ""
        rows.append(f"{group}<tr><th{indent}>{escape(title.format(label(baseline)))}</th>{cells}</tr>")
        group = ""  # a heading stands over its first row, and nowhere if it has none
        if name in ("gold_reward", "gold_reward_greedy") and difference:
            rows += _component_rows(measures, models, "_greedy" if name.endswith("greedy") else "")
    if not rows:
        raise Missing("none of its numbers were measured; `prefopt eval compare`, `tax` and `drift` do")
    head = "".join(f"<th>{escape(label(m))}</th>" for m in models)
    html = scroll_table(f"<tr><th></th>{head}</tr>", "".join(rows))
    paired = [
        f"<tr><th>{escape(title)}</th>{cell(m, decimals, True, '')}</tr>"
        for title, name, decimals in _AGAINST_PPO
        if (m := find(measures, name, "ppo_ptx", "ppo"))
    ]
    if paired:
        html += "<h3>PPO-ptx minus PPO, paired</h3>" + scroll_table(
            "<tr><th></th><th>difference</th></tr>", "".join(paired)
        )
    apart = (results.get("settings") or {}).get("heldout_use_case")
    kept_out = (
        f"The use case “{escape(str(apart))}” was kept out of reward-model and RL training and is in no other row."
        if apart
        else ""
    )
    return html + (
        "<p class='note'>Small print under a number: its 95 % interval (bootstrap over prompts, documents or tasks). "
        f"▲ better and ▼ worse mark intervals that exclude no difference; differences are paired. {kept_out}</p>"
    )


def _component_rows(measures: list[dict], models: list[str], suffix: str) -> list[str]:
    names = dict.fromkeys(m["name"] for m in measures if m["name"].startswith(f"gold_component{suffix}."))
    return [
        f'<tr><th class="difference">{escape(name.partition(".")[2])}</th>'
        + "".join(cell(find(measures, name, m), 3, False, m) for m in models)
        + "</tr>"
        for name in names
    ]
