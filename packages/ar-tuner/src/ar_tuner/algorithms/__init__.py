"""Algorithms: from one block and its exact inputs to quantized weights."""

from ar_tuner.algorithms.base import Algorithm, BlockResult, BlockTask, Target, TuneSettings

__all__ = ["Algorithm", "BlockResult", "BlockTask", "Target", "TuneSettings"]
