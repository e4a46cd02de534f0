"""The planned peak of a step is the one that the CPU allocator sees, on shapes that nobody has chosen."""

import random
from pathlib import Path

import pytest

from prefopt.memory_plan.steps import STEPS
from prefopt.models.prefix import sharing as prefix_sharing

TOLERANCE = 0.15


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.setattr(prefix_sharing, "MIN_SAVED_TOKENS", 64)  # as users have it; other tests share all prefixes
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import memory_plan_error

    return memory_plan_error


@pytest.fixture(scope="module")
def seed():
    return random.SystemRandom().randrange(10**6)


@pytest.mark.parametrize("step", STEPS)
def test_the_planned_peak_of_a_shape_drawn_now_is_the_measured_one(benchmark, seed, step):
    shape = benchmark.draw(step, random.Random(f"{step} {seed}"))
    print(f"seed {seed}: {shape}")
    found = benchmark.compare(shape)
    assert found["ratio"] == pytest.approx(1, abs=TOLERANCE), f"seed {seed}, {found}"
