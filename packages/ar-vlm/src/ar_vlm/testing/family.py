"""What is special to a family of small models."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        tokens: special tokens under the names the processor knows them by.
        mark: what stands for an image in a chat.
        image: tokens that the model's features replace, by the name in `tokens`.
        processor: options of the processor.
        pictures: options of the image processor.
        config: where the configuration departs from that of `ar_tuner.testing.tiny_config`.
        kind: type of the model, where it is not the family's name.
        parts: names of the classes of processor and image processor, where Transformers has none
            for the type.
        torchvision: its image processor needs torchvision.
    """

    tokens: dict[str, str]
    mark: str
    image: str = "image_token"
    processor: dict[str, Any] = field(default_factory=dict)
    pictures: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    kind: str = ""
    parts: tuple[str, str] | None = None
    torchvision: bool = False


SQUARE = {"height": 56, "width": 56}
CLIP = {"vision_config": {"image_size": 56, "patch_size": 14}}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
