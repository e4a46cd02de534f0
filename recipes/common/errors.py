"""Common errors, each answered with one sentence and a remedy. An error that is not one of them keeps its traceback.

`run_command` is around every command, whether `prefopt` or `accelerate launch -m prefopt.recipes...` started it;
`PREFOPT_TRACEBACK=1` shows the traceback that a sentence replaces.
"""

import errno
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from prefopt.errors import UserError
from prefopt.recipes.common.lock import release

OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")

# What a command can lower when memory runs out; the first is the cheapest.
BATCH = "per_device_train_batch_size (with gradient_accumulation_steps as much higher, the batch stays what it is)"
OF_TRAINING = "gradient_checkpointing: true; use_peft: true with load_in_4bit: true"
TO_LOWER = {
    "sft": f"{BATCH} or max_length; or set {OF_TRAINING}",
    "reward": f"{BATCH}, max_tokens_per_forward or max_length; or set {OF_TRAINING}",
    "dpo": f"{BATCH}, max_tokens_per_forward or max_length; or set {OF_TRAINING}",
    "ppo-ptx": f"{BATCH}, ptx_per_device_batch_size, max_completion_length or ptx_max_length; or set {OF_TRAINING}",
    "sample": "batch_size or max_new_tokens",
    "best-of-n": "batch_size or max_new_tokens",
    "rank": "batch_size",
    "eval": "batch_size or max_new_tokens",
}
# Of these `prefopt plan` knows the memory.
PLANNED = ("sft", "reward", "dpo", "ppo-ptx")

# After an interruption.
RESUMES = {
    **dict.fromkeys(
        PLANNED,
        ". With `resume_from_checkpoint: true` the same command resumes from the newest complete checkpoint of output_dir",
    ),
    **dict.fromkeys(
        ("sample", "best-of-n", "rank", "iterate", "eval", "sweep"), ". The same command goes on where it was"
    ),
    "pipeline": ". The same command begins again with the step that it was in; those before are kept",
}

# What the system says of a path -> what it is and what helps.
PATHS = {
    errno.EACCES: "permission denied; change its rights (chmod, chown), or name another place",
    errno.EPERM: "not permitted; change its rights or owner, or name another place",
    errno.EROFS: "is on a file system that cannot be written to; name another place",
    errno.EISDIR: "is a folder; name a file",
    errno.ENOTDIR: "a folder of this path is a file; name another place",
    errno.EEXIST: "is a file where a folder is needed; name another place",
    errno.ELOOP: "is a link that leads back to itself; name the file itself",
    errno.ENAMETOOLONG: "the name is too long for this file system; choose a shorter one",
}

# Packages that no training step needs -> the extra that brings them.
EXTRAS = {
    "evaluate": "eval",
    "krippendorff": "label",
    "lm_eval": "eval",
    "markdown_it": "label",
    "matplotlib": "eval",
    "sacrebleu": "eval",
}

# Of how TRL and peft call transformers and torch, which no key of a command changes.
NOISE = (
    r"`(is_)?gradient_checkpointing(_\w+)?` is deprecated",
    "'pin_memory' argument is set as true but no accelerator is found",
)


def run_command(main: Callable[[list[str] | None], Any], command: str, argv: list[str] | None = None) -> None:
    """Run a command; a common error ends it with one sentence in place of a traceback."""
    for message in NOISE:
        warnings.filterwarnings("ignore", message=message)
    try:
        with _terminable():
            main(argv)
    except KeyboardInterrupt as error:
        if _wants_traceback():
            raise
        is_term = isinstance(error, Terminated)
        print(f"{'terminated' if is_term else 'interrupted'}{RESUMES.get(command, '')}", file=sys.stderr)
        sys.exit(128 + (signal.SIGTERM if is_term else signal.SIGINT))
    except Exception as error:
        sentence = explain(error, command)
        if sentence is None or _wants_traceback():
            traceback.print_exc()
            sys.exit(1)
        # A UserError names the place itself; of the others only the traceback knows it.
        if not isinstance(error, UserError):
            sentence += " (PREFOPT_TRACEBACK=1 shows where it happened)"
        process = int(os.environ.get("RANK", "0"))
        sys.exit(f"error: {sentence}" if process == 0 else f"process {process}: error: {sentence}")
    finally:
        release()


@contextmanager
def collecting(mistakes: list[str]) -> Iterator[None]:
    """Inside, a UserError ends the block and is put into the list, so that what comes after it is checked as well.

    >>> mistakes = []
    >>> with collecting(mistakes):
    ...     raise UserError("learning_rate=-1: expected a finite number from 0")
    >>> mistakes
    ['learning_rate=-1: expected a finite number from 0']
    """
    try:
        yield
    except UserError as error:
        mistakes.append(str(error))


def raise_all(mistakes: list[str]) -> None:
    """One UserError for all mistakes that were collected, if there are any."""
    if mistakes:
        raise UserError("\n".join(mistakes))


class Terminated(KeyboardInterrupt):
    """SIGTERM, which job schedulers, containers and `kill` send: it ends a command as Ctrl-C does."""


@contextmanager
def _terminable() -> Iterator[None]:
    """Inside, SIGTERM raises `Terminated`; a handler that is there already stays."""
    is_free = signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if not is_free or threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() == owner:
            raise Terminated
        # A worker that was forked: it ends as it would have without us.
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def explain(error: BaseException, command: str = "") -> str | None:
    """What a common error is and what to do about it; None for an error that is not one of them.

    >>> explain(MemoryError(), "sample")
    'out of memory: lower batch_size or max_new_tokens'
    >>> explain(ZeroDivisionError("a bug"))
    """
    if isinstance(error, UserError):
        return str(error)
    for cause in _causes(error):
        for rule in (
            _memory,
            _disk,
            _path,
            _hub,
            _bitsandbytes,
            _device,
            _attention,
            _package,
            _weights,
            _template,
            _adapter,
        ):
            sentence = rule(cause, command)
            if sentence is not None:
                return sentence
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and those it was raised from."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _wants_traceback() -> bool:
    return os.environ.get("PREFOPT_TRACEBACK", "").lower() not in ("", "0", "false")


# ---- the rules: (error, command) -> sentence or None ------------------------------------------------------------
def _memory(error: BaseException, command: str) -> str | None:
    text = str(error)
    # The CPU's allocator raises a RuntimeError; torch's class is known by its name, so that torch need not be loaded.
    is_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    is_memory |= isinstance(error, OSError) and error.errno == errno.ENOMEM
    is_memory |= isinstance(error, RuntimeError) and (
        "out of memory" in text or "can't allocate memory" in text or "Cannot allocate memory" in text
    )
    if not is_memory:
        return None
    size = text[text.find("Tried to allocate") :].split(". ")[0] if "Tried to allocate" in text else ""
    where = " on the GPU" if "CUDA" in text or "HIP" in text else ""
    sentence = f"out of memory{where}{f' ({size.lower()})' if size else ''}"
    remedy = TO_LOWER.get(command, "a batch size or a length in the settings")
    planned = "; `prefopt plan` says what fits" if command in PLANNED else ""
    return f"{sentence}: lower {remedy}{planned}"


def _disk(error: BaseException, command: str) -> str | None:
    text = str(error)
    is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    # safetensors and torch.save report a full disk as errors of their own.
    is_full |= "No space left on device" in text or "PytorchStreamWriter failed writing" in text
    if not is_full:
        return None
    place = getattr(error, "filename", None)
    kept = ""
    if command in PLANNED:
        kept = (
            "; complete checkpoints are kept, and resume_from_checkpoint: true resumes from the newest; a lower "
            "save_total_limit keeps fewer"
        )
    return f"the disk is full{f' at {place}' if place else ''}: free some space or name an output elsewhere{kept}"


def _path(error: BaseException, command: str) -> str | None:
    # Without a name it is no path, or nobody would know which.
    name = getattr(error, "filename2", None) or getattr(error, "filename", None)
    if not isinstance(error, OSError) or error.errno not in PATHS or not isinstance(name, str | os.PathLike):
        return None
    return f"{os.fspath(name)}: {PATHS[error.errno]}"


def _hub(error: BaseException, command: str) -> str | None:
    name, text = type(error).__name__, str(error)
    if name == "GatedRepoError" or "gated repo" in text:
        return (
            "access to this model or data set is restricted: accept its terms on its page at huggingface.co, then log "
            "in with `hf auth login` (or set HF_TOKEN)"
        )
    if name in ("RepositoryNotFoundError", "DatasetNotFoundError") or "not a valid model identifier" in text:
        return (
            "there is no such folder here and no such name on the Hub, or it is private: check the spelling; for a "
            "private one log in with `hf auth login` (or set HF_TOKEN)"
        )
    if name == "RevisionNotFoundError":
        return "the Hub has it, but not this revision: check model_revision"
    offline = ("OfflineModeIsEnabled", "LocalEntryNotFoundError")
    unreachable = ("We couldn't connect to", "Couldn't reach", "couldn't find it in the cached files")
    if name in offline or any(words in text for words in unreachable):
        switched_off = any(os.environ.get(key, "") in ("1", "true") for key in OFFLINE)
        why = "HF_HUB_OFFLINE is set" if switched_off else "no connection"
        return (
            f"the Hub cannot be reached ({why}) and there is no copy on this machine: where there is a network, "
            "`hf download NAME --local-dir FOLDER`, and name that folder here"
        )
    return None


def _bitsandbytes(error: BaseException, command: str) -> str | None:
    text = str(error)
    if isinstance(error, (ImportError, RuntimeError, OSError)) and "bitsandbytes" in text.lower():
        return (
            "bitsandbytes does not work here, which load_in_4bit, load_in_8bit and 8-bit optimizers need: "
            f"{_first_line(text)}. `prefopt env` says what works; install one for your GPU (pip install -U "
            "bitsandbytes) or leave these keys out"
        )
    return None


def _device(error: BaseException, command: str) -> str | None:
    text = str(error)
    if "doesn't support bf16" in text:
        return (
            "bf16: true needs a GPU that has bf16 (NVIDIA Ampere or newer): leave bf16 unset, which turns it on only "
            "where it works, or set fp16: true on an older GPU; for bf16 on the CPU add use_cpu: true"
        )
    if "fp16" in text.lower() and "requires" in text and "GPU" in text:
        return "fp16: true needs a GPU: leave it unset here"
    no_gpu = ("Found no NVIDIA driver", "Torch not compiled with CUDA", "No CUDA GPUs are available")
    if any(words in text for words in (*no_gpu, "no GPUs found", "CUDA driver initialization failed")):
        return f"no usable GPU: {_first_line(text)}. `prefopt env` says what is there; to train on the CPU add use_cpu: true"
    return None


def _weights(error: BaseException, command: str) -> str | None:
    # Of files from the Hub; a local folder is looked at before.
    name, text = type(error).__name__, str(error)
    if name == "UnpicklingError":
        return (
            "a file of weights or of a checkpoint is damaged, or a pickle of more than tensors, which is never opened"
        )
    if name == "SafetensorError":
        return f"a .safetensors file is damaged or cut ({_first_line(text)}): download or copy it again"
    if isinstance(error, RuntimeError) and ("ignore_mismatched_sizes" in text or "size mismatch for" in text):
        return "the weights have other shapes than the configuration beside them: they are not of one model"
    if isinstance(error, IndexError) and str(error) == "index out of range in self":
        return (
            "a row has a token id beyond the model's embeddings: the tokenizer is of another model, or tokens were added to "
            "it and the embeddings not resized (model.resize_token_embeddings)"
        )
    if "probability tensor contains either `inf`, `nan`" in str(error):
        return (
            "the model's logits are not finite: its weights are broken (NaN), or temperature is too small to divide by"
        )
    return None


def _template(error: BaseException, command: str) -> str | None:
    # Known by its name, so that Jinja2 need not be loaded.
    if any(kind.__name__ == "TemplateError" for kind in type(error).__mro__):
        line = f" in line {error.lineno}" if getattr(error, "lineno", None) else ""
        return (
            f"the chat template fails{line}: {_first_line(str(error))}; mend it, or name another by chat_template_path"
        )
    return None


def _adapter(error: BaseException, command: str) -> str | None:
    # PEFT's: a class of its own in newer versions alone.
    if isinstance(error, ValueError) and "not found in the base model" in str(error):
        sentence = _first_line(str(error)).partition(". Please")[0]
        return f"lora_target_modules: {sentence}; name other modules (`prefopt plan` tries them without weights)"
    return None


def _attention(error: BaseException, command: str) -> str | None:
    text = _first_line(str(error))
    if isinstance(error, (ImportError, ValueError)) and "has been toggled on" in text:
        why = text.partition("due to the following error:")[2].strip() or text
        return f"attn_implementation does not work here: {why}; install it, or leave the key out (PyTorch's own attention)"
    return None


def _package(error: BaseException, command: str) -> str | None:
    text = _first_line(str(error))
    package = (getattr(error, "name", None) or "").split(".")[0]
    if isinstance(error, ModuleNotFoundError) and package in EXTRAS:
        return f"{package} is not installed: pip install 'prefopt[{EXTRAS[package]}]'"
    if isinstance(error, (ImportError, RuntimeError)) and "pip install" in text:
        return text
    return None


def _first_line(text: str) -> str:
    return " ".join(text.strip().splitlines()[:1]).rstrip(".")
