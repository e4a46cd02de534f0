"""Training: the choice of the SFT epoch, and the RL runs."""

from prefopt.evaluation.report.plots import Series, curves_plot, drawable, of_log
from prefopt.evaluation.report.tables import Block, Missing, Results, label

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
