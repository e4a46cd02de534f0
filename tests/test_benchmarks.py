"""The benchmarks run and their three sides compute the same step; nothing here looks at a time."""

import json
from pathlib import Path

import pytest

TINY = ["--layers", "2", "--hidden", "32", "--vocab", "64", "--repeats", "2", "--device", "cpu"]


@pytest.fixture
def ranking_step(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "benchmarks"))
    monkeypatch.setenv("TQDM_DISABLE", "1")  # what it would set for good
    import ranking_step

    monkeypatch.setattr(ranking_step, "quiet", lambda: None)
    return ranking_step


@pytest.mark.parametrize(
    "options",
    [
        ["--method", "reward", "--k", "4"],
        ["--method", "reward", "--k", "3", "--lora", "--gradient-checkpointing", "--batch", "2"],
        ["--method", "dpo", "--k", "4"],
        ["--method", "dpo", "--k", "3", "--lora", "--model", "qwen3"],
        ["--method", "dpo", "--k", "2", "--precompute-ref", "--batch", "2"],
    ],
    ids=" ".join,
)
def test_a_step_of_each_side_is_the_same_step(ranking_step, capsys, options):
    figures = ranking_step.main([*options, *TINY, "--prompt", "20", "--completion", "6"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == figures
    assert figures["packed"]
    assert figures["loss_abs_diff"] < 1e-6
    assert figures["grad_rel_l2"] < 1e-5
    # The step is not one that any trainer would get right: the loss is off log 2, and the gradient is not 0.
    assert abs(figures["loss_shared"] - 0.6931) > 1e-4
    assert figures["self_check_seconds"] > 0
    assert figures["speedup_vs_rows"] < figures["speedup_vs_rows_later_steps"]
    assert figures["speedup_vs_trl"] > 0
    assert figures["peak_vs_trl"] > figures["peak_vs_rows"] > 0.9
    assert figures["peak_meter"]


def test_a_cell_that_falls_back_says_so(ranking_step):
    figures = ranking_step.main(
        ["--method", "reward", "--k", "2", *TINY, "--prompt", "1", "--completion", "32"]
    )
    assert not figures["packed"]
    assert figures["self_check_seconds"] == 0


def test_the_peak_counts_what_a_step_holds_at_once(ranking_step):
    """Twice the rows take twice the memory: the meter sees no more and no less than a step needs."""
    peaks = {}
    for k in (4, 8):
        options = ranking_step.parse(
            ["--method", "reward", "--k", str(k), *TINY, "--prompt", "60", "--completion", "4"]
        )
        peaks[k] = {name: result.peak for name, result in ranking_step.measure(options).items()}
    assert peaks[8]["trl"] / peaks[4]["trl"] == pytest.approx((8 * 7) / (4 * 3), rel=0.1)
    assert peaks[8]["rows"] / peaks[4]["rows"] == pytest.approx(8 / 4, rel=0.1)
    # Tokens grow by (60 + 8 * 4) / (60 + 4 * 4) = 1.21; the keys that attention holds are those of whole rows.
    assert 1.1 < peaks[8]["shared"] / peaks[4]["shared"] < 1.6


def test_scaling_fits_exponents(ranking_step, tmp_path):
    import scaling

    assert scaling.exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    sweeps = scaling.main(
        ["--method", "reward", *TINY, "--completion", "4", "--prompt", "8", "--ks", "2", "3",
         "--prompts", "8", "16", "--plot", str(tmp_path / "scaling.svg")]
    )  # fmt: skip
    assert sweeps["k"]["k"] == [2, 3]
    assert set(sweeps["prompt"]["exponents"]) == {"trl", "rows", "shared"}
    # tokens against K: pairs 6 * 12 / (2 * 12), rows 3/2, shared (8 + 12) / (8 + 8)
    expected = {"trl": 3.0, "rows": 1.5, "shared": 20 / 16}
    for side, ratio in expected.items():
        assert 1.5 ** sweeps["k"]["exponents_of_tokens"][side] == pytest.approx(ratio)
    assert (tmp_path / "scaling.svg").read_text(encoding="utf-8").startswith("<?xml")
