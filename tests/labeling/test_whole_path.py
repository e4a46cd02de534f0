"""The whole path on the sandbox: what people rank in their browsers teaches a reward model what labels in memory do."""

from itertools import chain

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from prefopt import cli
from prefopt.inference.jsonl import read_jsonl, write_jsonl
from prefopt.inference.scoring import score_rows
from prefopt.models.checkpoints import load_reward_model
from prefopt.sandbox import World, build_model, build_tokenizer, labelers

pytestmark = [pytest.mark.timeout(600), pytest.mark.slow]

# The text of a node; a model without training writes control characters, which the sheet shows by their names.
TEXT = """node => {
    const copy = node.cloneNode(true);
    for (const named of copy.querySelectorAll(".control"))
        named.replaceWith(String.fromCharCode(parseInt(named.textContent.slice(2), 16)));
    return copy.textContent;
}"""


def prefopt(*words):
    assert cli.main([str(word) for word in words]) == 0


def label_in_browser(browser, sheet, person, answers):
    """The labeler sees what the page shows, and nothing else, and answers with its keys and buttons."""
    with browser.new_context(viewport={"width": 1280, "height": 900}) as context:
        page = context.new_page()
        page.goto(sheet.as_uri())
        page.fill("#name", person.name)
        page.press("#name", "Enter")
        page.wait_for_selector("#work:not([hidden])")
        while page.locator("#work").is_visible():
            prompt = page.locator("#prompt .text").evaluate(TEXT)
            said = person.label(prompt, [box.evaluate(TEXT) for box in page.locator("#outputs .text").all()])
            for i, (rating, flags) in enumerate(zip(said["ratings"], said["flags"], strict=True)):
                page.keyboard.press("j")
                page.keyboard.press(str(rating))
                for flag in (name for name, is_set in flags.items() if is_set):
                    page.check(f'#output-{i} input[value="{flag}"]')
                page.focus(f"#output-{i}")
            for rank in said["ranks"]:
                page.keyboard.press("r")
                page.keyboard.press(str(rank))
            page.keyboard.press("Control+Enter")
            assert page.locator("#missing").text_content() == ""
        with page.expect_download() as download:
            page.click("#end-download")
        download.value.save_as(answers)


def test_labels_from_the_browser_give_the_reward_model_of_labels_in_memory(browser, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    world, tokenizer = World(seed=0), build_tokenizer()
    tokenizer.save_pretrained("sft")
    build_model(tokenizer, seed=0).save_pretrained("sft")
    write_jsonl("prompts.jsonl", [{"prompt": p, "use_case": world.use_case(p)} for p in world.prompts("rm", 3)])
    prefopt("sample", "--model_name_or_path", "sft", "--dataset_name", "prompts.jsonl", "--output", "drawn.jsonl",
            "--max_new_tokens", 6)  # fmt: skip
    samples = read_jsonl("drawn.jsonl")
    for (
        row
    ) in samples:  # a model without training says nothing worth a preference: half of the outputs are the world's
        for i in range(0, len(row["completions"]), 2):
            row["completions"][i] = world.demonstration(row["prompt"], draw=i // 4)  # some of them twice
            row["truncated"][i] = False
    write_jsonl("samples.jsonl", samples)

    people = labelers(world, "train")[:2]
    in_memory = [person.label(row["prompt"], row["completions"]) | {"truncated": row["truncated"]}
                 for person in people for row in samples]  # fmt: skip
    write_jsonl("in_memory.jsonl", in_memory)

    prefopt("label", "export", "samples.jsonl", "--out", "sheet.html", "--group", "train")
    files = [tmp_path / f"answers-{person.name}.jsonl" for person in people]
    for person, file in zip(people, files, strict=True):
        label_in_browser(browser, tmp_path / "sheet.html", person, file)
    prefopt("label", "import", *files, "--out", "rankings.jsonl")
    rankings = read_jsonl("rankings.jsonl")
    assert [{name: row[name] for name in in_memory[0]} for row in rankings] == in_memory
    assert any(len(set(row["ranks"])) < len(set(row["completions"])) for row in rankings)  # ties
    assert any(len(set(row["completions"])) < len(row["completions"]) for row in rankings)  # shown once

    for name in ("in_memory", "rankings"):
        prefopt("reward", "--model_name_or_path", "sft", "--dataset_name", f"{name}.jsonl", "--output_dir", f"rm-{name}",
                "--max_steps", 3, "--per_device_train_batch_size", 2, "--learning_rate", 1e-3, "--seed", 1,
                "--save_strategy", "no", "--report_to", "none", "--bf16", "false")  # fmt: skip
    weights = [load_file(f"rm-{name}/model.safetensors") for name in ("in_memory", "rankings")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    start = load_file("sft/model.safetensors")
    assert any(not torch.equal(tensor, weights[1][name]) for name, tensor in start.items() if name in weights[1])
    scores = [score_rows(load_reward_model(f"rm-{name}"), AutoTokenizer.from_pretrained(f"rm-{name}"), samples)
              for name in ("in_memory", "rankings")]  # fmt: skip
    assert scores[0] == scores[1]
    assert len(set(chain.from_iterable(scores[0]))) > 3
