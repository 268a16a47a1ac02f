"""Read and write the `quantization_config` of compressed-tensors: which layer is stored how.

Data in, data out. A config has groups; each has targets (names, `re:` patterns, module classes) and
arguments for weights and activations.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ar_kernels.hf.config import LayerFormat, pattern
from ar_kernels.weight import KernelError
from ar_schemes import Granularity, Scheme, Span, TensorSpec, describe, unknown_name

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from ar_kernels.hf.stored import StoredLayer

LAYOUTS = {
    "pack-quantized": "ct_pack",
    "int-quantized": "ct_int",
    "float-quantized": "ct_float",
    "naive-quantized": "ct_float",
    "nvfp4-pack-quantized": "ct_nvfp4",
    "mxfp4-pack-quantized": "ct_mxfp4",
    "mxfp8-quantized": "ct_mxfp8",
    "nvfp4-e5m3-pack-quantized": "nvfp4_e5m3",
}
"""Name of a compression format to the layout of its tensors."""
_SCALES = {"mx_fp": "e8m0", "nv_fp": "float8_e4m3fn", "nvfp4_v2": "ue5m3", "fp": "float32"}
E5M3 = "nvfp4-e5m3-pack-quantized"
"""auto-round writes it; compressed-tensors itself does not know it."""
_BYTE = 8


@dataclass(frozen=True)
class Group:
    """One config group: what it targets, and how that is stored."""

    targets: tuple[str, ...]
    scheme: Scheme
    format: str


@dataclass(frozen=True)
class CompressedConfig:
    """A config of compressed-tensors, understood."""

    groups: tuple[Group, ...]
    ignore: tuple[str, ...]

    def find(self, name: str, kind: str = "Linear") -> Group | None:
        """Return the group of a layer, or None: names first, then patterns, then classes."""
        return self.find_any((name,), kind)

    def find_any(self, names: Collection[str], kind: str = "Linear") -> Group | None:
        """Return the group of a layer that goes by several names, or None."""
        if any(_matches(target, name, kind) for target in self.ignore for name in names):
            return None
        ranked = [
            (rank, group)
            for group in self.groups
            for target in group.targets
            for name in names
            if (rank := _matches(target, name, kind))
        ]
        return max(ranked, key=lambda pair: pair[0])[1] if ranked else None


@dataclass(frozen=True)
class CompressedPlan:
    """What a config of compressed-tensors says of the layers of a model."""

    config: CompressedConfig
    method: str = "compressed-tensors"

    def resolve(
        self,
        layers: Mapping[str, tuple[str, ...]],
        heads: Collection[str],  # noqa: ARG002 - an output head is a layer as any other
    ) -> dict[str, LayerFormat]:
        """Return the format of every layer that a group targets and nothing ignores."""
        found = {layer: self.config.find_any(names) for layer, names in layers.items()}
        return {
            layer: LayerFormat(group.scheme, LAYOUTS[group.format])
            for layer, group in found.items()
            if group is not None
        }

    def settle(
        self, said: LayerFormat | None, layer: StoredLayer
    ) -> tuple[str | None, LayerFormat | None]:
        """Return (contradiction or None, the format) of a layer whose tensors are packed."""
        if said is None:
            held = ", ".join(sorted(layer.facts))
            return f"the config leaves it in 16 bit, the files hold {held}", None
        return None, said


def parse_compressed(config: Mapping[str, Any]) -> CompressedConfig:
    """Return a `quantization_config` with `quant_method` compressed-tensors, understood.

    Raises:
        KernelError: a format or arguments that are not known here.
    """
    if (config.get("transform_config") or {}).get("config_groups"):
        msg = "transform_config: weights that were rotated or scaled are not known here"
        raise KernelError(msg)
    whole = str(config.get("format") or "")
    groups = []
    for name, group in (config.get("config_groups") or {}).items():
        if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
            msg = f"config_groups: {name} must be an object with weights"
            raise KernelError(msg)
        form = str(group.get("format") or whole)
        if form not in LAYOUTS:
            raise KernelError(unknown_name("compression format", form, LAYOUTS))
        weight = _spec(group["weights"], form)
        act = group.get("input_activations")
        activation = None if act is None else _activation(act, form)
        made = Scheme(name="", weight=weight, activation=activation)
        targets = tuple(str(t) for t in group.get("targets") or ())
        groups.append(Group(targets, replace(made, name=describe(made)), form))
    return CompressedConfig(tuple(groups), tuple(str(t) for t in config.get("ignore") or ()))


def weight_args(spec: TensorSpec) -> dict[str, Any]:
    """Return the quantization arguments of a weight."""
    return _args(spec) | {"dynamic": False}


def activation_args(spec: TensorSpec) -> dict[str, Any]:
    """Return the quantization arguments of activations."""
    local = spec.data_type.startswith("nv")
    return _args(spec) | {"dynamic": "local" if local else spec.dynamic}


def _args(spec: TensorSpec) -> dict[str, Any]:
    integer = spec.data_type == "int"
    out: dict[str, Any] = {
        "num_bits": spec.bits,
        "type": "int" if integer else "float",
        "symmetric": spec.symmetric,
        "strategy": str(spec.granularity.span),
    }
    if spec.granularity.span is Span.GROUP:
        out["group_size"] = spec.granularity.size[0]
    if spec.granularity.span is Span.TILE:
        out |= {"strategy": "block", "block_structure": list(spec.granularity.size)}
    if spec.data_type.startswith("nv"):
        scale = "uint8" if spec.data_type == "nvfp4_v2" else "float8_e4m3fn"
        out |= {"strategy": "tensor_group", "scale_dtype": f"torch.{scale}"}
    elif spec.data_type.startswith("mx"):
        out["scale_dtype"] = "torch.uint8"
    return out


def _spec(args: Mapping[str, Any], form: str) -> TensorSpec:
    """Return the spec that arguments stand for; integer scales count as float16 until seen."""
    bits, kind = args.get("num_bits", _BYTE), str(args.get("type", "int"))
    data_type = "int" if kind == "int" else _float_type(bits, args, form)
    try:
        return TensorSpec(
            data_type=data_type,
            bits=bits,
            granularity=_granularity(args),
            symmetric=bool(args.get("symmetric", True)),
            scale_dtype=_SCALES.get(data_type, "float16"),
        )
    except (TypeError, ValueError) as error:
        msg = f"quantization arguments {dict(args)} are not understood: {error}"
        raise KernelError(msg) from error


def _float_type(bits: Any, args: Mapping[str, Any], form: str) -> str:
    if form == E5M3:
        return "nvfp4_v2"
    if args.get("strategy") == "tensor_group":
        return "nv_fp"
    scale = str(args.get("scale_dtype") or "").removeprefix("torch.")
    if form.startswith("mxfp") or scale in ("uint8", "float8_e8m0fnu"):
        return "mx_fp"
    if bits == _BYTE:
        return "fp"
    msg = f"float weights of {bits} bits in format {form!r} are not known here"
    raise KernelError(msg)


def _granularity(args: Mapping[str, Any]) -> Granularity:
    size, strategy = args.get("group_size"), args.get("strategy")
    if strategy == "block":
        shape = args.get("block_structure") or ()
        if isinstance(shape, str):
            shape = [int(n) for n in shape.split("x")]
        return Granularity(Span.TILE, tuple(shape))
    if strategy in ("group", "tensor_group") or (strategy is None and size and size > 0):
        return Granularity(Span.GROUP, (int(size or 0),))
    spans = {"token": Span.TOKEN, "channel": Span.CHANNEL, "tensor": Span.TENSOR}
    if strategy is None:
        return Granularity(Span.CHANNEL if size == -1 else Span.TENSOR)
    if strategy not in spans:
        raise KernelError(unknown_name("strategy", str(strategy), ("group", "block", *spans)))
    return Granularity(spans[strategy])


def _activation(args: Mapping[str, Any], form: str) -> TensorSpec:
    spec = _spec(args, form)
    if spec.data_type == "nv_fp":
        return spec.with_(data_type="nv_fp4_with_static_gs")
    return spec.with_(dynamic=bool(args.get("dynamic", False)))


def _matches(target: str, name: str, kind: str) -> int:
    """Return how closely a target means a layer: 3 by name, 2 by pattern, 1 by class, 0 not."""
    if target == name or name.endswith(f".{target}"):
        return 3
    if target.startswith("re:"):
        return 2 if pattern(target.removeprefix("re:"), target).match(name) else 0
    return 1 if target == kind else 0


def format_of(weight: TensorSpec, activation: TensorSpec | None) -> str | None:
    """Return the compression format that carries a weight, or None."""
    if weight.super_group is not None:
        return None
    # one byte per code only where a kernel multiplies bytes; vLLM reads narrower ones packed
    bytewise = activation is not None and weight.bits == _BYTE
    return {
        ("int", weight.bits): "int-quantized" if bytewise else "pack-quantized",
        ("fp", 8): "naive-quantized" if activation is None else "float-quantized",
        ("nv_fp", 4): "nvfp4-pack-quantized",
        ("nvfp4_v2", 4): E5M3,
        ("mx_fp", 4): "mxfp4-pack-quantized",
        ("mx_fp", 8): "mxfp8-quantized",
    }.get((weight.data_type, weight.bits))
