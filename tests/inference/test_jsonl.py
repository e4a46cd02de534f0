"""JSONL files, and that reading and writing them loads nothing heavy."""

import gzip
import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest

from prefopt.errors import UserError
from prefopt.inference.jsonl import HOST, read_json, read_jsonl, write_jsonl


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


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    names = [
        f".a[1].jsonl.{HOST}-{gone.pid}.tmp",
        f".a[1].jsonl.{HOST}-{os.getppid()}.tmp",
        f".a[1].jsonl.{HOST}-x.tmp",
    ]
    names += [f".a[1].jsonl.other{HOST}-{gone.pid}.tmp", f".a[1].jsonl.x.{HOST}-{gone.pid}.tmp", ".a[1].jsonl.part"]
    for name in names:
        (tmp_path / name).write_text("x")
    write_jsonl(tmp_path / "a[1].jsonl", [{"a": 1}])
    assert {path.name for path in tmp_path.iterdir()} == {"a[1].jsonl", *names[1:]}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "No such file"),
        ("{", "not valid JSON"),
        ("[" * 100000, "nested too deeply"),
        ("[]", "expected a JSON object, got list"),
        ('{"a": 1}', "'b' is missing"),
        ("\ud800", "not valid JSON"),
        ('{"a": 1, "b": 2, "a": 3}', "the key 'a' stands twice"),
    ],
)
def test_a_json_file_that_is_not_what_it_should_be_is_named(tmp_path, content, said):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError, match=rf"x\.json: .*{said}"):
        read_json(path, "a", "b")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("[" * 100000, "nested too deeply"),
        ('{"a": [{"b": 1, "b": 1}]}', r"the key 'b' stands twice\); .*mend or remove"),
    ],
)
def test_a_row_that_cannot_be_meant_is_named(tmp_path, line, told):
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n' + line + "\n")
    with pytest.raises(UserError, match=rf"rows\.jsonl line 2: .*{told}"):
        read_jsonl(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("damage", ["cut", "no gzip", "checksum"])
def test_a_damaged_gzip_file_is_named(tmp_path, damage):
    whole = gzip.compress(b'{"a": 1}\n' * 1000)
    content = {"cut": whole[:-20], "no gzip": b'{"a": 1}', "checksum": whole[:-8] + b"\0" * 8}[damage]
    (tmp_path / "rows.jsonl.gz").write_bytes(content)
    with pytest.raises(UserError, match=r"rows\.jsonl\.gz: not a whole gzip file"):
        read_jsonl(tmp_path / "rows.jsonl.gz")


def test_a_file_of_other_content_stays_unless_it_may_be_replaced(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [{"a": 1}], replace=False)
    write_jsonl(path, [{"a": 1}], replace=False)
    with pytest.raises(UserError, match=r"rows\.jsonl is there already"):
        write_jsonl(path, [{"a": 2}], replace=False)
    assert read_jsonl(path) == [{"a": 1}]
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]
    write_jsonl(path, [{"a": 2}])
    assert read_jsonl(path) == [{"a": 2}]
    with pytest.raises(UserError, match="is a folder; name a file"):
        write_jsonl(tmp_path, [])


def test_what_parquet_has_and_json_has_not_is_written_or_named(tmp_path):
    moment = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    row = {"at": moment, "day": moment.date(), "hour": moment.time(), "spent": timedelta(seconds=1.5)}
    row |= {"price": Decimal("1.50"), "digest": b"\0\1", "nested": [{"at": moment}]}
    write_jsonl(tmp_path / "rows.jsonl", [row])
    assert read_jsonl(tmp_path / "rows.jsonl") == [
        {
            "at": "2026-01-02T03:04:05+00:00",
            "day": "2026-01-02",
            "hour": "03:04:05",
            "spent": 1.5,
            "price": 1.5,
            "digest": "AAE=",
            "nested": [{"at": "2026-01-02T03:04:05+00:00"}],
        }
    ]
    with pytest.raises(
        TypeError, match=r"other\.jsonl row 1: field 'image': object has no form in JSON; leave the field"
    ):
        write_jsonl(tmp_path / "other.jsonl", [row, {"prompt": "p", "image": [object()]}])


def test_a_link_that_leads_nowhere_is_not_written_over(tmp_path):
    (tmp_path / "link.jsonl").symlink_to("nowhere.jsonl")
    with pytest.raises(UserError, match=r"link\.jsonl is a link that leads nowhere"):
        write_jsonl(tmp_path / "link.jsonl", [{"a": 1}])
    assert (tmp_path / "link.jsonl").is_symlink()
