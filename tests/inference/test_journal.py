"""Rows that are computed once, and long computations that go on behind a kill."""

import json

import pytest

from prefopt.inference.journal import Journal, continued_rows, kept_rows
from prefopt.inference.jsonl import read_jsonl

ENTRIES = [[{"text": "a\nb \u2028 \ud800 é", "ids": [1]}], 0.1 + 0.2, None, {"x": [True, -0.0]}]


class Worker:
    """Computes the entries; counts them, and breaks behind so many."""

    def __init__(self, breaks_behind: int = 99) -> None:
        self.computed: list[int] = []
        self.breaks_behind = breaks_behind

    def entries(self, journal: Journal) -> list:
        return list(journal.entries(len(ENTRIES), self.compute))

    def rows(self, journal: Journal) -> list[dict]:
        return [{"entry": entry} for entry in self.entries(journal)]

    def compute(self, i: int) -> object:
        if len(self.computed) == self.breaks_behind:
            raise KeyboardInterrupt
        self.computed.append(i)
        return ENTRIES[i]


def test_a_journal_cut_at_any_byte_goes_on_behind_its_last_whole_entry(tmp_path, caplog):
    path = tmp_path / "journal"
    assert Worker().entries(Journal(path, "inputs")) == ENTRIES
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    assert len(lines) == 1 + len(ENTRIES)
    ends = [sum(map(len, lines[: n + 1])) for n in range(1, len(lines))]  # of each entry
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        caplog.clear()
        worker = Worker()
        assert worker.entries(Journal(path, "inputs")) == ENTRIES
        missing = [i for i, end in enumerate(ends) if end > cut]
        assert worker.computed == missing
        assert path.read_bytes() == whole
        half = cut not in (*ends, len(lines[0])) and cut > len(lines[0])
        assert ("half written" in caplog.text) == half


@pytest.mark.parametrize(
    "end", [b"\0" * 40 + b"\n", b'[1, "two runs wrote at once"]\n', b"3\n", b'"ab"\n', b"[1, 2, 3]\n"]
)
def test_a_line_that_is_not_the_next_entry_ends_the_journal(tmp_path, end):
    path = tmp_path / "journal"
    Worker().entries(Journal(path, "inputs"))
    whole = path.read_bytes()
    head, first, second, *rest = whole.splitlines(keepends=True)
    path.write_bytes(b"".join([head, first, second, end, *rest]))
    worker = Worker()
    assert worker.entries(Journal(path, "inputs")) == ENTRIES
    assert worker.computed == [2, 3]
    assert path.read_bytes() == whole


def test_a_journal_of_other_inputs_is_begun_anew_but_not_before_something_is_found(tmp_path, caplog):
    path = tmp_path / "journal"
    with pytest.raises(KeyboardInterrupt):
        Worker(breaks_behind=2).entries(Journal(path, {"seed": 1}))
    with pytest.raises(KeyboardInterrupt):
        Worker(breaks_behind=0).entries(Journal(path, {"seed": 2}))
    assert f"{path}: 2 parts were made from other data, models or settings" in caplog.text
    first = Worker()
    assert first.entries(Journal(path, {"seed": 1})) == ENTRIES
    assert first.computed == [2, 3]
    other = Worker()
    other.entries(Journal(path, {"seed": 2}))
    assert other.computed == [0, 1, 2, 3]


def test_rows_of_a_broken_computation_equal_those_of_a_whole_one(tmp_path):
    whole = continued_rows(tmp_path / "whole.jsonl", "inputs", Worker().rows)
    path = tmp_path / "rows.jsonl"
    with pytest.raises(KeyboardInterrupt):
        continued_rows(path, "inputs", Worker(breaks_behind=3).rows)
    assert [p.name for p in tmp_path.iterdir() if "rows" in p.name] == [".rows.jsonl.part"]
    worker = Worker()
    assert continued_rows(path, "inputs", worker.rows) == whole == read_jsonl(path)
    assert worker.computed == [3]
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert continued_rows(path, "inputs", Worker(breaks_behind=0).rows) == whole  # nothing is left to do
    assert not list(tmp_path.glob(".*"))


def test_finished_rows_outlive_a_computation_in_their_place_that_breaks(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = continued_rows(path, "first", Worker().rows)
    with pytest.raises(KeyboardInterrupt):
        continued_rows(path, "second", Worker(breaks_behind=2).rows)
    assert continued_rows(path, "first", Worker(breaks_behind=0).rows) == rows
    worker = Worker()
    continued_rows(path, "second", worker.rows)
    assert worker.computed == [2, 3]
    assert kept_rows(path, "first", lambda: [{"a": 1}]) == [{"a": 1}]
    assert json.loads(path.read_text()) == {"a": 1}
