"""Bad input stops a recipe with one line that names the place and the remedy, before any model is loaded."""

import json

import pytest
from trl import ModelConfig

from prefopt import cli
from prefopt.errors import UserError
from prefopt.recipes import dpo, evaluate, label, plan, ppo_ptx, reward, sample, sft
from prefopt.recipes.common.arguments import parse, read_config
from prefopt.recipes.common.rows import check_fields, load_rows

GOOD = {"prompt": "2 + 2 =", "completions": [" 4", " 5"], "ranks": [1, 2]}
NO_MODEL = "no-such/model"  # loading it would raise OSError, not the error a test expects


def write_rows(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def run_reward(tmp_path, rows, *extra):
    data = write_rows(tmp_path / "rows.jsonl", rows)
    arguments = [
        "--model_name_or_path",
        NO_MODEL,
        "--dataset_name",
        data,
        "--output_dir",
        str(tmp_path / "out"),
    ]
    with pytest.raises(UserError) as stop:
        reward.main([*arguments, *extra])
    return str(stop.value)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "p", "completions": ["a", "b"]}, ["row 1", "'ranks'"]),
        ({**GOOD, "completions": [" 4"], "ranks": [1]}, ["row 1", "'completions'", "at least 2"]),
        ({**GOOD, "ranks": [1, 2, 3]}, ["row 1", "'ranks'", "2 ranks"]),
        ({**GOOD, "ranks": [1, float("nan")]}, ["row 1", "'ranks'", "nan"]),
        ({**GOOD, "completions": [" 4", ""]}, ["row 1", "completions[1]", "non-empty"]),
        ({**GOOD, "ranks": ["1", "2"]}, ["row 1", "'ranks'", "integer"]),
    ],
    ids=["missing-field", "one-completion", "length", "nan", "empty", "strings"],
)
@pytest.mark.parametrize("recipe", [reward, dpo])
def test_bad_rows_name_row_field_and_expectation(tmp_path, row, said, recipe):
    data = write_rows(tmp_path / "rows.jsonl", [GOOD, row])
    with pytest.raises(UserError) as stop:
        recipe.main(["--model_name_or_path", NO_MODEL, "--dataset_name", data, "--output_dir", str(tmp_path / "out")])
    for words in ("rows.jsonl", *said):
        assert words in str(stop.value)


@pytest.mark.parametrize("recipe", [sft, reward, dpo, ppo_ptx, sample])
def test_unknown_yaml_key_is_an_error_with_a_suggestion(tmp_path, recipe):
    config = tmp_path / "step.yaml"
    key, meant = ("temprature", "temperature") if recipe is sample else ("learnin_rate", "learning_rate")
    config.write_text(f"model_name_or_path: {NO_MODEL}\n{key}: 0.1\n")
    with pytest.raises(UserError) as stop:
        recipe.main(["--config", str(config)])
    assert f"'{key}' (did you mean '{meant}'?)" in str(stop.value)
    assert "step.yaml" in str(stop.value)


def test_unknown_command_line_key_is_an_error_with_a_suggestion(tmp_path):
    with pytest.raises(UserError, match=r"command line: 'learnin_rate' .did you mean 'learning_rate'"):
        reward.main(["--learnin_rate", "0.1", "--output_dir", str(tmp_path)])


@pytest.mark.parametrize(
    ("recipe", "key", "said"),
    [
        (dpo, "torch_dtype", "'torch_dtype' (did you mean 'dtype'?)"),
        (sft, "torch_dtype", "'torch_dtype' (did you mean 'dtype'?)"),
        (
            dpo,
            "dataset_mixture",
            "'dataset_mixture' (mixtures of data sets are not taken: write their rows into one file",
        ),
        (dpo, "max_prompt_length", "'max_prompt_length' (prompts are not cut; rows that are too long are left out"),
        (dpo, "warmup_ratio", "'warmup_ratio' (did you mean 'warmup_steps'?)"),
        (ppo_ptx, "total_episodes", "'total_episodes' (set `max_steps` or `num_train_epochs`"),
        (ppo_ptx, "response_length", "'response_length' (set `max_completion_length`"),
    ],
)
def test_keys_of_others_are_answered_by_what_is_taken_here(tmp_path, recipe, key, said):
    config = tmp_path / "step.yaml"
    config.write_text(f"model_name_or_path: {NO_MODEL}\n{key}: 1\n")
    for argv in (["--config", str(config)], [f"--{key}", "1"]):
        with pytest.raises(UserError) as stop:
            recipe.main(argv)
        assert said in str(stop.value)


def test_command_line_wins_over_the_file(tmp_path):
    config = tmp_path / "step.yaml"
    config.write_text(f"model_name_or_path: {NO_MODEL}\ndataset_name: from_file.jsonl\n")
    with pytest.raises(UserError, match=r"from_line\.jsonl"):
        sample.main(["--config", str(config), "--dataset_name", "from_line.jsonl", "--output", "x.jsonl"])


def test_all_rows_tied_is_said(tmp_path):
    message = run_reward(tmp_path, [{**GOOD, "ranks": [1, 1]}])
    assert "tied" in message


def test_missing_file_and_broken_json(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.jsonl does not exist"):
        load_rows("nowhere.jsonl", check=check_fields("prompt"), key="dataset_name")
    broken = tmp_path / "rows.jsonl"
    broken.write_text('{"prompt": "a"}\n{"prompt": ')
    with pytest.raises(UserError, match="line 2"):
        load_rows(str(broken), check=check_fields("prompt"), key="dataset_name")


def test_an_empty_cell_names_its_row(tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a"}, {"prompt": ""}])
    with pytest.raises(UserError, match="row 1: field 'prompt'"):
        load_rows(data, check=check_fields("prompt"), key="dataset_name")


def test_csv_and_parquet_files_load(tmp_path):
    rows = load_rows(
        write_rows(tmp_path / "rows.jsonl", [{"prompt": "a"}, {"prompt": "b"}]),
        check=check_fields("prompt"),
        key="d",
    )
    rows.to_csv(tmp_path / "rows.csv")
    rows.to_parquet(tmp_path / "rows.parquet")
    rows.save_to_disk(tmp_path / "folder")
    for name in ("rows.csv", "rows.parquet", "folder"):
        assert load_rows(str(tmp_path / name), check=check_fields("prompt"), key="d")["prompt"][:] == [
            "a",
            "b",
        ]


def test_cli_lists_every_command_and_refuses_others(capsys):
    assert cli.main(["--help"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in cli.COMMANDS)
    assert cli.main(["rewrad"]) == 2
    assert "rewrad" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": 3}, "row 1: field 'prompt': expected a text or messages"),
        ({"prompt": [{"role": "user"}]}, "row 1: field 'prompt': expected a text or messages"),
        ({"prompt": [{"role": "user", "content": "hi"}]}, "text in some rows and messages in others"),
    ],
)
def test_prompts_that_are_no_text_name_their_row(tmp_path, row, said):
    data = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a"}, row])
    with pytest.raises(UserError, match=said):
        load_rows(data, check=check_fields("prompt"), key="dataset_name")


def test_a_field_of_mixed_types_is_named(tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "id": 1}, {"prompt": "b", "id": "two"}])
    with pytest.raises(UserError, match="row 1: field 'id' has values of different types"):
        load_rows(data, check=check_fields("prompt"), key="dataset_name")


@pytest.mark.parametrize("text", ["a: [", "3: x", "- a", "learning_rate:"])
def test_a_file_that_is_no_mapping_of_words_is_refused(tmp_path, text):
    config = tmp_path / "step.yaml"
    config.write_text(text)
    with pytest.raises(UserError, match=r"step\.yaml"):
        reward.main([f"--config={config}"])
    with pytest.raises(UserError, match="needs a YAML file"):
        reward.main(["--config"])


def test_a_missing_model_is_one_line(tmp_path):
    message = run_reward(tmp_path, [GOOD])
    assert message.startswith("model_name_or_path: cannot load")
    assert "\n" not in message
    with pytest.raises(
        UserError, match=r"^model_name_or_path: there is no folder /no/such/model, and no model on the Hub"
    ):
        reward.main(["--model_name_or_path", "/no/such/model", "--output_dir", str(tmp_path / "out")])


@pytest.mark.parametrize("beta", ["0", "-1"])
def test_dpo_refuses_a_beta_that_inverts_the_ranks(tmp_path, beta):
    with pytest.raises(UserError, match="expected a positive number"):
        dpo.main(["--output_dir", str(tmp_path), "--beta", beta])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("seed: 1\nseed: 2\n", "the key 'seed' stands twice"),
        ("env: {A: 1, A: 2}\n", "the key 'A' stands twice"),
        ("seed: " + "[" * 5000, "nested too deeply"),
        ("a: !!python/object/apply:os.system [ls]\n", "not a YAML file"),
    ],
)
def test_a_yaml_file_that_cannot_be_meant_is_refused(tmp_path, content, said):
    (tmp_path / "step.yaml").write_text(content)
    with pytest.raises(UserError, match=rf"step\.yaml .*{said}"):
        read_config(str(tmp_path / "step.yaml"))


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("output_dir: [1]", r"output_dir is \[1\]; expected a text"),
        ("dataset_name: 5", "dataset_name is 5; expected a text; put it in quotes"),
        ("max_steps: [2]", r"max_steps is \[2\]; expected a whole number"),
        ("learning_rate: {a: 1}", "learning_rate is {'a': 1}; expected a number"),
        ("report_to: {a: 1}", "report_to is {'a': 1}; expected a text or a list"),
        ("lora_target_modules: {a: b}", "lora_target_modules is {'a': 'b'}; expected"),
        ("save_strategy: no", "save_strategy is False; expected a text; put it in quotes"),
        ("bf16: 3", "bf16 is 3; expected true or false"),
        ("resume_from_checkpoint: {a: 1}", r"resume_from_checkpoint is \{'a': 1\}; expected a text or true or false"),
        ("loss_on: first", "loss_on is 'first'; expected one of all, last"),
        ("optim: nope", "optim is 'nope'; expected one of adamw_torch, "),
        ("lr_scheduler_type: nope", "lr_scheduler_type is 'nope'; expected one of linear, "),
    ],
)
def test_a_value_of_another_type_is_named_in_its_file(tmp_path, line, told):
    (tmp_path / "step.yaml").write_text(line + "\n")
    with pytest.raises(UserError, match=rf"step\.yaml: {told}"):
        sft.main(["--config", str(tmp_path / "step.yaml")])


def test_the_numbers_of_an_adapter_have_ranges(tmp_path):
    lora = ["--lora_r", "0", "--lora_alpha", "0", "--lora_dropout", "2"]
    told = r"lora_r=0: expected a whole number from 1; lora_alpha=0: expected .* above 0; lora_dropout=2\.0: expected"
    with pytest.raises(UserError, match=told):
        sft.main(["--output_dir", str(tmp_path), *lora])
    with pytest.raises(UserError, match=told):
        plan.main(["sft", "--model", "base", "--gpu", "24GB", *lora])


def test_values_that_are_one_of_few_are_checked_in_every_command(tmp_path):
    (tmp_path / "step.yaml").write_text(f"output_dir: {tmp_path}\nmodels: {{sft: base}}\ndtype: x\n")
    told = r"step\.yaml: dtype is 'x'; expected one of auto, float32, bfloat16, float16"
    with pytest.raises(UserError, match=told):
        evaluate.main(["all", "--config", str(tmp_path / "step.yaml")])
    (tmp_path / "step.yaml").write_text("format: nope\n")
    with pytest.raises(UserError, match=r"step\.yaml: format is 'nope'; expected one of sheet, label-studio"):
        label.main(["export", "samples.jsonl", "--config", str(tmp_path / "step.yaml")])


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("x", "model_init_kwargs='x': expected pairs of a name and a value"),
        ('{"x', "model_init_kwargs: not valid JSON"),
    ],
)
def test_a_text_where_a_mapping_belongs_is_named(tmp_path, value, told):
    with pytest.raises(UserError, match=told):
        sft.main(["--output_dir", str(tmp_path), "--model_init_kwargs", value])
    (tmp_path / "step.yaml").write_text(f"output_dir: {tmp_path}\nmodel_init_kwargs: '{value}'\n")
    with pytest.raises(UserError, match=told):
        sft.main(["--config", str(tmp_path / "step.yaml")])


def test_values_of_the_types_that_keys_have_are_taken(tmp_path):
    (tmp_path / "step.yaml").write_text(
        f"output_dir: {tmp_path}\nlearning_rate: 1e-5\nmax_steps: 3\nwarmup_steps: 2\nreport_to: [none]\n"
        "lora_target_modules: all-linear\nresume_from_checkpoint: true\nmodel_init_kwargs: {a: 1}\nsave_strategy: 'no'\n"
    )
    kinds = (sft.SFTArguments, sft.SFTStepConfig, ModelConfig)
    _, args, model = parse(kinds, ["--config", str(tmp_path / "step.yaml")], "prefopt sft")
    assert (args.learning_rate, args.max_steps, args.warmup_steps) == (1e-5, 3, 2)
    assert model.lora_target_modules == "all-linear"
