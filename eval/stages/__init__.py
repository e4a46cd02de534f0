"""The stages of an evaluation: one file and one entry here each, in the order they run and stand in the report."""

from prefopt.evaluation.run import Stage
from prefopt.evaluation.stages import (
    benchmarks,
    compare,
    diversity,
    drift,
    generate,
    judge,
    overoptimization,
    ratings,
    reward_model,
    tax,
)

STAGES: tuple[Stage, ...] = (
    generate.STAGE,
    judge.STAGE,
    compare.STAGE,
    ratings.STAGE,
    reward_model.STAGE,
    benchmarks.STAGE,
    tax.STAGE,
    drift.STAGE,
    diversity.STAGE,
    overoptimization.STAGE,
)
