"""The pretraining term of RankedDPOTrainer, `ptx_coef`: its gradient, its log, its place in the text after resuming."""

import copy

import pytest
import torch
from datasets import Dataset

from prefopt.trainers.dpo.trainer import RankedDPOTrainer
from tests.trainers.conftest import RAGGED, lora
from tests.trainers.dpo.conftest import config

pytestmark = pytest.mark.slow

TEXTS = ["the cat sat on the mat", "a red dog ran to the house and the cat", "is this a house?", "the dog sat"]


def trainer_on(model, tokenizer, folder, is_streamed=False, rows=RAGGED, **overrides):
    texts = Dataset.from_list([{"text": text} for text in TEXTS])
    options = {"ptx_coef": 0.7, "ptx_max_length": 6, "ptx_batch_ratio": 0.75, "ptx_per_device_batch_size": 2}
    options |= {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0, "lr_scheduler_type": "constant", **overrides}
    if not options["ptx_coef"]:
        texts = None
    return RankedDPOTrainer(
        model=copy.deepcopy(model),
        args=config(folder, **options),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        pretrain_dataset=texts.to_iterable_dataset() if is_streamed else texts,
    )


def change_of(trainer):
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    return {name: weight - before[name] for name, weight in trainer.model.state_dict().items()}


@pytest.mark.parametrize("is_adapted", [False, True])
@pytest.mark.parametrize("options", [{}, {"max_tokens_per_forward": 20}])
def test_a_step_has_both_gradients(options, is_adapted, causal_lm, tokenizer, tmp_path):
    """Weights move by -lr * (that of DPO + ptx_coef * that of the mean loss of a token of text, by a loop)."""
    if is_adapted:
        causal_lm = lora(causal_lm, "CAUSAL_LM")
    steps = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 1, **options}
    of_dpo = change_of(trainer_on(causal_lm, tokenizer, tmp_path / "dpo", ptx_coef=0.0, **steps))
    trainer = trainer_on(causal_lm, tokenizer, tmp_path / "both", **steps)
    blocks = copy.deepcopy(trainer.pretraining.text).take(3)  # 0.75 of 2 x 2 rows
    both = change_of(trainer)
    assert trainer.pretraining.position == 3
    model = copy.deepcopy(causal_lm).eval()
    total, count = 0.0, 0
    for block in blocks:
        log_probs = model(torch.tensor([block])).logits[0].log_softmax(-1)
        for place in range(len(block) - 1):
            total, count = total - log_probs[place, block[place + 1]], count + 1
    loss = total / count
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert max(gradient.abs().max() for gradient in gradients.values()) > 1e-2
    for name, gradient in gradients.items():
        torch.testing.assert_close(both[name] - of_dpo[name], -0.1 * 0.7 * gradient, rtol=1e-4, atol=1e-6, msg=name)
    log = trainer.state.log_history[0]
    norm = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
    assert log["loss/ptx"] == pytest.approx(loss.item(), rel=1e-5)
    assert log["grad_norm/ptx"] == pytest.approx(0.7 * norm.item(), rel=1e-4)
    moved = torch.cat([of_dpo[name].flatten() for name in gradients]).norm()
    assert log["grad_norm/dpo"] == pytest.approx(moved.item() / 0.1, rel=1e-3)


def test_the_logged_loss_is_the_sum(causal_lm, tokenizer, tmp_path):
    plain, both = (
        trainer_on(causal_lm, tokenizer, tmp_path / str(coef), ptx_coef=coef, max_steps=1) for coef in (0.0, 0.7)
    )
    for trainer in (plain, both):
        trainer.train()
    ours, alone = both.state.log_history[0], plain.state.log_history[0]
    assert ours["loss"] == pytest.approx(alone["loss"] + 0.7 * ours["loss/ptx"], rel=1e-5)
    assert "loss/ptx" not in alone


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_resumed_run_goes_on_in_the_text(is_streamed, causal_lm, tokenizer, tmp_path):
    options = {
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 3,
        "logging_steps": 2,
    }
    whole = trainer_on(causal_lm, tokenizer, tmp_path, is_streamed, **options)
    whole.train()
    resumed = trainer_on(causal_lm, tokenizer, tmp_path, is_streamed, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.pretraining.position == whole.pretraining.position
    for (name, a), (_, b) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    # logged after step 4, of steps 3 and 4
    last = [log for log in whole.state.log_history if "loss/ptx" in log][-1]
    assert [log for log in resumed.state.log_history if "loss/ptx" in log][-1]["loss/ptx"] == last["loss/ptx"]


def test_another_kind_of_text_is_no_text_to_go_on_in(causal_lm, tokenizer, tmp_path):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trainer_on(causal_lm, tokenizer, tmp_path, **options).train()
    with pytest.raises(ValueError, match="the pretraining text of the checkpoint was not a stream: give it"):
        trainer_on(causal_lm, tokenizer, tmp_path, True, **options).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-1")
        )


def test_a_run_without_text_is_not_gone_on_with(causal_lm, tokenizer, tmp_path):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trainer_on(causal_lm, tokenizer, tmp_path, ptx_coef=0.0, **options).train()
    with pytest.raises(ValueError, match="is of a run without ptx_coef"):
        trainer_on(causal_lm, tokenizer, tmp_path, **options).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-1")
        )


def test_text_and_coefficient_go_together(causal_lm, tokenizer, tmp_path):
    texts = Dataset.from_list([{"text": TEXTS[0]}])
    for coef, given in ((0.5, None), (0.0, texts)):
        with pytest.raises(ValueError, match=r"ptx_coef > 0 needs pretrain_dataset, and ptx_coef 0 takes none"):
            RankedDPOTrainer(
                model=causal_lm,
                args=config(tmp_path, ptx_coef=coef),
                train_dataset=Dataset.from_list(RAGGED),
                processing_class=tokenizer,
                pretrain_dataset=given,
            )
    with pytest.raises(ValueError, match=r"exceeds the model's .* positions"):
        trainer_on(causal_lm, tokenizer, tmp_path, ptx_max_length=10**6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ptx_coef": -1.0}, "ptx_coef"),
        ({"ptx_batch_ratio": 0.0}, "ptx_batch_ratio"),
        ({"ptx_max_length": 1}, "ptx_max_length"),
        ({"ptx_coef": 0.5, "fp16": True}, "fp16 loss scaling"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)
