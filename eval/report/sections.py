"""What a reader sees first, one sentence and a table of lights, and the other sections that no stage owns.

Each gives its blocks from the results, and raises `Missing` when there is nothing to show.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from prefopt.evaluation.report.paper import FIG_3, MARK
from prefopt.evaluation.report.plots import Series, curves_plot, drawable, intervals_plot, of_log
from prefopt.evaluation.report.tables import (
    Ask,
    Block,
    Cell,
    Column,
    Fold,
    Gap,
    Items,
    Line,
    Measure,
    Missing,
    Results,
    Samples,
    Table,
    better_or_worse,
    headed,
    interval,
    label,
    missing_numbers,
    number,
)
from prefopt.evaluation.results import MODELS, families, no_number
from prefopt.evaluation.run import Question, Stage
from prefopt.evaluation.stages import STAGES

SIGNS = {
    "better": "▲ better",
    "worse": "▼ worse",
    "unclear": "● unclear",
    "baseline": "baseline",
    "skipped": "– skipped",
    "failed": "✕ failed",
}


@dataclass(frozen=True)
class Light:
    """The answer of one model: `better` or `worse` where the 95 % interval of the comparison excludes no difference,
    `unclear` where it does not, `baseline` for what is compared with, `skipped` or `failed` (with `reason`) else.
    """

    state: str
    value: float | None = None
    numbers: str = ""
    reason: str = ""


def lights(results: Results) -> list[tuple[str, str, dict[str, Light]]]:
    """Of every question how it reads, what the paper found, and the light of every model.

    Models are compared with the baseline, on benchmarks with the base. Of several benchmarks `numbers` tells how many are
    better and worse, and one that is worse makes the light `worse`.

    >>> lights(Results({}))[0][2]["ppo"].state
    'skipped'
    """
    base = ((results.content.get("stages") or {}).get("bench") or {}).get("base") or results.baseline
    rows = []
    for stage in STAGES:
        against = base if stage.key == "bench" else results.baseline
        for question in stage.questions:
            models = {model: _light(results, stage, question, model, against) for model in results.models}
            rows.append((question.title.format(label(against)), question.paper, models))
    return rows


def _light(results: Results, stage: Stage, question: Question, model: str, against: str) -> Light:
    is_rate = question.measure.startswith("winrate")
    of_model = [m for m in results.measures if m["model"] == model and fnmatchcase(m["name"], question.measure)]
    if model == against:
        alone = [m["value"] for m in of_model if m["against"] is None and m["value"] is not None]
        value = alone[0] if len(alone) == 1 and not is_rate else None
        return Light("baseline", value, "" if value is None else number(value, question.decimals))
    compared = [m for m in of_model if m["against"] == against]
    known = [m for m in compared if m["value"] is not None]
    if compared and not known:
        return Light(compared[0]["status"], reason=compared[0]["reason"])
    if not known:
        note = (results.content.get("notes") or {}).get(stage.key)
        # A missing number of the model's own says why; its difference to the baseline is then not even named.
        alone = next((m for m in of_model if m["against"] is None and m["reason"]), None)
        if alone and not note:
            return Light(alone["status"], reason=alone["reason"])
        has_run = stage.key in (results.content.get("stages") or {})
        remedy = "was run without it" if has_run else "gives it"
        why = no_number(note or f"not measured; `prefopt eval {stage.name}` {remedy}")
        return Light(why.status, reason=why.reason)
    words = {"good": "better", "bad": "worse", "": "unclear"}
    states = [words[better_or_worse(m)] for m in known]
    state = next(s for s in ("worse", "better", "unclear") if s in states)
    if len(known) > 1:
        tally = f"of {len(known)}: {states.count('better')} better, {states.count('worse')} worse"
        return Light(state, numbers=tally)
    value = number(known[0]["value"], question.decimals, sign=not is_rate)
    return Light(state, known[0]["value"], value + interval(known[0], question.decimals, "\n"))


def verdict(results: Results) -> str:
    """The result of the run in one sentence.

    >>> verdict(Results({}))
    'No model was compared with SFT.'
    """
    models, baseline = results.models, results.baseline
    groups: dict[str, list[str]] = {"beats": [], "loses to": [], "cannot be told from": []}
    first = [m for m in ("ppo_ptx", "ppo", "dpo") if m in models]
    for model in [*first, *(m for m in models if m not in MODELS)]:
        m = results.find("winrate", model, baseline) if model != baseline else None
        if m and m["value"] is not None:
            word = {"good": "beats", "bad": "loses to", "": "cannot be told from"}[better_or_worse(m)]
            groups[word].append(f"{label(model)} ({number(m['value'], 2)}{interval(m, 2, ', 95 % interval ')})")
    parts = [_said(word, group, label(baseline)) for word, group in groups.items() if group]
    if not parts:
        return f"No model was compared with {label(baseline)}."
    judge = results.settings.get("judge") or "a judge that is not named"
    sentence = f"By win rate under {judge}, " + "; ".join(parts)
    tax = results.find("pretraining_bits_per_byte", "ppo_ptx", "ppo")
    if tax and tax["value"] is not None:
        sure = {"good": "less", "bad": "more", "": ""}[better_or_worse(tax)]
        amount = f"({number(tax['value'], 3, sign=True)} bits per byte{interval(tax, 3, ', ')})"
        sentence += (
            f"; PPO-ptx forgets {sure} of the pretraining text than PPO {amount}"
            if sure
            else f"; whether PPO-ptx or PPO forgets more of the pretraining text cannot be told {amount}"
        )
    return sentence + "."


def _said(word: str, models: Sequence[str], baseline: str) -> str:
    """
    >>> _said("beats", ["DPO"], "SFT"), _said("beats", ["PPO", "DPO"], "SFT")
    ('DPO beats SFT', 'PPO and DPO beat SFT')
    """
    if len(models) > 1:
        word = {"beats": "beat", "loses to": "lose to"}.get(word, word)
    return f"{' and '.join(filter(None, [', '.join(models[:-1]), models[-1]]))} {word} {baseline}"


# Drawn in the forest plot, in this order, as far as measured: (measure, what is added to the model's name).
WIN_RATES = (
    ("winrate", ""),
    ("winrate_length_controlled", ", equal length"),
    ("winrate_greedy", ", greedy"),
    ("winrate_heldout_use_case", ", held-out use case"),
)


def glance(results: Results) -> list[Block]:
    """The lights, and the forest plot of the win rates."""
    if not results.measures:
        raise Missing("nothing was measured; `prefopt eval all` measures what the data allow")
    rows = []
    for question, paper, models in lights(results):
        cells = [Cell(SIGNS[x.state], x.numbers, x.state, x.reason) for x in models.values()]
        rows.append(Line(question, [*cells, Cell(paper or "–", tone="paper")]))
    prompts = results.settings.get("prompts")
    note = (
        f"Compared with {label(results.baseline)} on the same prompts{f' ({prompts:,})' if prompts else ''}, documents or tasks. "
        "▲ better and ▼ worse: the 95 % interval excludes no difference; ● unclear: it does not."
    )
    if str(results.settings.get("judge")).startswith("the reward model"):
        note += " A reward model as judge favors what was trained against it, or chosen by it, whether that is better or not."
    heads = ["", *map(label, results.models), Cell("paper", MARK, "paper")]
    return [Table(heads, rows, "lights"), note, *_reasons(results), *_forest(results)]


def _reasons(results: Results) -> list[Items]:
    """Why lights are out: each reason once, with the questions that it leaves unanswered."""
    questions: dict[str, dict[str, None]] = {}
    for question, _, models in lights(results):
        for light in models.values():
            if light.reason:
                questions.setdefault(f"{light.state}: {light.reason}", {})[question] = None
    return [Items([("", f"{' '.join(of)} {reason}") for reason, of in questions.items()])] if questions else []


def _forest(results: Results) -> list[Block]:
    rows = []
    for model in results.others:
        for name, suffix in WIN_RATES:
            m = results.find(name, model, results.baseline)
            if m and m["value"] is not None:
                paper = FIG_3.get(model) if name == "winrate" else None
                rows.append((label(model) + suffix, {"win rate": {**m, "paper": paper}}))
    if not rows:
        return [Gap("Skipped: no win rates were measured; `prefopt eval compare` does.")]
    axis = f"win rate against {label(results.baseline)} (.5 = equal)"
    return [
        intervals_plot(rows, "win rates with their intervals", axis, level=0.5),
        "Win rates with intervals of 95 % over prompts. "
        f"◇ paper, {MARK}: labelers' preference over the 175B SFT model (Fig. 3, held-out labelers).",
    ]


def models(results: Results) -> list[Block]:
    """The models in numbers: rewards, alignment tax, drift, each with its difference to the baseline."""
    if not results.measures:
        raise Missing("no measures in the results")
    table = results.table(_asks(results))
    if not table:
        raise Missing("none of its numbers were measured; `prefopt eval compare`, `tax` and `drift` do")
    against_ppo = [
        Ask("bits per byte (lower is better)", "pretraining_bits_per_byte", 4, "ppo"),
        Ask("accuracy on held-out tasks", "heldout_task_accuracy", 3, "ppo"),
        Ask("gold reward, T = 1", "gold_reward", 3, "ppo"),
        Ask("gold reward, greedy", "gold_reward_greedy", 3, "ppo"),
    ]
    paired = headed("PPO-ptx minus PPO, paired", results.table(against_ppo, [Column("difference", "ppo_ptx")]))
    apart = results.settings.get("heldout_use_case")
    note = (
        "Small print under a number: its 95 % interval (bootstrap over prompts, documents or tasks). ▲ better and ▼ worse "
        "mark intervals that exclude no difference; differences are paired."
    )
    if apart:
        note += f" The use case “{apart}” was kept out of reward-model and RL training and is in no other row."
    return [*table, *paired, note]


def _asks(results: Results) -> list[Ask | str]:
    baseline, name = results.baseline, label(results.baseline)
    minus = f"minus {name}"

    def parts(suffix: str) -> list[Ask]:
        prefix = f"gold_component{suffix}."
        return [Ask(part, prefix + part, indent=True) for part in results.names(prefix)]

    return [
        f"Is it better? The judge: {results.settings.get('judge') or 'nobody'}",
        Ask("win rate, samples at T = 1", "winrate", 3, baseline),
        Ask("win rate, greedy", "winrate_greedy", 3, baseline),
        Ask("win rate, held-out use case", "winrate_heldout_use_case", 3, baseline),
        Ask("gold reward, T = 1", "gold_reward"),
        Ask(minus, "gold_reward", 3, baseline),
        *parts(""),
        Ask("gold reward, greedy", "gold_reward_greedy"),
        Ask(minus, "gold_reward_greedy", 3, baseline),
        *parts("_greedy"),
        Ask("gold reward, held-out use case", "gold_reward_heldout_use_case"),
        "What did it cost? The alignment tax",
        Ask("bits per byte of pretraining text (lower is better)", "pretraining_bits_per_byte"),
        Ask(minus, "pretraining_bits_per_byte", 4, baseline),
        Ask("accuracy on held-out tasks", "heldout_task_accuracy"),
        Ask(minus, "heldout_task_accuracy", 3, baseline),
        "How far did it move?",
        Ask(f"KL to {name}, nats per completion", "kl_to_sft"),
        Ask(f"KL to {name}, nats per token", "kl_to_sft_per_token", 4),
        Ask("reward-model score", "rm_score"),
        Ask("tokens per completion", "completion_tokens", 1),
        Ask("share cut at the length limit", "truncated"),
    ]


EPOCHS = {
    "validation_loss": "validation loss",
    "rm_score": "reward-model score on validation prompts",
    "gold": "gold reward on validation prompts",
}
RL = {
    "objective/scores": "reward-model score of the rollouts",
    "objective/kl": "KL to SFT, nats per completion",
    "gold": "gold reward of the rollouts",
    "loss/ptx": "loss on pretraining text, nats per token",
}


def epochs(results: Results) -> list[Block]:
    """The curves by which the SFT epoch was chosen."""
    curves = results.content.get("curves") or {}
    if not curves.get("sft_epochs"):
        raise Missing("no curve of the SFT epochs was given; set `sft_selection`")
    log = [{"step": entry["epoch"], **entry} for entry in curves["sft_epochs"]]
    chosen = curves.get("sft_chosen_epoch")
    marks = [] if chosen is None else [(chosen, f"chosen: epoch {chosen}")]
    figures = [
        curves_plot([Series("", of_log(log, key), dotted=True)], title, "SFT epoch", marks=marks)
        for key, title in EPOCHS.items()
        if drawable(log, key)
    ]
    note = (
        "The epoch is chosen by reward-model score, as in the paper, where validation loss overfits after one epoch while "
        "the score, and people's preference, still rise."
    )
    return [*figures, note]


def rl(results: Results) -> list[Block]:
    """Rewards, KL and pretraining loss over the steps of the RL runs."""
    curves = results.content.get("curves") or {}
    runs = {label(m): log for m, log in curves.items() if log and not m.startswith("sft_")}
    figures, note = [], []
    for key, title in RL.items():
        series = [
            Series(name, of_log(log, key), color=i) for i, (name, log) in enumerate(runs.items()) if drawable(log, key)
        ]
        if series:
            figures.append(curves_plot(series, title, "step"))
        if series and key == "gold":
            note = ["A reward-model score that rises while the gold reward falls is over-optimization."]
    if not figures:
        raise Missing("no training curves were given; set `rl_runs`")
    return [*figures, *note]


def numbers(results: Results) -> list[Block]:
    """All measures, those of one definition together, and what is missing."""
    measures = results.measures
    if not measures:
        raise Missing("nothing was measured")
    rows = []
    for (definition, source), members in families(measures).items():
        rows += [Line(Cell(definition, source), kind="group"), *map(_row, members)]
    heads = ["name", "model", "value", "95 % interval", Cell("n", "prompts"), "status"]
    shown = {k: ", ".join(v) if isinstance(v, list) else v for k, v in results.settings.items() if v is not None}
    settings = "; ".join(f"{k} = {v}" for k, v in shown.items())
    title = f"All {len(measures)} numbers with their definitions"
    why, line = "Missing numbers and why", "{reason} — {names}"
    missing = missing_numbers(why, measures, lambda m: f"{m['name']} ({label(m['model'])})", line)
    return [settings, *missing, Fold(title, [Table(heads, rows, "every")])]


def _row(m: Measure) -> Line:
    against = f" − {label(m['against'])}" if m["against"] and not m["name"].startswith("winrate") else ""
    count = Cell(f"{m['n']:,}", f"{m['n_clusters']:,}" if m["n_clusters"] != m["n"] else "")
    status = Cell(m["status"], m["reason"] or "", "words")
    return Line(m["name"], [label(m["model"]) + against, number(m["value"], 4), interval(m, 4) or "–", count, status])


def time(results: Results) -> list[Block]:
    """The seconds of every step."""
    steps = {k: v for k, v in (results.content.get("wall_seconds") or {}).items() if v is not None}
    if not steps:
        raise Missing("no wall times were given")
    longest = max([*steps.values(), 1e-9])
    rows = [Line(step, [_seconds(s), Cell("", share=max(s, 0) / longest)]) for step, s in steps.items()]
    note = "A step that went on with what an earlier run had kept has the time of both."
    rows.append(Line("sum", [_seconds(sum(steps.values())), ""], "total"))
    return [Table(["step", "time", ""], rows, "time"), note]


def samples(results: Results) -> list[Block]:
    """Samples side by side: the worst first."""
    if not results.content.get("samples"):
        raise Missing("no samples were given; `prefopt eval generate` draws them")
    return ["One sample each at temperature 1, on the same prompts.", Samples(results.content["samples"])]


def _seconds(s: float) -> str:
    return f"{s:.1f} s" if s < 120 else f"{s / 60:.1f} min"
