"""The recipes on tiny models: what one step writes, the next one reads, full models and LoRA adapters alike."""

import json
import logging
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForCausalLM

from prefopt.errors import UserError
from prefopt.inference.jsonl import read_jsonl, write_jsonl
from prefopt.models.checkpoints import load_reward_model
from prefopt.models.reward import sequence_scores
from prefopt.recipes import dpo, ppo_ptx, reward, sample, sft
from tests.conftest import tiny_config

pytestmark = pytest.mark.slow

SHORT = [
    "--max_steps",
    "2",
    "--per_device_train_batch_size",
    "4",
    "--bf16",
    "false",
    "--report_to",
    "none",
    "--save_strategy",
    "no",
]
LORA = ["--use_peft", "--lora_r", "4", "--lora_target_modules", "q_proj", "v_proj", "--learning_rate", "0.05"]
PROMPTS = ["the cat", "a dog", "the red house", "what is this?"]


@pytest.fixture
def files(tmp_path, causal_lm, tokenizer):
    causal_lm.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": p, "id": i} for i, p in enumerate(PROMPTS)])
    write_jsonl(tmp_path / "demos.jsonl", [{"prompt": p, "completion": " sat on the mat"} for p in PROMPTS])
    write_jsonl(tmp_path / "text.jsonl", [{"text": "the cat sat on the mat and the dog ran"}] * 8)
    ranked = {"completions": [" sat", " ran to the house", " mat"], "ranks": [1, 2, 2]}
    write_jsonl(tmp_path / "rankings.jsonl", [{"prompt": p, **ranked} for p in PROMPTS])
    return tmp_path


def run(recipe, folder, model, rows, output, *extra):
    common = ["--model_name_or_path", str(folder / model), "--dataset_name", str(folder / rows)]
    recipe.main([*common, "--output_dir", str(folder / output), *SHORT, *map(str, extra)])


@pytest.fixture
def warned():
    """What transformers and TRL log."""
    records = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: records.append(record.getMessage())
    loggers = [logging.getLogger(name) for name in ("transformers", "trl")]
    for logger in loggers:
        logger.addHandler(handler)
    yield records
    for logger in loggers:
        logger.removeHandler(handler)


def test_the_steps_chain_with_lora_adapters(files, warned):
    run(sft, files, "base", "demos.jsonl", "sft", *LORA)
    run(reward, files, "sft", "rankings.jsonl", "rm", "--center_on", files / "demos.jsonl")
    text = ["--pretrain_dataset_name", files / "text.jsonl", "--ptx_batch_ratio", "1", "--ptx_max_length", "8"]
    ppo = ["--generation_batch_size", "4", "--max_completion_length", "4"]
    run(ppo_ptx, files, "sft", "prompts.jsonl", "ppo", *ppo, "--reward_model_name_or_path", files / "rm", *text)
    run(dpo, files, "sft", "rankings.jsonl", "dpo", "--ptx_coef", "0.5", *text)
    assert "| pretraining text | text.jsonl, sequences of 8 tokens |" in (files / "dpo" / "README.md").read_text()
    run(reward, files, "rm", "rankings.jsonl", "rm-again")
    load_reward_model(files / "rm")
    # Nothing was missing, and nobody has set this.
    assert not [text for text in warned if "LOAD REPORT" in text or "model_init_kwargs" in text]
    # What they say of a model that lacks something is heard.
    AutoModelForSequenceClassification.from_pretrained(files / "base", num_labels=1)
    assert [text for text in warned if "LOAD REPORT" in text and "score.weight" in text]
    for name in ("sft", "rm", "ppo", "dpo"):
        assert (files / name / "adapter_model.safetensors").is_file()
    assert (files / "ppo" / "value_function.safetensors").is_file()
    ids = torch.tensor([[5, 6, 7]])
    policies = {n: AutoModelForCausalLM.from_pretrained(files / n)(ids).logits for n in ("base", "sft", "ppo", "dpo")}
    for name in ("base", "ppo", "dpo"):
        assert not torch.allclose(policies["sft"], policies[name], atol=1e-6)


def test_dpo_says_what_its_pretraining_term_needs(files):
    for more in (["--ptx_coef", "0.5"], ["--pretrain_dataset_name", files / "text.jsonl"]):
        with pytest.raises(UserError, match=r"ptx_coef > 0 needs pretrain_dataset_name, and .* 0 .* takes none"):
            run(dpo, files, "base", "rankings.jsonl", "dpo", *more)
    text = ["--pretrain_dataset_name", files / "text.jsonl", "--ptx_max_length", "1000000"]
    with pytest.raises(UserError, match="ptx_max_length"):
        run(dpo, files, "base", "rankings.jsonl", "dpo", "--ptx_coef", "0.5", *text)


def test_dpo_against_another_reference(files, tokenizer):
    torch.manual_seed(5)
    LlamaForCausalLM(tiny_config()).save_pretrained(files / "other")
    tokenizer.save_pretrained(files / "other")
    how = ["--logging_steps", "1", "--beta", "0.3"]
    run(dpo, files, "base", "rankings.jsonl", "dpo", *how)
    for reference in ("base", "other"):
        more = ["--ref_model_name_or_path", files / reference]
        run(dpo, files, "base", "rankings.jsonl", f"against-{reference}", *how, *more)
    weights = [(files / name / "model.safetensors").read_bytes() for name in ("dpo", "against-base", "against-other")]
    assert weights[0] == weights[1] != weights[2]

    def logps(name, prompt, completion):
        x, y = (tokenizer(text)["input_ids"] for text in (prompt, completion))
        ids = [*x, *y, tokenizer.eos_token_id]
        of = (
            AutoModelForCausalLM.from_pretrained(files / name)(torch.tensor([ids]))
            .logits[0]
            .detach()
            .double()
            .log_softmax(-1)
        )
        return sum(float(of[t - 1, ids[t]]) for t in range(len(x), len(ids)))

    ratios = [
        [0.3 * (logps("base", p, y) - logps("other", p, y)) for y in (" sat", " ran to the house", " mat")]
        for p in PROMPTS
    ]
    slow = [sum(math.log1p(math.exp(worse - best)) for worse in others) / 2 for best, *others in ratios]
    log = json.loads((files / "against-other" / "trainer_state.json").read_text())["log_history"]
    assert log[0]["loss"] == pytest.approx(sum(slow) / 4, abs=1e-5)


def test_the_reference_may_be_an_adapter_and_has_the_policy_s_tokens(files, chat_tokenizer):
    run(sft, files, "base", "demos.jsonl", "sft", *LORA)
    run(dpo, files, "sft", "rankings.jsonl", "dpo")
    run(dpo, files, "sft", "rankings.jsonl", "same", "--ref_model_name_or_path", files / "sft")
    ids = torch.tensor([[5, 6, 7]])
    dpo_logits, same = (AutoModelForCausalLM.from_pretrained(files / n)(ids).logits for n in ("dpo", "same"))
    assert torch.allclose(dpo_logits, same, atol=1e-5)
    with pytest.raises(UserError, match="ref_model_name_or_path: "):
        run(dpo, files, "base", "rankings.jsonl", "new", "--ref_model_name_or_path", files / "nowhere")
    LlamaForCausalLM(tiny_config(vocab_size=330)).save_pretrained(files / "other")
    chat_tokenizer.add_tokens(["<new>"])
    chat_tokenizer.save_pretrained(files / "other")
    with pytest.raises(UserError, match=r"ref_model_name_or_path: .*other has other tokens than .*base"):
        run(dpo, files, "base", "rankings.jsonl", "new", "--ref_model_name_or_path", files / "other")


def test_a_reward_model_starts_from_the_sft_adapter(files, tokenizer, capsys, caplog):
    run(sft, files, "base", "demos.jsonl", "sft", *LORA)
    run(sft, files, "sft", "demos.jsonl", "sft-again")
    run(reward, files, "sft", "rankings.jsonl", "rm", "--learning_rate", 0)
    assert f"saved: {files / 'rm'}" in capsys.readouterr().out
    assert "model_init_kwargs" not in caplog.text  # which nobody has set
    hidden = AutoModelForCausalLM.from_pretrained(files / "sft")(
        torch.tensor([[5, 6, 7]]), output_hidden_states=True
    ).hidden_states[-1][0, -1]
    model = load_reward_model(files / "rm")
    head = model.get_base_model().score.modules_to_save["default"].weight[0]
    score = sequence_scores(model, torch.tensor([[5, 6, 7]]), torch.ones(1, 3, dtype=torch.long))
    torch.testing.assert_close(score[0], hidden @ head, atol=1e-5, rtol=0)


def test_centered_demonstrations_score_zero_after_reloading(files, tokenizer):
    run(reward, files, "base", "rankings.jsonl", "rm", "--center_on", files / "demos.jsonl")
    model = load_reward_model(files / "rm")
    scores = []
    for row in read_jsonl(files / "demos.jsonl"):
        ids = torch.tensor([tokenizer(row["prompt"] + row["completion"])["input_ids"] + [tokenizer.eos_token_id]])
        scores.append(sequence_scores(model, ids, torch.ones_like(ids)).item())
    assert sum(scores) / len(scores) == pytest.approx(0, abs=1e-6)
    assert max(map(abs, scores)) > 1e-4


def test_samples_keep_the_prompt_and_forget_other_completions(files):
    rows = [{**row, "id": i, "labeler": "ann"} for i, row in enumerate(read_jsonl(files / "rankings.jsonl"))]
    write_jsonl(files / "labeled.jsonl", rows)
    argv = ["--model_name_or_path", str(files / "base"), "--dataset_name", str(files / "labeled.jsonl")]
    argv += ["--output", str(files / "out.jsonl"), "--max_new_tokens", "4", "--k_min", "2", "--k_max", "3"]
    sample.main(argv)
    drawn = read_jsonl(files / "out.jsonl")
    assert [row["prompt"] for row in drawn] == PROMPTS
    assert all(set(row) == {"prompt", "id", "completions", "truncated"} for row in drawn)
    assert all(2 <= len(row["completions"]) == len(row["truncated"]) <= 3 for row in drawn)
    first = (files / "out.jsonl").read_text()
    sample.main(argv)
    assert (files / "out.jsonl").read_text() == first


def test_a_truncated_completion_gets_no_eos_whichever_row_says_so(files):
    rows = read_jsonl(files / "rankings.jsonl")
    rows[1]["truncated"] = [True, True, True]
    write_jsonl(files / "cut.jsonl", rows)
    from transformers import AutoTokenizer

    from prefopt.rankings.checks import validate_comparisons
    from prefopt.rankings.dataset import prepare_comparisons, tokenize_comparisons
    from prefopt.recipes.common.rows import load_rows

    tokenizer = AutoTokenizer.from_pretrained(files / "base")
    loaded = load_rows(str(files / "cut.jsonl"), check=validate_comparisons, key="dataset_name")
    ids = tokenize_comparisons(prepare_comparisons(loaded), tokenizer)["completion_ids"]
    eos = tokenizer.eos_token_id
    assert [all(completion[-1] == eos for completion in row) for row in ids] == [True, False, True, True]


@pytest.mark.parametrize("recipe", [sample, dpo, ppo_ptx])
def test_a_reward_model_is_no_policy(files, tokenizer, recipe):
    reward_model = AutoModelForSequenceClassification.from_pretrained(files / "base", num_labels=1)
    reward_model.save_pretrained(files / "rm")
    tokenizer.save_pretrained(files / "rm")
    rows = "rankings.jsonl" if recipe is dpo else "prompts.jsonl"
    argv = ["--model_name_or_path", str(files / "rm"), "--dataset_name", str(files / rows)]
    if recipe is sample:
        argv += ["--output", str(files / "out.jsonl"), "--max_new_tokens", "4"]
    else:
        argv += ["--output_dir", str(files / "out"), *SHORT]
    if recipe is ppo_ptx:
        argv += [
            "--reward_model_name_or_path",
            str(files / "rm"),
            "--ptx_coef",
            "0",
            "--max_completion_length",
            "4",
        ]
    with pytest.raises(UserError, match="is a reward model; expected a language model"):
        recipe.main(argv)


def test_a_language_model_is_no_reward_model(files):
    with pytest.raises(UserError, match=r"reward_model_name_or_path: .* has no trained head"):
        run(ppo_ptx, files, "base", "prompts.jsonl", "ppo", "--ptx_coef", 0,
            "--reward_model_name_or_path", files / "base")  # fmt: skip


def test_chat_rows_without_a_template_stop_before_training(files):
    chat = [
        {
            "prompt": [{"role": "user", "content": "hi"}],
            "completion": [{"role": "assistant", "content": "yes"}],
        }
    ]
    write_jsonl(files / "chat.jsonl", chat)
    with pytest.raises(UserError, match="no chat template"):
        run(reward, files, "base", "rankings.jsonl", "rm", "--center_on", files / "chat.jsonl")
    with pytest.raises(UserError, match="no chat template"):
        run(sft, files, "base", "chat.jsonl", "sft")
    assert not (files / "rm").exists()


def test_pretraining_text_is_a_tenth_of_the_mix(files, tokenizer):
    demos = [{"prompt": "the cat", "completion": f" ran {i}"} for i in range(18)]
    write_jsonl(files / "many.jsonl", demos)
    run(sft, files, "base", "many.jsonl", "mixed", "--pretrain_dataset_name", files / "text.jsonl",
        "--pretrain_mix", 0.1, "--max_length", 16, "--num_train_epochs", 1, "--max_steps", -1)  # fmt: skip
    state = json.loads((files / "mixed" / "trainer_state.json").read_text())
    assert state["max_steps"] == 5  # 18 demonstrations + 2 blocks, 4 a step
