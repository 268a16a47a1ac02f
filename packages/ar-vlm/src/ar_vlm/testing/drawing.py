"""Pictures that are drawn, and chats about what is on them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

COLORS = {
    "red": (200, 30, 30),
    "green": (30, 160, 60),
    "blue": (40, 70, 200),
    "yellow": (230, 200, 40),
    "black": (20, 20, 20),
    "white": (240, 240, 240),
}
SHAPES = ("circle", "square")
NUMBERS = ("no", "one", "two", "three", "four")


def draw_picture(number: int) -> tuple[Image, str]:
    """Return a picture of some shapes, and what is on it; a function of the number."""
    from PIL import Image, ImageDraw

    chance = random.Random(number)  # noqa: S311 - a drawing, not a secret
    paper, ink = chance.sample(list(COLORS), 2)
    shape, count = chance.choice(SHAPES), chance.randint(1, 4)
    width, height = chance.choice([(96, 80), (80, 80), (112, 80)])
    image = Image.new("RGB", (width, height), COLORS[paper])
    pen = ImageDraw.Draw(image)
    for _ in range(count):
        x, y = chance.randint(0, width - 30), chance.randint(0, height - 30)
        box = [x, y, x + 25, y + 25]
        (pen.ellipse if shape == "circle" else pen.rectangle)(box, fill=COLORS[ink])
    plural = "" if count == 1 else "s"
    return image, f"{NUMBERS[count]} {ink} {shape}{plural} on {paper} paper"


def write_samples(folder: str | Path, count: int, *, first: int = 0, size: int = 0) -> Path:
    """Write drawn pictures and a JSONL file of chats about them, and return that file.

    Args:
        folder: made if it is not there.
        count: chats, of one picture each but for every fourth, which has two.
        first: number of the first picture.
        size: pixels that pictures are scaled to in width and height; 0: as drawn, in several sizes.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(first, first + count):
        told = []
        parts: list[dict[str, Any]] = []
        for which in range(2 if number % 4 == 3 else 1):  # noqa: PLR2004
            image, words = draw_picture(number * 10 + which)
            name = f"{number}-{which}.png"
            (image.resize((size, size)) if size else image).save(folder / name)
            parts.append({"type": "image", "path": name})
            told.append(words)
        question = "what is in the image?" if len(parts) == 1 else "what is in the images?"
        messages = [
            {"role": "user", "content": [*parts, {"type": "text", "text": question}]},
            {"role": "assistant", "content": [{"type": "text", "text": " and ".join(told)}]},
        ]
        lines.append(json.dumps({"messages": messages}))
    file = folder / "samples.jsonl"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file
