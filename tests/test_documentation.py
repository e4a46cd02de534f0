"""README and docs/ tell the truth: their Python runs, their commands and keys exist, their links and names resolve."""

import ast
import re
import shlex
import shutil
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM, LlamaForSequenceClassification
from trl import TrlParser

from prefopt import cli
from prefopt.gpu import command as gpu_check
from prefopt.inference.jsonl import write_jsonl
from tests.conftest import tiny_config

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "recipes").rglob("*.md")),
]
TRAINING = {"sft", "reward", "ppo-ptx", "dpo"}


def name(page):
    return str(page.relative_to(ROOT))


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


def commands(page):
    """Every `prefopt ...` of the page's bash blocks, as a list of words."""
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"\s(?:&&|\|)\s", line):
                words = shlex.split(part, comments=True)
                if words[:1] == ["prefopt"]:
                    yield words[1:]


@pytest.fixture
def workshop(tmp_path, monkeypatch, tokenizer):
    """A folder in which the names that the pages use are tiny models and files."""
    monkeypatch.chdir(tmp_path)
    config = tiny_config(max_position_embeddings=4096)
    for path, model in (
        ("Qwen/Qwen3-0.6B-Base", LlamaForCausalLM(config)),
        ("sft", LlamaForCausalLM(config)),
        ("rm", LlamaForSequenceClassification(tiny_config(max_position_embeddings=4096, num_labels=1))),
    ):
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
    prompts = ["the cat", "a dog", "the red house", "what is this?", "the mat", "the dog", "a cat", "a house"]
    ranked = {"completions": [" sat", " ran to the house", " mat"], "ranks": [1, 2, 2]}
    write_jsonl("prompts.jsonl", [{"prompt": p} for p in prompts])
    write_jsonl("demonstrations.jsonl", [{"prompt": p, "completion": " sat on the mat"} for p in prompts])
    write_jsonl("rankings.jsonl", [{"prompt": p, **ranked} for p in prompts])
    write_jsonl("text.jsonl", [{"text": "the cat sat on the mat and the dog ran. " * 20}] * 64)
    return tmp_path


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name)
def test_python_runs(page, workshop):
    source = "\n".join(blocks(page, "python"))
    exec(compile(source, name(page), "exec"), {"__name__": "page"})


def test_the_three_steps_of_the_readme_run(workshop, monkeypatch):
    (block,) = [b for b in blocks(ROOT / "README.md", "bash") if "prefopt sft" in b and "prefopt ppo-ptx" in b]
    page = workshop / "steps.md"
    page.write_text(f"```bash\n{block}```\n")
    # As for a new user: no step writes over a model that it has not trained.
    for folder in ("sft", "rm"):
        shutil.rmtree(workshop / folder)
    ran = []
    for words in commands(page):
        if words[:2] == ["label", "import"]:  # the answers of people, whom this test does not have
            continue
        if words[0] in TRAINING:
            words += ["--max_steps", "1", "--report_to", "none", "--bf16", "false"]
        if words[0] == "ppo-ptx":
            words += ["--max_completion_length", "8", "--ptx_max_length", "64"]
        if words[0] == "sample":
            words += ["--max_new_tokens", "8"]
        cli.main(words)
        ran.append(words[0])
    assert ran == ["sft", "sample", "label", "reward", "ppo-ptx", "dpo"]
    for folder in ("sft", "rm", "policy", "dpo"):
        assert (workshop / folder / "model.safetensors").is_file()
    assert "<html" in (workshop / "sheet.html").read_text(encoding="utf-8")


class Parsed(BaseException):
    """The command's keys are known; what it does is another test's."""


@pytest.mark.parametrize("page", [page for page in PAGES if list(commands(page))], ids=name)
def test_commands_and_their_keys_exist(page, workshop, monkeypatch):
    def stop(*args, **kwargs):
        raise Parsed

    monkeypatch.setattr(TrlParser, "parse_args_and_config", stop)
    monkeypatch.setattr(gpu_check, "run", stop)
    for words in commands(page):
        assert words[0] in cli.COMMANDS, words
        while "--config" in words:  # files of the reader's own
            at = words.index("--config")
            words = words[:at] + words[at + 2 :]
        with suppress(Parsed):
            cli.main(words)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    targets = [t for t in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in t and not t.startswith("#")]
    missing = [t for t in targets if not (page.parent / t.partition("#")[0]).exists()]
    assert missing == []


def test_every_page_is_linked_from_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [p.name for p in (ROOT / "docs").glob("*.md") if f"docs/{p.name}" not in readme] == []


def equations():
    """(function or file, test) of every row of the README's table of equations."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## Equations")[1].split("\n## ")[0]
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 4 and "`" in cells[1]:
            yield re.findall(r"`([^`]+)`", cells[1]), re.findall(r"`([^`]+)`", cells[3])


def test_every_equation_has_its_function_and_its_test():
    rows = list(equations())
    assert len(rows) > 12
    for places, tests in rows:
        for place in places:
            if place.endswith(".py"):
                assert (ROOT / "prefopt" / place).is_file(), place
                continue
            module, _, function = place.rpartition(".")
            assert callable(getattr(import_module(f"prefopt.{module}"), function)), place
        assert tests, places
        for test in tests:
            path, _, function = test.partition("::")
            tree = ast.parse((ROOT / "tests" / path).read_text(encoding="utf-8"))
            names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
            assert function in names, test
