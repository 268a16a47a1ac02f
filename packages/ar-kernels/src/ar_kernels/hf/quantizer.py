"""The quantizer that transformers calls while it loads a checkpoint."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils import quantization_config as stock

from ar_kernels.hf.load import layer_openings
from ar_kernels.hf.stored import stored_facts, stored_layers
from ar_kernels.hf.understand import understand
from ar_kernels.linear import QuantLinear

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

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


CONFIGS = {
    "auto-round": AutoRoundConfig,
    "gptq": GPTQConfig,
    "awq": AwqConfig,
    "compressed-tensors": CompressedTensorsConfig,
    "fp8": FineGrainedFP8Config,
}
"""Config class of each quantization method."""


class ArQuantizer(HfQuantizer):
    """Puts a `QuantLinear` in the place of every quantized linear layer."""

    requires_calibration = True  # float models are not quantized while they are loaded

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
        facts = stored_facts(checkpoint_files)
        rename = _Renaming(model)
        head = model.get_output_embeddings()
        openings = layer_openings(
            self.checkpoint,
            {name: _shape(module) for name, module in linears.items()},
            stored=None if facts is None else stored_layers(facts, rename, rename.state),
            heads=[name for name, module in linears.items() if module is head],
            prefix=model.base_model_prefix,
        )
        for name, found in openings.items():
            module, scheme = linears[name], found.format.scheme
            assert scheme.weight is not None
            replacement = QuantLinear(
                scheme.weight,
                *_shape(module),
                layout=found.format.layout,
                bias=getattr(module, "bias", None) is not None,
                dtype=module.weight.dtype,
                device="meta",
                activation=scheme.activation,
                stored=found.stored,
            )
            model.set_submodule(name, replacement)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:  # noqa: ARG002
        """Choose a backend for every layer and pack its weight."""
        wanted = getattr(self.quantization_config, "backend", None)
        prefer = None if wanted in _NO_CHOICE else wanted
        used: Counter[str] = Counter()
        for module in model.modules():
            if isinstance(module, QuantLinear) and module.device.type != "meta":
                module.prepare(prefer)
                used[f"{module.backend} ({module.spec})"] += 1
        layers = ", ".join(f"{count} layers -> {what}" for what, count in used.items())
        _log.info("ar-kernels opened the %s checkpoint: %s", self.checkpoint.method, layers)
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
        """Tell transformers that there are no gradients for the weights."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Tell transformers that `torch.compile` works."""
        return True


def register(methods: Iterable[str]) -> None:
    """Make transformers load these `quant_method`s with us."""
    for method in methods:
        AUTO_QUANTIZER_MAPPING[method] = ArQuantizer
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


class _Renaming:
    """Keys of files to keys of a model, as transformers renames them while it loads.

    `state` is the model's state dict.
    """

    def __init__(self, model: Any) -> None:
        transforms = get_model_conversion_mapping(model) or []
        self._renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self._converters = [t for t in transforms if not isinstance(t, WeightRenaming)]
        self._prefix = model.base_model_prefix
        self.state: dict[str, torch.Tensor] = model.state_dict()

    def __call__(self, key: str) -> str:
        """Return the model's key for a key of the files."""
        rest = (self._prefix, self.state)
        found = rename_source_key(key, self._renamings, self._converters, *rest)[0]
        if found not in self.state and key in self.state:
            found = rename_source_key(key, [], [], *rest)[0]
        return str(found)
