"""report.html and report.md from results.json."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from prefopt.evaluation.report import sections
from prefopt.evaluation.report.render import to_html, to_markdown
from prefopt.evaluation.report.tables import Block, Gap, Missing, Page, Results, Section
from prefopt.evaluation.results import jsonable, no_number
from prefopt.evaluation.stages import STAGES, compare
from prefopt.inference.jsonl import write_whole

logger = logging.getLogger(__name__)


class Chapter(NamedTuple):
    """A section to be: the stage whose data it shows (None: the measures alone), and what builds its blocks."""

    id: str
    title: str
    stage: str | None
    build: Callable[[Results], list[Block]]


SECTIONS = (
    Chapter("glance", "At a glance", None, sections.glance),
    Chapter("models", "The models in numbers", None, sections.models),
    Chapter("use-cases", "Win rates by use case", None, compare.use_cases),
    *(Chapter(stage.name, stage.title, stage.key, stage.section) for stage in STAGES if stage.section),
    Chapter("sft-epoch", "Choosing the SFT epoch", None, sections.epochs),
    Chapter("rl", "RL training", None, sections.rl),
    Chapter("samples", "The worst samples, side by side", None, sections.samples),
    Chapter("time", "Wall time", None, sections.time),
    Chapter("numbers", "Every number with its definition", None, sections.numbers),
)


def report_page(content: Mapping[str, Any]) -> Page:
    """The report of one run, from the content of results.json.

    Optional in `curves`: `sft_epochs`, a list of {`epoch`, `validation_loss`, `rm_score`}, with `sft_chosen_epoch`; and
    under a model's name its training log (PPOPtxTrainer's keys, and `gold`, the rollouts' gold reward). A section whose
    data are missing says so, why, and how to get them.

    >>> report_page({}).verdict
    ['No model was compared with SFT.']
    """
    results = Results(jsonable(content))
    return Page("prefopt report", [sections.verdict(results)], [_section(chapter, results) for chapter in SECTIONS])


def build_report(results: Mapping[str, Any], folder: Path) -> None:
    """Write the report (`report_page`) as report.html, one self-contained page, and the same as report.md."""
    page = report_page(results)
    write_whole(folder / "report.html", to_html(page))
    write_whole(folder / "report.md", to_markdown(page))


def _section(chapter: Chapter, results: Results) -> Section:
    note = (results.content.get("notes") or {}).get(chapter.stage)
    try:
        if note is not None:
            raise Missing(note)
        blocks = chapter.build(results)
    except Missing as missing:
        why = no_number(str(missing))
        blocks = [Gap(f"{why.status.capitalize()}: {why.reason}.")]
    except Exception as error:  # one broken section must not cost the reader the others
        logger.exception("report section %r failed", chapter.title)
        blocks = [Gap(f"Failed: {type(error).__name__}: {error}")]
    return Section(chapter.id, chapter.title, blocks)
