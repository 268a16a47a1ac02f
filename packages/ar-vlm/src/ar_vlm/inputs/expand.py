"""An image processor and a tokenizer as one: the image token is repeated for every image feature.

For models whose processor class cannot be loaded. The number of features comes from what the image
processor gives: a grid of patches, or the size of the image; else from the configuration.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

_COUNTS = ("image_seq_length", "image_seq_len", "mm_tokens_per_image", "num_image_tokens")
"""Names under which configurations say how many tokens one image has."""
_MARKS = ("image_token_id", "image_token_index")


@dataclass(frozen=True)
class Pair:
    """Takes text and images like a processor.

    Attributes:
        image_processor, tokenizer: the parts.
        image_token: what stands for an image in the text.
        count: tokens per image where nothing else says; None: unknown.
        row: (pixels per token in height and width, token that ends a row, token that ends the
            image), for models that mark the rows of an image; else None.
        marked: the model is told which tokens are of images (`mm_token_type_ids`).
    """

    image_processor: Any
    tokenizer: Any
    image_token: str
    count: int | None = None
    row: tuple[int, str, str] | None = None
    marked: bool = False

    @classmethod
    def of(
        cls, image_processor: Any, tokenizer: Any, config: Any, settings: Mapping[str, Any]
    ) -> Pair:
        """Return the pair for a model.

        Args:
            image_processor, tokenizer: the parts.
            config: configuration of the model.
            settings: processor_config.json, which may be empty.

        Raises:
            ValueError: the configuration names no image token.
        """
        mark = next((v for n in _MARKS if isinstance(v := getattr(config, n, None), int)), None)
        if mark is None:
            msg = f"the configuration of {config.model_type} names no image token"
            raise ValueError(msg)
        counts = [settings.get(n) or getattr(config, n, None) for n in _COUNTS]
        return cls(
            image_processor,
            tokenizer,
            tokenizer.convert_ids_to_tokens(mark),
            next((c for c in counts if isinstance(c, int)), None),
            _row(tokenizer, config, settings),
            hasattr(image_processor, "merge_size"),
        )

    @property
    def chat_template(self) -> str | None:
        """The template of the tokenizer."""
        found: str | None = getattr(self.tokenizer, "chat_template", None)
        return found

    def __call__(
        self, *, text: list[str], images: Sequence[Any], **options: Any
    ) -> dict[str, Tensor]:
        """Return the inputs of one text and its images, `[1, T]` token ids among them.

        Raises:
            ValueError: another number of image tokens than of images, or nothing says how many
                tokens an image has.
        """
        options.pop("return_tensors", None)
        given = {"patch_size": self.row[0]} if self.row is not None else {}
        seen = dict(self.image_processor(images=list(images), return_tensors="pt", **given))
        pieces = text[0].split(self.image_token)
        if len(pieces) != len(images) + 1:
            msg = f"{len(pieces) - 1} {self.image_token} in the text for {len(images)} images"
            raise ValueError(msg)
        whole = pieces[0]
        for index, piece in enumerate(pieces[1:]):
            whole += self._tokens(seen, index) + piece
        found = dict(self.tokenizer([whole], return_tensors="pt", **options))
        if self.marked:
            mark = self.tokenizer.convert_tokens_to_ids(self.image_token)
            found["mm_token_type_ids"] = (found["input_ids"] == mark).to(torch.int64)
        return {**found, **seen}

    def _tokens(self, seen: Mapping[str, Any], index: int) -> str:
        grids, sizes = seen.get("image_grid_thw"), seen.get("image_sizes")
        if grids is not None:
            merge = int(getattr(self.image_processor, "merge_size", 1)) ** 2
            return self.image_token * (int(torch.as_tensor(grids[index]).prod()) // merge)
        if sizes is not None and self.row is not None:
            pixels, end_row, end = self.row
            height, width = (int(n) // pixels for n in sizes[index])
            rows = [self.image_token * width] * height
            return end_row.join(rows) + end
        if self.count is not None:
            return self.image_token * (self.count * _tiles(seen, index))
        msg = "neither the image processor nor the configuration says how many tokens an image has"
        raise ValueError(msg)


def _tiles(seen: Mapping[str, Any], index: int) -> int:
    patches = seen.get("num_patches", seen.get("num_crops"))
    return 1 if patches is None else int(patches[index])


def _row(tokenizer: Any, config: Any, settings: Mapping[str, Any]) -> tuple[int, str, str] | None:
    """Return how rows of an image end, for the models whose tokenizer has tokens for that."""
    ends = [settings.get(k, v) for k, v in _ROW_ENDS.items()]
    known = tokenizer.get_vocab()
    patch = settings.get("patch_size") or getattr(
        getattr(config, "vision_config", None), "patch_size", None
    )
    if not all(end in known for end in ends) or not isinstance(patch, int):
        return None
    merge = settings.get("spatial_merge_size") or getattr(config, "spatial_merge_size", None) or 1
    return patch * merge, ends[0], ends[1]


_ROW_ENDS = {"image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"}
