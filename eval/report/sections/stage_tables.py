"""What the sections of the stages have in common: their data, a table of measures, a row of plots."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from prefopt.evaluation.report.markup import Missing, cell, scroll_table
from prefopt.evaluation.results import find

# (title, name of the measure, decimals, compared with this model or None); a title alone begins a group of rows
TableRow = tuple[str, str, int, str | None] | str


def stage_data(results: Mapping[str, Any], stage: str) -> Mapping[str, Any]:
    """What the stage kept for its plots and tables.

    Raises:
        Missing: the stage has not run.
    """
    found = (results.get("stages") or {}).get(stage)
    if not found:
        raise Missing(f"the stage has not run; `prefopt eval {stage.replace('_', '-')}` runs it")
    return found.get("data", found)


def measure_table(
    measures: Sequence[Mapping[str, Any]],
    rows: Sequence[TableRow],
    columns: Sequence[tuple[str, str, str]],
) -> str:
    """HTML of a table of measures; rows and columns without any are left out, and "" if there is none at all.

    Args:
        columns: (heading, model, what is put behind the names of the measures).
    """
    columns = [c for c in columns if any(_find(measures, row, c) for row in rows)]
    body, heading = "", ""
    for row in rows:
        if isinstance(row, str):
            heading = (
                f"<tr class='group'><th colspan='{len(columns) + 1}'><span>{escape(row)}</span></th></tr>"
            )
            continue
        title, _, decimals, against = row
        found = [_find(measures, row, column) for column in columns]
        if any(found):
            cells = "".join(
                cell(m, decimals, against is not None, c[1]) for m, c in zip(found, columns, strict=True)
            )
            indent = " class='difference'" if against is not None else ""
            body += f"{heading}<tr><th{indent}>{escape(title)}</th>{cells}</tr>"
            heading = ""
    if not body:
        return ""
    head = "".join(f"<th>{escape(title)}</th>" for title, _, _ in columns)
    return scroll_table(f"<tr><th></th>{head}</tr>", body)


def _find(
    measures: Sequence[Mapping[str, Any]], row: TableRow, column: tuple[str, str, str]
) -> Mapping[str, Any] | None:
    if isinstance(row, str):
        return None
    _, model, suffix = column
    return find(measures, row[1] + suffix, model, row[3])


def figures(svgs: Sequence[str]) -> str:
    return f"<div class='figures'>{''.join(f'<figure>{svg}</figure>' for svg in svgs)}</div>" if svgs else ""


def note(text: str) -> str:
    """A paragraph of explanation; `text` is text."""
    return f"<p class='note'>{escape(text)}</p>"
