"""Who may import whom, where private TRL names may stand, and no paths of one machine."""

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "prefopt": ROOT / "prefopt",
    "prefopt.recipes": ROOT / "recipes",
    "prefopt.evaluation": ROOT / "eval",
}

# Part of prefopt -> parts it may import, libraries it may import (None: any). A new part needs a line here.
MODELS = {"torch", "datasets", "transformers", "tokenizers", "peft", "safetensors"}
LIBRARY = {"losses", "statistics", "rankings", "models", "inference", "hub", "trainers"}
RULES: dict[str, tuple[set[str], set[str] | None]] = {
    "errors": (set(), set()),
    "losses": (set(), {"torch"}),
    "statistics": (set(), {"numpy", "scipy", "krippendorff", "sacrebleu"}),
    "rankings": (set(), {"torch", "datasets", "transformers", "accelerate"}),
    "models": ({"rankings"}, MODELS),
    "inference": ({"rankings", "models"}, {"torch", "transformers", "accelerate", "peft", "numpy", "vllm"}),
    "hub": ({"models"}, {"huggingface_hub", "peft", "safetensors", "torch", "transformers"}),
    "trainers": (LIBRARY, MODELS | {"trl", "accelerate", "huggingface_hub", "numpy", "vllm"}),
    "labeling": ({"rankings", "statistics", "inference"}, {"numpy", "scipy", "markdown_it"}),
    "sandbox": ({"rankings", "labeling"}, MODELS | {"numpy", "vaderSentiment"}),
    "memory": ({"models"}, MODELS),
    "gpu": (LIBRARY | {"memory"}, MODELS | {"trl", "bitsandbytes"}),
    "evaluation": (LIBRARY | {"labeling", "sandbox"}, None),
    "recipes": (LIBRARY | {"labeling", "sandbox", "evaluation", "memory", "gpu"}, None),
    "cli": ({"recipes", "evaluation", ""}, None),  # "" is prefopt itself, for the version
    "": (LIBRARY, set()),  # for type checkers only: the names are imported on first use
}


def modules() -> Iterator[tuple[str, Path]]:
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            yield ".".join((package, *parts)).removesuffix(".__init__"), path


def imports(source: str, module: str, is_package: bool = False) -> set[str]:
    """Dotted names of everything imported anywhere in the source, `from a import b` as a.b."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                parents = module.split(".")
                parents = parents[: len(parents) - node.level + is_package]
                origin = ".".join([*parents, *([origin] if origin else [])])
            if origin == "prefopt":  # a public name stands for the module it lives in
                found |= {public_names().get(alias.name, f"prefopt.{alias.name}") for alias in node.names}
            else:
                found |= {f"{origin}.{alias.name}" for alias in node.names}
    return found


@cache
def public_names() -> dict[str, str]:
    """ranking_loss -> prefopt.losses.ranking_loss, as prefopt/__init__.py tells type checkers."""
    found = imports((ROOT / "prefopt" / "__init__.py").read_text(encoding="utf-8"), "prefopt", is_package=True)
    return {name.split(".")[-1]: name for name in found if name.startswith("prefopt.")}


def part(dotted: str) -> str:
    """The part of prefopt that a dotted name is in: prefopt.trainers.x.Y -> trainers; "" for prefopt itself."""
    first = dotted.split(".")[1] if "." in dotted else ""
    # `python -m prefopt` is the command.
    return "cli" if first == "__main__" else "" if first.startswith("__") else first


def is_private(dotted: str) -> bool:
    return any(name.startswith("_") and not name.endswith("__") for name in dotted.split("."))


def offences(source: str, module: str, is_package: bool = False) -> list[str]:
    own = part(module)
    if own not in RULES:
        return [f"{module}: give '{own}' a line in RULES"]
    parts, libraries = RULES[own]
    found = []
    for name in sorted(imports(source, module, is_package)):
        top = name.split(".")[0]
        if top == "prefopt":
            if part(name) not in parts | {own, "errors"}:
                found.append(f"{module} imports {name}: {own or 'prefopt'} may not import {part(name)}")
            elif is_private(name) and part(name) != own:
                found.append(f"{module} imports {name}: private")
        elif top not in sys.stdlib_module_names and libraries is not None and top not in libraries:
            found.append(f"{module} imports {name}: {own or 'prefopt'} may not import {top}")
    return found


def private_trl_names(source: str) -> set[str]:
    return {name for name in imports(source, "any") if name.split(".")[0] == "trl" and is_private(name)}


def test_dependencies_point_one_way():
    found = [
        offence
        for module, path in modules()
        for offence in offences(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")
    ]
    assert found == []


def test_private_trl_names_stay_with_the_trainers():
    allowed = {ROOT / "tests" / "trainers" / "test_trl_contract.py"}
    found = {
        str(path.relative_to(ROOT)): names
        for folder in ("prefopt", "recipes", "eval", "tests")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if ROOT / "prefopt" / "trainers" not in path.parents and path not in allowed
        if (names := private_trl_names(path.read_text(encoding="utf-8")))
    }
    assert found == {}


def test_no_file_names_a_place_on_one_machine():
    places = ["/" + "work" + "/", ".." + "/shared", "/" + "root" + "/"]
    files = [p for folder in ("prefopt", "recipes", "eval", "tests", ".ci") for p in (ROOT / folder).rglob("*")]
    files += [ROOT / name for name in ("README.md", "Makefile", "pyproject.toml", "constraints.txt")]
    files = [p for p in files if p.is_file() and "__pycache__" not in p.parts]
    assert len(files) > 10
    found = [f"{p.relative_to(ROOT)}: {place}" for p in files for place in places if place.encode() in p.read_bytes()]
    assert found == []


def test_the_checks_see_what_they_are_for():
    assert offences("import torch, math\nfrom torch.nn import functional", "prefopt.losses") == []
    for source, module in [
        ("import numpy", "prefopt.losses"),
        ("def f():\n    from trl import RewardTrainer", "prefopt.models.reward"),
        ("from prefopt.trainers.ppo_ptx.config import PPOPtxConfig", "prefopt.rankings.dataset"),
        ("from prefopt import RankedRewardTrainer", "prefopt.rankings.dataset"),
        ("from prefopt import trainers", "prefopt.sandbox.world"),
        ("from ..trainers import ppo_ptx", "prefopt.statistics.intervals"),
        ("from ... import recipes", "prefopt.trainers.ppo_ptx.trainer"),
        ("import prefopt.recipes.sft", "prefopt.evaluation.report.page"),
        ("from prefopt.losses import _token_mean", "prefopt.trainers.ppo_ptx.trainer"),
        ("", "prefopt.newcomer"),
    ]:
        assert len(offences(source, module)) == 1, source
    assert offences("from .losses import ranking_loss", "prefopt", is_package=True) == []
    assert private_trl_names("from trl.trainer.utils import _a, b\nfrom trl import __version__\nimport trl._c") == {
        "trl.trainer.utils._a",
        "trl._c",
    }
