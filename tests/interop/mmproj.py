"""Vision towers in mmproj files: what libmtmd makes of an image beside what Transformers makes.

    python tests/interop/mmproj.py make WORK [FAMILY...]     # where ar and Transformers are
    PYTHON tests/interop/mmproj.py read WORK                 # where llama-cpp-python is

`make` writes a small model of each family, its GGUF files and the features of a drawn image;
`read` encodes the same image from these files and prints the largest difference, relative to the
largest value. Random weights: it shows that tensors are in their places, not how well a model sees.

libmtmd puts the class token behind the patches, where Transformers has it before them, and so gives
every token its neighbour's position (and of llava drops the first patch in place of the class). For
families with such a token the features are also made in that order: `as libmtmd`.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

FAMILIES = (
    *("llava", "gemma3", "idefics3", "internvl", "mistral3"),
    *("qwen2_vl", "qwen2_5_vl", "qwen3_vl"),
)
SIDES = {"qwen3_vl": 96, "qwen2_vl": 84, "qwen2_5_vl": 84, "mistral3": 84}
SIDE = 56
CLASSED = ("llava", "internvl")
"""Families whose towers have a class token."""


def drawn(side: int) -> np.ndarray:
    """Return an image [side, side, 3] of bytes: two waves and a gradient."""
    y, x = np.mgrid[0:side, 0:side].astype(np.float32) / side
    parts = (np.sin(9 * x + 4 * y) * 0.5 + 0.5, np.cos(7 * y) * 0.5 + 0.5, (x + y) / 2)
    return (np.stack(parts, -1) * 255).astype(np.uint8)


def features(source: Path, image: np.ndarray, *, moved: bool = False) -> np.ndarray:
    """Return what the vision part of a model makes of an image: [tokens, hidden].

    Args:
        source: directory of the model.
        image: bytes [height, width, 3], as large as the model wants it.
        moved: the class token comes last, and tokens have the positions of that order.
    """
    import torch
    from PIL import Image
    from transformers import AutoImageProcessor, AutoModelForImageTextToText

    processor = AutoImageProcessor.from_pretrained(source)
    model = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32).eval()
    made = processor(images=[Image.fromarray(image)], return_tensors="pt", do_resize=False)
    if moved:
        move_class(model.model.vision_tower)
    wanted = ("pixel_values", "image_grid_thw", "image_sizes", "pixel_attention_mask")
    with torch.inference_mode():
        found = model.model.get_image_features(**{k: v for k, v in made.items() if k in wanted})
    found = getattr(found, "pooler_output", found)
    parts = found if isinstance(found, (list, tuple)) else [found]
    return np.concatenate([p.reshape(-1, p.shape[-1]).numpy() for p in parts])


def move_class(tower: Any) -> None:
    """Make a tower of Transformers order its tokens as libmtmd does."""
    embeddings = tower.embeddings
    table = getattr(embeddings, "position_embedding", None)
    positions = embeddings.position_embeddings if table is None else table.weight[None]

    def last(module: Any, args: Any, out: Any) -> Any:  # noqa: ARG001
        whole = out[0] if isinstance(out, tuple) else out
        rolled = (whole - positions).roll(-1, 1) + positions
        return (rolled, *out[1:]) if isinstance(out, tuple) else rolled

    def first(module: Any, args: Any, out: Any) -> Any:  # noqa: ARG001
        out.last_hidden_state = out.last_hidden_state.roll(1, 1)
        return out

    embeddings.register_forward_hook(last)
    if table is None:  # internvl drops the class token, wherever it is
        tower.encoder.register_forward_hook(first)


def make(work: Path, families: list[str]) -> None:
    """Write models, their GGUF files and the features of an image."""
    from ar_tuner import AutoRound
    from ar_vlm.testing import make_tiny

    for family in families:
        folder = work / family
        source = make_tiny(family, folder / "source")
        job = AutoRound(source, scheme="GGUF:Q8_0", recipe="rtn")
        job.quantize_and_save(folder / "gguf", "gguf:q8_0")
        image = drawn(SIDES.get(family, SIDE))
        np.save(folder / "image.npy", image)
        np.save(folder / "features.npy", features(source, image))
        if family in CLASSED:
            np.save(folder / "moved.npy", features(source, image, moved=True))


def encode(folder: Path, image: np.ndarray, shape: tuple[int, int]) -> np.ndarray | str:
    """Return what libmtmd makes of an image: [tokens, hidden], or what went wrong."""
    import llama_cpp
    from llama_cpp import mtmd_cpp as mtmd

    eyes = next(folder.glob("mmproj-*.gguf"))
    text = next(f for f in folder.glob("*.gguf") if f != eyes)
    params = llama_cpp.llama_model_default_params()
    model = llama_cpp.llama_model_load_from_file(str(text).encode(), params)
    if not model:
        return "llama.cpp does not load the text model"
    settings = mtmd.mtmd_context_params_default()
    settings.use_gpu, settings.n_threads, settings.warmup = False, 1, False
    context = mtmd.mtmd_init_from_file(str(eyes).encode(), model, settings)
    if not context:
        return "libmtmd does not load the mmproj file"
    height, width, _ = image.shape
    data = (ctypes.c_uint8 * image.size)(*image.tobytes())
    bitmap = mtmd.mtmd_bitmap_init(width, height, data)
    chunks = mtmd.mtmd_input_chunks_init()
    said = mtmd.mtmd_default_marker()
    prompt = mtmd.mtmd_input_text(said, len(said), False, True)
    bitmaps = (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap)
    if mtmd.mtmd_tokenize(context, chunks, ctypes.byref(prompt), bitmaps, 1):
        return "libmtmd does not take the image"
    out = []
    for i in range(mtmd.mtmd_input_chunks_size(chunks)):
        chunk = mtmd.mtmd_input_chunks_get(chunks, i)
        if mtmd.mtmd_input_chunk_get_type(chunk) != mtmd.MTMD_INPUT_CHUNK_TYPE_IMAGE:
            continue
        if mtmd.mtmd_encode_chunk(context, chunk):
            return "libmtmd does not encode the image"
        count = mtmd.mtmd_input_chunk_get_n_tokens(chunk)
        size = llama_cpp.llama_model_n_embd_inp(model)
        values = np.ctypeslib.as_array(mtmd.mtmd_get_output_embd(context), (count, size))
        out.append(values[:, : shape[1]].copy())
    return np.concatenate(out)


def difference(got: np.ndarray, wanted: np.ndarray) -> float | str:
    """Return the largest difference, relative; several pictures of the image are each compared."""
    if len(got) != len(wanted) and got.shape[0] % wanted.shape[0] == 0:
        parts = np.split(got, len(got) // len(wanted))
        return max(float(difference(part, wanted)) for part in parts)
    side = int(len(wanted) ** 0.5)
    if len(got) == len(wanted) + side - 1:  # Pixtral: a token between rows of patches
        got = np.delete(got, [(side + 1) * (i + 1) - 1 for i in range(side - 1)], 0)
    if got.shape != wanted.shape:
        return f"{list(got.shape)} instead of {list(wanted.shape)}"
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


def read(work: Path) -> None:
    """Encode every image and print the difference."""
    results: dict[str, Any] = {}
    for folder in sorted(p for p in work.iterdir() if (p / "features.npy").is_file()):
        wanted = np.load(folder / "features.npy")
        got = encode(folder / "gguf", np.load(folder / "image.npy"), wanted.shape)
        results[folder.name] = got if isinstance(got, str) else difference(got, wanted)
        if (folder / "moved.npy").is_file() and not isinstance(got, str):
            found = difference(got, np.load(folder / "moved.npy"))
            results[f"{folder.name}, as libmtmd"] = found
    sys.stdout.write(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    task, where, *rest = sys.argv[1:]
    if task == "make":
        make(Path(where), rest or list(FAMILIES))
    else:
        read(Path(where))
