"""A finished step is kept; a changed one is refused; a failed one is run again."""

import pytest

from prefopt.errors import UserError
from prefopt.recipes.common.steps import Steps


def run(folder, settings, log):
    steps = Steps(folder, total=2)
    for name in ("first", "second"):
        steps.run(name, name, settings.get(name), lambda name=name: log.append(name))
    return steps


def test_a_finished_step_is_not_repeated(tmp_path):
    log = []
    first = run(tmp_path, {}, log)
    second = run(tmp_path, {}, log)
    assert log == ["first", "second"]
    assert second.seconds == first.seconds


def test_a_failed_step_is_run_again(tmp_path):
    log = []

    def fails():
        raise RuntimeError("power cut")

    steps = Steps(tmp_path, total=2)
    steps.run("first", "first", None, lambda: log.append("first"))
    with pytest.raises(RuntimeError):
        steps.run("second", "second", None, fails)
    run(tmp_path, {}, log)
    assert log == ["first", "second"]


@pytest.mark.parametrize("changed", ["first", "second"])
def test_other_settings_are_refused_not_reused(tmp_path, changed):
    run(tmp_path, {}, [])
    log = []
    with pytest.raises(UserError, match=f"step '{changed}' .* ran with other settings"):
        run(tmp_path, {changed: {"learning_rate": 1}}, log)
    assert log == []


def test_a_step_is_not_reused_after_an_earlier_one_ran_again(tmp_path):
    run(tmp_path, {}, [])
    (tmp_path / "steps" / "first.json").unlink()
    log = []
    with pytest.raises(UserError, match=r"step 'second' .* before an earlier step ran again"):
        run(tmp_path, {}, log)
    assert log == ["first"]
