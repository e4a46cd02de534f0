"""The local Hub, in place of the real one, for the tests of this folder alone."""

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import transformers.utils.hub
from huggingface_hub import constants
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefopt.hub.push import push_folder
from tests.hub.local_hub import LocalHub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """A fresh Hub that huggingface_hub, transformers, peft and TRL take for the real one; the token may write.

    It speaks LFS, not Xet. Waiting between retries takes no time.
    """
    server = LocalHub()
    monkeypatch.setenv("HF_TOKEN", "writer")
    for name, value in {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_CACHE": str(tmp_path / "hub-cache"),
    }.items():
        assert hasattr(constants, name)
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
    # Before transformers 5.10 there is no such cache.
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)
    patient = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
    monkeypatch.setattr("huggingface_hub.utils._http.time", patient)
    huggingface_hub.close_session()
    yield server
    huggingface_hub.close_session()
    server.close()


@pytest.fixture
def base(hub: LocalHub, causal_lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> str:
    """The language model that all runs start from, on the Hub."""
    causal_lm.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return push_folder(tmp_path / "base", "me/base").repo_url.repo_id
