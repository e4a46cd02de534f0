"""`prefopt push` and what it says when the Hub does not take a model; the local Hub breaks as it is told to."""

import json
import math
import os
import shlex

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftConfig
from transformers import AutoModelForCausalLM

from prefopt import cli
from prefopt.hub.cards import FACTS, README
from prefopt.hub.push import HubError, files_to_publish, push_command, push_folder
from tests.hub.models import dpo_trainer, reward_trainer

pytestmark = [pytest.mark.allow_hosts(["127.0.0.1"]), pytest.mark.slow]


@pytest.fixture
def folder(causal_lm, tokenizer, tmp_path):
    """A saved model with one file that goes to the Hub in three parts."""
    causal_lm.save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    (tmp_path / "policy" / "large.bin").write_bytes(os.urandom(150_000))
    return tmp_path / "policy"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def push(folder, *options):
    cli.main(["push", str(folder), "me/policy", *options])


# ---- what is published ----


def test_what_only_training_needs_stays_at_home(tmp_path):
    names = [
        "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "README.md", "trainer_state.json",
        "runs/today/events.out", "checkpoint-2/adapter_model.safetensors", "checkpoint-2/optimizer.pt",
        "_unfinished/x", "_merged-1/model.safetensors", "optimizer.pt", "optimizer_0/x.distcp", "scheduler.pt",
        "rng_state_0.pth", "rollout_0.pt", "ppo_ptx_state.json", "complete.json", "training_args.bin",
        "value_function.safetensors", "weight_average.safetensors", "ref/adapter_model.safetensors",
        "reward_2/adapter_model.safetensors", "value/adapter_config.json", "ema/adapter_model.safetensors",
        "completions/completions_1.parquet",
    ]  # fmt: skip
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    alone = {
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "README.md",
        "trainer_state.json",
        "runs/today/events.out",
    }
    roles = {
        "value_function.safetensors",
        "weight_average.safetensors",
        "ref/adapter_model.safetensors",
        "reward_2/adapter_model.safetensors",
        "value/adapter_config.json",
        "ema/adapter_model.safetensors",
    }
    assert set(files_to_publish(tmp_path)) == alone
    assert set(files_to_publish(tmp_path, roles=True)) == alone | roles


def test_the_hub_gets_the_same_bytes(hub, folder, capsys):
    before = contents(folder)
    push(folder)
    assert capsys.readouterr().out == f"published: {hub.url}/me/policy\n"
    remote = hub.files("me/policy")
    assert remote == contents(folder)
    assert {name: remote[name] for name in before} == before
    assert set(remote) - set(before) == {"README.md", "model_card.json"}
    assert not hub.repositories["me/policy"].private


def test_private_and_revision(hub, folder):
    push(folder, "--private", "true", "--revision", "trial")
    repository = hub.repositories["me/policy"]
    assert repository.private
    assert (len(repository.branches["main"]), repository.branches["trial"]) == (0, contents(folder))
    push(folder, "--private", "true")  # it is there and private
    repository.private = False
    with pytest.raises(SystemExit, match="me/policy is there already and is public"):
        push(folder, "--private", "true", "--revision", "other")
    assert "other" not in repository.branches


# ---- failures ----


@pytest.mark.parametrize("request_", ["PUT /lfs", "POST /verify", "preupload", "batch"])
@pytest.mark.parametrize("status", [500, 503, None])
def test_what_passes_when_tried_again_is_not_mentioned(hub, folder, request_, status, capsys):
    hub.fail(request_, status, times=2)
    push(folder)
    assert hub.files("me/policy") == contents(folder)
    assert "error" not in capsys.readouterr().out


FAILURES = {
    "500": ("PUT /lfs", 500, "the Hub had an error of its own \\(500\\)"),
    "cut": ("PUT /lfs", None, "the connection broke"),
    "cut in the third part": ("PUT /lfs/\\w+/3", None, "the connection broke"),
    "commit": ("POST .*/commit", 502, "the Hub had an error of its own \\(502\\)"),
    "commit cut": ("POST .*/commit", None, "the connection broke"),
    "no room": ("POST .*/commit", 413, "the Hub answered 413: this is a test"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failed_upload_leaves_the_model_and_the_command_it_gives_repairs_it(failure, hub, folder):
    request, status, said = FAILURES[failure]
    hub.fail(request, status)
    model = contents(folder)
    with pytest.raises(SystemExit, match=said) as stop:
        push(folder, "--private", "true")
    message = str(stop.value)
    assert "\n" not in message
    assert message.startswith(f"error: {folder} was not published as me/policy: ")
    assert f"the model is whole in {folder}; try again: prefopt push {folder} me/policy --private true" in message
    assert {name: contents(folder)[name] for name in model} == model
    assert hub.files("me/policy") == {}  # nothing in halves

    hub.faults.clear()
    stored = set(hub.large_files)
    hub.requests.clear()
    cli.main(shlex.split(message.split("try again: ")[1])[1:])
    assert hub.files("me/policy") == contents(folder)
    for oid in stored:  # what the Hub had got is not sent again
        assert hub.count(f"PUT /lfs/{oid}") == 0


@pytest.mark.parametrize("token", ["reader", None])
def test_a_token_that_may_not_write(token, hub, folder, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    push_folder(folder, "me/policy")
    monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN")
    said = "the token may not write there" if token else "no valid token: run `hf auth login`, or set HF_TOKEN"
    before, hub.requests = contents(folder), []
    for repository in ("me/policy", "me/new"):  # one is there and may be read
        with pytest.raises(HubError, match=said):
            push_folder(folder, repository)
    assert contents(folder) == before
    assert "me/new" not in hub.repositories
    assert hub.count("preupload|/lfs/|commit") == 0  # nothing was uploaded in vain


def test_offline_is_said(hub, folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        push_folder(folder, "me/policy")


# ---- the command ----


def test_bad_arguments_stop_with_a_line(hub, folder, tmp_path):
    for argv, said in {
        (): "give a folder and a repository",
        (folder,): "give a folder and a repository",
        (folder, "me/policy", "more"): "too many arguments: more",
        (tmp_path / "none", "me/policy"): "none holds no model",
        (folder, "me/policy", "--merge", "true"): "policy is no adapter: there is nothing to merge",
        (folder, "a/b/c"): "a/b/c",
        (
            folder,
            "me/policy",
            "--results",
            tmp_path / "no.json",
        ): "no.json: No such file or directory",
        (folder, "me/policy", "--mergee", "true"): "did you mean 'merge'?",
    }.items():
        with pytest.raises(SystemExit) as stop:
            cli.main(["push", *map(str, argv)])
        assert said in str(stop.value)
        assert "\n" not in str(stop.value)
    assert hub.count("commit") == 0


@pytest.mark.parametrize("four_bit", [False, True])
def test_merge_publishes_a_whole_policy(four_bit, hub, base, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)  # no rounding to bf16
    trainer = dpo_trainer(base, tokenizer, tmp_path / "policy", four_bit=four_bit)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(dataset_name="me/rankings")
    ids = torch.tensor([[5, 6, 7]])
    expected = trainer.model.eval()(input_ids=ids).logits
    before = contents(tmp_path / "policy")
    push(tmp_path / "policy", "--merge", "true")
    files = hub.files("me/policy")
    assert "adapter_config.json" not in files
    merged = AutoModelForCausalLM.from_pretrained("me/policy")
    torch.testing.assert_close(merged(ids).logits, expected, atol=1e-5, rtol=0)
    card = ModelCard(files[README].decode())
    assert (card.data["library_name"], card.data.base_model, card.data.datasets) == (
        "transformers",
        "me/base",
        ["me/rankings"],
    )
    assert contents(tmp_path / "policy") == before
    assert [path for path in (tmp_path / "policy").iterdir() if path.name.startswith("_")] == []


def test_a_merge_that_is_not_taken_can_be_repeated(hub, base, tokenizer, tmp_path):
    dpo_trainer(base, tokenizer, tmp_path / "policy").save_model()
    hub.fail("POST .*/commit", None)
    with pytest.raises(SystemExit) as stop:
        push(tmp_path / "policy", "--merge", "true")
    command = push_command(tmp_path / "policy", "me/policy", merge=True)
    assert str(stop.value).endswith(f"the model is whole in {tmp_path / 'policy'}; try again: {command}")
    hub.faults.clear()
    cli.main(shlex.split(command)[1:])
    assert "model.safetensors" in hub.files("me/policy")


def measure(name, model, value, against=None, status="ok"):
    return {
        "name": name, "model": model, "against": against, "value": value, "ci_low": value - 0.1, "ci_high": value + 0.1,
        "n": 50, "status": status,
    }  # fmt: skip


@pytest.mark.parametrize("broken", [{"value": math.nan}, {"value": "0.7"}, {"value": None}, {"ci_high": math.inf}])
def test_numbers_that_are_none_do_not_go_into_the_card(hub, folder, tmp_path, broken):
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"measures": [{**measure("winrate", "ppo", 0.7, "sft"), **broken}]}))
    before = sorted((path, path.stat().st_mtime_ns) for path in folder.iterdir())
    with pytest.raises(SystemExit, match=r"results\.json: winrate of ppo has no finite value"):
        push(folder, "--results", str(results), "--results_name", "ppo")
    assert sorted((path, path.stat().st_mtime_ns) for path in folder.iterdir()) == before


def test_win_rates_go_into_the_card_and_stay(hub, folder, tmp_path):
    measures = [
        measure("winrate", "ppo", 0.7, "sft"),
        measure("winrate", "dpo", 0.6, "sft"),
        measure("gold_reward", "ppo", 1.5),
        measure("gold_reward", "ppo", 0.5, "sft"),  # the difference
        measure("winrate_greedy", "ppo", 0.9, "sft"),
        measure("kl_to_sft", "ppo", 0.9, status="skipped"),
    ]
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"measures": measures, "settings": {"judge": "the reward model rm"}}))
    with pytest.raises(
        SystemExit, match="has no numbers of 'policy'; name the model with --results_name, one of: dpo"
    ):
        push(folder, "--results", str(results))
    push(folder, "--results", str(results), "--results_name", "ppo")
    push(folder)
    card = ModelCard(hub.files("me/policy")[README].decode())
    found = {(r.metric_type, r.metric_value, r.metric_name) for r in card.data.eval_results}
    rate = "win rate against sft, judged by the reward model rm"
    assert found == {
        ("winrate", 0.7, f"{rate} (n = 50, 95 % interval 0.6 to 0.8)"),
        ("gold_reward", 1.5, "gold reward (n = 50, 95 % interval 1.4 to 1.6)"),
    }
    assert f"| {rate} | 0.7 | 0.6 to 0.8 | 50 | prefopt eval |" in card.text
    (folder / README).write_text("My own.")
    with pytest.raises(SystemExit, match="edited by hand, so no results are added"):
        push(folder, "--results", str(results), "--results_name", "ppo")


def test_a_dry_run_writes_what_would_be_published_and_changes_nothing(hub, base, tokenizer, tmp_path, capsys):
    reward_trainer(base, tokenizer, tmp_path / "rm").save_model()
    (tmp_path / "rm" / "optimizer.pt").write_bytes(b"0")
    before = contents(tmp_path / "rm")
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"measures": [measure("rm.accuracy.g", "rm", 0.7)]}))
    out = tmp_path / "look"
    cli.main(["push", str(tmp_path / "rm"), "me/rm", "--dry_run", str(out), "--results", str(results)])
    assert "nothing was sent" in capsys.readouterr().out
    assert hub.repositories.keys() == {"me/base"}
    assert contents(tmp_path / "rm") == before
    written = contents(out)
    assert "optimizer.pt" not in written
    cli.main(["push", str(tmp_path / "rm"), "me/rm", "--results", str(results)])
    published = hub.files("me/rm")
    facts = [json.loads(files[FACTS]) for files in (written, published)]
    assert facts[0] == facts[1]
    assert all(published[name] == content for name, content in written.items() if name != FACTS)
    assert b'from_pretrained(base, "me/rm")' in written[README]
    assert b"pairwise accuracy, g (n = 50" in written[README]
    with pytest.raises(SystemExit, match="is there already; name a new folder"):
        cli.main(["push", str(tmp_path / "rm"), "me/rm", "--dry_run", str(out)])


@pytest.mark.parametrize("kind", ["policy", "reward model"])
def test_a_dry_run_of_a_merge_writes_the_whole_model(kind, hub, base, tokenizer, tmp_path, capsys):
    make, name = (dpo_trainer, "policy") if kind == "policy" else (reward_trainer, "rm")
    trainer = make(base, tokenizer, tmp_path / name)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(dataset_name="me/rankings")
    before = contents(tmp_path / name)
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"measures": [measure("winrate", name, 0.7, "sft")]}))
    options = [str(tmp_path / name), f"me/{name}", "--merge", "true", "--results", str(results)]
    cli.main(["push", *options, "--dry_run", str(tmp_path / "look")])
    shown = capsys.readouterr().out
    assert "nothing was sent" in shown
    assert "model.safetensors" in shown
    assert hub.repositories.keys() == {"me/base"}
    assert contents(tmp_path / name) == before
    # What merging keeps for a while lies in the folder.
    assert [path for path in (tmp_path / name).iterdir() if path.name.startswith("_")] == []
    written = contents(tmp_path / "look")
    assert "adapter_config.json" not in written
    card = ModelCard(written[README].decode())
    assert (card.data["library_name"], card.data.base_model, card.data.datasets) == (
        "transformers",
        "me/base",
        ["me/rankings"],
    )
    assert "LoRA adapter on" not in card.text
    assert f'from_pretrained("me/{name}")' in card.text
    assert "win rate against sft" in card.text
    cli.main(["push", *options])
    published = hub.files(f"me/{name}")
    assert json.loads(written.pop(FACTS)) == json.loads(published[FACTS])
    assert {name: content for name, content in published.items() if name in written} == written
    assert published.keys() - written.keys() == {FACTS, ".gitattributes"} & published.keys()


def test_a_dry_run_into_the_model_itself_is_refused(hub, folder):
    before = contents(folder)
    with pytest.raises(SystemExit, match="is there already; name a new folder"):
        cli.main(["push", str(folder), "me/policy", "--dry_run", str(folder)])
    assert contents(folder) == before


def test_an_adapter_on_a_folder_of_this_machine_is_said(hub, causal_lm, tokenizer, tmp_path, caplog):
    causal_lm.save_pretrained(tmp_path / "base")
    reward_trainer(str(tmp_path / "base"), tokenizer, tmp_path / "rm").save_model()
    push_folder(tmp_path / "rm", "me/rm")
    assert PeftConfig.from_pretrained("me/rm").base_model_name_or_path == str(tmp_path / "base")
    assert "a folder that others do not have" in caplog.text
    assert "add --merge true" in caplog.text
