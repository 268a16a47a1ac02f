"""LLaVA's sets on the Hugging Face hub, under the names auto-round knows them by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ar_tuner.calibration.optional import check_installed, load
from ar_vlm.errors import VlmError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ar_tuner.calibration.sources import Query

PATH = "liuhaotian/LLaVA-Instruct-150K"
COCO = "http://images.cocodataset.org/train2017/"
"""Where the images are that the records name."""


@dataclass(frozen=True)
class LlavaSet:
    """One file of LLaVA's instructions. It satisfies `DatasetSource`.

    Attributes:
        name: what a user types; `aliases` are other ways to say it.
        file: the file in the repository.
        image_base: address that names of images are put behind, where no folder holds them.
        shows_images: its records do.
    """

    name: str
    file: str
    aliases: tuple[str, ...] = ()
    image_base: str = COCO
    shows_images: bool = True

    def records(self, query: Query) -> Iterable[Any]:
        """Return the records, no more than `query.limit`.

        Raises:
            VlmError: no consent to download; while reading: what the hub answers.
            TunerError: `datasets` is not installed.
        """
        if not query.allow_download:
            msg = (
                f"calibration dataset {self.name!r} is on the Hugging Face hub: allow downloads to "
                "fetch it and its images (--allow-download)"
            )
            raise VlmError(msg)
        check_installed("datasets", f"calibration dataset {self.name!r}")
        return self._read(query)

    def _read(self, query: Query) -> Iterator[Any]:
        datasets = load("datasets", f"calibration dataset {self.name!r}")
        try:
            rows = datasets.load_dataset(PATH, data_files=self.file, split="train", streaming=True)
            for number, row in enumerate(rows):
                if number == query.limit:
                    return
                yield row
        except (OSError, ValueError, KeyError) as error:
            first = str(error).strip().partition("\n")[0] or type(error).__name__
            msg = f"calibration dataset {self.name!r} cannot be loaded: {first}"
            raise VlmError(msg) from error


SETS = (
    LlavaSet("llava_conv_58k", "conversation_58k.json"),
    LlavaSet(
        "llava_instruct_80k", "llava_instruct_80k.json", aliases=("llava", "liuhaotian/llava")
    ),
    LlavaSet("llava_instruct_150k", "llava_instruct_150k.json"),
)
