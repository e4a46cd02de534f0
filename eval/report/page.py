"""report.html from results.json: one self-contained page without scripts or external references."""

import logging
import os
import re
from collections.abc import Callable, Mapping
from html import escape
from typing import Any

from prefopt.evaluation.report.markup import Missing, page
from prefopt.evaluation.report.sections import (
    bench,
    compare,
    diversity,
    drift,
    metadata,
    models,
    numbers,
    overopt,
    overview,
    reward_model,
    samples,
    training,
    winrates,
)
from prefopt.evaluation.report.verdict import verdict
from prefopt.evaluation.results import jsonable, no_number
from prefopt.inference.jsonl import write_whole

logger = logging.getLogger(__name__)
Results = Mapping[str, Any]

# Title, the stage whose data it shows (None: the measures alone), and what builds it.
SECTIONS: tuple[tuple[str, str | None, Callable[[Results], str]], ...] = (
    ("At a glance", None, overview.section),
    ("The models in numbers", None, models.section),
    ("Who wins: judges, use cases, strengths", "compare", compare.section),
    ("Win rates by use case", None, winrates.section),
    ("What people said: ratings and flags", "metadata", metadata.section),
    ("Reward model", "reward_model", reward_model.section),
    ("Public benchmarks: NLP and safety", "bench", bench.section),
    ("Drift from the baseline", "drift", drift.section),
    ("Diversity", "diversity", diversity.section),
    ("Over-optimization", "overopt", overopt.section),
    ("Choosing the SFT epoch", None, training.epochs_section),
    ("RL training", None, training.rl_section),
    ("The worst samples, side by side", None, samples.section),
    ("Wall time", None, numbers.time_section),
    ("Every number with its definition", None, numbers.section),
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
    body = "\n".join(_section(title, stage, build, results) for title, stage, build in SECTIONS)
    summary = f'<p class="verdict">{escape(verdict(results))}</p>'
    write_whole(path, page("prefopt report", f"{summary}\n{body}"))


def _section(title: str, stage: str | None, build: Callable[[Results], str], results: Results) -> str:
    note = (results.get("notes") or {}).get(stage)
    try:
        if note is not None:
            raise Missing(note)
        content = build(results)
    except Missing as missing:
        why = no_number(str(missing))
        content = f"<p class='skipped'>{why.status.capitalize()}: {_coded(why.reason)}.</p>"
    except Exception as error:  # one broken section must not cost the reader the others
        logger.exception("report section %r failed", title)
        content = f"<p class='skipped'>Failed: {escape(f'{type(error).__name__}: {error}')}</p>"
    return f"<section><h2>{escape(title)}</h2>\n{content}\n</section>"


def _coded(text: str) -> str:
    """Text whose `words` are set as code."""
    return re.sub("`([^`]*)`", r"<code>\1</code>", escape(text))
