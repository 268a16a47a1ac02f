"""For authors of model families: tiny random models of every type that Transformers can build.

record = check_family("qwen3_next")
assert record.failed is None, record.error
"""

from ar_tuner.testing.checkpoints import in_tiles
from ar_tuner.testing.family import STEPS, Record, check_family
from ar_tuner.testing.images import image_batch
from ar_tuner.testing.known import read_known, surprise
from ar_tuner.testing.tiny import (
    CannotBuildError,
    image_text_types,
    text_types,
    tiny_config,
    tiny_model,
    tiny_rows,
)

__all__ = [
    "STEPS",
    "CannotBuildError",
    "Record",
    "check_family",
    "image_batch",
    "image_text_types",
    "in_tiles",
    "read_known",
    "surprise",
    "text_types",
    "tiny_config",
    "tiny_model",
    "tiny_rows",
]
