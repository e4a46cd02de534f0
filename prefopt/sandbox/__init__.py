"""A closed small world with a known gold reward, to run the whole pipeline on in minutes."""

from prefopt.sandbox.corpus import Task
from prefopt.sandbox.gold import GoldScore
from prefopt.sandbox.labeling import FLAGS, Labeler, labelers
from prefopt.sandbox.model import build_model, build_tokenizer
from prefopt.sandbox.sentiment import SentimentWorld
from prefopt.sandbox.world import SPLIT_SIZES, World, demo_gold_reward

__all__ = [
    "FLAGS",
    "SPLIT_SIZES",
    "GoldScore",
    "Labeler",
    "SentimentWorld",
    "Task",
    "World",
    "build_model",
    "build_tokenizer",
    "demo_gold_reward",
    "labelers",
]
