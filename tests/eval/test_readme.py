from pathlib import Path

from prefopt.evaluation.stages import STAGES, report

README = (Path(__file__).resolve().parents[2] / "eval" / "README.md").read_text(encoding="utf-8")


def test_every_stage_has_its_line_with_its_file():
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in README.splitlines() if line[:1] == "|"]
    stages = (*STAGES, report.STAGE)
    assert [row[1] for row in rows[2:]] == [f"`{stage.name}`" for stage in stages]
    for stage, (_, _, file, _) in zip(stages, rows[2:], strict=True):
        assert file.startswith(f"`stages/{stage.measure.__module__.rpartition('.')[2]}.py`")
