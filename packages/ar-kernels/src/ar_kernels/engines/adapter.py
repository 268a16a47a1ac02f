"""Config and linear method for engines whose interfaces descend from vLLM's.

The base classes come from the engine, so the classes here are made when it is known.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch

from ar_kernels import ops, registry
from ar_kernels.backends.base import Need
from ar_kernels.backends.select import choose
from ar_kernels.engines.claims import METHOD, claimed, dimensions, format_of
from ar_kernels.hf.config import parse
from ar_schemes import Span

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from ar_kernels.hf.config import LayerFormat
    from ar_kernels.layouts.base import TensorFact

METHOD_CLASS = "ArLinearMethod"
"""Class name of the linear method: engines list those whose parameters load themselves."""
_READY = "ar_ready_"


@dataclass(frozen=True)
class Engine:
    """What is taken from an engine.

    Attributes:
        config: `QuantizationConfig`.
        method: `LinearMethodBase`.
        linear: `LinearBase`.
        unquantized: `UnquantizedLinearMethod`.
        parameters: module with `PackedvLLMParameter` and its kin.
    """

    config: type[Any]
    method: type[Any]
    linear: type[Any]
    unquantized: type[Any]
    parameters: Any


def make_method(engine: Engine) -> type[Any]:
    """Return the linear method, a subclass of the engine's."""

    class ArLinearMethod(engine.method):  # type: ignore[name-defined]
        """Holds the checkpoint's tensors while loading, then what a backend computes with."""

        def __init__(self, form: LayerFormat) -> None:
            self.form = form

        def create_weights(
            self,
            layer: nn.Module,
            input_size_per_partition: int,
            output_partition_sizes: list[int],
            input_size: int,
            output_size: int,  # noqa: ARG002 - the engine's signature
            params_dtype: torch.dtype,
            **extra: Any,
        ) -> None:
            """Register the checkpoint's tensors, as parameters that know how to be cut."""
            spec = self.form.scheme.weight
            assert spec is not None
            shape = (sum(output_partition_sizes), input_size_per_partition)
            layout = registry.layout(self.form.layout)
            facts = layout.facts(spec, *shape)
            whole = spec.granularity.span is Span.CHANNEL
            for name, (along_i, along_o) in dimensions(self.form.layout).items():
                axes = (None if whole and facts[name].shape[along_i] == 1 else along_i, along_o)
                loader = extra.get("weight_loader")
                made = _parameter(engine, facts[name], axes, shape, loader)
                layer.register_parameter(name, made)
            layer.ar_shape = shape  # type: ignore[assignment]
            layer.ar_dtype = params_dtype  # type: ignore[assignment]

        def process_weights_after_loading(self, layer: nn.Module) -> None:
            """Replace the checkpoint's tensors by what the chosen backend computes with."""
            _finish(layer, self.form)

        def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
            """Return x [..., I] times the weight transposed, plus bias: [..., O]."""
            buffers = [getattr(layer, _READY + name) for name in layer.ar_ready]
            rows = layer.ar_shape[0]
            out: Tensor = ops.quant_linear(x, buffers, layer.ar_meta, bias, layer.ar_backend, rows)
            return out

    return ArLinearMethod


def _finish(layer: nn.Module, form: LayerFormat) -> None:
    """Replace the checkpoint's tensors of a layer by those of the chosen backend."""
    spec = form.scheme.weight
    assert spec is not None
    names = list(dimensions(form.layout))
    tensors = {name: getattr(layer, name).data for name in names}
    if "g_idx" in tensors:  # a later part of the input counts on from an earlier one
        tensors["g_idx"] = tensors["g_idx"] - tensors["g_idx"].min()
    device = tensors[names[0]].device.type
    rows, columns = layer.ar_shape  # type: ignore[misc]
    weight = registry.layout(form.layout).unpack(tensors, spec, rows, columns)
    need = Need(spec, rows, columns, device, layer.ar_dtype)  # type: ignore[arg-type]
    backend = choose(need).backend
    packed = backend.pack(weight, need)
    for name in names:
        delattr(layer, name)
    for name, tensor in packed.buffers.items():
        kept = torch.nn.Parameter(tensor, requires_grad=False)
        layer.register_parameter(_READY + name, kept)
    layer.ar_ready = tuple(packed.buffers)  # type: ignore[assignment]
    layer.ar_meta = list(packed.meta)  # type: ignore[assignment]
    layer.ar_backend = backend.name  # type: ignore[assignment]


def make_config(engine: Engine, method: type[Any]) -> type[Any]:
    """Return the quantization config, a subclass of the engine's."""

    class ArConfig(engine.config):  # type: ignore[name-defined]
        """A checkpoint's `quantization_config`, read by ar-kernels."""

        def __init__(self, config: Mapping[str, Any]) -> None:
            super().__init__()
            self.understood = parse(config)

        def get_name(self) -> str:
            """Return the name under which the engine knows this method."""
            return METHOD

        def get_supported_act_dtypes(self) -> list[torch.dtype]:
            """Return the types of activations."""
            return [torch.float16, torch.bfloat16]

        @classmethod
        def get_min_capability(cls) -> int:
            """Return the oldest compute capability: that of the Triton kernels."""
            return 80

        @staticmethod
        def get_config_filenames() -> list[str]:
            """Return the files that may hold a config of its own beside config.json."""
            return ["quantization_config.json", "quantize_config.json"]

        @classmethod
        def from_config(cls, config: Mapping[str, Any]) -> Any:
            """Return the config of a `quantization_config`."""
            return cls(config)

        @classmethod
        def override_quantization_method(
            cls,
            hf_quant_cfg: Mapping[str, Any],
            user_quant: str | None,
            hf_config: Any = None,  # noqa: ARG003 - newer engines pass it
        ) -> str | None:
            """Return our name for checkpoints that the engine has no kernels for, else None."""
            return claimed(hf_quant_cfg, user_quant)

        def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
            """Return how a layer is multiplied; None leaves it to the engine."""
            if not isinstance(layer, engine.linear):
                return None
            fused = getattr(self, "packed_modules_mapping", None) or {}
            form = format_of(self.understood, prefix, fused)
            return engine.unquantized() if form is None else method(form)

        def get_scaled_act_names(self) -> list[str]:
            """Return the activations that are scaled afterwards: none."""
            return []

    return ArConfig


def _parameter(
    engine: Engine,
    fact: TensorFact,
    axes: tuple[int | None, int | None],
    shape: tuple[int, int],
    loader: Any,
) -> Any:
    """Return an empty parameter of the engine for a tensor of a checkpoint.

    Args:
        engine: whose parameter.
        fact: the tensor's shape and type.
        axes: its dimensions along input and output, None where it has none.
        shape: (O, I) of the weight.
        loader: the layer's loader of shards.
    """
    along_i, along_o = axes
    kinds = engine.parameters
    data = torch.empty(fact.shape, dtype=fact.dtype)
    if along_o is None:
        return kinds.RowvLLMParameter(data=data, input_dim=along_i, weight_loader=loader)
    common = {"data": data, "output_dim": along_o, "weight_loader": loader}
    # how many features one entry holds; 1 for scales, of which there is one a feature or group
    per_o = Fraction(shape[0], fact.shape[along_o])
    if along_i is None:
        if per_o == 1:
            return kinds.ChannelQuantScaleParameter(**common)
        return kinds.PackedColumnParameter(
            **common, packed_dim=along_o, packed_factor=_plain(per_o)
        )
    common["input_dim"] = along_i
    if per_o != 1:
        return kinds.PackedvLLMParameter(**common, packed_dim=along_o, packed_factor=_plain(per_o))
    # along the input every partition is a whole number of entries: plain shares are right
    return kinds.GroupQuantScaleParameter(**common)


def _plain(ratio: Fraction) -> int | Fraction:
    return ratio.numerator if ratio.denominator == 1 else ratio
