"""Samples to model inputs, and those of equal shapes to batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from ar_vlm.errors import VlmError
from ar_vlm.inputs.processors import load_processor
from ar_vlm.inputs.text import Way, rendered

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from torch import Tensor

    from ar_vlm.samples.sample import Sample

Batch: TypeAlias = dict[str, "Tensor"]
Maker: TypeAlias = Callable[["Sample"], Mapping[str, Any]]
LEAST = 2
"""Tokens below which a sample says nothing: there is no second one to predict."""


@dataclass(frozen=True)
class Built:
    """The inputs of one sample.

    Attributes:
        inputs: keyword arguments of the model's forward; token ids are [1, T].
        way: how its chat became text.
        cut: tokens left out at its end.
    """

    inputs: Batch
    way: Way
    cut: int = 0

    @property
    def tokens(self) -> int:
        """Number of token ids."""
        return self.inputs["input_ids"].shape[1]

    @property
    def seen(self) -> bool:
        """True for a sample with images."""
        return len(self.inputs) > 1 and any(k not in _SEQUENCE for k in self.inputs)


_SEQUENCE = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


@dataclass(frozen=True)
class Inputs:
    """Builds model inputs of samples.

    Attributes:
        processor: takes text with marks and images; None where `maker` is given.
        maker: a user's own way from a sample to model inputs; rows of token ids are [1, T].
        seqlen: tokens beyond which text is cut; what belongs to an image never is.
    """

    processor: Any = None
    maker: Maker | None = None
    seqlen: int | None = None

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        processor: Any = None,
        seqlen: int | None = None,
        trust_remote_code: bool = False,
    ) -> Inputs:
        """Return the builder for a checkpoint.

        Args:
            path: its directory.
            processor: a processor to use instead, or a function from a `Sample` to model inputs.
            seqlen: tokens beyond which text is cut.
            trust_remote_code: code in the checkpoint may run.

        Raises:
            VlmError: no processor can be loaded.
        """
        if processor is None:
            processor = load_processor(path, trust_remote_code=trust_remote_code)
        if callable(processor) and not hasattr(processor, "tokenizer"):
            return cls(maker=processor, seqlen=seqlen)
        return cls(processor, seqlen=seqlen)

    def build(self, sample: Sample) -> Batch:
        """Return the keyword arguments of the model's forward for one sample, ids [1, T].

        Raises:
            VlmError: the processor does not take it, or an image cannot be read.
        """
        return self.built(sample).inputs

    def built(self, sample: Sample) -> Built:
        """Return the inputs of one sample, and how they came about.

        Raises:
            VlmError: see `build`.
        """
        if self.maker is not None:
            return self._checked(self.maker(sample), "given")
        text, way = rendered(sample, self.processor)
        bos = getattr(self.processor.tokenizer, "bos_token", None)
        options = {"add_special_tokens": not (bos and text.startswith(bos))}
        images = sample.images()
        try:
            if not images:
                ids = self.processor.tokenizer([text], verbose=False, **options)["input_ids"]
                return self._checked({"input_ids": torch.tensor(ids)}, way)
            made = self.processor(text=[text], images=images, return_tensors="pt", **options)
        except (ValueError, TypeError, KeyError, IndexError, RuntimeError) as error:
            reason = str(error).strip().partition("\n")[0][:200] or type(error).__name__
            msg = f"a sample with {len(images)} images is not taken by the processor: {reason}"
            raise VlmError(msg) from error
        return self._checked(made, way)

    def batches(self, samples: Sequence[Sample], *, size: int = 8) -> Iterator[Batch]:
        """Yield batches of at most `size` samples of equal shapes, in the order of their first.

        Samples whose images or texts differ in shape do not share a batch, so nothing is padded.

        Raises:
            VlmError: see `build`.
        """
        yield from joined([self.build(sample) for sample in samples], size=size)

    def _checked(self, made: Mapping[str, Any], way: Way) -> Built:
        tensors = {k: v for k, v in made.items() if isinstance(v, torch.Tensor) and k != "labels"}
        ids = tensors.get("input_ids")
        if ids is None or ids.ndim != 2 or ids.shape[0] != 1:  # noqa: PLR2004
            msg = "inputs of a sample must hold input_ids [1, T]"
            raise VlmError(msg)
        if ids.shape[1] < LEAST:
            msg = f"a sample of {ids.shape[1]} tokens is empty"
            raise VlmError(msg)
        if self.seqlen is None or ids.shape[1] <= self.seqlen:
            return Built(tensors, way)
        return self._cut(tensors, way)

    def _cut(self, tensors: Batch, way: Way) -> Built:
        """Leave out the end of the text, but nothing that belongs to an image."""
        assert self.seqlen is not None
        length, end = tensors["input_ids"].shape[1], self.seqlen
        marks = self._marks()
        if marks:
            found = torch.isin(tensors["input_ids"][0], torch.tensor(marks)).nonzero()
            end = max(end, int(found.max()) + 2) if len(found) else end  # and what ends the image
        elif any(k not in _SEQUENCE for k in tensors):
            return Built(tensors, way)
        if end >= length:
            return Built(tensors, way)

        def cut(value: Tensor) -> Tensor:
            along = value.ndim > 1 and value.shape[:2] == (1, length)
            return value[:, :end] if along and not value.is_floating_point() else value

        return Built({k: cut(v) for k, v in tensors.items()}, way, length - end)

    def _marks(self) -> list[int]:
        """Return the ids of tokens that stand for images."""
        tokenizer = getattr(self.processor, "tokenizer", None)
        names = [getattr(self.processor, n, None) for n in ("image_token", "video_token")]
        ids = [getattr(self.processor, n, None) for n in ("image_token_id", "image_ids")]
        known = [i for i in ids if isinstance(i, int)]
        known += [j for i in ids if isinstance(i, (list, tuple)) for j in i if isinstance(j, int)]
        if tokenizer is not None:
            known += [tokenizer.convert_tokens_to_ids(n) for n in names if isinstance(n, str)]
        return sorted({i for i in known if isinstance(i, int)})


def joined(parts: Sequence[Batch], *, size: int) -> Iterator[Batch]:
    """Yield inputs of equal keys, shapes and types as batches of at most `size`."""
    groups: dict[tuple[Any, ...], list[Batch]] = {}
    for part in parts:
        shape = tuple((k, tuple(v.shape), v.dtype) for k, v in sorted(part.items()))
        groups.setdefault(shape, []).append(part)
    for group in groups.values():
        for start in range(0, len(group), size):
            some = group[start : start + size]
            yield {k: torch.cat([part[k] for part in some]) for k in some[0]}
