"""report.html from results.json: one self-contained page without scripts or external references."""

import logging
import os
from collections.abc import Callable, Mapping
from html import escape
from typing import Any

from prefopt.evaluation.generate import write_whole
from prefopt.evaluation.markup import Missing, page
from prefopt.evaluation.results import jsonable
from prefopt.evaluation.sections import (
    models,
    numbers,
    overview,
    reward_accuracy,
    samples,
    training,
    winrates,
)
from prefopt.evaluation.verdict import verdict

logger = logging.getLogger(__name__)
Results = Mapping[str, Any]

SECTIONS: tuple[tuple[str, Callable[[Results], str]], ...] = (
    ("At a glance", overview.section),
    ("The models in numbers", models.section),
    ("Win rates by use case", winrates.section),
    ("Reward model", reward_accuracy.section),
    ("Choosing the SFT epoch", training.epochs_section),
    ("RL training", training.rl_section),
    ("The worst samples, side by side", samples.section),
    ("Wall time", numbers.time_section),
    ("Every number with its definition", numbers.section),
)


def build_report(results: Results, path: str | os.PathLike) -> None:
    """Write the report of one run to `path`.

    `results` is what `evaluate` returns or results.json holds. Optional curves in `results["curves"]`: `sft_epochs`, a
    list of {`epoch`, `validation_loss`, `rm_score`}, with `sft_chosen_epoch`; and under a model's name its training
    log, a list of {`step`, `objective/scores`, `objective/kl`, `loss/ptx`, `gold`} (PPOPtxTrainer's log keys, and the
    gold reward of the rollouts where it is known). A section whose data are missing says so, why, and how to get them.

    Example:
        >>> import tempfile, pathlib
        >>> page = pathlib.Path(tempfile.mkdtemp()) / "report.html"
        >>> build_report({}, page)
        >>> "Skipped" in page.read_text()
        True
    """
    results = jsonable(results)
    body = "\n".join(_section(title, build, results) for title, build in SECTIONS)
    summary = f'<p class="verdict">{escape(verdict(results))}</p>'
    write_whole(path, page("prefopt report", f"{summary}\n{body}"))


def _section(title: str, build: Callable[[Results], str], results: Results) -> str:
    try:
        content = build(results)
    except Missing as missing:
        content = f"<p class='skipped'>Skipped: {escape(str(missing))}.</p>"
    except Exception as error:  # one broken section must not cost the reader the others
        logger.exception("report section %r failed", title)
        content = f"<p class='skipped'>Failed: {escape(f'{type(error).__name__}: {error}')}</p>"
    return f"<section><h2>{escape(title)}</h2>\n{content}\n</section>"
