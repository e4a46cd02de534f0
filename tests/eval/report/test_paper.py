"""The paper's values, checked against what its text says of them."""

from prefopt.evaluation.report.paper import FIG_4, TABLE_14, table_14


def test_regressions_of_section_4_2():
    """PPO falls on SQuADv2, DROP, HellaSwag and Fr-En against GPT-3, and ptx recovers most of it."""
    for task in ("squadv2/f1", "drop/f1", "hellaswag/acc", "wmt15_fr_en/bleu"):
        gpt3, ppo, ptx = (table_14(task, "zero-shot", m) for m in ("base", "ppo", "ppo_ptx"))
        assert ppo < ptx
        assert ppo < gpt3
    assert table_14("hellaswag/acc", "zero-shot", "ppo_ptx") > table_14("hellaswag/acc", "zero-shot", "base")


def test_every_row_has_four_models_in_the_range_of_its_metric():
    for task, conditions in TABLE_14.items():
        most = 100 if task.endswith(("f1", "bleu")) else 1
        for row in conditions.values():
            assert len(row) == 4
            assert all(0 < value < most for value in row)
            assert most == 1 or min(row) > 1


def test_unknown_values_are_none():
    assert table_14("squadv2/f1", "zero-shot", "dpo") is None
    assert table_14("mmlu/acc", "zero-shot", "ppo") is None


def test_figure_4_has_shares_of_three_models():
    for shares in FIG_4.values():
        assert len(shares) == 3
        assert all(0 < share < 1 for share in shares)
