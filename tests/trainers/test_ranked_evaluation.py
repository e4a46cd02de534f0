"""What `evaluate()` of the ranked trainers returns: measures on rankings, whatever the batches."""

import pytest
from datasets import Dataset

from prefopt import RankedDPOConfig, RankedDPOTrainer, RankedRewardConfig, RankedRewardTrainer
from prefopt.ranking_metrics import flatten, ranking_metrics

ROWS = [
    {"prompt": "the cat", "completions": [" sat", " ran to the mat", " and"], "ranks": [2, 1, 3], "labeler": "ann"},
    {"prompt": "what is this?", "completions": [" a dog", " a cat"], "ranks": [2, 1], "labeler": "bob"},
    {
        "prompt": "the dog",
        "completions": [" ran", " sat on the red mat", " is", " and", " to the house"],
        "ranks": [1, 2, 2, 3, 1],
        "labeler": "ann",
    },
    {"prompt": "a red house", "completions": [" is this", " sat", " ran"], "ranks": [1, 1, 2], "labeler": None},
]  # fmt: skip
KINDS = {
    "reward": (RankedRewardTrainer, RankedRewardConfig, "reward_model"),
    "dpo": (RankedDPOTrainer, RankedDPOConfig, "causal_lm"),
}


@pytest.fixture(params=KINDS)
def make_trainer(request, tokenizer, tmp_path):
    trainer_class, config_class, model = KINDS[request.param]

    def make(rows=ROWS, batch_size=2, compute_metrics=None, **overrides):
        trainer = trainer_class(
            model=request.getfixturevalue(model),
            args=config_class(
                str(tmp_path),
                report_to="none",
                use_cpu=True,
                per_device_eval_batch_size=batch_size,
                disable_tqdm=True,
                **overrides,
            ),
            train_dataset=Dataset.from_list(rows),
            eval_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            compute_metrics=compute_metrics,
        )
        for i, parameter in enumerate(trainer.model.parameters()):  # away from DPO's reference
            parameter.data.add_((0.02 if i % 2 else -0.02) * parameter.data.abs())
        return trainer

    return make


def test_measures_are_those_of_the_scores(make_trainer):
    trainer = make_trainer()
    scores = [trainer.score([row["prompt"]] * len(row["ranks"]), row["completions"]) for row in ROWS]
    lengths = [[len(ids) for ids in row["completion_ids"]] for row in trainer.eval_dataset]
    expected = flatten(
        ranking_metrics(
            scores,
            [row["ranks"] for row in ROWS],
            lengths=lengths,
            labelers=[row["labeler"] for row in ROWS],
        ),
        prefix="eval_",
    )
    found = trainer.evaluate()
    assert {"eval_accuracy_labeler_ann", "eval_accuracy_gap_2", "eval_accuracy_longer_wins"} < set(expected)
    assert {"eval_accuracy_ci_low", "eval_kendall_tau", "eval_nll", "eval_ece", "eval_top1"} < set(expected)
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_measures_do_not_depend_on_the_batches(batch_size, make_trainer):
    trainer = make_trainer(batch_size=batch_size)
    found = trainer.evaluate()
    trainer.args.per_device_eval_batch_size = 2
    other = trainer.evaluate()
    unlike = {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}
    # TRL averages the lowest and the highest score of each batch.
    unlike |= {"eval_min_reward", "eval_max_reward"}
    assert {name: value for name, value in found.items() if name not in unlike} == pytest.approx(
        {name: value for name, value in other.items() if name not in unlike}, abs=1e-5
    )


def test_own_compute_metrics_takes_their_place(make_trainer):
    trainer = make_trainer(compute_metrics=lambda p: {"prompts": len(p.label_ids)})
    found = trainer.evaluate()
    assert found["eval_prompts"] == len(ROWS)
    assert "eval_top1" not in found


def test_each_set_is_measured_on_its_own_rows(make_trainer):
    trainer = make_trainer()
    trainer.eval_dataset = {"all": trainer.eval_dataset, "bob": trainer.eval_dataset.select([1])}
    found = trainer.evaluate()
    assert found["eval_bob_accuracy"] == found["eval_all_accuracy_labeler_bob"]
    assert "eval_bob_accuracy_labeler_ann" not in found


def test_grouping_by_length_is_refused(make_trainer):
    with pytest.raises(ValueError, match="max_tokens_per_forward"):
        make_trainer(train_sampling_strategy="group_by_length")
