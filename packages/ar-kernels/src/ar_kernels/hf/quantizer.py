"""The quantizer that transformers calls while it loads a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin, QuantizationMethod

from ar_kernels.hf.config import parse
from ar_kernels.linear import QuantLinear
from ar_kernels.weight import KernelError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


class CheckpointQuantization(QuantizationConfigMixin):
    """A `quantization_config` kept as it was read, so that saving writes the same."""

    def __init__(self, **fields: Any) -> None:
        method = getattr(fields.get("quant_method"), "value", fields.get("quant_method"))
        self.fields = {**fields, "quant_method": method}
        self.quant_method = QuantizationMethod(method)

    def __getattr__(self, name: str) -> Any:
        """Return a field of the config, as transformers and engines look at them."""
        fields = self.__dict__.get("fields", {})
        if name in fields:
            return fields[name]
        raise AttributeError(name)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as they were read."""
        return dict(self.fields)

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the fields as they were read."""
        return self.to_dict()


class ArQuantizer(HfQuantizer):
    """Puts a `QuantLinear` in the place of every quantized linear layer."""

    requires_calibration = True  # float models are not quantized while they are loaded

    def _process_model_before_weight_loading(
        self, model: Any, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> Any:
        """Replace the quantized layers of a model on the meta device by empty `QuantLinear`s."""
        parsed = parse(self.quantization_config.to_dict())
        linears = dict(_linears(model))
        head = model.get_output_embeddings()
        heads = [name for name, module in linears.items() if module is head]
        chosen = parsed.resolve({name: _aliases(name) for name in linears}, heads)
        bad: dict[str, str] = {}
        for name, found in chosen.items():
            if found.scheme.weight is None:
                continue
            module = linears[name]
            rows, columns = _shape(module)
            try:
                replacement = QuantLinear(
                    found.scheme.weight,
                    rows,
                    columns,
                    layout=found.layout,
                    bias=getattr(module, "bias", None) is not None,
                    dtype=dtype or model.dtype,
                    device="meta",
                )
            except KernelError as error:
                bad[name] = str(error)
                continue
            model.set_submodule(name, replacement)
        if bad:
            lines = "\n".join(f"  {name}: {why}" for name, why in bad.items())
            msg = f"{len(bad)} layers of this checkpoint cannot be opened:\n{lines}"
            raise KernelError(msg)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:  # noqa: ARG002
        """Choose a backend for every layer and pack its weight."""
        for module in model.modules():
            if isinstance(module, QuantLinear) and module.device.type != "meta":
                module.prepare()
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
        AUTO_QUANTIZATION_CONFIG_MAPPING[method] = CheckpointQuantization


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            yield name, module


def _shape(module: nn.Module) -> tuple[int, int]:
    """Return (out features, in features); Conv1D of GPT-2 stores its weight transposed."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    rows, columns = weight.shape
    return (rows, columns) if isinstance(module, nn.Linear) else (columns, rows)


def _aliases(name: str) -> tuple[str, ...]:
    """Return the names a config may use for a layer: with and without the model's own prefix."""
    return (name, f"model.{name}", name.removeprefix("model."))


def _dense(module: QuantLinear, dtype: torch.dtype) -> nn.Linear:
    made = nn.Linear(
        module.columns, module.rows, bias=module.bias is not None, device="meta", dtype=dtype
    )
    weight = module.quantized().dequantize(dtype)
    made.weight = nn.Parameter(weight, requires_grad=False)
    if module.bias is not None:
        made.bias = nn.Parameter(module.bias.data.to(dtype), requires_grad=False)
    return made
