"""The second-order solver: rounding that knows how errors of a layer's weights add up."""

from ar_tuner.algorithms.second_order.algorithm import SecondOrder
from ar_tuner.algorithms.second_order.knobs import Knobs
from ar_tuner.algorithms.second_order.polish import polish
from ar_tuner.algorithms.second_order.starting import starting_params

__all__ = ["Knobs", "SecondOrder", "polish", "starting_params"]
