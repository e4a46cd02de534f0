"""One self-contained page about one training run: what happened, in words, numbers and plots."""

import os
from html import escape

from prefopt.evaluation.report import plots
from prefopt.evaluation.report.markup import page, scroll_table
from prefopt.evaluation.training_run import KINDS, Run, no_trouble, numbers, sentences, table, title
from prefopt.inference.jsonl import write_whole

Series = list[tuple[str, str]]

# Of each kind: (title, [(key, label)]). A plot of nothing but zeros is left out; evaluations are drawn beside training.
PLOTS: dict[str, list[tuple[str, Series]]] = {
    "ppo": [
        ("score per episode", [("objective/scores", "score"), ("objective/rewards", "minus KL penalty")]),
        ("KL per episode, nats", [("objective/kl", "KL to the reference")]),
        ("entropy per token, nats", [("entropy", "entropy")]),
        ("value loss", [("loss/value", "value loss")]),
        ("explained variance of the values", [("value/explained_variance", "explained variance")]),
        ("loss on pretraining text, nats per token", [("loss/ptx", "ptx loss")]),
        ("share of tokens with a clipped ratio", [("clip_ratio/region_mean", "clipped")]),
        ("share of episodes without EOS", [("completions/clipped_ratio", "without EOS")]),
        ("tokens per completion", [("completions/mean_length", "mean length")]),
        ("standard deviation of the reward", [("reward_std", "standard deviation")]),
        ("episodes of a rollout without a reward", [("objective/unscored", "unscored")]),
        ("learning rate", [("learning_rate", "learning rate")]),
    ],
    "dpo": [
        ("loss", [("loss", "loss")]),
        ("accuracy", [("rewards/accuracies", "accuracy")]),
        ("margin of the implicit reward", [("rewards/margins", "margin")]),
        ("implicit reward", [("rewards/chosen", "chosen"), ("rewards/rejected", "rejected")]),
        ("log-probability of a completion", [("logps/chosen", "chosen"), ("logps/rejected", "rejected")]),
        ("entropy per token, nats", [("entropy", "entropy")]),
        ("gradient norm before clipping", [("grad_norm", "gradient norm")]),
        ("learning rate", [("learning_rate", "learning rate")]),
    ],
    "reward": [
        ("loss", [("loss", "loss")]),
        ("accuracy", [("accuracy", "accuracy")]),
        ("margin", [("margin", "margin")]),
        ("score", [("max_reward", "highest"), ("mean_reward", "mean"), ("min_reward", "lowest")]),
        ("gradient norm before clipping", [("grad_norm", "gradient norm")]),
        ("learning rate", [("learning_rate", "learning rate")]),
    ],
    "training": [
        ("loss", [("loss", "loss")]),
        ("accuracy per token", [("mean_token_accuracy", "accuracy")]),
        ("reward", [("reward", "reward")]),
        ("entropy per token, nats", [("entropy", "entropy")]),
        ("gradient norm before clipping", [("grad_norm", "gradient norm")]),
        ("learning rate", [("learning_rate", "learning rate")]),
    ],
}
PLOTS["ppo_ptx"] = PLOTS["ppo"]

TERMS = [("grad_norm/ppo", "PPO"), ("grad_norm/ptx", "ptx_coef * ptx")]


def build_page(run: Run, path: str | os.PathLike) -> None:
    """Write the page of a run to `path`."""
    said = "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences(run))
    sections = [f"<p class='note'>{escape(title(run))}</p><div class='verdict'>{said}</div>", _troubles(run)]
    if run.kind in ("ppo", "ppo_ptx"):
        sections.append(f"<section><h2>Which term moved the weights</h2>{_terms(run)}</section>")
    sections.append(f"<section><h2>The curves</h2>{_curves(run)}</section>")
    sections.append(f"<section><h2>In numbers</h2>{_numbers(run)}</section>")
    kind = KINDS[run.kind]
    write_whole(path, page(f"{kind[0].upper()}{kind[1:]} run", "\n".join(sections)))


def _troubles(run: Run) -> str:
    if run.kind not in ("ppo", "ppo_ptx"):
        return ""
    troubles = run.troubles()
    items = "".join(
        f"<li><b>Step {t.step}: {escape(t.name)}.</b> {escape(t.message[0].upper() + t.message[1:])}.</li>"
        for t in troubles
    )
    body = (
        f"<ul class='troubles'>{items}</ul>" if troubles else f"<p class='note'>{escape(no_trouble(run))}</p>"
    )
    return f"<section><h2>Troubles and what to do</h2>{body}</section>"


def _terms(run: Run) -> str:
    figures = []
    if plots.drawable(run.log, "grad_norm/ptx"):
        figures.append(plots.shares_plot(run.training, TERMS, "share of the policy's gradient"))
    norms = [*TERMS, ("grad_norm", "policy, sum"), ("grad_norm/value", "value function")]
    limit = run.settings.get("max_grad_norm") or None
    heading = "gradient norms before clipping" + (f" (dashed: max_grad_norm {limit:g})" if limit else "")
    figures.append(
        plots.log_plot(
            run.training,
            norms,
            heading,
            level=limit,
            logarithmic=True,
            marks=_marks(run, *(k for k, _ in norms)),
        )
    )
    return _figures(figures) + (
        "<p class='note'>Eq. 2 of InstructGPT: policy + vf_coef * value + ptx_coef * LM. The policy is moved by PPO and "
        "by the pretraining term; the value function, unless it is a head on the policy's trunk, has weights of its own. "
        "Adam divides by the size of the gradient: the shares tell which way the weights went, the learning rate how "
        "far. The sum is that of the last step of a log entry, its terms are means over the entry.</p>"
    )


def _curves(run: Run) -> str:
    panels = list(PLOTS[run.kind])
    keys = {key.removeprefix("eval_") for entry in run.log for key in entry}
    names = sorted(key for key in keys if _is_reward(key))
    if len(names) > 1:
        panels.insert(1, ("score by reward function", [(key, key.split("/")[1]) for key in names]))
    figures = [
        plots.log_plot(_without_totals(run), series, heading, marks=_marks(run, *(key for key, _ in series)))
        for heading, series in panels
        if any(
            any(numbers(run.log, prefix + key)) for key, _ in series for prefix in ("", "eval_")
        )  # not all 0
    ]
    if not figures:
        return "<p class='skipped'>Nothing in this log can be drawn.</p>"
    return _figures(figures)


def _without_totals(run: Run) -> list:
    return [entry for entry in run.log if "train_loss" not in entry]


def _is_reward(key: str) -> bool:
    return key.startswith("rewards/") and key.endswith("/mean")


def _marks(run: Run, *keys: str) -> list[tuple[int, str]]:
    return [(t.step, t.name) for t in run.troubles() if t.key.removeprefix("eval_") in keys]


def _numbers(run: Run) -> str:
    heads, rows = table(run)
    if not rows:
        return "<p class='skipped'>No training step is in this log.</p>"
    head = "".join(f"<th>steps {escape(h)}</th>" for h in heads)
    body = "".join(
        f"<tr><th>{escape(name)}</th>{''.join(f'<td>{escape(x)}</td>' for x in values)}</tr>"
        for name, values in rows
    )
    settings = ", ".join(f"{key} = {value:g}" for key, value in run.settings.items())
    note = "Means over the log entries of each third of the run. " + (
        f"Settings: {settings}." if settings else ""
    )
    return scroll_table(f"<tr><th></th>{head}</tr>", body) + f"<p class='note'>{escape(note)}</p>"


def _figures(svgs: list[str]) -> str:
    return f"<div class='figures'>{''.join(f'<figure>{svg}</figure>' for svg in svgs)}</div>"
