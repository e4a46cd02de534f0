"""What a model's files tell before its weights are loaded: every kind of damage is named by its file."""

from pathlib import Path

import pytest
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

from prefopt.errors import UserError
from prefopt.models.checkpoints import check_reward_model
from prefopt.models.files import check_model_files
from prefopt.models.loading import load_causal_lm
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
    "content", ["[]", "{", "5", "[" * 10000, '{"model_type": "llama", "hidden_size": "x"}', '{"model_type": "nope"}']
)
@pytest.mark.parametrize("file", ["lm/config.json", "adapter/adapter_config.json"])
def test_a_broken_configuration_is_named(folder, file, content):
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
