"""What happened in a training run: which term of InstructGPT's Eq. 2 moved the weights when, and what went wrong.

    prefopt explain-run runs/demo/ppo_ptx

Reads the log in a run's folder or in its checkpoints (trainer_state.json), also while it is running, and loads no
model. Prints a summary and writes one page with the plots. Reward models, DPO and SFT are explained as far as their
logs go.
"""

import argparse
import os
from pathlib import Path

from prefopt.errors import UserError
from prefopt.evaluation.training_run import build_page, read_run, summary


def main(argv: list[str] | None = None) -> None:
    """Explain the run in one folder."""
    parser = argparse.ArgumentParser("prefopt explain-run", description="What happened in a training run.")
    parser.add_argument("run", help="output_dir of the run, or one of its checkpoints")
    parser.add_argument("--output", type=Path, help="the page; default: explanation.html in the folder")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is no explanation of a run")
    arguments = parser.parse_args(argv)
    run = read_run(arguments.run)
    output = arguments.output or run.folder / "explanation.html"
    if output.is_file() and not arguments.overwrite and not _is_explanation(output):
        raise UserError(
            f"{output} is there and is no explanation of a run; name another file, or replace it with --overwrite"
        )
    print(summary(run))
    try:
        build_page(run, output)
    except OSError as error:
        reason = f"{os.strerror(error.errno)}" if error.errno else str(error)
        raise UserError(f"cannot write {output}: {reason}; choose another place with --output") from error
    print(f"page: {output}")


def _is_explanation(path: Path) -> bool:
    with path.open("rb") as file:
        return b'<meta name="generator" content="prefopt">' in file.read(500)
