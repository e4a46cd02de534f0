"""A process of checks is forked from this one, which has imported everything."""

import pytest
import torch

from prefopt.gpu import run


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    work = run.work

    def alone(*args):
        # The threads of OpenMP do not live on in a forked process, which would wait for them.
        torch.set_num_threads(1)
        work(*args)

    monkeypatch.setattr(run, "START_METHOD", "fork")
    monkeypatch.setattr(run, "work", alone)
