"""What a model card says, that its metadata is valid, and that a card somebody has edited is kept."""

import json
import logging
import math
from pathlib import Path

import pytest
from datasets import Dataset
from huggingface_hub import EvalResult, ModelCard
from transformers import AutoModelForCausalLM

from prefopt.hub.cards import FACTS, README, build_card, is_handwritten, read_facts, write_card
from prefopt.hub.push import push_folder
from prefopt.inference.jsonl import write_jsonl
from prefopt.recipes import sft
from tests.hub.models import ROWS, chat, dpo_trainer, ppo_trainer, reward_trainer, run_card

pytestmark = [pytest.mark.allow_hosts(["127.0.0.1"]), pytest.mark.slow]


@pytest.fixture
def trained(base, tokenizer, tmp_path):
    rows = [*ROWS, {"prompt": "a", "completions": [" dog", " cat"], "ranks": [1, 1]}]
    rows += [{"prompt": "a", "completions": [" dog", " cat", " mat", " house"], "ranks": [1, 2, 2, 3]}]
    trainer = reward_trainer(
        base,
        tokenizer,
        tmp_path / "rm",
        rows=rows,
        four_bit=True,
        eval_strategy="steps",
        eval_steps=1,
        seed=3,
    )
    trainer.train()
    trainer.save_model()
    return trainer


@pytest.fixture
def saved(base, tokenizer, tmp_path):
    """A LoRA reward model that was not trained: enough for what becomes of its card."""
    trainer = reward_trainer(base, tokenizer, tmp_path / "rm")
    trainer.save_model()
    return trainer


def facts_table(text):
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| ")]
    return {cells[0].strip().strip("`"): cells[1].strip() for cells in lines}


def test_a_card_says_how_the_reward_model_came_about(trained, tmp_path):
    trained.eval_split = "validation"
    trained.create_model_card(dataset_name="me/rankings")
    card = ModelCard.load(tmp_path / "rm" / README)
    table = facts_table(card.text)
    assert "started from" not in table
    assert table["prompts"] == "5"  # of the six one ties altogether and is dropped
    assert table["completions per prompt (K)"] == "3: 4 prompts, 4: 1 prompts"
    assert table["comparisons (pairs of unequal rank)"] == str(4 * 3 + 5)
    assert table["optimizer steps"] == "2"
    assert table["learning_rate"] == "0.05"
    assert table["seed"] == "3"
    assert table["ties"] == "drop"
    assert table["base in training"] == "4-bit nf4"
    assert table["adapter"] == "LoRA on q_proj v_proj, rank 4, alpha 8"
    for bookkeeping in ("output_dir", "report_to", "use_cpu", "logging_steps", "eval_strategy"):
        assert bookkeeping not in table
    assert "https://huggingface.co/papers/2203.02155" in card.text
    assert "ouyang2022training" in card.text
    assert "bnb_4bit_use_double_quant=True" in card.text
    data = card.data
    assert data.base_model == "me/base"
    assert data["base_model_relation"] == "adapter"
    assert data.datasets == ["me/rankings"]
    assert data["library_name"] == "peft"
    assert data.pipeline_tag == "text-classification"
    assert {"trl", "prefopt", "ranked-reward", "lora"} <= set(data.tags)

    # The last evaluation is the model-index.
    logged = [entry for entry in trained.state.log_history if "eval_accuracy" in entry][-1]
    found = {result.metric_type: result for result in data.eval_results}
    assert set(found) == {"accuracy", "top1", "kendall_tau"}
    accuracy = found["accuracy"]
    assert isinstance(accuracy, EvalResult)
    assert accuracy.metric_value == logged["eval_accuracy"]
    low, high = logged["eval_accuracy_ci_low"], logged["eval_accuracy_ci_high"]
    assert accuracy.metric_name == f"pairwise accuracy (n = 2, 95 % interval {low:.4g} to {high:.4g})"
    assert (accuracy.dataset_type, accuracy.dataset_split) == ("me/rankings", "validation")


def test_a_card_names_the_rows_that_were_measured_and_no_hidden_token(trained, tmp_path):
    trained.eval_dataset_name = str(tmp_path / "heldout.jsonl")
    trained.create_model_card(dataset_name="me/rankings")
    card = ModelCard.load(tmp_path / "rm" / README)
    # A file has no split.
    assert {(found.dataset_type, found.dataset_name, found.dataset_split) for found in card.data.eval_results} == {
        ("local", "heldout.jsonl", None)
    }
    assert "| heldout.jsonl, step 2 |" in card.text
    assert "\n\nn: how many rows, prompts, samples or documents were measured; " in card.text
    assert card.data.datasets == ["me/rankings"]
    assert str(tmp_path) not in card.text.replace(json.dumps(str(tmp_path / "rm")), "")
    assert not {name for name in facts_table(card.text) if name.endswith("_token")}


def test_ppo_ptx_reports_its_kl_and_score(base, tokenizer, tmp_path):
    sft = dpo_trainer(base, tokenizer, tmp_path / "sft")
    sft.save_model()

    def length(completion_ids, **kwargs):
        return [float(len(ids)) for ids in completion_ids]

    trainer = ppo_trainer(str(tmp_path / "sft"), tokenizer, tmp_path / "ppo", length, kl_coef=0.07)
    trainer.train()
    trainer.save_model()
    trainer.other_datasets = {"pretraining text": str(tmp_path / "text.jsonl")}
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / "ppo" / README)
    first, second = (entry for entry in trainer.state.log_history if "objective/kl" in entry)
    # Not measures of the model, which was another from step to step.
    assert card.data.eval_results is None
    table = facts_table(card.text)
    for key, title in (("objective/kl", "KL to the SFT model per episode in training (nats)"),
                       ("objective/scores", "score of an episode in training, before the KL penalty"),
                       ("loss/ptx", "loss on pretraining text in training (nats per token)")):  # fmt: skip
        said = f"{first[key]:.4g} in the first half of the steps, {second[key]:.4g} in the second half"
        assert table[title] == said
    assert table["pretraining text"] == "text.jsonl, sequences of 8 tokens"
    assert table["episodes per optimizer step"] == "4"
    # TRL's, which PPO has no use for, and the weight of the only reward.
    assert not {"beta", "loss_type", "scale_rewards", "top_p", "reward_weights"} & set(table)
    assert table["value_learning_rate"] == "9e-06"
    assert (table["kl_coef"], table["ptx_coef"], table["reward"]) == ("0.07", "27.8", "length")
    assert card.data.pipeline_tag == "text-generation"
    assert "ppo-ptx" in card.data.tags
    assert "https://huggingface.co/papers/2203.02155" in card.text
    assert "https://huggingface.co/papers/1707.06347" in card.text


def test_the_code_runs_from_a_local_folder(saved, tmp_path):
    saved.create_model_card()
    text = (tmp_path / "rm" / README).read_text()
    assert json.dumps(str(tmp_path / "rm")) in text
    expected = saved.score(["What is 2 + 2?"], [" 4"])[0]
    assert run_card(text)["score"] == pytest.approx(expected, abs=1e-5)


def test_a_chain_of_steps_names_the_model_it_began_with(base, causal_lm, tokenizer, tmp_path):
    causal_lm.save_pretrained(tmp_path / "sft")
    tokenizer.save_pretrained(tmp_path / "sft")
    write_card(tmp_path / "sft", {"base_model": "me/base"})
    trainer = reward_trainer(str(tmp_path / "sft"), tokenizer, tmp_path / "rm", lora=False)
    trainer.save_model()
    trainer.create_model_card()
    assert ModelCard.load(tmp_path / "rm" / README).data.base_model == "me/base"
    elsewhere = dpo_trainer(str(tmp_path / "base"), tokenizer, tmp_path / "dpo")
    elsewhere.save_model()
    elsewhere.create_model_card()
    # A path of this machine is no base model on the Hub, which would refuse the card.
    assert ModelCard.load(tmp_path / "dpo" / README).data.base_model is None


@pytest.mark.parametrize(
    ("start", "said"),
    [("me/base", None), ("me/sft", "me/sft"), ("old/runs/sft", "sft"), (None, None)],
)
def test_a_card_names_the_step_before_where_that_is_not_the_base(start, said, saved, tmp_path):
    saved.started_from = start
    saved.create_model_card()
    table = facts_table((tmp_path / "rm" / README).read_text())
    assert table.get("started from") == said


def test_without_pretraining_text_it_is_ppo(base, tokenizer, tmp_path):
    def length(completion_ids, **kwargs):
        return [float(len(ids)) for ids in completion_ids]

    dpo_trainer(base, tokenizer, tmp_path / "sft").save_model()
    trainer = ppo_trainer(str(tmp_path / "sft"), tokenizer, tmp_path / "ppo", length, ptx_coef=0.0)
    trainer.save_model()
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / "ppo" / README)
    table = facts_table(card.text)
    assert "Trained with PPO (" in card.text
    assert "pretraining" not in card.text.replace(str(tmp_path), "")
    assert table["ptx_coef"] == "0.0"
    assert not [name for name in table if name.startswith("ptx_") and name != "ptx_coef"]
    assert "ppo" in card.data.tags
    assert "ppo-ptx" not in card.data.tags


def test_what_was_measured_in_training_is_told_by_halves_of_the_steps(saved, tmp_path):
    """Of 7 steps 1-3 are logged together, 4 alone, 5-6 together; step 7 has no number. Half of 7 is after step 3."""
    saved.state.log_history = [
        {"step": 3, "accuracy": 0.5},
        {"step": 3, "grad_norm": 1.0},
        {"step": 4, "accuracy": 1.0},
        {"step": 6, "accuracy": 0.75},
        {"step": 7, "accuracy": math.nan},
    ]
    saved.create_model_card()
    card = ModelCard.load(tmp_path / "rm" / README)
    assert card.data.eval_results is None
    second = (1.0 + 2 * 0.75) / 3
    said = f"0.5 in the first half of the steps, {second:.4g} in the second half"
    assert facts_table(card.text)["pairwise accuracy in training"] == said


def test_each_of_several_evaluation_sets_is_named_with_its_rows(saved, tmp_path):
    rows = Dataset.from_list(ROWS)
    saved.eval_dataset = {"ann": rows, "bob": rows.select(range(3))}
    saved.state.log_history = [
        {"step": 1, "eval_ann_accuracy": 0.1, "eval_bob_accuracy": 0.2},
        {"step": 2, "eval_ann_accuracy": 0.6, "eval_ann_accuracy_ci_low": 0.5, "eval_ann_accuracy_ci_high": 0.7},
        {"step": 2, "eval_bob_accuracy": 0.8},
    ]
    saved.eval_split = "test"
    saved.create_model_card(dataset_name="me/rankings")
    text = (tmp_path / "rm" / README).read_text()
    assert "| pairwise accuracy | 0.6 | 0.5 to 0.7 | 4 | rankings ann, test, step 2 |" in text
    assert "| pairwise accuracy | 0.8 |  | 3 | rankings bob, test, step 2 |" in text


@pytest.mark.parametrize("is_known", [True, False])
def test_a_local_base_is_no_hub_id_wherever_the_card_is_written(is_known, causal_lm, tokenizer, tmp_path, monkeypatch):
    """`runs/base` has the form of a Hub id, and is a folder where training was started."""
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    elsewhere.mkdir()
    causal_lm.save_pretrained(project / "runs" / "base")
    monkeypatch.chdir(project)
    trainer = reward_trainer("runs/base", tokenizer, Path("rm"))
    trainer.save_model()
    trainer.create_model_card()
    monkeypatch.chdir(elsewhere)
    facts = read_facts(project / "rm") if is_known else {}
    card = build_card(project / "rm", facts, "me/rm")
    assert (card.data.base_model, card.data.get("base_model_relation")) == (None, None)
    assert "huggingface.co/runs" not in card.text
    assert "A LoRA adapter on base." in card.text


def test_a_public_base_stays_public_where_a_folder_has_its_name(saved, tmp_path, monkeypatch):
    saved.create_model_card()
    (tmp_path / "me" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert build_card(tmp_path / "rm", read_facts(tmp_path / "rm")).data.base_model == "me/base"


@pytest.mark.parametrize("kind", ["prompt", "messages", "chat", "text"])
def test_the_code_uses_an_sft_model_as_it_was_trained(kind, base, chat_tokenizer, tmp_path):
    """Whether or not the tokenizer has a chat template."""
    user, answer = {"role": "user", "content": "the"}, {"role": "assistant", "content": " cat"}
    row = {
        "prompt": {"prompt": "the", "completion": " cat"},
        "messages": {"messages": [user, answer]},
        "chat": {"prompt": [user], "completion": [answer]},
        "text": {"text": "the cat"},
    }[kind]
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(tmp_path / "start")
    chat_tokenizer.save_pretrained(tmp_path / "start")
    write_jsonl(tmp_path / "rows.jsonl", [row] * 4)
    argv = ["--model_name_or_path", str(tmp_path / "start"), "--dataset_name", str(tmp_path / "rows.jsonl")]
    argv += ["--output_dir", str(tmp_path / "sft"), "--max_steps", "1", "--report_to", "none", "--use_cpu", "true"]
    sft.main([*argv, "--disable_tqdm", "true", "--max_length", "64"])
    text = (tmp_path / "sft" / README).read_text()
    assert ("apply_chat_template" in text) == (kind in ("messages", "chat"))
    # A text is gone on with; many a model ends it at once after a question mark.
    assert ('tokenizer("The capital of France is"' in text) == (kind not in ("messages", "chat"))
    assert "on rows.jsonl" in text
    assert "Supervised fine-tuning" in text
    run_card(text)


@pytest.mark.parametrize("is_chat", [True, False])
def test_the_code_uses_a_model_of_a_stream_as_it_was_trained(is_chat, base, chat_tokenizer, tmp_path):
    rows = [chat(row) if is_chat else row for row in ROWS]
    trainer = reward_trainer(base, chat_tokenizer, tmp_path / "rm", rows=rows, stream=True)
    trainer.save_model()
    trainer.create_model_card()
    assert ("apply_chat_template" in (tmp_path / "rm" / README).read_text()) == is_chat


# ---- cards that somebody has edited ----


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_an_edited_text_is_kept_and_said_so(saved, tmp_path, caplog):
    saved.create_model_card()
    assert not is_handwritten(tmp_path / "rm")
    edit(tmp_path / "rm" / README, "## How to use it", "## Why we made it\n\nFor fun.\n\n## How to use it")
    saved.save_model()  # PEFT writes into the card at every save
    before = (tmp_path / "rm" / README).read_text()
    with caplog.at_level(logging.WARNING):
        saved.create_model_card(dataset_name="me/rankings")
    assert "was edited by hand and is kept; delete it to have it written again" in caplog.text
    assert (tmp_path / "rm" / README).read_text() == before
    assert read_facts(tmp_path / "rm")["datasets"] == ["me/rankings"]
    saved.create_model_card(dataset_name="/home/me/secret/rows.jsonl")
    assert read_facts(tmp_path / "rm")["datasets"] == ["rows.jsonl"]
    (tmp_path / "rm" / README).unlink()
    saved.create_model_card()
    assert "For fun." not in (tmp_path / "rm" / README).read_text()


def test_added_metadata_stay_in_a_card_that_is_written_anew(saved, tmp_path):
    saved.create_model_card()
    edit(tmp_path / "rm" / README, "---\n", "---\nlicense: mit\nlanguage: [en, de]\n")
    saved.save_model()
    saved.create_model_card(dataset_name="me/rankings")
    data = ModelCard.load(tmp_path / "rm" / README).data
    assert (data.license, data.language, data.datasets) == ("mit", ["en", "de"], ["me/rankings"])


def test_the_local_base_that_peft_writes_into_a_card_goes(saved, tmp_path, hub):
    (tmp_path / "rm" / README).write_text("---\nlicense: mit\nbase_model: /home/me/base\n---\n\nMy own words.\n")
    push_folder(tmp_path / "rm", "me/rm")  # the Hub refuses such metadata
    card = ModelCard(hub.files("me/rm")[README].decode())
    assert (card.data.license, card.data.base_model) == ("mit", None)
    assert card.text.strip() == "My own words."


def test_a_card_edited_on_the_hub_is_kept_there(saved, tmp_path, hub, caplog):
    saved.push_to_hub()
    ours = hub.files("me/rm")[README]
    saved.push_to_hub()
    assert "was edited there" not in caplog.text
    hub.files("me/rm")[README] = b"---\nlicense: mit\n---\nEdited on the site.\n"
    with caplog.at_level(logging.WARNING):
        saved.push_to_hub()
    assert "the model card of me/rm was edited there and is kept" in caplog.text
    assert hub.files("me/rm")[README] == b"---\nlicense: mit\n---\nEdited on the site.\n"
    del hub.files("me/rm")[README]
    saved.push_to_hub()
    assert hub.files("me/rm")[README] == ours
    (tmp_path / "rm" / README).write_text("---\nlicense: mit\n---\nEdited at home.\n")
    saved.push_to_hub()
    assert hub.files("me/rm")[README] == b"---\nlicense: mit\n---\nEdited at home.\n"


def test_a_folder_without_facts_gets_a_card_of_what_its_files_say(base, tokenizer, tmp_path):
    card = build_card(tmp_path / "base", {}, "me/base")
    assert card.data["library_name"] == "transformers"
    assert "Training" not in card.text
    assert "model" in run_card(card.text)
    assert not (tmp_path / "elsewhere" / FACTS).exists()
