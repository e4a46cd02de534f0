"""Sides of a split: the right shares, and users with many rows as well as with few on each of them."""

from statistics import mean

import pytest

from prefopt.rankings.splits import split_by_key

SHARES = {"train": 0.9, "validation": 0.05, "test": 0.05}


@pytest.mark.parametrize("seed", [0, 1])
def test_held_out_users_have_as_many_rows_as_others(seed):
    sizes = [1, 1, 1, 2, 3, 4, 6, 14] * 125  # 4 on average, none near the 100 of half a held-out side
    rows = [{"user": user, "prompt": "p"} for user, size in enumerate(sizes) for _ in range(size)]
    sides = split_by_key(rows, "user", SHARES, seed)
    assert sorted(i for side in sides.values() for i in side) == list(range(len(rows)))
    users = {side: {rows[i]["user"] for i in positions} for side, positions in sides.items()}
    assert sum(map(len, users.values())) == len(sizes)
    for side, share in SHARES.items():
        assert len(sides[side]) == pytest.approx(share * len(rows), abs=14)
        assert mean(sizes[user] for user in users[side]) == pytest.approx(4, abs=1.7)


def test_a_user_with_most_rows_does_not_spoil_the_shares():
    sizes = [500, 400, *[1] * 100]
    rows = [{"user": user, "prompt": "p"} for user, size in enumerate(sizes) for _ in range(size)]
    for seed in range(5):
        sides = split_by_key(rows, "user", SHARES, seed)
        assert [len(side) for side in sides.values()] == [900, 50, 50]
