"""Pictures that samples refer to; they are opened when their turn comes."""

from __future__ import annotations

import base64
import binascii
import io
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ar_vlm.errors import VlmError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from PIL.Image import Image

SUFFIXES = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"))
MOVING = frozenset((".apng", ".gif", ".tif", ".tiff", ".webp"))
"""Files whose frames Pillow reads."""
FRAMES = 8
"""Frames taken of a video, evenly spread."""
TIMEOUT = 30.0
"""Seconds that one image may take to come over the network."""


@dataclass(frozen=True)
class Picture:
    """One image.

    Attributes:
        source: a file, encoded bytes, an image of Pillow, or an address to fetch.
        frame: which one of a file that holds several.
    """

    source: Path | bytes | str | Image
    frame: int = 0

    def open(self) -> Image:
        """Return the image in RGB.

        Raises:
            VlmError: it cannot be read.
        """
        from PIL import Image as images
        from PIL import UnidentifiedImageError

        source = self.source
        try:
            if isinstance(source, images.Image):
                return source.convert("RGB")
            if isinstance(source, str):
                source = _fetched(source)
            with images.open(io.BytesIO(source) if isinstance(source, bytes) else source) as found:
                found.seek(self.frame)
                return found.convert("RGB")
        except (OSError, EOFError, ValueError, UnidentifiedImageError) as error:
            msg = f"image {self} cannot be read: {error}"
            raise VlmError(msg) from error

    @property
    def missing(self) -> bool:
        """True for a file that is not there."""
        return isinstance(self.source, Path) and not self.source.is_file()

    def __str__(self) -> str:
        if isinstance(self.source, (str, Path)):
            return repr(str(self.source)[:200])
        return f"of {len(self.source)} bytes" if isinstance(self.source, bytes) else "in memory"


@dataclass(frozen=True)
class Places:
    """Where the images of a file of samples lie.

    Attributes:
        folders: tried one after the other for a relative name.
        fetch: addresses may be fetched over the network.
        base: address that names are put behind which are in no folder.
    """

    folders: tuple[Path, ...] = ()
    fetch: bool = False
    base: str | None = None

    def picture(self, value: Any) -> Picture:
        """Return the image that a value of a record means.

        A path, a `file://` or `data:` address, encoded bytes, a mapping that holds one of these
        (as `datasets` gives), or an image of Pillow.

        Raises:
            VlmError: an address without consent to fetch it, or no image at all.
        """
        from PIL.Image import Image

        if isinstance(value, Image):
            return Picture(value)
        if isinstance(value, bytes):
            return Picture(value)
        if isinstance(value, Path):
            return Picture(self._file(str(value)))
        if isinstance(value, dict):
            return self.picture(_named(value, ("bytes", "path", "url", "image")))
        if not isinstance(value, str) or not value.strip():
            msg = f"{type(value).__name__} {str(value)[:60]!r} is no image: give the path of a file"
            raise VlmError(msg)
        return self._named(value.strip())

    def frames(self, value: Any, count: int = FRAMES) -> list[Picture]:
        """Return at most `count` images of a video, evenly spread.

        A list of images, a folder of them, or a file whose frames Pillow reads.

        Raises:
            VlmError: none of these.
        """
        if isinstance(value, dict):
            value = _named(value, ("frames", "path", "video"))
        if isinstance(value, (list, tuple)):
            return _spread([self.picture(v) for v in value], count)
        path = self._file(str(value).removeprefix("file://"))
        if path.is_dir():
            files = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
            return _spread([Picture(p) for p in files], count)
        if path.suffix.lower() not in MOVING:
            msg = (
                f"video {str(value)!r}: give its frames as images (a list, or a folder of them), "
                f"or a file of the kinds {', '.join(sorted(MOVING))}"
            )
            raise VlmError(msg)
        return _spread([Picture(path, i) for i in range(_length(path))], count)

    def _named(self, name: str) -> Picture:
        if name.startswith("data:"):
            return Picture(_decoded(name))
        if name.startswith(("http://", "https://")):
            if not self.fetch:
                msg = (
                    f"image {name[:120]!r} is on the network: allow downloads to fetch it "
                    "(--allow-download), or name a local folder of images"
                )
                raise VlmError(msg)
            return Picture(name)
        picture = Picture(self._file(name.removeprefix("file://")))
        if self.base is not None and picture.missing:
            return self._named(self.base + name)
        return picture

    def _file(self, name: str) -> Path:
        """Return the file of a name: as it stands, or in a folder, there or not."""
        path = Path(name).expanduser()
        if path.is_absolute():
            return path
        tried = [folder / path for folder in self.folders]
        tried += [folder / path.name for folder in self.folders if len(path.parts) > 1]
        return next((p for p in tried if p.exists()), tried[0] if tried else path)


def _spread(pictures: Sequence[Picture], count: int) -> list[Picture]:
    if len(pictures) <= count:
        return list(pictures)
    return [pictures[i * len(pictures) // count] for i in range(count)]


def _length(path: Path) -> int:
    """Return how many frames a file holds; one that is not there has one, which is missing."""
    from PIL import Image, UnidentifiedImageError

    if not path.is_file():
        return 1
    try:
        with Image.open(path) as found:
            for number in itertools.count(1):
                try:
                    found.seek(number)
                except EOFError:
                    return number
    except (OSError, UnidentifiedImageError) as error:
        msg = f"video {str(path)!r} cannot be read: {error}"
        raise VlmError(msg) from error
    raise AssertionError


def _named(value: Mapping[str, Any], keys: Sequence[str]) -> Any:
    found = next((value[key] for key in keys if value.get(key) is not None), None)
    if found is None:
        msg = (
            f"a picture or video with the fields {', '.join(map(str, value))} says not where it is"
        )
        raise VlmError(msg)
    return found


def _decoded(address: str) -> bytes:
    try:
        return base64.b64decode(address.partition(",")[2], validate=True)
    except binascii.Error as error:
        msg = f"image {address[:40]!r}... is no base64: {error}"
        raise VlmError(msg) from error


def _fetched(address: str) -> bytes:
    import urllib.request

    with urllib.request.urlopen(address, timeout=TIMEOUT) as answer:  # noqa: S310 - http(s) only
        body: bytes = answer.read()
    return body
