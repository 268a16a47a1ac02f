"""Writes the vision tower and projector into a file of their own, losing nothing of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ar_export.errors import ExportError
from ar_export.gguf.metadata import add
from ar_export.gguf.mmproj.families import Family, metadata, processor_settings
from ar_export.gguf.rows import pairs_apart

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    import gguf
    from torch import Tensor

SOURCES = "ar.source.names"
"""Key of the names that the file's tensors have in the checkpoint, in the file's order."""
KEPT = "ar."
"""Begin of the names of tensors that llama.cpp has no use for; a reader gets them back."""
BREAK_ROW = "v.token_embd.img_break"
_CONV3D, _MATRIX = 5, 2
_F32, _F16 = 0, 1


class MmprojWriter:
    """Takes the tensors of the vision part and writes `mmproj-*.gguf`.

    Args:
        family: the model's family.
        config: its configuration with all defaults.
        path: of the file.
    """

    def __init__(self, family: Family, config: Mapping[str, Any], path: Path) -> None:
        import gguf

        self._family = family
        self._config = config
        self._names: list[str] = []
        self._half = False
        self._writer: gguf.GGUFWriter = gguf.GGUFWriter(path, "clip", use_temp_file=True)

    def takes(self, key: str) -> bool:
        """Tell whether a tensor of the checkpoint belongs here."""
        return self._family.tower.names_of(key) is not None

    def add(self, key: str, tensor: Tensor) -> None:
        """Take a tensor under its name in the checkpoint."""
        for name, part in self._parts(key, tensor):
            self._put(name, part, key)

    def add_break_row(self, row: Tensor) -> None:
        """Take the embedding of the token that ends a row of patches; Pixtral's only."""
        self._put(BREAK_ROW, row, "")

    def close(self, folder: Path, title: str) -> None:
        """Write the file.

        Args:
            folder: where the processor's settings lie.
            title: `general.name`.

        Raises:
            ExportError: the settings do not say how images are prepared.
        """
        processor = processor_settings(folder)
        kind = _F16 if self._half else _F32
        facts = metadata(self._family, self._config, processor, file_type=kind)
        self._writer.add_name(title)
        for key, value in facts.items():
            add(self._writer, key, value)
        self._writer.add_array(SOURCES, self._names)
        self._writer.write_header_to_file()
        self._writer.write_kv_data_to_file()
        self._writer.write_tensors_to_file()
        self._writer.close()

    def abort(self) -> None:
        """Let go of the file."""
        self._writer.close()

    def _parts(self, key: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        tower = self._family.tower
        names = tower.names_of(key)
        assert names is not None
        if not names:
            yield f"{KEPT}{key}", tensor
        elif tensor.ndim == _CONV3D:  # two frames at a time: a convolution for each
            if tensor.shape[2] != 2:  # noqa: PLR2004
                msg = f"{key}: llama.cpp takes two frames at a time, not {tensor.shape[2]}"
                raise ExportError(msg)
            yield names[0], tensor[:, :, 0]
            yield f"{names[0]}.1", tensor[:, :, 1]
        else:
            for name, part in zip(names, tensor.chunk(len(names)), strict=True):
                if tower.permuted and name.split(".")[-2] in ("attn_q", "attn_k"):
                    heads = int(self._config["vision_config"]["num_attention_heads"])
                    yield name, part[pairs_apart(part.shape[0], heads)]
                else:
                    yield name, part + tower.offsets.get(name, 0.0)

    def _put(self, name: str, tensor: Tensor, key: str) -> None:
        import gguf

        whole = tensor.ndim < _MATRIX or any(w in name for w in ("_embd", "norm", ".ln"))
        small = tensor.itemsize == 2 or name in self._family.tower.half  # noqa: PLR2004
        fits = small and not whole and bool((tensor.float().abs() < 65504).all())  # noqa: PLR2004
        data = tensor.detach().cpu().to(torch.float16 if fits else torch.float32)
        kind = gguf.GGMLQuantizationType.F16 if fits else gguf.GGMLQuantizationType.F32
        self._half |= fits
        self._names.append(key)
        self._writer.add_tensor(name, data.contiguous().numpy(), raw_dtype=kind)
