"""At a glance: the lights and the forest plot of the win rates."""

from collections.abc import Mapping
from html import escape
from typing import Any

from prefopt.evaluation.report import plots
from prefopt.evaluation.report.markup import Missing, baseline_name, label, model_names, number, scroll_table
from prefopt.evaluation.report.paper import MARK, paper_value
from prefopt.evaluation.report.verdict import SIGNS, lights
from prefopt.evaluation.results import find

# Drawn in the forest plot, in this order, as far as measured: (measure, what is added to the model's name).
WIN_RATES = (
    ("winrate", ""),
    ("winrate_length_controlled", ", equal length"),
    ("winrate_greedy", ", greedy"),
    ("winrate_heldout_use_case", ", held-out use case"),
)


def section(results: Mapping[str, Any]) -> str:
    """HTML of the overview."""
    if not results.get("measures"):
        raise Missing("nothing was measured; `prefopt eval all` measures what the data allow")
    return _lights(results) + _forest(results)


def _lights(results: Mapping[str, Any]) -> str:
    models = model_names(results)
    rows = []
    for light in lights(results):
        cells = "".join(_cell(light["models"][model], light) for model in models)
        rows.append(
            f"<tr><th>{escape(light['question'])}</th>{cells}<td class='paper'>{escape(light['paper']) or '–'}</td></tr>"
        )
    head = "".join(f"<th>{escape(label(m))}</th>" for m in models)
    head = f"<tr><th></th>{head}<th class='paper'>paper <small>{MARK}</small></th></tr>"
    note = (
        f"<p class='note'>Compared with {escape(label(baseline_name(results)))} on the same prompts, documents or tasks. "
        "▲ better and ▼ worse: the 95 % interval excludes no difference; ● unclear: it does not. "
        "Why a number is missing is told where it is pointed at, and under “Every number”.</p>"
    )
    return f"<div class='lights'>{scroll_table(head, ''.join(rows))}</div>{note}"


def _cell(light: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    state, decimals = light["state"], row["decimals"]
    title = f" title='{escape(light['reason'], quote=True)}'" if light.get("reason") else ""
    small = ""
    if light["value"] is not None:
        signed = state != "baseline" and not row["measure"].startswith("winrate")
        small = number(light["value"], decimals, sign=signed)
        if light.get("ci_low") is not None and light.get("ci_high") is not None:
            small += f"<br>{number(light['ci_low'], decimals)} to {number(light['ci_high'], decimals)}"
        small = f"<small>{small}</small>"
    elif light.get("tally"):
        small = f"<small>{escape(light['tally'])}</small>"
    return f"<td{title}><span class='light {state}'>{SIGNS[state]}</span>{small}</td>"


def _forest(results: Mapping[str, Any]) -> str:
    measures, baseline = results.get("measures") or [], baseline_name(results)
    rows = []
    for model in model_names(results):
        for name, suffix in WIN_RATES:
            m = find(measures, name, model, baseline)
            if model != baseline and m and m["value"] is not None:
                paper = paper_value(name, model)
                rows.append((label(model) + suffix, {**m, "paper": paper and paper[0]}))
    if not rows:
        return "<p class='skipped'>Skipped: no win rates were measured; `prefopt eval compare` does.</p>"
    note = (
        "<p class='note'>Win rates with intervals of 95 % over prompts. <span class='paper'>◇ paper, "
        f"{MARK}: labelers' preference over the 175B SFT model (Fig. 3, held-out labelers).</span></p>"
    )
    return f"<figure>{plots.forest_plot(rows, label(baseline))}</figure>{note}"
