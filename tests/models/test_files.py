"""What a model's files tell before its weights are loaded: every kind of damage is named by its file."""

import json
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)
from trl import ModelConfig

from prefopt.errors import UserError, UserTypeError
from prefopt.models.checkpoints import check_reward_model, load_reward_model
from prefopt.models.files import check_model_files
from prefopt.models.loading import check_policy, load_causal_lm
from prefopt.recipes.common.models import load_tokenizer


@pytest.fixture
def folder(tmp_path, causal_lm, reward_model, tokenizer) -> Path:
    for name, model in (("lm", causal_lm), ("rm", reward_model)):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    causal_lm.name_or_path = causal_lm.config._name_or_path = str(tmp_path / "lm")
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(causal_lm, lora).save_pretrained(tmp_path / "adapter")
    return tmp_path


def test_whole_models_pass(folder):
    for name in ("lm", "rm", "adapter"):
        check_model_files(folder / name)
    check_model_files("of-nobody/on-the-hub")
    GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=2)).save_pretrained(folder / "gpt2")
    check_model_files(folder / "gpt2")
    # The transformer alone, whose file has other names, and one in several files.
    AutoModelForCausalLM.from_pretrained(folder / "gpt2").base_model.save_pretrained(folder / "bare")
    check_model_files(folder / "bare")
    AutoModelForCausalLM.from_pretrained(folder / "lm").save_pretrained(folder / "shards", max_shard_size="10KB")
    assert (folder / "shards" / "model.safetensors.index.json").is_file()
    check_model_files(folder / "shards")


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


DAMAGES = {
    "cut": cut,
    "empty": lambda path: path.write_bytes(b""),
    "html": lambda path: path.write_text("<html>404</html>"),
    "pointer": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n"),
    "gone": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["lm/model.safetensors", "rm/model.safetensors", "adapter/adapter_model.safetensors"])
def test_damaged_weights_are_named(folder, name, damage):
    DAMAGES[damage](folder / name)
    with pytest.raises(UserError, match=r"(model\.safetensors|adapter_model\.safetensors).*again") as error:
        check_model_files((folder / name).parent)
    assert ("LFS pointer" in str(error.value)) == (damage == "pointer")


def test_a_shard_that_is_missing_is_named(folder):
    AutoModelForCausalLM.from_pretrained(folder / "lm").save_pretrained(folder / "shards", max_shard_size="10KB")
    lost = sorted((folder / "shards").glob("model-*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(UserError, match=f"{lost.name} is missing"):
        check_model_files(folder / "shards")


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{",
        "5",
        "[" * 10000,
        '{"model_type": "llama", "hidden_size": "x"}',
        '{"model_type": "llama", "hidden_act": "x"}',
        '{"model_type": "llama", "architectures": [5]}',
        '{"model_type": "llama", "architectures": "LlamaForCausalLM"}',
        '{"model_type": "nope"}',
    ],
)
@pytest.mark.parametrize("file", ["lm/config.json", "adapter/adapter_config.json", "lm/generation_config.json"])
def test_a_broken_configuration_is_named(folder, file, content):
    if "generation" in file and "model_type" in content:
        content = "[5]"
    if "adapter" in file and "model_type" in content:
        content = '{"peft_type": "NOPE"}'
    (folder / file).write_text(content)
    with pytest.raises(UserError, match=Path(file).name):
        check_model_files((folder / file).parent)


@pytest.mark.parametrize("name", ["lm", "rm"])
def test_a_tensor_of_the_transformer_that_is_missing_is_named(folder, name):
    file = folder / name / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    check = check_reward_model if name == "rm" else check_model_files
    with pytest.raises(UserError, match=r"lack layers\.1\.mlp\.up_proj\.weight, which would be drawn at random"):
        check(folder / name)


def test_a_tensor_of_an_adapter_that_is_missing_is_named(folder):
    file = folder / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    name = sorted(weights)[0]
    save_file({key: value for key, value in weights.items() if key != name}, file)
    with pytest.raises(UserError, match=rf"adapter_model\.safetensors lacks {name}"):
        load_causal_lm(folder / "adapter")


def test_what_is_no_decoder_is_refused(tmp_path):
    small = {
        "vocab_size": 30,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
    }
    BertForMaskedLM(BertConfig(**small)).save_pretrained(tmp_path / "bert")
    T5ForConditionalGeneration(
        T5Config(vocab_size=30, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    ).save_pretrained(tmp_path / "t5")
    for kind in ("bert", "t5"):
        with pytest.raises(UserError, match=f"{kind} is a {kind} model; prefopt trains decoders"):
            check_model_files(tmp_path / kind)


def test_a_tokenizer_beyond_the_embeddings_is_refused(folder, tokenizer):
    load_tokenizer(ModelConfig(model_name_or_path=str(folder / "lm")))
    # An id that no row has is no harm; the end of every answer is.
    tokenizer.add_tokens([f"<more {i}>" for i in range(20)])
    tokenizer.save_pretrained(folder / "lm")
    load_tokenizer(ModelConfig(model_name_or_path=str(folder / "lm")))
    tokenizer.eos_token = "<more 19>"
    tokenizer.save_pretrained(folder / "lm")
    with pytest.raises(UserError, match=r"beyond the model's embeddings for 320 tokens .*'<more 19>'"):
        load_tokenizer(ModelConfig(model_name_or_path=str(folder / "lm")))


def edited(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_words_beyond_the_embeddings_are_refused_before_a_row_has_one(folder, causal_lm):
    causal_lm.resize_token_embeddings(200)
    causal_lm.save_pretrained(folder / "lm")
    with pytest.raises(UserError, match=r"beyond the model's embeddings for 200 tokens \(\d+ words\)"):
        load_tokenizer(ModelConfig(model_name_or_path=str(folder / "lm")))


def test_a_tensor_of_another_shape_is_named(folder):
    file = folder / "lm" / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.0.mlp.up_proj.weight"] = weights["model.layers.0.mlp.up_proj.weight"][:5].clone()
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(
        UserError, match=r"model\.safetensors: layers\.0\.mlp\.up_proj\.weight has the shape \[5, \d+\]"
    ):
        check_model_files(folder / "lm")


@pytest.mark.parametrize("value", [0, -1, 10**12])
@pytest.mark.parametrize("name", ["num_hidden_layers", "vocab_size", "max_position_embeddings"])
def test_a_size_that_no_model_has_is_named(folder, name, value):
    edited(folder / "lm" / "config.json", **{name: value})
    with pytest.raises(
        UserError, match=rf"config\.json.*({name} is {value}; expected a whole number from 1|cannot be used)"
    ):
        check_model_files(folder / "lm")


def test_weights_in_pytorchs_own_format_are_looked_at_too(folder):
    file, tensors = folder / "lm" / "pytorch_model.bin", load_file(folder / "lm" / "model.safetensors")
    (folder / "lm" / "model.safetensors").unlink()
    for is_zip in (True, False):
        torch.save(tensors, file, _use_new_zipfile_serialization=is_zip)
        check_model_files(folder / "lm")
    del tensors["model.norm.weight"]
    torch.save(tensors, file)
    with pytest.raises(UserError, match=r"lack norm\.weight"):
        check_model_files(folder / "lm")


def test_a_classifier_of_several_labels_is_no_reward_model(folder):
    labels = {"id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
    edited(folder / "rm" / "config.json", **labels)
    with pytest.raises(UserError, match="rm is a classifier of 3 labels; a reward model has one"):
        check_reward_model(folder / "rm")


def without_head(folder):
    weights = load_file(folder / "rm" / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, folder / "rm" / "model.safetensors", metadata={"format": "pt"})


def nan_head(folder):
    weights = load_file(folder / "rm" / "model.safetensors")
    weights["score.weight"][0, 0] = math.nan
    save_file(weights, folder / "rm" / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (without_head, "rm has no trained head, so its scores would be random"),
        (nan_head, r"model\.safetensors: the head score\.weight is not finite"),
        (lambda folder: edited(folder / "rm/config.json", reward_bias=math.nan), "reward_bias is nan"),
        (lambda folder: edited(folder / "rm/config.json", reward_bias="x"), "reward_bias is 'x'"),
        (lambda folder: edited(folder / "rm/config.json", reward_token_id=10**9), "reward_token_id is 1000000000"),
        (lambda folder: edited(folder / "rm/config.json", reward_token_id="x"), "reward_token_id is 'x'"),
    ],
)
def test_a_head_that_cannot_score_is_refused_before_weights_are_loaded(folder, damage, told):
    check_reward_model(folder / "rm")
    damage(folder)
    for load in (check_reward_model, load_reward_model):
        with pytest.raises(UserError, match=told):
            load(folder / "rm")


@pytest.mark.parametrize("path", [None, 5, "", [], b"lm"])
def test_what_is_no_path_is_said_to_be_none(path):
    for load in (check_model_files, load_reward_model):
        with pytest.raises(UserTypeError, match="expected a folder or a name on the Hub"):
            load(path)


def test_a_path_that_leads_nowhere_is_no_question_to_the_hub(folder, monkeypatch):
    monkeypatch.chdir(folder)
    Path("file").write_text("x")
    Path("link").symlink_to("nowhere")
    Path("loop").symlink_to("loop")
    for path in ("/no/such", "./lm2", "a/b/c", "link", "loop", "runs/"):
        with pytest.raises(UserError, match=f"there is no folder {path}"):
            check_model_files(path)
    with pytest.raises(UserError, match="file is a file; name the folder"):
        check_model_files("file")
    check_model_files("gpt2")


def test_an_adapter_on_itself_and_one_that_does_not_fit_its_base_are_named(folder):
    config = folder / "adapter" / "adapter_config.json"
    saved = config.read_text()
    edited(config, base_model_name_or_path=str(folder / "adapter"))
    with pytest.raises(UserError, match="is an adapter on itself"):
        check_model_files(folder / "adapter")
    config.write_text(saved)
    edited(config, target_modules=["nope"])
    with pytest.raises(UserError, match=r"the adapter .*adapter does not fit its base .*lm: Target modules"):
        load_causal_lm(folder / "adapter")
    config.write_text(saved)
    edited(config, r="x")
    with pytest.raises(UserError, match=r"the adapter .*adapter does not fit its base .*lm"):
        load_causal_lm(folder / "adapter")
    config.write_text(saved)
    edited(config, base_model_name_or_path=5)
    with pytest.raises(UserError, match=r"adapter_config\.json names no base"):
        check_model_files(folder / "adapter")
    config.write_text(saved)
    edited(config, r=3)
    with pytest.raises(UserError, match=r"the adapter .*adapter does not fit its base .*size mismatch"):
        load_causal_lm(folder / "adapter")


@pytest.mark.parametrize(
    "weight_map", [[], "model.safetensors", {"model.norm.weight": 5}, {"model.norm.weight": "gone.safetensors"}]
)
def test_an_index_of_another_form_is_named(folder, weight_map):
    (folder / "lm" / "model.safetensors").unlink()
    (folder / "lm" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json"):
        check_model_files(folder / "lm")


def test_what_is_no_decoder_is_no_policy(tmp_path, reward_model, tokenizer):
    encoder = BertForMaskedLM(
        BertConfig(vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    )
    encoder.save_pretrained(tmp_path / "bert")
    for policy, told in (
        (encoder, "is a bert model"),
        (str(tmp_path / "bert"), "is a bert model"),
        (reward_model, "reward model"),
    ):
        with pytest.raises(UserError, match=told):
            check_policy(policy)
