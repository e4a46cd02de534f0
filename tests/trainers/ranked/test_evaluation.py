"""What `evaluate()` of the ranked trainers returns: measures on rankings, whatever the batches."""

import numpy as np
import pytest
from datasets import Dataset
from transformers import TrainerCallback

from prefopt import RankedDPOConfig, RankedDPOTrainer, RankedRewardConfig, RankedRewardTrainer
from prefopt.statistics.rankings import flatten, ranking_metrics

pytestmark = pytest.mark.slow

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

    def make(rows=ROWS, batch_size=2, compute_metrics=None, callbacks=None, **overrides):
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
            callbacks=callbacks,
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


TIMES = ("_runtime", "_per_second", "_time")


def without_times(metrics):
    return {name: value for name, value in metrics.items() if not name.endswith(TIMES)}


@pytest.mark.parametrize("make_trainer", ["reward"], indirect=True)  # TRL's DPO logs no extremes
def test_the_extremes_are_those_of_the_evaluation(make_trainer):
    trainer = make_trainer(batch_size=1)
    scores = [trainer.score([row["prompt"]] * len(row["ranks"]), row["completions"]) for row in ROWS]
    trainer.eval_dataset = {"all": trainer.eval_dataset, "bob": trainer.eval_dataset.select([1])}
    found = trainer.evaluate()
    for name, rows in (("all", scores), ("bob", scores[1:2])):
        assert found[f"eval_{name}_min_reward"] == pytest.approx(min(map(min, rows)), abs=1e-6)
        assert found[f"eval_{name}_max_reward"] == pytest.approx(max(map(max, rows)), abs=1e-6)


def test_predicting_leaves_the_next_evaluation_alone(make_trainer):
    trainer = make_trainer()
    expected = without_times(trainer.evaluate())
    trainer.predict(trainer.eval_dataset.select([0]))
    assert not trainer._sums["eval"]
    assert not trainer._metrics["eval"]
    assert without_times(trainer.evaluate()) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("make_trainer", "precompute"),
    [("reward", False), ("dpo", False), ("dpo", True)],
    indirect=["make_trainer"],
)
def test_predict_takes_the_rows_that_evaluate_takes(precompute, make_trainer):
    trainer = make_trainer()
    expected = trainer.predict(trainer.eval_dataset)
    if precompute:
        trainer = make_trainer(precompute_ref_log_probs=True)
        reference = trainer.predict(Dataset.from_list(ROWS))
        trainer.state.global_step = 1  # the model is no longer its reference
        with pytest.raises(ValueError, match="no reference of a full model is kept"):
            trainer.predict(Dataset.from_list(ROWS))
        assert reference.predictions.shape == expected.predictions.shape
        return
    raw = trainer.predict(Dataset.from_list(ROWS))
    np.testing.assert_allclose(raw.predictions, expected.predictions, atol=1e-6)
    assert without_times(raw.metrics) == pytest.approx(without_times(expected.metrics), abs=1e-6)


def test_predict_asks_for_the_ratings_of_margins(make_trainer):
    rated = [{**row, "ratings": [10 - rank for rank in row["ranks"]]} for row in ROWS]
    trainer = make_trainer(rows=rated, margin_coef=0.5)
    with pytest.raises(ValueError, match="test: field 'ratings': expected ratings to make margins of"):
        trainer.predict(Dataset.from_list(ROWS))


def test_no_row_is_left_out_of_an_evaluation(make_trainer):
    trainer = make_trainer(batch_size=3, dataloader_drop_last=True)
    found = trainer.evaluate()
    assert trainer.args.dataloader_drop_last
    assert len(trainer.predict(trainer.eval_dataset).predictions) == len(ROWS)
    trainer.args.dataloader_drop_last = False
    assert without_times(found) == pytest.approx(without_times(trainer.evaluate()), abs=1e-5)


def test_the_loss_weighs_prompts_and_not_batches(make_trainer):
    """Rows with nothing to compare, which a dataset tokenized elsewhere may have, count nowhere."""
    trainer = make_trainer(batch_size=1)
    alone = [trainer.evaluate(trainer.eval_dataset.select([i]))["eval_loss"] for i in range(len(ROWS))]
    trainer.args.per_device_eval_batch_size = 3
    assert trainer.evaluate()["eval_loss"] == pytest.approx(sum(alone) / len(ROWS), abs=1e-6)


@pytest.mark.parametrize(
    "options", [{"batch_eval_metrics": True}, {"eval_do_concat_batches": False}], ids=lambda x: next(iter(x))
)
def test_predictions_in_parts_need_measures_of_ones_own(options, make_trainer):
    with pytest.raises(ValueError, match=f"{next(iter(options))}=.*needs? .*own"):
        make_trainer(**options)
    found = make_trainer(compute_metrics=lambda p, compute_result=True: {"own": 3.0}, **options).evaluate()
    assert found["eval_own"] == 3.0


def test_a_metric_called_loss_names_nothing_else(make_trainer):
    found = make_trainer(compute_metrics=lambda p: {"eval_hinge_loss": 1.0}).evaluate()
    assert found["eval_hinge_loss"] == 1.0
    assert {"eval_loss", "eval_num_tokens"} < set(found)
    assert not any(name.startswith("eval_hinge_") for name in set(found) - {"eval_hinge_loss"})


class Predicts(TrainerCallback):
    trainer = None

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.predict(self.trainer.eval_dataset)


def test_predicting_in_a_step_leaves_its_metrics_to_training(make_trainer):
    logs = []
    for callback in (TrainerCallback(), Predicts()):
        options = {"max_steps": 2, "logging_steps": 1, "save_strategy": "no", "bf16": False}
        trainer = make_trainer(callbacks=[callback], **options)
        callback.trainer = trainer
        trainer.train()
        logs.append([set(log) for log in trainer.state.log_history])
        names = ("mean_reward", "min_reward") if isinstance(trainer, RankedRewardTrainer) else ("kendall_tau",)
        assert set(names) <= set(trainer.state.log_history[0])
    assert logs[0] == logs[1]
