"""Model inputs of samples: token ids beside pixels, through the model's own processor."""

from ar_vlm.inputs.build import Built, Inputs
from ar_vlm.inputs.processors import load_processor

__all__ = ["Built", "Inputs", "load_processor"]
