"""One self-contained page about one training run: what happened, in words, numbers and plots."""

import os

from prefopt.evaluation.report.plots import drawable, log_plot, shares_plot
from prefopt.evaluation.report.render import to_html
from prefopt.evaluation.report.tables import Block, Figure, Gap, Items, Line, Page, Section, Table
from prefopt.evaluation.training_run import KINDS, NAMES, Run, no_trouble, numbers, sentences, table, title
from prefopt.inference.jsonl import write_whole

Series = dict[str, str]  # key -> name

# Of each kind: the key that a plot shows, or its title and several keys with their names. A plot of nothing but zeros is
# left out; evaluations are drawn with training.
Panels = tuple[str | tuple[str, Series], ...]
_STEPS: Panels = ("grad_norm", "learning_rate")
_RL: Panels = (
    ("score per episode", {"objective/scores": "score", "objective/rewards": "minus KL penalty"}),
    *("objective/kl", "entropy", "loss/value", "value/explained_variance", "loss/ptx", "clip_ratio/region_mean"),
    *("completions/clipped_ratio", "completions/mean_length", "reward_std", "objective/unscored", "learning_rate"),
)
PLOTS: dict[str, Panels] = {
    "ppo": _RL,
    "ppo_ptx": _RL,
    "dpo": (
        *("loss", "rewards/accuracies", "rewards/margins"),
        ("implicit reward", {"rewards/chosen": "chosen", "rewards/rejected": "rejected"}),
        ("log-probability of a completion", {"logps/chosen": "chosen", "logps/rejected": "rejected"}),
        *("entropy", *_STEPS),
    ),
    "reward": (
        *("loss", "accuracy", "margin"),
        ("score", {"max_reward": "highest", "mean_reward": "mean", "min_reward": "lowest"}),
        *_STEPS,
    ),
    "training": ("loss", "mean_token_accuracy", "reward", "entropy", *_STEPS),
}
TERMS = {"grad_norm/ppo": "PPO", "grad_norm/ptx": "ptx_coef * ptx"}


def build_page(run: Run, path: str | os.PathLike) -> None:
    """Write the page of a run to `path`."""
    sections = [Section("curves", "The curves", _curves(run)), Section("numbers", "In numbers", _numbers(run))]
    if run.is_ppo:
        troubles = Section("troubles", "Troubles and what to do", _troubles(run))
        sections = [troubles, Section("terms", "Which term moved the weights", _terms(run)), *sections]
    kind = KINDS[run.kind]
    heading = f"{kind[0].upper()}{kind[1:]} run"
    write_whole(path, to_html(Page(heading, sentences(run), sections, [title(run)])))


def _troubles(run: Run) -> list[Block]:
    items = [(f"Step {t.step}: {t.name}.", f"{t.message[0].upper()}{t.message[1:]}.") for t in run.troubles()]
    return [Items(items) if items else no_trouble(run)]


def _terms(run: Run) -> list[Block]:
    norms = {**TERMS, "grad_norm": "policy, sum", "grad_norm/value": "value function"}
    limit = run.settings.get("max_grad_norm") or None
    heading = "gradient norms before clipping" + (f" (dashed: max_grad_norm {limit:g})" if limit else "")
    figures = [_plot(run, norms, heading, level=limit, logarithmic=True)]
    if drawable(run.log, "grad_norm/ptx"):
        figures.insert(0, shares_plot(run.training, TERMS, "share of the policy's gradient"))
    note = (
        "Eq. 2 of InstructGPT: policy + vf_coef * value + ptx_coef * LM. The policy is moved by PPO and by the pretraining "
        "term; the value function, unless it is a head on the policy's trunk, has weights of its own. Adam divides by the "
        "size of the gradient: the shares tell which way the weights went, the learning rate how far. The sum is that of "
        "the last step of a log entry, its terms are means over the entry."
    )
    return [*figures, note]


def _curves(run: Run) -> list[Block]:
    panels = [(NAMES[p], {p: NAMES[p]}) if isinstance(p, str) else p for p in PLOTS[run.kind]]
    logged = {key.removeprefix("eval_") for entry in run.log for key in entry}
    rewards = sorted(key for key in logged if key.startswith("rewards/") and key.endswith("/mean"))
    if len(rewards) > 1:
        panels.insert(1, ("score by reward function", {key: key.split("/")[1] for key in rewards}))
    figures = [
        _plot(run, series, heading)
        for heading, series in panels
        if any(any(numbers(run.log, prefix + key)) for key in series for prefix in ("", "eval_"))
    ]
    return figures or [Gap("Nothing in this log can be drawn.")]


def _plot(run: Run, series: Series, heading: str, **options) -> Figure:
    marks = [(t.step, t.name) for t in run.troubles() if t.key.removeprefix("eval_") in series]
    log = [entry for entry in run.log if "train_loss" not in entry]  # the last entry holds totals
    return log_plot(log, series, heading, marks=marks, **options)


def _numbers(run: Run) -> list[Block]:
    heads, rows = table(run)
    if not rows:
        return [Gap("No training step is in this log.")]
    settings = ", ".join(f"{key} = {value:g}" for key, value in run.settings.items())
    note = "Means over the log entries of each third of the run." + (f" Settings: {settings}." if settings else "")
    columns = ["", *(f"steps {head}" for head in heads)]
    return [Table(columns, [Line(name, values) for name, values in rows]), note]
