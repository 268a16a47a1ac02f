"""End-to-end distillation: rounding, scales and norm gains against the float model's logits."""

from ar_tuner.distill.stage import Distill

__all__ = ["Distill"]
