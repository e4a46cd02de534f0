"""Publishing on the Hub: which files go there, under which card, and what is said when it does not work."""

import logging
import os
import shlex
import shutil
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import CommitInfo, HfApi, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from peft import PeftConfig
from transformers import AutoConfig, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import CONFIG_NAME

from prefopt.errors import UserError
from prefopt.hub.cards import ADAPTER_CONFIG, FACTS, README, holds_model, is_handwritten, read_facts, write_card
from prefopt.models.checkpoints import merge_reward_model, save_reward_model
from prefopt.models.loading import load_causal_lm

logger = logging.getLogger(__name__)

# Needed to go on training, not to use the model. training_args.bin is a pickle that holds the token it was given.
PRIVATE = (
    "_*",
    "optimizer*",
    "scheduler.pt",
    "scaler.pt",
    "rng_state*",
    "rollout_*.pt",
    "ppo_ptx_state.json",
    "complete.json",
    "training_args.bin",
)
# What PPO-ptx and DPO keep beside the policy: value function, averaged weights, and the folders of other adapters.
ROLES = ("value_function.safetensors", "weight_average.safetensors")
ROLE_FOLDERS = ("ema", "ref", "reward*", "value")


class HubError(RuntimeError):
    """The Hub did not take a model. The message says what happened, that the model is whole, and how to try again."""


def files_to_publish(folder: str | os.PathLike, roles: bool = False) -> list[str]:
    """Paths in `folder` that belong on the Hub: the model itself, its tokenizer, card and TensorBoard logs.

    With `roles` also what PPO-ptx and DPO keep beside the policy: value function, reference, reward model, averages.
    A folder that holds no model is a UserError.
    """
    folder = Path(folder)
    if not holds_model(folder):
        raise UserError(
            f"{folder} holds no model: expected {ADAPTER_CONFIG} or {CONFIG_NAME}, as save_model leaves them"
        )
    found = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        parts = path.relative_to(folder).parts
        if any(fnmatch(path.name, pattern) for pattern in PRIVATE):
            continue
        if len(parts) == 1:
            wanted = roles or path.name not in ROLES
        else:
            wanted = parts[0] == "runs" or (roles and any(fnmatch(parts[0], name) for name in ROLE_FOLDERS))
        if wanted:
            found.append("/".join(parts))
    return found


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    roles: bool = False,
    commit_message: str = "Upload model with prefopt",
    run_as_future: bool = False,
    saved_in: str | os.PathLike | None = None,
    retry: str | None = None,
) -> CommitInfo | Future:
    """Publish a saved model: the repository and branch are made if need be, and the card is written for it.

    A model card that somebody has edited, here or on the Hub, is kept. The upload is huggingface_hub's, which tries
    again by itself what may have been chance, and leaves out what the Hub has already.

    Args:
        folder: reward model or policy, full or LoRA adapter.
        repo_id: `owner/name`, or a name of one's own.
        private: make the repository private if it is new.
        token: default: HF_TOKEN or that of `hf auth login`.
        roles: as in `files_to_publish`.
        run_as_future: upload in the background; an error is then raised by `.result()`, as it came.
        saved_in, retry: the folder and the command that the message of a failure names.

    Raises:
        UserError: the folder holds no model, or `private` is asked for a repository that is public.
        HubError: the upload failed.
    """
    folder = Path(folder)
    files_to_publish(folder)
    saved_in = folder if saved_in is None else saved_in
    if retry is None:
        retry = push_command(folder, repo_id, private=private, revision=revision, roles=roles)
    api = HfApi(token=token)
    with hub_errors(
        f"{saved_in} was not published as {repo_id}", f"the model is whole in {saved_in}; try again: {retry}"
    ):
        repo_id = create_repo(api, repo_id, private=private, revision=revision)
        write_card(folder, _facts(folder), repo_id)
        _warn_of_local_base(folder)
        wanted = files_to_publish(folder, roles)
        if not is_handwritten(folder) and _is_card_edited(api, repo_id, revision):
            logger.warning("the model card of %s was edited there and is kept; delete it there to have ours", repo_id)
            wanted.remove(README)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=[_literal(name) for name in wanted],
            commit_message=commit_message,
            revision=revision,
            run_as_future=run_as_future,
        )


def write_published(folder: str | os.PathLike, repo_id: str, out: str | os.PathLike, roles: bool = False) -> list[str]:
    """Write into the new folder `out` the files that `push_folder` would publish, their card among them; returns their names.

    Raises:
        UserError: the folder holds no model, or `out` holds something.
    """
    folder, out = Path(folder), Path(out)
    wanted = files_to_publish(folder, roles)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} is there already; name a new folder")
    for name in {*wanted, *([FACTS] if (folder / FACTS).is_file() else [])}:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / name, out / name)
    write_card(out, _facts(folder), repo_id)
    _warn_of_local_base(out)
    return files_to_publish(out, roles)


def save_merged(folder: str | os.PathLike, out: str | os.PathLike) -> None:
    """Merge a LoRA adapter into its base and save the whole model, with tokenizer and card, in the dtype of the base.

    A base that was quantized in training is dequantized first, as in `merge_reward_model`.
    """
    folder, out = Path(folder), Path(out)
    if not (folder / ADAPTER_CONFIG).is_file():
        raise UserError(f"{folder} is no adapter: there is nothing to merge")
    adapter = PeftConfig.from_pretrained(folder)
    dtype = AutoConfig.from_pretrained(adapter.base_model_name_or_path).dtype or torch.float32
    if adapter.task_type == "SEQ_CLS":
        save_reward_model(merge_reward_model(folder, dtype=dtype), out)
    else:
        quantization = read_facts(folder).get("quantization")
        quantization = BitsAndBytesConfig(**quantization) if quantization else None
        load_causal_lm(folder, merge=True, dtype=dtype, quantization_config=quantization).save_pretrained(out)
    AutoTokenizer.from_pretrained(folder).save_pretrained(out)
    for name in (FACTS, README):
        if (folder / name).is_file():
            shutil.copy(folder / name, out)


def create_repo(api: HfApi, repo_id: str, *, private: bool | None = None, revision: str | None = None) -> str:
    """Make sure that a repository is there and may be written to; returns its full id."""
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    api.auth_check(repo_id, write=True)
    if private and not api.repo_info(repo_id).private:
        raise UserError(
            f"{repo_id} is there already and is public; make it private in its settings, or take another name"
        )
    if revision is not None and not revision.startswith("refs/"):  # of a pull request
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return repo_id


def push_command(folder: str | os.PathLike, repo_id: str, **options: Any) -> str:
    """The command line that publishes a folder; options that are not set are left out.

    >>> push_command("my runs/rm", "me/rm", private=True)
    "prefopt push 'my runs/rm' me/rm --private true"
    """
    words = ["prefopt", "push", os.fspath(folder), repo_id]
    for name, value in options.items():
        if value:
            words += [f"--{name}", "true" if value is True else value]
    return shlex.join(words)


@contextmanager
def hub_errors(what: str, remedy: str) -> Iterator[None]:
    """Turn every way in which the Hub says no into one `HubError`: what did not happen, why, and what to do."""
    try:
        yield
    except (HTTPError, OSError, RuntimeError) as error:
        raise HubError(f"{what}: {_reason(error)}; {remedy}") from error


def _reason(error: BaseException) -> str:
    if isinstance(error, RuntimeError) and error.__cause__ is not None:  # of one file
        return f"{str(error).rstrip('.')} ({_reason(error.__cause__)})"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, which keeps huggingface_hub from the network"
    no_token = "no valid token: run `hf auth login`, or set HF_TOKEN, with a token that may write"
    if isinstance(error, LocalTokenNotFoundError):
        return no_token
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status == 401:
        return no_token
    if status == 403:
        return (
            "the token may not write there: make one that may at https://huggingface.co/settings/tokens and set "
            "HF_TOKEN, or take a repository of your own"
        )
    if status is not None and status >= 500:
        return f"the Hub had an error of its own ({status}), also when asked again"
    if status is not None:
        return f"the Hub answered {status}: {error.server_message or _first_line(error)}"
    if isinstance(error, HTTPError):
        return f"the connection broke ({type(error).__name__}: {_first_line(error)})"
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _facts(folder: Path) -> dict[str, Any]:
    """What is known of a model; of PPO-ptx's averaged policy that of the policy."""
    return read_facts(folder) or (read_facts(folder.parent) if folder.name == "ema" else {})


def _is_card_edited(api: HfApi, repo_id: str, revision: str | None) -> bool:
    """Whether the Hub has a model card that prefopt did not write."""
    with TemporaryDirectory() as folder:
        for name in (README, FACTS):
            try:
                hf_hub_download(repo_id, name, revision=revision, local_dir=folder, token=api.token)
            except EntryNotFoundError:
                continue
        return is_handwritten(folder)


def _warn_of_local_base(folder: Path) -> None:
    base = PeftConfig.from_pretrained(folder).base_model_name_or_path if (folder / ADAPTER_CONFIG).is_file() else None
    if base and os.path.isdir(base):
        remedy = f"publish that too and name it in {ADAPTER_CONFIG}, or add --merge true"
        logger.warning("%s is an adapter on %s, a folder that others do not have: %s", folder, base, remedy)


def _literal(name: str) -> str:
    return "".join(f"[{char}]" if char in "*?[" else char for char in name)
