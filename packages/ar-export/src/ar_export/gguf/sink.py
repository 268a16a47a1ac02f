"""The sink that writes one GGUF file; tensors wait in a scratch file, not in memory."""

from __future__ import annotations

import importlib.util
import math
from typing import TYPE_CHECKING, Any

import torch

from ar_export.errors import ExportError
from ar_export.folder import StagedFolder
from ar_export.formats.dtypes import config_dtype
from ar_export.gguf.architectures import architecture_of
from ar_export.gguf.metadata import add, heads, metadata, rope_factors
from ar_export.gguf.mix import FILE_TYPES, variant_of
from ar_export.gguf.mmproj.families import break_token, check_eyes, family_of
from ar_export.gguf.mmproj.writer import MmprojWriter
from ar_export.gguf.multimodal import WRAPPER, described, sees, text_key, text_of, wrapper_of
from ar_export.gguf.rows import reordered, row_order
from ar_export.gguf.tokenizer import write_tokenizer
from ar_export.side import copy_side_files, write_configs
from ar_kernels import layout
from ar_kernels.layouts.gguf import gguf_type

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import gguf
    from torch import Tensor

    from ar_export.sink import SinkRequest
    from ar_kernels import QuantizedWeight
    from ar_schemes import LayerPlan

QUANTIZATION_VERSION = 2
_ALIGNMENT = 32
_HEADER = 16_384
"""Bytes of keys, values and tensor names, about."""
_PER_TOKEN = 38
"""Bytes of one token: text, kind and its share of the merges (measured on BPE vocabularies)."""


class GgufSink:
    """Takes weights and makes a directory with one .gguf file, the config and the tokenizer."""

    def __init__(self, request: SinkRequest, variant: str) -> None:
        self._request = request
        self._variant = variant_of(request.plan, variant)
        self._config = text_of(request.config)
        self._arch = architecture_of(self._config)
        self._wrapper: dict[str, str] = {}
        self._eyes: MmprojWriter | None = None
        self._family = family_of(described(request.config)) if sees(request.config) else None
        self._folder = StagedFolder(request.output, overwrite=request.overwrite)
        self._folder.check()
        self._writer: gguf.GGUFWriter | None = None
        self._experts: dict[str, dict[int, Tensor]] = {}

    def put(self, name: str, weight: QuantizedWeight) -> None:
        """Take the weight of a layer (name without `.weight`)."""
        name = self._as_text(f"{name}.weight").removesuffix(".weight")
        found = self._arch.name_of(f"{name}.weight")
        kind = gguf_type(weight.spec)
        if found is None or kind is None:
            msg = f"{name}: GGUF has no place for {weight.spec}"
            raise ExportError(msg)
        self._keep_break(found[0], weight.dequantize)
        order = row_order(found[0], self._arch, self._config)
        placed = weight if order is None else reordered(weight, order)
        blocks = layout(f"gguf_{kind.lower()}").pack(placed)["blocks"]
        target, expert = found
        if expert is not None:
            blocks = self._stacked(target, expert, blocks.reshape(weight.shape[0], -1))
            if blocks.ndim == 2:  # noqa: PLR2004 - others of its layer are still to come
                return
        self._add(target, blocks, kind)

    def put_tensor(self, name: str, tensor: Tensor) -> None:
        """Take a tensor that stays as it is."""
        if self._family is not None and self._eyes_open().takes(name):
            self._eyes_open().add(name, tensor)
            return
        found = self._arch.name_of(self._as_text(name))
        if found is None:
            return
        target, expert = found
        self._keep_break(target, lambda: tensor)
        if expert is not None:
            tensor = self._stacked(target, expert, tensor)
            if tensor.ndim == 2:  # noqa: PLR2004 - others of its layer are still to come
                return
        order = row_order(target, self._arch, self._config)
        if self._arch.conv1d and tensor.ndim == 2 and "_embd" not in target:  # noqa: PLR2004
            tensor = tensor.t()
        if order is not None:
            tensor = tensor[order]
        if self._arch.norm_offset and target.endswith("norm.weight"):
            tensor = tensor.float() + self._arch.norm_offset
        kind = _float_kind(target, tensor.ndim, tensor.dtype)
        if kind == "F32":
            self._add(target, tensor.float(), kind)
        elif kind == "BF16":
            self._add(target, tensor.contiguous().view(torch.uint8), kind)
        else:
            self._add(target, tensor.half(), kind)

    def commit(self) -> Path:
        """Write the file, then make the directory visible at once."""
        request, folder = self._request, self._folder.path()
        waiting = sorted(self._experts)
        if waiting:
            msg = f"experts are missing for {', '.join(waiting[:4])}"
            raise ExportError(msg)
        if request.source is not None:
            copy_side_files(request.source, folder, request.config)
        if request.side is not None:
            request.side(folder)
        write_configs(folder, request.config, None)
        writer = self._open()
        for name, factors in rope_factors(self._config).items():
            self._add(name, torch.tensor(factors), "F32")
        write_tokenizer(
            writer,
            folder,
            vocab_size=int(self._config["vocab_size"]),
            architecture=self._arch.name,
        )
        for key, value in self._wrapper.items():
            writer.add_string(f"{WRAPPER}{key}", value)
        if self._eyes is not None:
            self._eyes.close(folder, _title(request.config, request.output))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return self._folder.commit()

    def abort(self) -> None:
        """Remove everything that was staged."""
        if self._writer is not None:
            self._writer.close()
        if self._eyes is not None:
            self._eyes.abort()
        self._folder.abort()

    def _stacked(self, target: str, expert: int, tensor: Tensor) -> Tensor:
        """Return all experts of a layer as [E, O, I] once they are there, else the one."""
        names = ("num_local_experts", "num_experts", "n_routed_experts")
        count = next((int(n) for n in map(self._config.get, names) if n), 0)
        here = self._experts.setdefault(target, {})
        here[expert] = tensor
        if len(here) < count:
            return tensor
        del self._experts[target]
        return torch.stack([here[i] for i in range(count)])

    def _as_text(self, key: str) -> str:
        """Return a name as that of a text model, and note what stands for its beginning."""
        if self._family is None:
            return key
        as_text = text_key(key)
        self._wrapper[as_text.partition(".")[0]] = wrapper_of(key, as_text)
        return as_text

    def _eyes_open(self) -> MmprojWriter:
        if self._eyes is None:
            assert self._family is not None
            path = self._folder.path() / f"mmproj-{self._request.output.name}.gguf"
            self._eyes = MmprojWriter(self._family, described(self._request.config), path)
        return self._eyes

    def _keep_break(self, target: str, values: Callable[[], Tensor]) -> None:
        """Give Pixtral's tower the embedding of the token that ends a row of patches."""
        source = self._request.source
        wanted = self._family is not None and self._family.tower.permuted
        number = break_token(source) if wanted and source is not None else None
        if target == "token_embd.weight" and number is not None:
            self._eyes_open().add_break_row(values()[number])

    def _open(self) -> gguf.GGUFWriter:
        if self._writer is None:
            import gguf

            name = f"{self._request.output.name}-{self._variant}.gguf"
            path = self._folder.path() / name
            self._writer = gguf.GGUFWriter(path, self._arch.name, use_temp_file=True)
            self._writer.add_type("model")
            self._writer.add_name(_title(self._request.config, self._request.output))
            self._writer.add_file_type(FILE_TYPES[self._variant])
            self._writer.add_quantization_version(QUANTIZATION_VERSION)
            self._writer.add_string("general.quantized_by", "ar")
            values = metadata(self._config, self._arch)
            for key, value in values.items():
                add(self._writer, f"{self._arch.name}.{key}", value)
        return self._writer

    def _add(self, name: str, tensor: Tensor, kind: str) -> None:
        import gguf

        data = tensor.detach().cpu().contiguous().numpy()
        self._open().add_tensor(name, data, raw_dtype=getattr(gguf.GGMLQuantizationType, kind))


def _float_kind(target: str, dimensions: int, dtype: torch.dtype) -> str:
    """Return the type that a tensor which stays a float has in the file."""
    wide = dimensions < 2 or "norm" in target or "ffn_gate_inp" in target  # noqa: PLR2004
    if wide or "position_embd" in target:
        return "F32"
    return "BF16" if dtype == torch.bfloat16 else "F16"


def float_bytes(
    config: Mapping[str, Any], floats: Mapping[str, tuple[tuple[int, ...], str]]
) -> int:
    """Return the bytes of float tensors, and an estimate of the tokenizer and the header."""
    text = text_of(config)
    arch = architecture_of(text)
    family = family_of(described(config)) if sees(config) else None
    total = _HEADER + _PER_TOKEN * int(text.get("vocab_size") or 0)
    for key, (shape, name) in floats.items():
        if family is not None and family.tower.names_of(key) is not None:
            total += math.prod(shape) * (2 if len(shape) > 1 else 4)
            continue
        found = arch.name_of(key if family is None else text_key(key))
        if found is None:
            continue
        kind = _float_kind(found[0], len(shape), getattr(torch, name))
        size = math.prod(shape) * (4 if kind == "F32" else 2)
        total += -(-size // _ALIGNMENT) * _ALIGNMENT
    return total


def check_request(config: dict[str, Any], plan: LayerPlan, source: Path | None) -> None:
    """Refuse a model that cannot become a GGUF file, before work.

    Raises:
        ExportError: no architecture of llama.cpp, or settings that it has no keys for.
    """
    if importlib.util.find_spec("gguf") is None:
        msg = "GGUF files need the gguf package: pip install 'ar-export[gguf]'"
        raise ExportError(msg)
    if sees(config):
        check_eyes(described(config), plan, source)
    text = text_of(config)
    arch = architecture_of(text)
    heads(text)
    metadata(text, arch)
    config_dtype(config)


def _title(config: Any, output: Path) -> str:
    named = str(config.get("_name_or_path") or "").rstrip("/").rpartition("/")[2]
    return named or output.name
