"""Small random vision-language models with processors, made on the spot, for tests and examples."""

from ar_vlm.testing.check import ImageRecord, check_images, missing_package
from ar_vlm.testing.drawing import draw_picture, write_samples
from ar_vlm.testing.families import FAMILIES
from ar_vlm.testing.tiny import make_model, make_tiny

__all__ = [
    "FAMILIES",
    "ImageRecord",
    "check_images",
    "draw_picture",
    "make_model",
    "make_tiny",
    "missing_package",
    "write_samples",
]
