"""JSONL files, and that reading and writing them loads nothing heavy."""

import json
import subprocess
import sys

import pytest

from prefopt.inference.jsonl import read_jsonl, write_jsonl


@pytest.mark.parametrize("module", ["jsonl", "journal"])
def test_a_file_is_written_without_torch(module):
    heavy = ("torch", "transformers", "datasets", "peft", "trl", "numpy")
    code = f"import sys, prefopt.inference.{module}; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_jsonl_round_trip_and_errors(tmp_path):
    rows = [{"text": "line\u2028separator\nand <é>"}, {"n": [1, None]}]
    path = tmp_path / "new" / "rows.jsonl"
    write_jsonl(path, rows)
    assert read_jsonl(path) == rows
    path.write_text('{"a": 1}\n\n{"a": \n', encoding="utf-8")
    with pytest.raises(ValueError, match="line 3: not valid JSON"):
        read_jsonl(path)
    path.write_text("[1]\n", encoding="utf-8")
    with pytest.raises(ValueError, match="line 1: expected a JSON object, got list"):
        read_jsonl(path)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [{"a": 1}])
    with pytest.raises(TypeError):
        write_jsonl(path, [{"a": 2}, {"a": object()}])
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]
