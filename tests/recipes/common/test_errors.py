"""Common errors end a command with a sentence and a remedy; a bug keeps its traceback."""

import errno
import json
import os
import re
import runpy
import signal
import sys
import time
import types
import warnings

import pytest
import torch
from huggingface_hub import errors
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import is_flash_attn_2_available

from prefopt import cli
from prefopt.errors import UserError, UserImportError, UserTypeError
from prefopt.rankings.checks import validate_comparisons
from prefopt.recipes.common.arguments import parse
from prefopt.recipes.common.errors import explain, run_command
from tests.conftest import forget_prefopt, run_in_fork

pytestmark = pytest.mark.slow


def hub_error(kind, message):
    response = types.SimpleNamespace(headers={}, request=None)
    return kind(message, response=response)


def wrapped(error, cause):
    error.__cause__ = cause
    return error


CPU_MEMORY = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "4096 bytes. Error code 12 (Cannot allocate memory)"
)
GPU_MEMORY = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.69 GiB of which 1.2 GiB is free."
)


@pytest.mark.parametrize(
    ("error", "command", "said"),
    [
        (GPU_MEMORY, "ppo-ptx", "on the GPU (tried to allocate 2.00 gib): lower per_device_train_batch_size"),
        (GPU_MEMORY, "ppo-ptx", "ptx_per_device_batch_size"),
        (GPU_MEMORY, "dpo", "max_tokens_per_forward"),
        (GPU_MEMORY, "sft", "gradient_checkpointing: true; use_peft: true with load_in_4bit: true"),
        (GPU_MEMORY, "reward", "`prefopt plan` says what fits"),
        (CPU_MEMORY, "sample", "out of memory: lower batch_size or max_new_tokens"),
        (MemoryError(), "eval", "out of memory: lower batch_size"),
        (OSError(errno.ENOSPC, "No space left on device", "out/x"), "sft", "the disk is full at out/x: free"),
        (
            SafetensorError("Error while serializing: I/O error: No space left on device"),
            "sft",
            "disk is full",
        ),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "sample", "the disk is full"),
        (
            PermissionError(errno.EACCES, "Permission denied", "a.jsonl"),
            "sft",
            "a.jsonl: permission denied; change its",
        ),
        (
            OSError(errno.EROFS, "Read-only file system", "out"),
            "sft",
            "out: is on a file system that cannot be written",
        ),
        (OSError(errno.EISDIR, "Is a directory", ".d.tmp", None, "d"), "label", "d: is a folder; name a file"),
        (
            NotADirectoryError(errno.ENOTDIR, "Not a directory", "a/b"),
            "sample",
            "a/b: a folder of this path is a file",
        ),
        (FileExistsError(errno.EEXIST, "File exists", "a"), "data", "a: is a file where a folder is needed"),
        (OSError(errno.ELOOP, "Too many levels of symbolic links", "a"), "data", "a: is a link that leads back"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "aaa"), "eval", "aaa: the name is too long"),
        (hub_error(errors.GatedRepoError, "403"), "sft", "accept its terms on its page at huggingface.co"),
        (
            hub_error(errors.RepositoryNotFoundError, "404"),
            "sft",
            "no such name on the Hub, or it is private",
        ),
        (wrapped(OSError("any text"), hub_error(errors.GatedRepoError, "403")), "sft", "accept its terms"),
        (hub_error(errors.RevisionNotFoundError, "404"), "sft", "check model_revision"),
        (
            errors.LocalEntryNotFoundError("not cached"),
            "sft",
            "the Hub cannot be reached (HF_HUB_OFFLINE is set)",
        ),
        (ImportError("Using `bitsandbytes` 4-bit quantization requires it"), "reward", "`prefopt env` says"),
        (
            RuntimeError("Found no NVIDIA driver on your system."),
            "sft",
            "no usable GPU: Found no NVIDIA driver",
        ),
        (
            ImportError(
                "FlashAttention2 has been toggled on, but it cannot be used due to the following error: the package for "
                "FlashAttention2 doesn't seem to be installed."
            ),
            "dpo",
            "attn_implementation does not work here: the package for FlashAttention2 doesn't seem to be installed; install",
        ),
        (RuntimeError("WandbCallback requires wandb. Run `pip install wandb`."), "sft", "pip install wandb"),
    ],
)
def test_a_common_error_is_one_sentence_with_its_remedy(error, command, said, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert said in explain(error, command)


@pytest.mark.skipif(is_flash_attn_2_available(), reason="flash attention is installed")
def test_an_attention_that_is_not_installed_is_a_sentence(tmp_path, causal_lm):
    causal_lm.save_pretrained(tmp_path)
    with pytest.raises(Exception, match="Flash") as raised:
        LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="flash_attention_2")
    assert explain(raised.value, "dpo").startswith("attn_implementation does not work here: ")


def test_broken_logits_are_said_to_be_so():
    with pytest.raises(RuntimeError) as raised:
        torch.multinomial(torch.tensor([0.5, float("nan")]), 1)
    assert "weights are broken" in explain(raised.value, "ppo-ptx")


def test_a_token_beyond_the_embeddings_is_said_to_be_so():
    with pytest.raises(IndexError) as raised:
        torch.nn.Embedding(2, 1)(torch.tensor([2]))
    assert "beyond the model's embeddings" in explain(raised.value, "sft")


def test_adapters_that_fit_no_module_are_said_by_their_key():
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=2,
                                         num_attention_heads=1))  # fmt: skip
    with pytest.raises(ValueError, match="not found in the base model") as raised:
        get_peft_model(model, LoraConfig(target_modules=r".*\.layers\.1[5-9]\..*_proj"))
    sentence = (
        r"lora_target_modules: Target modules .*\.layers\.1[5-9]\..*_proj not found in the base model; name other"
    )
    assert explain(raised.value, "sft").startswith(sentence)


def test_a_template_that_fails_is_named_with_its_line(chat_tokenizer):
    chat_tokenizer.chat_template = "{% for m in messages %}\n{{ m['role'] }"
    with pytest.raises(Exception, match="unexpected") as raised:
        chat_tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
    assert explain(raised.value, "sft").startswith("the chat template fails in line 2: ")


def test_the_allocators_own_error_is_known():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60)
    assert explain(raised.value, "sample") == "out of memory: lower batch_size or max_new_tokens"


def test_a_refusal_by_transformers_is_translated_where_the_settings_are_read(tmp_path):
    if torch.cuda.is_available():
        pytest.fail("this test says what happens without a GPU")
    from prefopt.recipes.sft import SFTStepConfig

    with pytest.raises(UserError, match=r"^bf16: true needs a GPU that has bf16 .*leave bf16 unset"):
        parse((SFTStepConfig,), ["--output_dir", str(tmp_path), "--bf16", "true"], "prefopt sft")


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a bug"),
        KeyError("x"),
        ZeroDivisionError(),
        RuntimeError("shape mismatch"),
        AttributeError("y"),
        FileNotFoundError(errno.ENOENT, "No such file", "a"),
        PermissionError("of no path"),
    ],
)
def test_a_bug_is_no_common_error(error):
    assert explain(error, "sft") is None


@pytest.mark.parametrize("kind", [UserError, UserTypeError, UserImportError])
def test_what_prefopt_refuses_itself_is_shown_as_it_is(kind):
    assert explain(kind("rows.jsonl row 2: no ranks"), "sft") == "rows.jsonl row 2: no ranks"
    with pytest.raises(SystemExit, match=r"^error: rows\.jsonl row 2: no ranks$"):
        run_command(raises(kind("rows.jsonl row 2: no ranks")), "sft")


def test_rows_are_refused_for_the_user():
    with pytest.raises(UserError, match="row 0: field 'ranks'"):
        validate_comparisons([{"prompt": "p", "completions": ["a", "b"], "ranks": [1]}], "rows.jsonl")


# ---- how a command ends -----------------------------------------------------------------------------------------
def raises(error):
    def main(argv):
        raise error

    return main


def test_a_common_error_ends_with_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        run_command(raises(GPU_MEMORY), "sft")
    assert str(stop.value).startswith("error: out of memory on the GPU")
    assert "PREFOPT_TRACEBACK=1" in str(stop.value)
    assert "Traceback" not in capsys.readouterr().err


def test_a_bug_keeps_its_traceback_and_fails(capsys):
    with pytest.raises(SystemExit) as stop:
        run_command(raises(ZeroDivisionError("a bug")), "sft")
    assert stop.value.code == 1
    assert "ZeroDivisionError: a bug" in capsys.readouterr().err


def test_the_traceback_behind_a_sentence(capsys, monkeypatch):
    monkeypatch.setenv("PREFOPT_TRACEBACK", "1")
    with pytest.raises(SystemExit) as stop:
        run_command(raises(GPU_MEMORY), "sft")
    assert stop.value.code == 1
    assert "Traceback" in capsys.readouterr().err


def test_an_interruption_says_how_to_go_on(capsys):
    with pytest.raises(SystemExit) as stop:
        run_command(raises(KeyboardInterrupt()), "dpo")
    assert stop.value.code == 130
    assert "resume_from_checkpoint: true" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("sft", "resume_from_checkpoint: true"),
        ("sample", "The same command goes on where it was"),
        ("pipeline", "begins again with the step that it was in"),
    ],
)
def test_sigterm_ends_as_an_interruption_does(capsys, command, told):
    """Schedulers and containers send it; it comes between any two lines."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        run_command(lambda argv: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(5), command)
    assert stop.value.code == 128 + signal.SIGTERM
    err = capsys.readouterr().err
    assert err.startswith("terminated")
    assert told in err
    assert "Traceback" not in err
    assert signal.getsignal(signal.SIGTERM) == before


def test_sigterm_ends_a_forked_worker_as_ever():
    def main(argv):
        worker = os.fork()
        if worker == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) == -signal.SIGTERM

    run_command(main, "sft")


def test_a_handler_of_others_stays():
    def of_others(number, frame):
        pass

    before = signal.signal(signal.SIGTERM, of_others)
    try:
        run_command(lambda argv: os.kill(os.getpid(), signal.SIGTERM), "sft")
        assert signal.getsignal(signal.SIGTERM) is of_others
    finally:
        signal.signal(signal.SIGTERM, before)


def test_of_several_processes_each_says_which_it_is(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit, match=r"^process 3: error: a bad row$"):
        run_command(raises(UserError("a bad row")), "sft")


def test_a_help_and_a_success_pass_through():
    run_command(lambda argv: None, "sft")
    with pytest.raises(SystemExit) as stop:
        run_command(raises(SystemExit(0)), "sft")
    assert stop.value.code == 0


@pytest.mark.parametrize(
    ("argv", "package", "extra"),
    [(["explain-run", "run"], "matplotlib", "eval"), (["label", "agreement", "x"], "krippendorff", "label")],
)
def test_a_package_of_an_extra_that_is_missing_is_named_with_it(argv, package, extra, tmp_path):
    rows = [{"prompt": "a", "completions": ["b", "c"], "ranks": [1, 2], "labeler": name} for name in ("ann", "bob")]
    (tmp_path / "x").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def program():
        os.chdir(tmp_path)
        forget_prefopt()
        for name in [name for name in sys.modules if name.partition(".")[0] == package]:
            del sys.modules[name]
        sys.modules[package] = None
        from prefopt import cli

        return cli.main(argv)

    assert run_in_fork(program, tmp_path / "log") == 1
    assert f"error: {package} is not installed: pip install 'prefopt[{extra}]'" in (tmp_path / "log").read_text()


def test_a_command_and_its_module_end_alike(tmp_path, monkeypatch):
    """`accelerate launch -m prefopt.recipes.dpo` runs the module."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completions": ["b", "c"], "ranks": [1, 2]}\n')
    argv = ["--model_name_or_path", "no-one/nothing", "--dataset_name", "rows.jsonl", "--output_dir", "out"]
    told = "the Hub cannot be reached (HF_HUB_OFFLINE is set)"
    with pytest.raises(SystemExit, match=re.escape(told)) as stop:
        cli.main(["dpo", *argv])

    def program():
        sys.argv[1:] = argv
        runpy.run_module("prefopt.recipes.dpo", run_name="__main__", alter_sys=True)

    assert run_in_fork(program, tmp_path / "log") == 1
    printed = (tmp_path / "log").read_text()
    assert printed.splitlines()[-1] == str(stop.value)
    assert "Traceback" not in printed


# ---- help -------------------------------------------------------------------------------------------------------
def test_the_help_names_every_command_in_its_group(capsys):
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    for title, commands in cli.GROUPS.items():
        part = shown[shown.index(f"{title}:") :].split("\n\n")[0]
        assert [line.split()[0] for line in part.splitlines()[1:]] == list(commands)
    assert "prefopt recipes copy tiny" in shown
    assert max(map(len, shown.splitlines())) <= 100


@pytest.mark.parametrize(
    ("command", "own", "hidden"),
    [
        ("reward", ["--center_on", "--ties", "--learning_rate", "--model_name_or_path"], "--adam_beta1"),
        ("ppo-ptx", ["--kl_coef", "--ptx_coef", "--reward_model_name_or_path"], "--beta"),
        ("dpo", ["--beta", "--max_length"], "--adam_beta1"),
    ],
)
def test_a_command_shows_its_own_keys_and_the_usual_ones_first(capsys, command, own, hidden):
    from importlib import import_module

    main = import_module(cli.COMMANDS[command][0]).main
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    short = capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--help-all"])
    everything = capsys.readouterr().out
    keys = {line.split()[0] for line in short.splitlines() if line.startswith("  --")}
    assert set(own) <= keys
    assert hidden not in keys
    for key in (*own, hidden):
        assert f"  {key} " in everything
    number = int(next(line for line in short.splitlines() if "--help-all" in line).split()[0])
    every = {line.split()[0] for line in everything.splitlines() if line.startswith("  --")}
    assert number == len({key for key in every - keys if not key.startswith("--no_")})


def test_dashes_in_a_key_are_underscores(tmp_path):
    from prefopt.recipes.sample import SampleArguments

    (args,) = parse((SampleArguments,), ["--output=a-b.jsonl", "--k-min", "3", "--k_max=3"], "prefopt sample")
    assert (args.output, args.k_min, args.k_max) == ("a-b.jsonl", 3, 3)


def test_warnings_that_no_key_changes_are_left_out(recwarn):
    def main(argv):
        warnings.warn(
            "`is_gradient_checkpointing` is deprecated and will be removed in v6.",
            FutureWarning,
            stacklevel=1,
        )
        warnings.warn("'pin_memory' argument is set as true but no accelerator is found, then", stacklevel=1)
        warnings.warn("`something_else` is deprecated", FutureWarning, stacklevel=1)

    run_command(main, "dpo")
    assert [str(warning.message) for warning in recwarn] == ["`something_else` is deprecated"]
