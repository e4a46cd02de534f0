"""A training run from its log: what moved the weights when, how the run went, what went wrong; in words and as a page."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from prefopt.errors import UserError
from prefopt.evaluation.report.plots import drawable, log_plot, shares_plot
from prefopt.evaluation.report.render import to_html
from prefopt.evaluation.report.tables import Block, Figure, Gap, Items, Line, Page, Section, Table
from prefopt.inference.jsonl import read_json, write_whole
from prefopt.trainers.ppo_ptx.watch import WINDOW, Trouble, diagnose

STATE_FILE = "trainer_state.json"
Log = Sequence[Mapping[str, Any]]

KINDS = {"ppo": "PPO", "ppo_ptx": "PPO-ptx", "dpo": "DPO", "reward": "reward model", "training": "training"}

# Log key -> what a reader calls it.
NAMES = {
    "loss": "loss",
    "grad_norm": "gradient norm before clipping",
    "grad_norm/ppo": "gradient norm, PPO",
    "grad_norm/ptx": "gradient norm, ptx_coef * ptx",
    "grad_norm/value": "gradient norm, value function",
    "learning_rate": "learning rate",
    "entropy": "entropy per token, nats",
    "objective/scores": "score per episode",
    "objective/rewards": "score minus KL penalty",
    "objective/kl": "KL per episode, nats",
    "objective/unscored": "episodes of a rollout without a reward",
    "value/explained_variance": "explained variance of the values",
    "loss/value": "value loss",
    "loss/ptx": "loss on pretraining text, nats per token",
    "clip_ratio/region_mean": "share of tokens with a clipped ratio",
    "completions/clipped_ratio": "share of episodes without EOS",
    "completions/mean_length": "tokens per completion",
    "reward": "reward",
    "reward_std": "standard deviation of the reward",
    "rewards/accuracies": "accuracy",
    "rewards/margins": "margin of the implicit reward",
    "rewards/chosen": "implicit reward, chosen",
    "rewards/rejected": "implicit reward, rejected",
    "accuracy": "accuracy",
    "margin": "margin",
    "mean_reward": "mean score",
    "mean_token_accuracy": "accuracy per token",
}
# What the table shows of each kind.
_STEPS = ("grad_norm", "learning_rate")
_PPO = (
    *("grad_norm/ppo", "grad_norm/ptx", "grad_norm/value", "learning_rate", "objective/scores", "objective/rewards"),
    *("objective/kl", "entropy", "value/explained_variance", "loss/ptx"),
    *("clip_ratio/region_mean", "completions/clipped_ratio"),
)
_DPO = ("loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected", "entropy", *_STEPS)
ROWS = {
    "ppo": _PPO,
    "ppo_ptx": _PPO,
    "dpo": _DPO,
    "reward": ("loss", "accuracy", "margin", "mean_reward", *_STEPS),
    "training": ("loss", "mean_token_accuracy", "entropy", "reward", *_STEPS),
}
# Of each kind: the key that a plot shows, or its title and several keys with their names. A plot of nothing but zeros is
# left out; evaluations are drawn with training.
Panels = tuple[str | tuple[str, dict[str, str]], ...]
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
HEADLINES = {"objective/scores", "objective/kl", "entropy", "loss", "rewards/accuracies", "accuracy", "reward"}


@dataclass(frozen=True)
class Run:
    """The log of one run."""

    folder: Path
    kind: str
    log: Log
    settings: Mapping[str, float]

    @property
    def training(self) -> Log:
        """The entries of training steps, without those of evaluations and the last one's totals."""
        return [entry for entry in self.log if "loss" in entry and "train_loss" not in entry]

    @property
    def steps(self) -> int:
        return max(int(entry.get("step", 0)) for entry in self.log)

    @property
    def is_ppo(self) -> bool:
        return self.kind in ("ppo", "ppo_ptx")

    @cached_property
    def troubles(self) -> list[Trouble]:
        """What `diagnose` finds in a PPO run; nothing is known of others."""
        return diagnose(self.log, self.settings) if self.is_ppo else []


def read_run(path: str | os.PathLike) -> Run:
    """The run in a folder: its own trainer_state.json or that of its checkpoints, whichever went furthest.

    Raises:
        UserError: there is no such folder, or no log in it; the message says what to do.
    """
    folder = Path(path)
    if folder.name == STATE_FILE:
        folder = folder.parent
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give the output_dir of a run or one of its checkpoints")
    files = [folder / STATE_FILE, *sorted(folder.glob(f"checkpoint-*/{STATE_FILE}"))]
    states, problems = [], []
    for file in files:
        if file.exists():
            try:
                states.append(_read_state(file))
            except UserError as error:
                problems.append(str(error))
    if not states:
        if problems:
            raise UserError(problems[0])
        runs = sorted(str(file.parent) for file in folder.glob(f"*/{STATE_FILE}"))
        if runs:
            raise UserError(f"{folder} holds several runs, name one of them: {', '.join(runs)}")
        raise UserError(
            f"no {STATE_FILE} in {folder} or its checkpoints: it is written with every checkpoint (save_strategy) and "
            "when a `prefopt` command ends"
        )
    state = max(states, key=lambda state: state["global_step"])
    # Numbers are all that a trainer logs.
    entries = [entry for entry in state["log_history"] if "step" in entry]
    log = [
        {name: value for name, value in entry.items() if isinstance(value, int | float | None)} for entry in entries
    ]
    settings: Any = state
    for key in ("stateful_callbacks", "TrainingWatch", "attributes", "settings"):
        settings = settings.get(key) if isinstance(settings, dict) else None
    run = Run(folder, _kind(log), log, settings if isinstance(settings, dict) else {})
    if not run.training:
        raise UserError(f"the log of {folder} has no step: the run is shorter than logging_steps; lower that")
    return run


def _read_state(file: Path) -> dict[str, Any]:
    """A trainer's state; a UserError if the file is none, or was not written to its end."""
    state = read_json(file, "global_step", "log_history")
    log = state["log_history"]
    is_log = isinstance(log, list) and all(isinstance(e, dict) and _is_step(e.get("step", 0)) for e in log)
    if not is_log or not _is_step(state["global_step"]):
        raise UserError(f"{file}: expected the steps and entries of a trainer's log; name the output_dir of a run")
    return state


def _is_step(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _kind(log: Log) -> str:
    keys = {key for entry in log for key in entry}
    if "loss/policy" in keys:
        return "ppo_ptx" if "loss/ptx" in keys else "ppo"
    if "rewards/margins" in keys:
        return "dpo"
    return "reward" if {"accuracy", "mean_reward"} <= keys else "training"


# ---- the run in numbers ---------------------------------------------------------------------------------------
def thirds(entries: Log) -> list[Log]:
    """The entries in up to three parts of equal length, in order."""
    parts = min(3, len(entries))
    edges = [round(i * len(entries) / parts) for i in range(parts + 1)] if parts else []
    return [entries[a:b] for a, b in pairwise(edges)]


def mean(entries: Log, key: str) -> float | None:
    """Mean of the finite numbers under a key."""
    values = numbers(entries, key)
    return fmean(values) if values else None


def numbers(entries: Log, key: str) -> list[float]:
    """The finite numbers under a key, in order."""
    values = (entry.get(key) for entry in entries)
    return [float(v) for v in values if isinstance(v, (int, float)) and math.isfinite(v)]


def ptx_share(entries: Log) -> float | None:
    """Share of the pretraining term in the policy's gradient: |ptx| / (|PPO| + |ptx|), before clipping."""
    ppo, ptx = mean(entries, "grad_norm/ppo"), mean(entries, "grad_norm/ptx")
    return ptx / (ppo + ptx) if ppo is not None and ptx is not None and ppo + ptx > 0 else None


def table(run: Run) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Column heads and rows: the run's quantities in three parts of it."""
    parts = thirds(run.training)
    first, heads = 1, []
    for part in parts:
        last = int(part[-1].get("step", first))
        heads.append(f"{first}–{last}")
        first = last + 1
    shares = [ptx_share(part) for part in parts]
    of_ppo = [None if share is None else 1 - share for share in shares]
    rows = [("share of PPO in the policy's gradient", of_ppo, percent)]
    rows += [("share of ptx in the policy's gradient", shares, percent)]
    rows += [(NAMES[key], [mean(part, key) for part in parts], short) for key in ROWS[run.kind]]
    return heads, [(name, [*map(told, x)]) for name, x, told in rows if any(value is not None for value in x)]


def sentences(run: Run) -> list[str]:
    """The run in a few sentences."""
    found = [_who_moved_the_policy(run)] if run.is_ppo else []
    found += _clipping(run)
    headlines = {key: numbers(run.training, key) for key in ROWS[run.kind] if key in HEADLINES}
    changes = [f"{NAMES[key]} {_change(values)}" for key, values in headlines.items() if len(values) > 1]
    if changes:
        found.append(f"First and last log entry: {'; '.join(changes)}.")
    # Of the PPO surrogate, eval_loss tells nothing.
    held_out = {"eval_accuracy"} if run.is_ppo else {"eval_accuracy", "eval_loss"}
    rewards = {k for e in run.log for k in e if k.startswith("eval_rewards/") and k.endswith(("/mean", "/accuracies"))}
    evaluations = {key: numbers(run.log, key) for key in sorted(held_out | rewards)}
    changes = [f"{k} {_change(values)} (best {_best(run, k)})" for k, values in evaluations.items() if len(values) > 1]
    if changes:
        found.append(f"First and last evaluation: {'; '.join(changes)}.")
    return found


def _change(values: Sequence[float]) -> str:
    return f"{short(values[0])} → {short(values[-1])}"


def _best(run: Run, key: str) -> str:
    entries = [entry for entry in run.log if numbers([entry], key)]
    best = (min if key.endswith("loss") else max)(entries, key=lambda entry: entry[key])
    return f"{short(best[key])} at step {best.get('step', 0)}"


def _who_moved_the_policy(run: Run) -> str:
    heads, _ = table(run)
    shares = [
        (head, share)
        for head, part in zip(heads, thirds(run.training), strict=True)
        if (share := ptx_share(part)) is not None
    ]
    parts = []
    for is_ptx, span in groupby(shares, key=lambda pair: pair[1] > 0.5):
        heads, of_ptx = zip(*span, strict=True)
        first, last = heads[0].split("–")[0], heads[-1].split("–")[1]
        pull = fmean(of_ptx) if is_ptx else 1 - fmean(of_ptx)
        parts.append(
            f"{'ptx' if is_ptx else 'PPO'} in steps {first}–{last} ({percent(pull)} of the sum of both norms)"
        )
    if not parts:
        return "PPO alone moved the policy: there is no pretraining term in this log."
    return f"The larger pull on the policy came from {', then '.join(parts)}."


def _clipping(run: Run) -> list[str]:
    limit = run.settings.get("max_grad_norm")
    if limit is None:
        unknown = "Whether gradients were clipped is not known: the log does not hold max_grad_norm."
        return [unknown] if run.is_ppo else []
    if not limit > 0:
        return ["Gradients were not clipped (max_grad_norm 0)."]
    found = []
    for key, name in (("grad_norm", "policy"), ("grad_norm/value", "value function")):
        if norms := numbers(run.training, key):
            clipped = [norm for norm in norms if norm > limit]
            cut = f", the largest from {short(max(clipped))}" if clipped else ""
            found.append(f"{name} in {len(clipped)} of {len(norms)}{cut}")
    return [f"Log entries with clipped gradients (max_grad_norm {limit:g}): {'; '.join(found)}."]


def summary(run: Run) -> str:
    """The run as text for a terminal."""
    heads, rows = table(run)
    lines = [title(run), ""]
    if rows:
        width = max(len(name) for name, _ in rows)
        columns = [max(len(x) for x in column) for column in zip(heads, *(v for _, v in rows), strict=True)]
        lines += [
            f"  {name:<{width}}  " + "  ".join(f"{x:>{w}}" for x, w in zip(values, columns, strict=True))
            for name, values in [("mean over steps", heads), *rows]
        ]
        lines.append("")
    lines += sentences(run)
    troubles = run.troubles
    lines += [f"Trouble at step {t.step}: {t.name}: {t.message}" for t in troubles]
    if run.is_ppo and not troubles:
        lines.append(no_trouble(run))
    return "\n".join(lines)


def no_trouble(run: Run) -> str:
    """What it means that `diagnose` found nothing: most of its checks average `WINDOW` log entries."""
    if len(run.training) >= WINDOW:
        return "No trouble found."
    return (
        f"Too short to judge: {_entries(run)}, and most troubles show from {WINDOW} on; lower logging_steps, or look "
        "again later."
    )


def title(run: Run) -> str:
    """What the run is, in a line."""
    return f"{run.folder}: {KINDS[run.kind]}, {run.steps} steps, {_entries(run)}"


def _entries(run: Run) -> str:
    count = len(run.training)
    return f"{count} log entr{'y' if count == 1 else 'ies'}"


def short(x: float | None) -> str:
    """A number in three digits; a dash for none."""
    return "–" if x is None else f"{x:.3g}".replace("-", "−")


def percent(x: float | None) -> str:
    return "–" if x is None else f"{100 * x:.0f} %"


# ---- the page ------------------------------------------------------------------------------------------------
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
    items = [(f"Step {t.step}: {t.name}.", f"{t.message[0].upper()}{t.message[1:]}.") for t in run.troubles]
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


def _plot(run: Run, series: Mapping[str, str], heading: str, **options) -> Figure:
    marks = [(t.step, t.name) for t in run.troubles if t.key.removeprefix("eval_") in series]
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
