"""What stops a step before any weights are loaded, and what a finished run is left with."""

import json
import shutil
import subprocess
import sys

import pytest
from transformers import AutoTokenizer, GPT2Config, PreTrainedTokenizerFast, Trainer

from prefopt.errors import UserError
from prefopt.inference.jsonl import write_jsonl
from prefopt.recipes import dpo, ppo_ptx, reward, sample, sft
from prefopt.recipes.common import preflight as checks
from prefopt.recipes.common.lock import release

pytestmark = pytest.mark.slow

CONTEXT = 256  # max_position_embeddings of the tests' models
SHORT = ["--max_steps", "2", "--report_to", "none", "--per_device_train_batch_size", "2"]


@pytest.fixture
def no_weights(monkeypatch):
    """Loading weights is the mistake that these tests look for."""

    def load(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", load)


def command(rows, *extra, output="out"):
    argv = ["--model_name_or_path", "base", "--dataset_name", rows, "--output_dir", output, *SHORT]
    return [*argv, *map(str, extra)]


def ppo_command(*extra):
    prompts = ["--reward_model_name_or_path", "rm", "--per_device_train_batch_size", "4"]
    return command("prompts.jsonl", *prompts, *extra)


# ---- lengths ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("recipe", "argv"),
    [
        (sft, command("demos.jsonl", "--max_length", CONTEXT + 1)),
        (reward, command("rankings.jsonl", "--max_length", CONTEXT + 1)),
        (dpo, command("rankings.jsonl", "--max_length", CONTEXT + 1)),
        (
            ppo_ptx,
            ppo_command("--pretrain_dataset_name", "text.jsonl", "--ptx_max_length", CONTEXT + 1),
        ),
    ],
    ids=["sft", "reward", "dpo", "ppo-ptx"],
)
def test_a_length_beyond_the_context_names_the_limit(files, no_weights, recipe, argv):
    with pytest.raises(UserError, match=rf"max_length is 257, but base reads at most {CONTEXT} tokens"):
        recipe.main(argv)


def test_a_default_length_is_lowered_to_the_context(files, caplog):
    args = reward.RankedRewardConfig(output_dir="out", report_to="none")
    assert args.max_length == 1024
    checks.check_length(args, "max_length", "base")
    assert args.max_length == CONTEXT
    assert "max_length: lowered from its default 1024 to the 256 tokens that base reads" in caplog.text
    args.max_length = CONTEXT  # just fits
    checks.check_length(args, "max_length", "base")
    assert args.max_length == CONTEXT


@pytest.mark.parametrize("recipe", [ppo_ptx, sample])
def test_a_prompt_that_leaves_no_room_for_a_completion_is_named(files, no_weights, recipe, tokenizer):
    rows = ["the cat", "a dog", " cat" * 50, "what is this?"]
    write_jsonl("prompts.jsonl", [{"prompt": p} for p in rows])
    length = len(tokenizer(rows[2])["input_ids"])
    room = CONTEXT - length
    if recipe is sample:
        argv = ["--model_name_or_path", "base", "--dataset_name", "prompts.jsonl", "--output", "s.jsonl"]
        key = "max_new_tokens"
    else:
        argv, key = ppo_command("--ptx_coef", 0), "max_completion_length"
    with pytest.raises(
        UserError, match=rf"row 2: its prompt of {length} tokens and {key} {room + 1} are more than the 256"
    ):
        recipe.main([*argv, f"--{key}", str(room + 1)])
    with pytest.raises(AssertionError, match="weights were loaded"):  # one token less fits
        recipe.main([*argv, f"--{key}", str(room)])


def test_chat_prompts_are_measured_as_their_template_renders_them(files, chat_tokenizer):
    from datasets import Dataset

    chat_tokenizer.save_pretrained("base")
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": "the cat"}]}])
    length = len(chat_tokenizer.apply_chat_template(rows[0]["prompt"], add_generation_prompt=True)["input_ids"])
    fits = ("max_new_tokens", CONTEXT - length)
    checks.check_prompts(rows, "rows", chat_tokenizer, ["base"], fits)
    with pytest.raises(UserError, match=rf"row 0: its prompt of {length} tokens"):
        checks.check_prompts(rows, "rows", chat_tokenizer, ["base"], ("max_new_tokens", fits[1] + 1))


def test_positions_of_other_configurations(tmp_path):
    GPT2Config(n_positions=64).save_pretrained(tmp_path / "gpt2")
    assert checks.positions(str(tmp_path / "gpt2")) == 64
    config = {
        "model_type": "llama",
        "max_position_embeddings": 100,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 100,
        },
    }
    (tmp_path / "yarn").mkdir()
    (tmp_path / "yarn" / "config.json").write_text(json.dumps(config))
    assert checks.positions(str(tmp_path / "yarn")) == 400
    (tmp_path / "bloom").mkdir()
    (tmp_path / "bloom" / "config.json").write_text('{"model_type": "bloom"}')
    assert checks.positions(str(tmp_path / "bloom")) is None


def test_a_tokenizer_without_any_closing_token_is_refused(files, tokenizer_source):
    PreTrainedTokenizerFast(tokenizer_object=tokenizer_source).save_pretrained("base")
    assert AutoTokenizer.from_pretrained("base").eos_token is None
    with pytest.raises(UserError, match=r"neither a padding nor an end-of-sequence token: set tokenizer\.eos_token"):
        reward.main(command("rankings.jsonl"))


# ---- the folder of the run ------------------------------------------------------------------------------------
def contents(folder):
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_finished_run_is_neither_overwritten_nor_saved_again(files, capsys):
    argv = command("demos.jsonl", "--save_steps", 1)
    sft.main(argv)
    before = contents(files / "out")
    with pytest.raises(UserError, match=r"output_dir: out holds a finished run.*resume_from_checkpoint: true"):
        sft.main(argv)
    capsys.readouterr()
    sft.main([*argv, "--resume_from_checkpoint", "true"])
    assert "out holds the finished run of 2 steps: nothing is left to train" in capsys.readouterr().out
    assert contents(files / "out") == before
    longer = [*argv, "--max_steps", "3", "--resume_from_checkpoint", "true"]
    sft.main(longer)
    assert json.loads((files / "out" / "trainer_state.json").read_text())["global_step"] == 3


def test_checkpoints_of_an_unfinished_run_are_not_overwritten(files):
    argv = command("demos.jsonl", "--save_steps", 1)
    sft.main(argv)
    (files / "out" / "trainer_state.json").unlink()  # as if killed at the end
    with pytest.raises(UserError, match=r"holds 2 checkpoints of an unfinished run"):
        sft.main(argv)
    sft.main([*argv, "--resume_from_checkpoint", "latest"])
    assert (files / "out" / "trainer_state.json").is_file()


def test_a_finished_run_without_checkpoints_cannot_be_made_longer(files):
    argv = command("demos.jsonl", "--save_strategy", "no")
    sft.main(argv)
    before = contents(files / "out")
    with pytest.raises(UserError, match="has no checkpoint to go on from"):
        sft.main([*argv, "--max_steps", "5", "--resume_from_checkpoint", "true"])
    assert contents(files / "out") == before


def test_a_run_whose_weights_are_gone_is_not_finished(files):
    argv = command("demos.jsonl", "--save_steps", 1, "--resume_from_checkpoint", "true")
    sft.main(argv)
    weights = (files / "out" / "model.safetensors").read_bytes()
    (files / "out" / "model.safetensors").unlink()
    sft.main(argv)
    assert (files / "out" / "model.safetensors").read_bytes() == weights


def test_epochs_are_counted_where_no_steps_are_asked_for(files):
    argv = command("demos.jsonl", "--max_steps", -1, "--num_train_epochs", 1, "--save_strategy", "epoch")
    sft.main(argv)
    before = contents(files / "out")
    sft.main([*argv, "--resume_from_checkpoint", "true"])
    assert contents(files / "out") == before
    sft.main([*argv, "--num_train_epochs", "2", "--resume_from_checkpoint", "true"])
    assert json.loads((files / "out" / "trainer_state.json").read_text())["epoch"] == 2


def test_a_run_of_another_step_is_not_gone_on_with(files):
    reward.main(command("rankings.jsonl", "--save_steps", 1))
    (files / "out" / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-2 is of a RankedRewardTrainer, not of a RankedDPOTrainer"):
        dpo.main(command("rankings.jsonl", "--resume_from_checkpoint", "true"))


def test_a_checkpoint_that_is_not_there_is_told_at_once(files, no_weights):
    with pytest.raises(UserError, match="resume_from_checkpoint: there is no folder nowhere"):
        sft.main(command("demos.jsonl", "--resume_from_checkpoint", "nowhere"))


# ---- logging --------------------------------------------------------------------------------------------------
def test_an_unknown_or_missing_logger_is_told_at_once(files, no_weights, monkeypatch):
    with pytest.raises(UserError, match=r"report_to: nope is not supported, only .*wandb"):
        sft.main(command("demos.jsonl", "--report_to", "nope"))
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="report_to: wandb needs its package: pip install wandb"):
        sft.main(command("demos.jsonl", "--report_to", "wandb"))


# ---- what is in output_dir already --------------------------------------------------------------------------------
@pytest.mark.parametrize("recipe", [sft, reward, dpo, ppo_ptx])
@pytest.mark.parametrize("name", ["base", "rm"])
@pytest.mark.parametrize("resume", [(), ("--resume_from_checkpoint", "true"), ("--resume_from_checkpoint", "rm")])
def test_a_model_of_no_run_is_not_overwritten(files, no_weights, recipe, name, resume):
    before = {path: path.read_bytes() for path in (files / name).iterdir()}
    rows = {sft: "demos.jsonl", ppo_ptx: "prompts.jsonl"}.get(recipe, "rankings.jsonl")
    argv = command(rows, *resume, output=name)
    if recipe is ppo_ptx:
        argv += ["--reward_model_name_or_path", "rm"]
    with pytest.raises(
        UserError, match=rf"output_dir: {name} holds a model \(model.safetensors\) .* another output_dir"
    ):
        recipe.main(argv)
    assert {path: path.read_bytes() for path in (files / name).iterdir()} == before


def test_a_file_is_no_output_dir(files, no_weights):
    with pytest.raises(UserError, match=r"output_dir: demos\.jsonl is a file; name a folder"):
        sft.main(command("demos.jsonl", output="demos.jsonl"))


def test_a_second_command_in_one_folder_is_refused_while_the_first_lives(files, no_weights):
    """The first is another process; its death, however it comes, gives the folder free."""
    code = (
        "from pathlib import Path; from prefopt.recipes.common.lock import lock; "
        "lock(Path('out/_lock'), 'output_dir', Path('out')); print('held', flush=True); input()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        assert first.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match=r"another command is writing out .*choose another output_dir"):
            sft.main(command("demos.jsonl"))
        first.kill()
        first.wait()
        with pytest.raises(AssertionError, match="weights were loaded"):
            sft.main(command("demos.jsonl"))


def test_a_run_holds_its_folder_until_it_ends(files, monkeypatch):
    code = "from filelock import FileLock; FileLock('out/_lock').acquire(timeout=0)"
    step, is_free = Trainer.training_step, []

    def look(self, *args, **kwargs):
        is_free.append(subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL).returncode == 0)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", look)
    sft.main(command("demos.jsonl", "--save_strategy", "no"))
    assert is_free
    assert not any(is_free)
    # As every command does at its end (`recipes.common.errors`).
    release()
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_run_that_was_killed_while_it_saved_its_model_starts_anew(files, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("transformers.Trainer.save_state", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            sft.main(command("demos.jsonl", "--save_strategy", "no"))
    assert (files / "out" / "model.safetensors").is_file()
    sft.main(command("demos.jsonl", "--save_strategy", "no"))
    with pytest.raises(UserError, match="holds a finished run"):
        sft.main(command("demos.jsonl"))


def test_a_run_that_another_command_has_just_finished_is_not_trained_over(files, monkeypatch):
    """It ends between the first look at the folder and the lock."""
    argv = command("demos.jsonl")
    load = sft.load_sft_rows

    def slow(data, args):
        shutil.copytree("base", "out")
        (files / "out" / "trainer_state.json").write_text('{"max_steps": 2, "num_train_epochs": 1}')
        return load(data, args)

    monkeypatch.setattr(sft, "load_sft_rows", slow)
    with pytest.raises(UserError, match="out holds a finished run, which a new run would overwrite"):
        sft.main(argv)


def test_what_kills_have_left_of_older_checkpoints_goes_when_the_run_ends(files):
    argv = command("demos.jsonl", "--save_steps", 1, "--save_total_limit", 1)
    sft.main(argv)
    # As a kill while the older one was being deleted leaves it, newer than the other for that.
    for folder in ("checkpoint-1", "_unfinished/checkpoint-1"):
        (files / "out" / folder).mkdir(parents=True)
        (files / "out" / folder / "config.json").write_text("{}")
    (files / "out" / "trainer_state.json").unlink()
    (files / "out" / "model.safetensors").unlink()
    sft.main([*argv, "--resume_from_checkpoint", "true"])
    assert sorted(path.name for path in (files / "out").glob("*checkpoint*")) == ["checkpoint-2"]
    assert not (files / "out" / "_unfinished").exists()


def test_mistakes_of_several_keys_are_told_at_once(files):
    with pytest.raises(UserError) as error:
        sft.main(["--model_name_or_path", "./gone", "--output_dir", "demos.jsonl", *SHORT])
    output_dir, model = str(error.value).splitlines()
    assert output_dir.startswith("output_dir: demos.jsonl is a file")
    assert model.startswith("model_name_or_path: there is no folder ./gone")
