"""What a command reads is never run: pickles, YAML tags, loading scripts, code beside a model, templates, names.

That texts of rows are inert in HTML: tests/labeling/test_sheet.py and tests/eval/report/test_render.py.
"""

import contextlib
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from prefopt import cli
from prefopt.errors import UserError
from prefopt.evaluation.run import EvaluationArguments
from prefopt.models.checkpoints import load_reward_model
from prefopt.models.loading import load_causal_lm, load_tokenizer
from prefopt.recipes import sft
from prefopt.recipes.common.arguments import read_config
from prefopt.recipes.common.errors import explain
from prefopt.recipes.common.rows import check_fields, load_rows

pytestmark = pytest.mark.slow


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("FIRED",)


BOMB = pickle.dumps(Bomb())
CODE = "import os\nos.mkdir('FIRED')\nclass Config: pass\nclass Model: pass\nclass Tokenizer: pass\n"


@pytest.fixture(autouse=True)
def nothing_fires(files, monkeypatch, causal_lm):
    # transformers asks on a terminal whether it may run code.
    monkeypatch.setattr("builtins.input", lambda *args: "y")
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    causal_lm.name_or_path = causal_lm.config._name_or_path = "base"
    get_peft_model(causal_lm, lora).save_pretrained("adapter")
    yield
    assert not Path("FIRED").exists()


def test_the_bomb_is_one():
    pickle.loads(BOMB)
    assert Path("FIRED").exists()
    os.rmdir("FIRED")


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet", ".pt", ".jsonl.gz"])
def test_a_pickle_as_rows(suffix):
    Path(f"rows{suffix}").write_bytes(BOMB)
    with pytest.raises(UserError, match="rows"):
        load_rows(f"rows{suffix}", key="dataset_name", check=check_fields("text"))


@pytest.mark.parametrize(
    ("folder", "file", "load"),
    [
        ("base", "pytorch_model.bin", load_causal_lm),
        ("rm", "pytorch_model.bin", load_reward_model),
        ("adapter", "adapter_model.bin", load_causal_lm),
    ],
)
@pytest.mark.parametrize("protocol", ["plain", "torch"])
def test_a_pickle_as_weights(folder, file, load, protocol):
    for weights in Path(folder).glob("*.safetensors"):
        weights.unlink()
    if protocol == "plain":
        Path(folder, file).write_bytes(BOMB)
    else:
        torch.save({"model.norm.weight": Bomb()}, Path(folder, file))
    with pytest.raises(UserError, match=f"{file} is damaged, or a pickle of more than tensors, which is never opened"):
        load(folder)


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth", "scheduler.pt"])
def test_a_pickle_in_a_checkpoint(name):
    argv = [
        "--model_name_or_path",
        "base",
        "--dataset_name",
        "demos.jsonl",
        "--output_dir",
        "out",
        "--save_steps",
        "1",
    ]
    argv += ["--report_to", "none", "--max_steps"]
    sft.main([*argv, "1"])
    Path("out/checkpoint-1", name).write_bytes(BOMB)
    # With its marker it is seen to have changed; without, torch refuses it.
    with pytest.raises(UserError, match=f"checkpoint-1 is incomplete: {name}"):
        sft.main([*argv, "2", "--resume_from_checkpoint", "out/checkpoint-1"])
    Path("out/checkpoint-1/complete.json").unlink()
    with pytest.raises(pickle.UnpicklingError) as error:
        sft.main([*argv, "2", "--resume_from_checkpoint", "out/checkpoint-1"])
    assert "which is never opened" in explain(error.value, "sft")


def test_a_tag_in_yaml():
    Path("step.yaml").write_text('seed: !!python/object/apply:os.mkdir ["FIRED"]\n')
    with pytest.raises(UserError, match=r"step\.yaml is not a YAML file"):
        read_config("step.yaml")


def test_a_loading_script():
    Path("rows").mkdir()
    Path("rows/rows.py").write_text(CODE)
    with pytest.raises(UserError, match="dataset_name: cannot load 'rows'"):
        load_rows("rows", key="dataset_name", check=check_fields("text"))


def with_code(folder, file, **classes):
    path = Path(folder, file)
    auto_map = {name: f"evil.{value}" for name, value in classes.items()}
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": auto_map}))
    Path(folder, "evil.py").write_text(CODE)


def test_code_beside_a_model():
    config = json.loads(Path("base/config.json").read_text())
    Path("base/config.json").write_text(json.dumps({**config, "model_type": "evil"}))
    classes = {"AutoConfig": "Config", "AutoModelForCausalLM": "Model", "AutoModelForSequenceClassification": "Model"}
    with_code("base", "config.json", **classes)
    for load in (load_causal_lm, load_reward_model):
        with pytest.raises(UserError, match=r"config\.json needs code that comes with the model"):
            load("base")
    argv = ["--model_name_or_path", "base", "--dataset_name", "x.jsonl", "--output_dir", "out", "--report_to", "none"]
    with pytest.raises(UserError, match=r"model_name_or_path: .*needs code"):
        sft.main(argv)


def test_code_beside_a_model_that_transformers_knows_is_left_alone():
    with_code("base", "config.json", AutoConfig="Config", AutoModelForCausalLM="Model")
    load_causal_lm("base")


def test_code_beside_a_tokenizer():
    path = Path("base/tokenizer_config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": "EvilTokenizer"}))
    with_code("base", "tokenizer_config.json", AutoTokenizer=["Tokenizer", "Tokenizer"])
    # With or without it; the folder has the tokenizer that transformers knows as well.
    with contextlib.suppress(UserError):
        load_tokenizer("base")


def test_an_attack_in_a_template(tokenizer):
    tokenizer.chat_template = "{{ cycler.__init__.__globals__.os.mkdir('FIRED') }}{{ messages[0].content }}"
    with pytest.raises(Exception, match="unsafe") as error:
        tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert "the chat template fails" in explain(error.value)


@pytest.mark.parametrize("name", ["../up", "a/b", "/abs", ".hidden", "", "a\x00b", "a\u202eb", "a\nb"])
def test_a_name_that_leads_out_of_its_folder(name):
    with pytest.raises(UserError, match="becomes a file's"):
        EvaluationArguments("out", {name: "base"})


@pytest.mark.parametrize("name", ["../tiny", "/etc", ".", "tiny/../tiny"])
def test_a_recipe_that_is_a_path(name):
    with pytest.raises(SystemExit) as stop:
        cli.main(["recipes", "copy", name, "there"])
    assert stop.value.code != 0
    assert not Path("there").exists()
