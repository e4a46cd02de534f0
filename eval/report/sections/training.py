"""Training: the choice of the SFT epoch, and the RL runs."""

from collections.abc import Mapping
from typing import Any

from prefopt.evaluation.report import plots
from prefopt.evaluation.report.markup import Missing, label


def epochs_section(results: Mapping[str, Any]) -> str:
    """HTML of the curve by which the SFT epoch was chosen."""
    curves = results.get("curves") or {}
    if not curves.get("sft_epochs"):
        raise Missing("no curve of the SFT epochs was given; set `sft_selection`")
    return f"<figure>{plots.epochs_plot(curves['sft_epochs'], curves.get('sft_chosen_epoch'))}</figure>" + (
        "<p class='note'>The epoch is chosen by reward-model score, as in the paper, where validation loss overfits "
        "after one epoch while the score, and people's preference, still rise.</p>"
    )


def rl_section(results: Mapping[str, Any]) -> str:
    """HTML of rewards, KL and pretraining loss over the steps of the RL runs."""
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
        raise Missing("no training curves were given; set `rl_runs`")
    figures = "".join(f"<figure>{plots.training_plot(runs, key, titles[key])}</figure>" for key in drawn)
    note = (
        "<p class='note'>A reward-model score that rises while the gold reward falls is over-optimization.</p>"
        if "gold" in drawn
        else ""
    )
    return f"<div class='figures'>{figures}</div>{note}"
