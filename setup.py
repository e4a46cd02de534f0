"""Stops a build from a checkout without symbolic links, which would leave out half of the package."""

from pathlib import Path

from setuptools import setup

for link, folder in (("recipes", "recipes"), ("evaluation", "eval")):
    if not (Path(__file__).parent / "prefopt" / link).is_dir():
        raise SystemExit(
            f"prefopt/{link} is not a link to {folder}/: this checkout was made without symbolic links. Switch them on "
            "(git config core.symlinks true, on Windows in developer mode) and run git checkout -- prefopt, or install "
            "prefopt from a wheel"
        )

setup()
