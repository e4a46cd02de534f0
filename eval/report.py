"""report.html from results.json: one self-contained page without scripts or external references."""

import logging
import os
from collections.abc import Callable, Mapping
from html import escape
from typing import Any

from prefopt.evaluation import plots
from prefopt.evaluation.generate import write_whole
from prefopt.evaluation.markup import (
    Missing,
    better_or_worse,
    cell,
    interval,
    label,
    listed,
    model_names,
    number,
    page,
    prompt_text,
    scroll_table,
    seconds,
    verb,
)
from prefopt.evaluation.results import BASELINE, MODELS, find, jsonable

logger = logging.getLogger(__name__)
Results = Mapping[str, Any]


def build_report(results: Results, path: str | os.PathLike) -> None:
    """Write the report of one run to `path`.

    `results` is what `evaluate` returns or results.json holds. Optional curves in `results["curves"]`: `sft_epochs`, a
    list of {`epoch`, `validation_loss`, `rm_score`}, with `sft_chosen_epoch`; and under a model's name its training
    log, a list of {`step`, `objective/scores`, `objective/kl`, `loss/ptx`, `gold`} (PPOPtxTrainer's log keys, and the
    gold reward of the rollouts where it is known). A section whose data are missing says so and why.

    Example:
        >>> import tempfile, pathlib
        >>> page = pathlib.Path(tempfile.mkdtemp()) / "report.html"
        >>> build_report({}, page)
        >>> "Skipped" in page.read_text()
        True
    """
    results = jsonable(results)
    sections = [
        ("The models", _models_section),
        ("Win rates against SFT", _winrate_section),
        ("Reward model", _reward_section),
        ("Choosing the SFT epoch", _epochs_section),
        ("RL training", _training_section),
        ("Samples side by side", _samples_section),
        ("Wall time", _time_section),
        ("Every number with its definition", _measures_section),
    ]
    body = "\n".join(_section(title, build, results) for title, build in sections)
    summary = f'<p class="verdict">{escape(verdict(results))}</p>'
    write_whole(path, page("prefopt report", f"{summary}\n{body}"))


def verdict(results: Results) -> str:
    """The result of the run in one sentence.

    >>> verdict({})
    'No model was compared with SFT.'
    """
    measures = results.get("measures") or []
    groups: dict[str, list[str]] = {"beats": [], "loses to": [], "cannot be told from": []}
    for model in ("ppo_ptx", "ppo", "dpo", *(m for m in model_names(results) if m not in MODELS)):
        m = find(measures, "winrate", model, BASELINE)
        if m and m["value"] is not None:
            low, high = m["ci_low"], m["ci_high"]
            known = low is not None and high is not None
            word = (
                "beats"
                if known and low > 0.5
                else "loses to"
                if known and high < 0.5
                else "cannot be told from"
            )
            groups[word].append(
                f"{label(model)} ({number(m['value'], 2)}{interval(m, 2, ', 95 % interval ')})"
            )
    parts = [f"{listed(models)} {verb(word, models)} SFT" for word, models in groups.items() if models]
    if not parts:
        return "No model was compared with SFT."
    sentence = "By win rate under the gold reward " + "; ".join(parts)
    tax = find(measures, "pretraining_bits_per_byte", "ppo_ptx", "ppo")
    if tax and tax["value"] is not None:
        sure = {"good": "less", "bad": "more"}.get(better_or_worse(tax))
        amount = f"({number(tax['value'], 3, sign=True)} bits per byte{interval(tax, 3, ', ')})"
        sentence += (
            f"; PPO-ptx forgets {sure} of the pretraining text than PPO {amount}"
            if sure
            else f"; whether PPO-ptx or PPO forgets more of the pretraining text cannot be told {amount}"
        )
    return sentence + "."


# ---- sections: each returns HTML or raises Missing ------------------------------------------------------------
# (title, measure, difference to the baseline?, decimals); a title alone starts a group of rows
_ROWS: list[tuple[str, str, bool, int] | str] = [
    "Is it better? Gold reward as the judge",
    ("win rate vs SFT, samples at T = 1", "winrate", True, 3),
    ("win rate vs SFT, greedy", "winrate_greedy", True, 3),
    ("win rate vs SFT, held-out use case", "winrate_heldout_use_case", True, 3),
    ("gold reward, T = 1", "gold_reward", False, 3),
    ("minus SFT", "gold_reward", True, 3),
    ("gold reward, greedy", "gold_reward_greedy", False, 3),
    ("minus SFT", "gold_reward_greedy", True, 3),
    ("gold reward, held-out use case", "gold_reward_heldout_use_case", False, 3),
    "What did it cost? The alignment tax",
    ("bits per byte of pretraining text (lower is better)", "pretraining_bits_per_byte", False, 3),
    ("minus SFT", "pretraining_bits_per_byte", True, 4),
    ("accuracy on held-out tasks", "heldout_task_accuracy", False, 3),
    ("minus SFT", "heldout_task_accuracy", True, 3),
    "How far did it move?",
    ("KL to SFT, nats per completion", "kl_to_sft", False, 3),
    ("KL to SFT, nats per token", "kl_to_sft_per_token", False, 4),
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


def _models_section(results: Results) -> str:
    measures, models = results.get("measures") or [], model_names(results)
    if not measures:
        raise Missing("no measures in the results")
    rows = []
    for row in _ROWS:
        if isinstance(row, str):
            rows.append(
                f'<tr class="group"><th colspan="{len(models) + 1}"><span>{escape(row)}</span></th></tr>'
            )
            continue
        title, name, difference, decimals = row
        found = [find(measures, name, m, BASELINE if difference else None) for m in models]
        if any(found):
            cells = "".join(
                cell(m, decimals, difference, model) for m, model in zip(found, models, strict=True)
            )
            indent = ' class="difference"' if title.startswith("minus") else ""
            rows.append(f"<tr><th{indent}>{escape(title)}</th>{cells}</tr>")
        if name in ("gold_reward", "gold_reward_greedy") and difference:
            rows += _component_rows(measures, models, "_greedy" if name.endswith("greedy") else "")
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
    settings = results.get("settings") or {}
    apart = settings.get("heldout_use_case")
    note = (
        "<p class='note'>Small print under a number: its 95 % interval (bootstrap over prompts, documents or tasks). "
        "▲ better and ▼ worse mark intervals that exclude no difference; differences are paired. "
    )
    note += (
        f"The use case “{escape(str(apart))}” was kept out of reward-model and RL training and is in no other row. "
        if apart
        else ""
    )
    return html + note + "</p>" + _missing_list(measures)


def _component_rows(measures: list[dict], models: list[str], suffix: str) -> list[str]:
    names = dict.fromkeys(m["name"] for m in measures if m["name"].startswith(f"gold_component{suffix}."))
    return [
        f'<tr><th class="difference">{escape(name.partition(".")[2])}</th>'
        + "".join(cell(find(measures, name, m), 3, False, m) for m in models)
        + "</tr>"
        for name in names
    ]


def _missing_list(measures: list[dict]) -> str:
    """Why numbers are missing, one line per reason."""
    why: dict[str, list[str]] = {}
    for m in measures:
        if m["status"] != "ok":
            why.setdefault(f"{m['status']}: {m['reason']}", []).append(f"{m['name']} ({label(m['model'])})")
    if not why:
        return ""
    items = "".join(
        f"<li>{escape(reason)} — {escape(', '.join(dict.fromkeys(names)))}</li>"
        for reason, names in why.items()
    )
    return f"<details class='missing'><summary>Missing numbers and why</summary><ul>{items}</ul></details>"


def _winrate_section(results: Results) -> str:
    measures = results.get("measures") or []
    rows = []
    for model in model_names(results):
        for name, suffix in (
            ("winrate", ""),
            ("winrate_heldout_use_case", ", held-out use case"),
            ("winrate_greedy", ", greedy"),
        ):
            m = find(measures, name, model, BASELINE)
            if model != BASELINE and m and m["value"] is not None:
                rows.append((label(model) + suffix, m))
    if not rows:
        raise Missing("no win rates were measured")
    use_cases = dict.fromkeys(m["name"] for m in measures if m["name"].startswith("winrate_use_case."))
    others = [m for m in model_names(results) if m != BASELINE]
    html = f"<figure>{plots.forest_plot(rows, label(BASELINE))}</figure>"
    html += (
        "<p class='note'>Intervals of 95 % over prompts. <span class='paper'>Paper, 175B, different data, human judges: "
        "PPO .69 and PPO-ptx .71 against SFT.</span></p>"
    )
    if use_cases:
        head = "".join(f"<th>{escape(label(m))}</th>" for m in others)
        body = "".join(
            f"<tr><th>{escape(name.partition('.')[2])} <small>n = {max((find(measures, name, m, BASELINE) or {'n': 0})['n'] for m in others)}"
            "</small></th>"
            + "".join(cell(find(measures, name, m, BASELINE), 2, True, m) for m in others)
            + "</tr>"
            for name in use_cases
        )
        table = scroll_table(f"<tr><th></th>{head}</tr>", body)
        html += f"<details><summary>Win rate by use case</summary>{table}</details>"
    return html


def _reward_section(results: Results) -> str:
    measures = results.get("measures") or []
    paper = {"train_labelers": "0.724", "heldout_labelers": "0.696"}
    rows = []
    for group, title in (("train_labelers", "training labelers"), ("heldout_labelers", "held-out labelers")):
        accuracy = find(measures, f"rm.accuracy.{group}", "reward_model")
        ceiling = find(measures, f"rm.gold_accuracy.{group}", "gold")
        if accuracy or ceiling:
            ratio = "–"
            if accuracy and ceiling and accuracy["value"] is not None and ceiling["value"]:
                ratio = number(accuracy["value"] / ceiling["value"], 2)
            pairs = (accuracy or ceiling)["n"]
            rows.append(
                f"<tr><th>{title} <small>{pairs} pairs</small></th>{cell(accuracy, 3, False, '')}"
                f"{cell(ceiling, 3, False, '')}<td>{ratio}</td><td class='paper'>{paper[group]}</td></tr>"
            )
    if not rows:
        raise Missing("no reward model was evaluated")
    head = (
        "<tr><th>pairs ranked by</th><th>reward model</th><th>gold ceiling</th><th>ratio</th>"
        "<th class='paper'>paper <small>175B, different data</small></th></tr>"
    )
    return scroll_table(head, "".join(rows)) + (
        "<p class='note'>Share of strictly ranked pairs put in the labelers' order. The gold ceiling is what the gold "
        "reward itself reaches on the same pairs: labelers are noisy. <span class='paper'>Paper: 175B, different data; "
        "there the accuracy on held-out labelers is .90 of how often those labelers agree with each other.</span></p>"
    )


def _epochs_section(results: Results) -> str:
    curves = results.get("curves") or {}
    if not curves.get("sft_epochs"):
        raise Missing("no curve of the SFT epochs was given")
    return f"<figure>{plots.epochs_plot(curves['sft_epochs'], curves.get('sft_chosen_epoch'))}</figure>" + (
        "<p class='note'>The epoch is chosen by reward-model score, as in the paper, where validation loss overfits "
        "after one epoch while the score, and people's preference, still rise.</p>"
    )


def _training_section(results: Results) -> str:
    runs = {
        label(m): log for m, log in (results.get("curves") or {}).items() if log and not m.startswith("sft_")
    }
    titles = {
        "objective/scores": "reward-model score of the rollouts",
        "objective/kl": "KL to SFT, nats per completion",
        "gold": "gold reward of the rollouts",
        "loss/ptx": "loss on pretraining text, nats per token",
    }
    drawn = [key for key in titles if any(plots.drawable(log, key) for log in runs.values())]
    if not drawn:
        raise Missing("no training curves were given")
    figures = "".join(f"<figure>{plots.training_plot(runs, key, titles[key])}</figure>" for key in drawn)
    note = (
        "<p class='note'>A reward-model score that rises while the gold reward falls is over-optimisation.</p>"
        if "gold" in drawn
        else ""
    )
    return f"<div class='figures'>{figures}</div>{note}"


def _samples_section(results: Results) -> str:
    samples = results.get("samples")
    if not samples:
        raise Missing("no samples were given")
    cards = []
    for sample in samples:
        answers = "".join(
            f"<div><h4>{escape(label(model))} <small>gold {number(c.get('gold'), 2)}"
            f"{', cut at the length limit' if c.get('truncated') else ''}</small></h4>"
            f"<pre>{escape(str(c.get('text', '')))}</pre></div>"
            for model, c in (sample.get("completions") or {}).items()
        )
        about = " · ".join(escape(str(x)) for x in (sample.get("use_case"), sample.get("why")) if x)
        cards.append(
            f"<article><p class='note'>{about}</p><pre class='prompt'>{escape(prompt_text(sample.get('prompt', '')))}"
            f"</pre><div class='answers'>{answers}</div></article>"
        )
    return "<p class='note'>One sample each at temperature 1.</p>" + "".join(cards)


def _time_section(results: Results) -> str:
    steps = {k: v for k, v in (results.get("wall_seconds") or {}).items() if v is not None}
    if not steps:
        raise Missing("no wall times were given")
    longest = max([*steps.values(), 1e-9])
    rows = "".join(
        f"<tr><th>{escape(step)}</th><td>{seconds(s)}</td>"
        f"<td class='bar'><span style='width:{100 * max(s, 0) / longest:.1f}%'></span></td></tr>"
        for step, s in steps.items()
    )
    rows += f"<tr class='total'><th>sum</th><td>{seconds(sum(steps.values()))}</td><td></td></tr>"
    return f"<div class='scroll'><table class='time'><tbody>{rows}</tbody></table></div>"


def _measures_section(results: Results) -> str:
    measures = results.get("measures") or []
    if not measures:
        raise Missing("no measures in the results")
    definitions: dict[str, dict] = {}
    for m in measures:
        if not m["against"] or m["name"].startswith("winrate"):
            definitions.setdefault(
                m["name"].partition(".")[0] if not m["name"].startswith("rm.") else m["name"], m
            )
    defined = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(m['definition'])} <small>({escape(m['source'])})</small></dd>"
        for name, m in definitions.items()
    )
    rows = "".join(
        f"<tr><th>{escape(m['name'])}</th><td>{escape(label(m['model']))}"
        f"{' − ' + escape(label(m['against'])) if m['against'] and not m['name'].startswith('winrate') else ''}</td>"
        f"<td>{number(m['value'], 4)}</td><td>{interval(m, 4)}</td><td>{m['n']}</td>"
        f"<td>{escape(m['status'])}</td></tr>"
        for m in measures
    )
    head = "<tr><th>name</th><th>model</th><th>value</th><th>95 % interval</th><th>n</th><th>status</th></tr>"
    settings = ", ".join(f"{k} = {v}" for k, v in (results.get("settings") or {}).items())
    return (
        f"<p class='note'>{escape(settings)}</p><details><summary>Definitions and sources</summary><dl>{defined}</dl></details>"
        f"<details><summary>All {len(measures)} numbers</summary>{scroll_table(head, rows)}</details>"
    )


def _section(title: str, build: Callable[[Results], str], results: Results) -> str:
    try:
        content = build(results)
    except Missing as missing:
        content = f"<p class='skipped'>Skipped: {escape(str(missing))}.</p>"
    except Exception as error:  # one broken section must not cost the reader the others
        logger.exception("report section %r failed", title)
        content = f"<p class='skipped'>Failed: {escape(f'{type(error).__name__}: {error}')}</p>"
    return f"<section><h2>{escape(title)}</h2>\n{content}\n</section>"
