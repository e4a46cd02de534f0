"""Measures of any stage, for tests of what is made of them."""

from prefopt.evaluation.results import Measures
from prefopt.evaluation.stages import STAGES, report

EVERY = Measures({name: one for stage in (*STAGES, report.STAGE) for name, one in stage.measures.items()})
measure = EVERY.record
