"""Splitting a batch into forwards of bounded size: a partition, within the budget, as few as consecutive filling gives."""

import itertools
import random

import pytest
import torch

from prefopt.models.prefix.sharing import is_faster
from prefopt.trainers.ranked.splits import split_completions


def random_batch(rng, max_completions=6):
    """`[B, K, T]` ids and mask, `[B, K]` present: ragged, some prompts share nothing, some absent from the middle."""
    rows = []
    for _ in range(rng.randrange(1, 6)):
        prompt = [rng.randrange(3, 9) for _ in range(rng.choice((0, 1, 4, 12)))]
        rows.append(
            [
                prompt + [rng.randrange(3, 9) for _ in range(rng.randrange(1, 8))]
                for _ in range(rng.randrange(1, max_completions + 1))
            ]
        )
    k, t = max(map(len, rows)), max(len(ids) for row in rows for ids in row)
    ids, mask = torch.zeros(len(rows), k, t, dtype=torch.long), torch.zeros(len(rows), k, t, dtype=torch.long)
    for b, row in enumerate(rows):
        for i, x in enumerate(row):
            ids[b, i, : len(x)], mask[b, i, : len(x)] = torch.tensor(x), 1
    present = mask.any(-1)
    if rng.random() < 0.3:  # only a part of the completions is to be forwarded
        present &= torch.tensor([[rng.random() < 0.7 for _ in range(k)] for _ in rows])
    return ids, mask, present


def rows_of(ids, mask, cells):
    return [ids[b, k][mask[b, k].bool()].tolist() for b, k in cells]


def size_by_hand(ids, mask, cells, shares_prefixes):
    """Tokens that a forward of these completions takes, padding included."""
    by_prompt = {}
    for b, k in cells:
        by_prompt.setdefault(b, []).append(rows_of(ids, mask, [(b, k)])[0])
    every = [row for some in by_prompt.values() for row in some]
    packed = 0
    for some in by_prompt.values():
        shared = 0
        while len(some) > 1 and all(len(row) - 1 > shared and row[shared] == some[0][shared] for row in some):
            shared += 1
        packed += shared + sum(len(row) - shared for row in some)
    padded = len(every) * max(map(len, every))
    total = sum(map(len, every))
    return packed if shares_prefixes and is_faster(packed, total) else padded


def cells_of(mask):
    return [tuple(cell) for cell in mask.nonzero().tolist()]


@pytest.mark.parametrize("shares_prefixes", [True, False])
@pytest.mark.parametrize("budget", [1, 8, 20, 45, 100, 1000])
def test_forwards_partition_the_batch_within_the_budget(budget, shares_prefixes):
    rng = random.Random(budget)
    kinds = set()
    for _ in range(40):
        ids, mask, present = random_batch(rng)
        if not present.any():
            continue
        masks = split_completions(ids, mask, present, budget, shares_prefixes)
        assert torch.equal(sum(m.int() for m in masks), present.int())
        for m in masks:
            cells = cells_of(m)
            assert m.dtype == torch.bool
            assert cells
            size = size_by_hand(ids, mask, cells, shares_prefixes)
            assert size <= budget or len(cells) == 1
            prompts = {b for b, _ in cells}
            whole = all(torch.equal(m[b], present[b]) for b in prompts)
            assert whole or len(prompts) == 1
            if not whole:  # only a prompt that does not fit by itself is divided
                (b,) = prompts
                assert size_by_hand(ids, mask, [c for c in cells_of(present) if c[0] == b], shares_prefixes) > budget
            kinds.add((whole, len(prompts) > 1))
    expected = {1: {(False, False)}, 1000: {(True, True)}}.get(budget, set())
    assert kinds >= expected


@pytest.mark.parametrize("shares_prefixes", [True, False])
def test_neighboring_forwards_would_not_fit_together(shares_prefixes):
    rng, compared = random.Random(3), 0
    for _ in range(60):
        ids, mask, present = random_batch(rng)
        if not present.any():
            continue
        masks = split_completions(ids, mask, present, 30, shares_prefixes)
        for m, n in itertools.pairwise(masks):
            both_of_one = m.any(1).sum() == n.any(1).sum() == 1 and torch.equal(m.any(1), n.any(1))
            if both_of_one:  # parts of one prompt: the first item of the next did not fit
                longest = max(cells_of(n), key=lambda c: int(mask[c].sum()))
                added = [*cells_of(m), longest]
                assert size_by_hand(ids, mask, added, shares_prefixes) > 30
                compared += 1
    assert compared > 20


def test_a_large_budget_takes_one_forward():
    rng = random.Random(4)
    for _ in range(20):
        ids, mask, present = random_batch(rng)
        if present.any():
            for shares_prefixes in (True, False):
                masks = split_completions(ids, mask, present, 10**6, shares_prefixes)
                assert len(masks) == 1
                assert torch.equal(masks[0], present)


def test_the_budget_is_met_exactly():
    """Four prompts of two rows 4 + 3: packed 10 tokens each, as rows 14; budgets at and one below a multiple."""
    ids = torch.tensor([[[9, 8, 7, 6, k, b, 3] for k in (1, 2)] for b in range(4)])
    mask, present = torch.ones_like(ids), torch.ones(4, 2, dtype=torch.bool)
    for shares_prefixes, size in ((True, 10), (False, 14)):
        for budget, forwards in (
            (4 * size, 1),
            (4 * size - 1, 2),
            (2 * size, 2),
            (2 * size - 1, 4),
            (size, 4),
        ):
            assert len(split_completions(ids, mask, present, budget, shares_prefixes)) == forwards
        assert len(split_completions(ids, mask, present, size - 1, shares_prefixes)) == 8


def test_rows_that_share_too_little_count_as_padded():
    """One shared token in twenty saves less than a tenth, so they are forwarded as rows, padding included."""
    ids = torch.tensor([[[9] + [1] * 19, [9] + [2] * 9 + [0] * 10]])
    mask = (ids > 0).long()
    present = torch.ones(1, 2, dtype=torch.bool)
    assert len(split_completions(ids, mask, present, 29, True)) == 2  # packed: 29 tokens
    assert len(split_completions(ids, mask, present, 39, True)) == 2
    assert len(split_completions(ids, mask, present, 40, True)) == 1


def test_64_completions():
    rng = random.Random(5)
    prompt = [rng.randrange(3, 60) for _ in range(100)]
    rows = [prompt + [k] * rng.randrange(1, 30) for k in range(1, 65)]
    ids = torch.zeros(1, 64, 130, dtype=torch.long)
    for k, row in enumerate(rows):
        ids[0, k, : len(row)] = torch.tensor(row)
    mask, present = (ids > 0).long(), torch.ones(1, 64, dtype=torch.bool)
    total = 100 + sum(len(row) - 100 for row in rows)
    masks = split_completions(ids, mask, present, 300, True)
    assert torch.equal(sum(m.int() for m in masks), present.int())
    assert all(size_by_hand(ids, mask, cells_of(m), True) <= 300 for m in masks)
    assert -(-(total - 100) // 200) <= len(masks) <= 1 + (total - 100) // (200 - 29)


def test_prompts_of_similar_length_go_together():
    lengths = [3, 20, 4, 19]
    ids = torch.tensor([[[k] * n + [0] * (20 - n) for k in (1, 2)] for n in lengths])
    mask, present = (ids > 0).long(), torch.ones(4, 2, dtype=torch.bool)
    masks = split_completions(ids, mask, present, 80, False)
    assert [m.any(1).tolist() for m in masks] == [[False, True, False, True], [True, False, True, False]]


def test_completions_of_similar_length_go_together():
    lengths = [3, 20, 4, 19]
    ids = torch.tensor([[[5 + k] * n + [0] * (20 - n) for k, n in enumerate(lengths)]])
    masks = split_completions(ids, (ids > 0).long(), torch.ones(1, 4, dtype=torch.bool), 40, False)
    assert [m[0].tolist() for m in masks] == [[False, True, False, True], [True, False, True, False]]
