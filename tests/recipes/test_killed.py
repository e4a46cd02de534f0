"""Commands that draw for hours are killed over and over, and end as if never killed: SIGKILL, which nothing can catch."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model

import prefopt.cli
from prefopt.inference.jsonl import write_jsonl
from prefopt.models.checkpoints import save_reward_model
from prefopt.recipes import rank
from tests.conftest import run_in_fork

pytestmark = pytest.mark.slow

PROMPTS = ["the cat", "a dog", "the red house and the mat", "what is this?", "the mat", "question: the cat"]


# ---- the process that is killed -----------------------------------------------------------------------------------
def die_at(event: str, number: int) -> None:
    """Raise SIGKILL at the `number`-th event."""
    seen, fsync = 0, os.fsync

    def dies(name: str) -> None:
        nonlocal seen
        seen += name == event
        if name == event and seen == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def synced(file: int) -> None:
        fsync(file)
        dies("part")
        if event == "half a part" and seen == number - 1:
            os.ftruncate(file, os.fstat(file).st_size - 9)
        dies("half a part")

    def audit(name: str, args: tuple) -> None:
        if name == "os.rename":
            dies(f"rename {os.path.basename(str(args[1]))}")
        elif name == "os.remove":
            dies(f"remove {os.path.basename(str(args[0]))}")

    os.fsync = synced
    sys.addaudithook(audit)


# ---- the tests ----------------------------------------------------------------------------------------------------
@pytest.fixture
def files(tmp_path: Path, causal_lm, tokenizer, reward_model) -> Path:
    causal_lm.save_pretrained(tmp_path / "sft")
    tokenizer.save_pretrained(tmp_path / "sft")
    causal_lm.name_or_path = causal_lm.config._name_or_path = str(tmp_path / "sft")
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(causal_lm, config).save_pretrained(tmp_path / "ppo")
    save_reward_model(reward_model, tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": p, "id": i} for i, p in enumerate(PROMPTS)])
    write_jsonl(tmp_path / "held_out.jsonl", [{"prompt": p} for p in PROMPTS])
    return tmp_path


def run(files: Path, command: str, kill: tuple[str, int] = ("never", 1), **keys: object) -> int:
    argv = [*command.split(), *(str(x) for key, value in keys.items() for x in (f"--{key}", value))]
    log = files / "log"
    log.unlink(missing_ok=True)

    def killed() -> int | None:
        die_at(*kill)
        return prefopt.cli.main(argv)

    return run_in_fork(killed, log)


def parts(journal: Path) -> int:
    """How many whole ones it has."""
    return journal.read_bytes().count(b"\n") - 1 if journal.exists() else 0


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("sample", {"k_min": 2, "k_max": 4}),
        ("best-of-n", {"n": 2}),
    ],
)
def test_one_file_is_as_if_never_killed(files, command, options):
    options |= {"model_name_or_path": files / "sft", "dataset_name": files / "prompts.jsonl"}
    options |= {"max_new_tokens": 5, "batch_size": 3, "reward_model_name_or_path": files / "rm"}
    if command == "sample":
        del options["reward_model_name_or_path"]
    whole, out, journal = files / "whole.jsonl", files / "out.jsonl", files / ".out.jsonl.part"
    assert run(files, command, **options, output=whole) == 0, (files / "log").read_text()
    every = 6 if command == "best-of-n" else None
    for kill, found in [
        (("part", 2), 2),
        (("half a part", 1), 2),
        (("part", 1), 3),  # in a process that went on: what it wrote stands behind the rest
        (("rename out.jsonl", 1), every),
        (("rename out.jsonl.inputs", 1), every),
        (("remove .out.jsonl.part", 1), every),
    ]:
        status = run(files, command, kill, **options, output=out)
        assert status == -signal.SIGKILL, (files / "log").read_text()
        assert found is None or parts(journal) == found, kill
        assert out.exists() == (kill[0] in ("rename out.jsonl.inputs", "remove .out.jsonl.part")), kill
    assert run(files, command, **options, output=out) == 0
    assert out.read_bytes() == whole.read_bytes()
    assert "half written" not in (files / "log").read_text()


def test_rankings_are_as_if_never_killed(files, monkeypatch):
    monkeypatch.setattr(rank, "ROWS_AT_ONCE", 2)
    write_jsonl(files / "samples.jsonl", [{"prompt": p, "completions": [" sat", " ran", " is"]} for p in PROMPTS])
    command, options = f"rank {files / 'samples.jsonl'}", {"reward_model": files / "rm", "people": 1}
    assert run(files, command, **options, output=files / "whole.jsonl") == 0, (files / "log").read_text()
    for kill, found in [
        (("part", 2), 2),
        (("half a part", 1), 2),
        (("rename out.judgements.jsonl", 1), 3),
        (("remove .out.judgements.jsonl.part", 1), 3),
        (("rename out.jsonl", 1), 0),
        (("rename out.people.jsonl", 1), 0),
        (("rename out.report.json", 1), 0),
    ]:
        status = run(files, command, kill, **options, output=files / "out.jsonl")
        assert status == -signal.SIGKILL, (files / "log").read_text()
        assert parts(files / ".out.judgements.jsonl.part") == found, kill
    assert run(files, command, **options, output=files / "out.jsonl") == 0, (files / "log").read_text()
    for name in ("jsonl", "judgements.jsonl", "people.jsonl", "report.json"):
        assert (files / f"out.{name}").read_bytes() == (files / f"whole.{name}").read_bytes()


def test_the_completions_of_an_evaluation_are_as_if_never_killed(files):
    options = {
        "models": json.dumps({"sft": str(files / "sft"), "ppo": str(files / "ppo")}),
        "prompts": files / "held_out.jsonl",
        "samples_per_prompt": 2,
        "max_new_tokens": 4,
        "batch_size": 2,
    }
    assert run(files, "eval generate", **options, output_dir=files / "whole") == 0
    folder = files / "out" / "completions"
    # Of each model 6 batches of samples, one prompt in each, and 3 of greedy completions.
    for kill, sft, ppo in [
        (("part", 4), 4, 0),
        (("half a part", 4), 7, 0),  # among the greedy ones
        (("part", 2 + 5), 0, 5),
        (("rename ppo.jsonl", 1), 0, 9),
    ]:
        status = run(files, "eval generate", kill, **options, output_dir=files / "out")
        assert status == -signal.SIGKILL, (files / "log").read_text()
        assert parts(folder / ".sft.jsonl.part") == sft, kill
        assert parts(folder / ".ppo.jsonl.part") == ppo, kill
    assert run(files, "eval generate", **options, output_dir=files / "out") == 0
    for name in ("sft", "ppo"):
        whole = (files / "whole" / "completions" / f"{name}.jsonl").read_bytes()
        assert (folder / f"{name}.jsonl").read_bytes() == whole
        assert whole.count(b"\n") == 6 * 2 + 6
    assert not list(folder.glob(".*.part"))
