"""For authors of model families: tiny random models of every type that Transformers can build."""

from ar_tuner.testing.tiny import (
    CannotBuildError,
    image_text_types,
    text_types,
    tiny_config,
    tiny_model,
    tiny_rows,
)

__all__ = [
    "CannotBuildError",
    "image_text_types",
    "text_types",
    "tiny_config",
    "tiny_model",
    "tiny_rows",
]
