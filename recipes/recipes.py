"""The recipe folders that come with prefopt: one YAML file per step, to be copied and changed.

prefopt recipes list             # which there are
prefopt recipes copy tiny        # into the folder tiny/
prefopt recipes copy tiny mine   # into the folder mine/
"""

import argparse
import shutil
from pathlib import Path

from prefopt.errors import UserError

HOME = Path(__file__).parent


def recipe_folders() -> dict[str, str]:
    """Name of each recipe folder, and the first line of its README.

    >>> recipe_folders()["tiny"]
    'All steps on a small closed world, on 2 CPU cores in about ten minutes'
    """
    folders = {}
    for readme in sorted(HOME.glob("*/README.md")):
        folders[readme.parent.name] = readme.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
    return folders


def copy(name: str, target: Path, *, force: bool = False) -> list[Path]:
    """Copy a recipe folder to `target`; the files written. A file that is there stops it unless `force`."""
    folders = recipe_folders()
    if name not in folders:
        raise UserError(f"there is no recipe {name!r}; there are {', '.join(folders)}")
    sources = sorted(path for path in (HOME / name).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    files = {source: target / source.relative_to(HOME / name) for source in sources}
    there = [path for path in files.values() if path.exists()]
    if there and not force:
        raise UserError(
            f"{there[0]} is there already ({len(there)} of {len(files)} files are): name another folder, or overwrite "
            "with --force"
        )
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file; expected the name of a folder")
    for source, path in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, path)
    return list(files.values())


def main(argv: list[str] | None = None) -> None:
    """List the recipe folders, or copy one."""
    parser = argparse.ArgumentParser("prefopt recipes", description="The recipe folders that come with prefopt.")
    commands = parser.add_subparsers(dest="command", metavar="{list,copy}")
    commands.add_parser("list", help="which there are; also without a command")
    of_copy = commands.add_parser("copy", help="copy a recipe folder, to be changed and run")
    of_copy.add_argument("name", help=", ".join(recipe_folders()))
    of_copy.add_argument("folder", nargs="?", type=Path, help="where to; default: the recipe's name")
    of_copy.add_argument("--force", action="store_true", help="overwrite files that are there")
    arguments = parser.parse_args(argv)
    if arguments.command != "copy":
        width = max(map(len, recipe_folders()))
        for name, title in recipe_folders().items():
            print(f"{name:<{width}}  {title}")
        print("\nprefopt recipes copy NAME   copies one into this folder")
        return
    target = arguments.folder or Path(arguments.name)
    files = copy(arguments.name, target, force=arguments.force)
    print(f"{len(files)} files in {target}; begin with {target / 'README.md'}")
