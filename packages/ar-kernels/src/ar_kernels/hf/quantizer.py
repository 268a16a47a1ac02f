"""The quantizer that transformers calls while it loads a checkpoint."""

from __future__ import annotations

import copy
import functools
import logging
from collections import Counter
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    FineGrainedFP8HfQuantizer,
    Mxfp4HfQuantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils import quantization_config as stock

from ar_kernels.backends.select import better_if_installed
from ar_kernels.hf.decoding import speed_up
from ar_kernels.hf.experts import (
    find_apart,
    find_experts,
    find_named,
    part_shapes,
    take_apart,
)
from ar_kernels.hf.load import layer_openings
from ar_kernels.hf.memory import Returning
from ar_kernels.hf.renaming import Renaming, sources_of
from ar_kernels.hf.sharing import leave_out_shared, put_shared
from ar_kernels.hf.stacked import Stack, await_tensors, find_stacks, unstack
from ar_kernels.hf.stored import by_model_name, stored_facts, stored_modules
from ar_kernels.hf.understand import understand
from ar_kernels.linear import QuantLinear
from ar_kernels.registry import backend

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    from ar_kernels.hf.load import Opening

_log = logging.getLogger(__name__)

_NO_CHOICE = (None, "", "auto", "auto_trainable")


class _AsRead(stock.QuantizationConfigMixin):
    """A `quantization_config` kept as it was read, so that saving writes the same.

    `backend` is never taken from the file, where it names a kernel of the writer's; transformers
    sets it when `from_pretrained` is given a config with one.
    """

    def __init__(self, **fields: Any) -> None:
        method = getattr(fields.get("quant_method"), "value", fields.get("quant_method"))
        self.fields = {**copy.deepcopy(fields), "quant_method": method}
        self.quant_method = stock.QuantizationMethod(method)
        self.backend = "auto"
        self.head_bits: int | None = None

    def __getattr__(self, name: str) -> Any:
        """Return a field of the config, as transformers and engines look at them."""
        fields = self.__dict__.get("fields", {})
        if name in fields:
            return fields[name]
        raise AttributeError(name)

    @classmethod
    def from_dict(
        cls,
        config_dict: Mapping[str, Any],
        return_unused_kwargs: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Return the config of a dict, unchecked: `ar_kernels.hf.config.parse` checks it."""
        made = cls(**config_dict)
        return (made, kwargs) if return_unused_kwargs else made

    @classmethod
    def asking(cls, method: str, backend: str, head_bits: int | None = None) -> Any:
        """Return a config to give to `from_pretrained` that asks for these and no more."""
        made = cls(quant_method=method)
        made.backend, made.head_bits = backend, head_bits
        return made

    def get_loading_attributes(self) -> dict[str, Any]:
        """Return what counts of a config that is given to `from_pretrained`."""
        return {"backend": self.backend, "head_bits": self.head_bits}

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as they were read."""
        return copy.deepcopy(self.fields)


# transformers compares class names when from_pretrained is given a config of its own, and takes
# over `backend` between classes it knows, hence the names and bases.


class AutoRoundConfig(_AsRead, stock.AutoRoundConfig):
    """A config with `quant_method` auto-round."""


class GPTQConfig(_AsRead, stock.GPTQConfig):
    """A config with `quant_method` gptq."""


class AwqConfig(_AsRead, stock.AwqConfig):
    """A config with `quant_method` awq."""


class CompressedTensorsConfig(_AsRead, stock.CompressedTensorsConfig):
    """A config with `quant_method` compressed-tensors."""


class FineGrainedFP8Config(_AsRead, stock.FineGrainedFP8Config):
    """A config with `quant_method` fp8."""


class Mxfp4Config(_AsRead, stock.Mxfp4Config):
    """A config with `quant_method` mxfp4."""


CONFIGS = {
    "auto-round": AutoRoundConfig,
    "gptq": GPTQConfig,
    "awq": AwqConfig,
    "compressed-tensors": CompressedTensorsConfig,
    "fp8": FineGrainedFP8Config,
    "mxfp4": Mxfp4Config,
}
"""Config class of each quantization method."""


class ArQuantizer(HfQuantizer):
    """Puts a `QuantLinear` in the place of every quantized linear layer."""

    requires_calibration = True  # float models are not quantized while they are loaded
    _unfused: Collection[tuple[str, ...]] = ()
    _files: Sequence[str] = ()
    _stacks: Collection[tuple[Stack, Callable[[str], nn.Module]]] = ()
    _shared: Mapping[str, str] = MappingProxyType({})

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Read the config; anything we do not know is refused before a file is opened."""
        self.checkpoint = understand(self.quantization_config.to_dict())

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> Any:
        """Replace the quantized layers of a model on the meta device by empty `QuantLinear`s."""
        linears = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, (nn.Linear, Conv1D))
        }
        shapes = {name: _shape(module) for name, module in linears.items()}
        self._files = checkpoint_files or ()
        facts = stored_facts(checkpoint_files)
        rename = Renaming(model)
        files = {} if facts is None else stored_modules(facts)
        experts, self._unfused = find_experts(files, rename.fusing, rename.trial)
        stored = by_model_name(files, rename)
        experts |= find_named(model, stored, experts)
        experts |= find_apart(model, files, rename, rename.fusing, experts)
        stacks = find_stacks(model, stored)
        apart = experts | {name: stack.found for name, stack in stacks.items()}
        for name, found in apart.items():
            shapes |= part_shapes(model.get_submodule(name), found, name)
            stored |= found.stored
        head = model.get_output_embeddings()
        openings = layer_openings(
            self.checkpoint,
            shapes,
            stored=None if facts is None else stored,
            heads=[name for name, module in linears.items() if module is head],
            prefix=model.base_model_prefix,
        )
        for name in openings.keys() & linears.keys():
            module = linears[name]
            bias = getattr(module, "bias", None) is not None
            layer = _layer(openings[name], shapes[name], module.weight.dtype, bias=bias)
            model.set_submodule(name, layer)
        self._shared = leave_out_shared(model)
        for name, found in apart.items():
            module = model.get_submodule(name)
            dtype = next(iter(module.parameters())).dtype
            make = functools.partial(_part, openings=openings, shapes=shapes, dtype=dtype)
            if name in stacks:
                await_tensors(module, stacks[name])
                self._stacks = (*self._stacks, (stacks[name], make))
            else:
                take_apart(model, name, found, make)
            # some classes start the experts' parameters, which are gone, from the module around
            around = model.get_submodule(name.rpartition(".")[0])
            around._is_hf_initialized = True  # noqa: SLF001 - Transformers' own mark
        return model

    def update_weight_conversions(self, weight_conversions: Any, model: Any) -> Any:
        """Leave out what would fuse experts that are packed one by one, for this model only."""
        kept = [c for c in weight_conversions if sources_of(c) not in self._unfused]
        return super().update_weight_conversions(kept, model)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:  # noqa: ARG002
        """Choose a backend for every layer and pack its weight."""
        put_shared(model, self._shared)
        wanted = getattr(self.quantization_config, "backend", None)
        prefer = None if wanted in _NO_CHOICE else wanted
        used: Counter[str] = Counter()
        hints: dict[str, None] = {}
        returning = Returning(self._files)
        for stack, make in self._stacks:
            for tensor in unstack(model.get_submodule(stack.name), stack, make, prefer):
                returning.done_with([tensor])
        self._stacks = ()
        for module in model.modules():
            if isinstance(module, QuantLinear) and module.device.type != "meta":
                if module.backend is None:
                    loaded = dict(module.named_buffers())
                    module.prepare(prefer)
                    kept = dict(module.named_buffers()).keys()
                    returning.done_with(loaded.pop(name) for name in loaded.keys() - kept)
                used[f"{module.backend} ({module.spec})"] += 1
                if prefer is None and module.backend is not None:
                    better = better_if_installed(module.need(), backend(module.backend))
                    hints |= {} if better is None else {better: None}
        bits = getattr(self.quantization_config, "head_bits", None)
        used.update(speed_up(model, bits, returning))
        returning.finish()
        layers = ", ".join(f"{count} layers -> {what}" for what, count in used.items())
        _log.info("ar-kernels opened the %s checkpoint: %s", self.checkpoint.method, layers)
        for hint in list(hints)[:1]:
            _suggest(hint.partition(" would ")[0], hint)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """Put float layers back."""
        for name, module in list(model.named_modules()):
            if isinstance(module, QuantLinear):
                model.set_submodule(name, _dense(module, dtype or module.dtype))
        return model

    def is_serializable(self) -> bool:
        """Tell transformers that `save_pretrained` works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Tell transformers that adapters can be trained: gradients reach a layer's input."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Tell transformers that `torch.compile` works."""
        return True


@functools.cache
def _suggest(name: str, hint: str) -> None:  # noqa: ARG001 - one line per process and backend
    _log.warning("%s", hint)


def quantizer(config: Any, **kwargs: Any) -> HfQuantizer:
    """Return our quantizer for a config, or transformers' own where it shall make a float model.

    Only transformers dequantizes while it loads (`dequantize=True`) or quantizes a float model.
    """
    own = _OWN.get(str(getattr(config.quant_method, "value", config.quant_method)))
    asked = not kwargs.get("pre_quantized", True) or getattr(config, "dequantize", False)
    if own is None or not asked:
        return ArQuantizer(config, **kwargs)
    kind, made_by = own
    if isinstance(config, _AsRead):
        config = kind(**config.fields | {"dequantize": True})
    found: HfQuantizer = made_by(config, **kwargs)
    return found


_OWN = {
    "fp8": (stock.FineGrainedFP8Config, FineGrainedFP8HfQuantizer),
    "mxfp4": (stock.Mxfp4Config, Mxfp4HfQuantizer),
}
"""Methods that transformers itself can dequantize on any device: config and quantizer."""


def register(methods: Iterable[str]) -> None:
    """Make transformers load these `quant_method`s with us."""
    for method in methods:
        AUTO_QUANTIZER_MAPPING[method] = quantizer
        AUTO_QUANTIZATION_CONFIG_MAPPING[method] = CONFIGS[method]


def _shape(module: Any) -> tuple[int, int]:
    """Return (out features, in features); Conv1D of GPT-2 holds its weight transposed."""
    rows, columns = module.weight.shape
    return (rows, columns) if isinstance(module, nn.Linear) else (columns, rows)


def _dense(module: QuantLinear, dtype: torch.dtype) -> nn.Linear:
    made = nn.Linear(
        module.columns, module.rows, bias=module.bias is not None, device="meta", dtype=dtype
    )
    made.weight = nn.Parameter(module.quantized().dequantize(dtype), requires_grad=False)
    if module.bias is not None:
        made.bias = nn.Parameter(module.bias.data.to(dtype), requires_grad=False)
    return made


def _layer(
    opening: Opening, shape: tuple[int, int], dtype: torch.dtype, *, bias: bool
) -> QuantLinear:
    """Return the empty layer for what the files hold."""
    scheme = opening.format.scheme
    assert scheme.weight is not None
    return QuantLinear(
        scheme.weight,
        *shape,
        layout=opening.format.layout,
        bias=bias,
        dtype=dtype,
        device="meta",
        activation=scheme.activation,
        stored=opening.stored,
    )


def _part(
    name: str,
    *,
    openings: Mapping[str, Opening],
    shapes: Mapping[str, tuple[int, int]],
    dtype: torch.dtype,
) -> nn.Module:
    """Return the empty layer of a part of an expert, quantized or not."""
    if name in openings:
        return _layer(openings[name], shapes[name], dtype, bias=False)
    rows, columns = shapes[name]
    return nn.Linear(columns, rows, bias=False, device="meta", dtype=dtype)
