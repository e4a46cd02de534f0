"""`prefopt sample`: cut off in its middle it draws what is missing; with other settings it begins anew."""

import pytest
from datasets import Dataset

from prefopt.errors import UserError
from prefopt.inference import engines
from prefopt.inference.generate import Completion, generate
from prefopt.inference.jsonl import read_jsonl, write_jsonl
from prefopt.recipes import sample

pytestmark = pytest.mark.slow

PROMPTS = ["the cat", "a dog", "the red house and the mat", "what is this?", "the mat", "question: the cat"]


@pytest.fixture
def files(tmp_path, causal_lm, tokenizer):
    causal_lm.save_pretrained(tmp_path / "sft")
    tokenizer.save_pretrained(tmp_path / "sft")
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": p, "id": i} for i, p in enumerate(PROMPTS)])
    return tmp_path


def options(files, output, **changed):
    keys = {
        "model_name_or_path": files / "sft",
        "dataset_name": files / "prompts.jsonl",
        "output": files / output,
        "k_min": 2,
        "k_max": 4,
        "max_new_tokens": 5,
        "batch_size": 4,
        **changed,
    }
    return [str(x) for key, value in keys.items() for x in (f"--{key}", value)]


class Batches(list):
    """How many completions each batch has that is drawn; drawing breaks behind `breaks_behind` batches."""

    breaks_behind = 99


@pytest.fixture
def batches(monkeypatch):
    sizes = Batches()

    def counted(model, *args, **kwargs):
        real = model.generate

        def one(**inputs):
            if len(sizes) == sizes.breaks_behind:
                raise KeyboardInterrupt
            sizes.append(len(inputs["input_ids"]))
            return real(**inputs)

        model.generate = one
        return generate(model, *args, **kwargs)

    monkeypatch.setattr(engines, "generate", counted)
    return sizes


def test_cut_off_it_draws_what_is_missing(files, batches, capsys):
    sample.main(options(files, "whole.jsonl"))
    drawn = sum(len(row["completions"]) for row in read_jsonl(files / "whole.jsonl"))
    whole = list(batches)
    assert sum(whole) == drawn
    assert len(whole) >= 4

    batches.clear()
    batches.breaks_behind = 3
    with pytest.raises(KeyboardInterrupt):
        sample.main(options(files, "out.jsonl"))
    assert not (files / "out.jsonl").exists()
    journal = files / ".out.jsonl.part"
    with journal.open("rb+") as file:  # as a kill inside a write leaves it
        file.truncate(journal.stat().st_size - 9)
    batches.breaks_behind = 99
    batches.clear()
    sample.main(options(files, "out.jsonl"))
    assert batches == whole[2:]
    assert (files / "out.jsonl").read_bytes() == (files / "whole.jsonl").read_bytes()
    assert not journal.exists()
    assert f" {drawn}/{drawn} " in capsys.readouterr().err

    batches.clear()
    sample.main(options(files, "out.jsonl"))
    assert batches == []
    assert "out.jsonl is finished" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"k_max": 3},
        {"max_new_tokens": 4},
        {"temperature": 0.5},
        {"batch_size": 5},
        {"dtype": "bfloat16"},
    ],
)
def test_with_other_settings_it_begins_anew(files, batches, monkeypatch, caplog, change):
    monkeypatch.setattr(sample, "_rankable", lambda *args: 1 / 0)  # breaks behind the last batch
    with pytest.raises(ZeroDivisionError):
        sample.main(options(files, "out.jsonl"))
    parts = len(batches)
    monkeypatch.undo()
    sample.main(options(files, "out.jsonl", **change))
    assert f"{parts} parts were made from other data, models or settings" in caplog.text
    kept = (files / "out.jsonl").read_bytes()
    if "seed" in change:
        sample.main(options(files, "alone.jsonl", **change))
        assert kept == (files / "alone.jsonl").read_bytes()
        sample.main(options(files, "out.jsonl", overwrite=True))  # finished, but with another seed
        assert kept != (files / "out.jsonl").read_bytes()


def test_with_other_rows_or_another_model_it_begins_anew(files, causal_lm, batches):
    for change in (
        lambda: None,
        lambda: write_jsonl(files / "prompts.jsonl", [{"prompt": p} for p in PROMPTS[:5]]),
        lambda: causal_lm.save_pretrained(files / "sft"),  # trained again
    ):
        change()
        batches.clear()
        if (files / "out.jsonl").exists():
            kept = (files / "out.jsonl").read_bytes()
            with pytest.raises(UserError, match=r"output: .*out\.jsonl is finished, of other rows.*--overwrite"):
                sample.main(options(files, "out.jsonl"))
            assert (files / "out.jsonl").read_bytes() == kept
        assert not batches
        sample.main(options(files, "out.jsonl", overwrite=True))
        assert batches


def test_a_file_of_others_is_not_written_over(files):
    """The prompts themselves, and what another command or a person wrote; its own file is drawn anew."""
    before = (files / "prompts.jsonl").read_bytes()
    with pytest.raises(UserError, match="is also read; choose another name"):
        sample.main(options(files, "prompts.jsonl"))
    with pytest.raises(UserError, match="nothing is written as a table"):
        sample.main(options(files, "answers.csv"))
    write_jsonl(files / "mine.jsonl", [{"prompt": "by hand"}])
    with pytest.raises(UserError, match=r"mine\.jsonl is there, and this command did not write it"):
        sample.main(options(files, "mine.jsonl"))
    assert (files / "prompts.jsonl").read_bytes() == before
    assert read_jsonl(files / "mine.jsonl") == [{"prompt": "by hand"}]
    for k_max in (2, 3):
        sample.main(options(files, "drawn.jsonl", k_max=k_max, overwrite=True))
    assert max(len(row["completions"]) for row in read_jsonl(files / "drawn.jsonl")) == 3


@pytest.mark.parametrize(("cut", "is_told"), [([True, True, False], True), ([True, False, False], False)])
def test_completions_without_an_end_are_told_of_if_most_have_none(cut, is_told, caplog):
    drawn = [Completion(text=f"text {i}", ids=[i], truncated=is_cut) for i, is_cut in enumerate(cut)]
    (row,) = sample._rankable(Dataset.from_list([{"prompt": "p"}]), [3], drawn, 2)
    assert row["truncated"] == cut
    assert ("2 of 3 completions run into max_new_tokens and have no end" in caplog.text) is is_told
