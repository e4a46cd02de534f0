"""The frontier's numbers and findings, from runs whose differences are known."""

import numpy as np
import pytest

from prefopt.evaluation.frontier import Measured, build_frontier_page, findings, results_of
from prefopt.inference.likelihood import BitsPerByte

PROMPTS, DOCUMENTS = 40, 20


def run(gold, tax, kl=1.0, seed=0):
    """A run that is better than SFT by `gold` on each prompt and worse by `tax` bits per byte on each document."""
    noise = np.random.default_rng(seed).normal(0, 0.2, PROMPTS)
    sizes = np.full(DOCUMENTS, 100.0)
    nats = (1.0 + tax) * np.log(2) * sizes + np.random.default_rng(seed).normal(0, 5, DOCUMENTS)
    return Measured(gold + noise, 2 * gold + noise, np.full(PROMPTS, kl), BitsPerByte(nats, sizes))


def runs(**methods):
    """Two seeds of each (method, knob): (gold, tax)."""
    found = {("sft", 0.0): [run(0, 0, 0, seed) for seed in (0, 1)]}
    for method, knobs in methods.items():
        for knob, (gold, tax) in knobs.items():
            found[method, knob] = [run(gold, tax, seed=seed) for seed in (0, 1)]
    return found


def verdicts(**methods):
    return {finding.title.split(" (")[0]: finding.holds for finding in findings(runs(**methods))}


def test_differences_are_paired_with_the_sft_model_of_the_same_seed():
    (point,) = results_of(runs(ppo={0.1: (0.25, 0.03)}), [0, 1])["points"]
    # Without pairing the noise of the prompts would make the intervals wide.
    for numbers in (point, point["seeds"]["0"], point["seeds"]["1"]):
        for end in ("value", "ci_low", "ci_high"):
            assert numbers["gold_gain"][end] == pytest.approx(0.25, abs=1e-9)
            assert numbers["tax"][end] == pytest.approx(0.03, abs=1e-9)
            assert numbers["win_rate"][end] == 1.0
    assert point["gold_gain"]["n"] == 2 * PROMPTS
    assert point["seeds"]["0"]["gold_gain"]["n"] == PROMPTS


def test_best_of_n_is_what_the_proxy_picks():
    sft = run(0, 0)
    gold = np.array([[0.0, 1.0], [5.0, 3.0]])
    drawn = Measured(gold, np.array([[0.1, 0.2], [0.3, 0.2]]), np.zeros(2), sft.text)
    two = drawn.best_of(2, sft)
    assert two.gold.tolist() == [1.0, 5.0]
    assert two.kl.tolist() == pytest.approx([np.log(2) - 0.5] * 2, abs=1e-12)
    assert drawn.best_of(1, sft).gold.tolist() == [0.5, 4.0]


def test_ptx_that_keeps_what_ppo_loses():
    found = verdicts(ppo={0.1: (0.3, 0.05), 1.0: (0.1, 0.01)}, ppo_ptx={0.1: (0.3, 0.0)})
    assert found["SFT is beaten on gold reward with every seed by PPO-ptx"] is True
    assert found["ptx keeps what PPO loses at equal reward"] is True
    # Either more tax or less reward, at each coefficient.
    assert found["A larger KL coefficient is no substitute for ptx"] is True


def test_a_coefficient_that_does_as_well_as_ptx():
    found = verdicts(ppo={0.1: (0.3, 0.05), 1.0: (0.3, -0.01)}, ppo_ptx={0.1: (0.3, 0.0)})
    assert found["A larger KL coefficient is no substitute for ptx"] is False


def test_one_coefficient_says_nothing_of_larger_ones():
    found = verdicts(ppo={0.1: (0.3, 0.05)}, ppo_ptx={0.1: (0.3, 0.0)})
    assert "A larger KL coefficient is no substitute for ptx" not in found
    assert found["ptx keeps what PPO loses at equal reward"] is True


def test_ptx_that_costs_reward_or_where_nothing_is_lost():
    assert (
        verdicts(ppo={0.1: (0.3, 0.05)}, ppo_ptx={0.1: (0.2, 0.0)})["ptx keeps what PPO loses at equal reward"]
        is False
    )
    assert (
        verdicts(ppo={0.1: (0.3, 0.0)}, ppo_ptx={0.1: (0.3, 0.0)})["ptx keeps what PPO loses at equal reward"] is None
    )


def test_ptx_keeps_what_dpo_loses():
    found = verdicts(dpo={0.1: (0.3, 0.05)}, dpo_ptx={0.1: (0.3, 0.0)})
    assert found["ptx keeps what DPO loses at equal reward"] is True
    assert "ptx keeps what PPO loses at equal reward" not in found
    assert (
        verdicts(dpo={0.1: (0.3, 0.05)}, dpo_ptx={0.1: (0.3, 0.08)})["ptx keeps what DPO loses at equal reward"]
        is False
    )


def test_dpo_against_its_variants():
    found = verdicts(
        dpo={0.1: (0.3, 0.0), 0.5: (0.2, 0.0)},
        dpo_best_worst={0.1: (0.2, 0.0), 0.5: (0.2, 0.0)},
        dpo_plackett_luce={0.1: (0.4, 0.0), 0.5: (0.4, 0.0)},
    )
    assert found["DPO, all pairs, beats DPO, best against worst"] is True
    assert found["DPO, all pairs, beats DPO, Plackett-Luce"] is False


def test_one_losing_seed_is_no_win_with_every_seed():
    found = runs(dpo={0.1: (0.3, 0.0)})
    found["dpo", 0.1][1] = run(-0.3, 0.0, seed=1)
    assert [finding.holds for finding in findings(found)] == [False]


def test_the_page_has_both_plots_and_every_number(tmp_path):
    of = runs(ppo={0.1: (0.3, 0.05)}, ppo_ptx={0.1: (0.3, 0.0)}, dpo={0.1: (0.3, 0.0)})
    results = {**results_of(of, [0, 1]), "settings": {"model": "m"}}
    build_frontier_page(tmp_path / "page.html", results, findings(of))
    page = (tmp_path / "page.html").read_text()
    assert page.count("<svg") == 2
    assert "PPO-ptx, kl_coef 0.1" in page
    assert page.count(">seed 1<") == 3
