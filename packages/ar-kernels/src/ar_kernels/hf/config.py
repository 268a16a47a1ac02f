"""Read a checkpoint's `quantization_config`: which layer is stored how.

Data in, data out: no model, no file.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ar_kernels import registry
from ar_kernels.numerics.activation import refuses_activation
from ar_kernels.weight import KernelError
from ar_schemes import FIELDS, Scheme, Span, scheme_from_dict, unknown_name

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from ar_kernels.hf.stored import StoredLayer
    from ar_schemes import TensorSpec

METHODS = ("auto-round", "gptq", "awq")
"""Values of `quant_method` that can be read."""

_PACKING = {
    "auto": "gptq",
    "auto_round:gptq": "gptq",
    "auto_round:auto_gptq": "gptq",
    "auto_round": "gptq_v2",
    "auto_round:gptqmodel": "gptq_v2",
    "auto_round:auto_awq": "awq",
    "auto_round:llm_compressor": "gptq",
    "auto_round:llm_compressor_nvfp4_e5m3": "gptq",
    "auto_round:fp8_static": "gptq",
    "auto_round:fp8": "gptq",
}
"""`packing_format` to the layout of its integers; float elements have layouts of their own."""
_FLOAT = {
    ("mx_fp", 4): "ct_mxfp4",
    ("mx_fp", 8): "ct_mxfp8",
    ("nv_fp", 4): "ct_nvfp4",
    ("nvfp4_v2", 4): "nvfp4_e5m3",
    ("mx_int", 4): "mx_int",
}
_FLOATS = {"fp", *(name for name, _ in _FLOAT)}
_WITH_G_IDX = "_g_idx"


@dataclass(frozen=True)
class LayerFormat:
    """How one layer is stored: its scheme (weight None: dense) and the bit order."""

    scheme: Scheme
    layout: str


@dataclass(frozen=True)
class Rule:
    """Layers whose name matches get `override` merged over the default; None keeps them dense."""

    pattern: re.Pattern[str]
    override: Mapping[str, Any] | None
    from_start: bool = False

    def hits(self, names: Iterable[str]) -> bool:
        """Tell whether one of a layer's names matches."""
        test = self.pattern.match if self.from_start else self.pattern.search
        return any(test(name) for name in names)


@dataclass(frozen=True)
class CheckpointConfig:
    """A `quantization_config`, understood.

    Attributes:
        method: `quant_method`.
        layout: name of the bit order, without its `_g_idx` variant.
        g_idx: whether its writer stores `g_idx` too.
        flat: the default scheme in flat form.
        blocks: prefixes of the modules that are quantized; empty: the whole model but its head.
        members: ends of the names that are quantized inside the blocks; empty: all.
        exact: layer name to what differs from the default.
        rules: for names that are not in `exact`; the first hit counts.
        head: the output head is quantized by default.
    """

    method: str
    layout: str
    g_idx: bool
    flat: Mapping[str, Any]
    blocks: tuple[str, ...] = ()
    members: tuple[str, ...] = ()
    exact: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    rules: tuple[Rule, ...] = ()
    head: bool = False
    packing: str = ""
    reading: bool = False

    @property
    def default(self) -> LayerFormat:
        """What a quantized layer gets when nothing else is said."""
        scheme = scheme_from_dict(self.flat)
        return LayerFormat(scheme, self.layout_for(scheme, g_idx=self.g_idx))

    def layout_for(self, scheme: Scheme, *, g_idx: bool) -> str:
        """Return the name of the layout that a layer of a scheme has, with `g_idx` or without."""
        if scheme.weight is None or self.packing not in _PACKING:
            return self.variant(g_idx)
        found = packed_layout(self.packing, scheme)
        return found if scheme.weight.data_type in _FLOATS else self.variant(g_idx)

    def variant(self, g_idx: bool) -> str:
        """Return the name of the layout, with or without `g_idx`."""
        name = self.layout + _WITH_G_IDX
        return name if g_idx and name in registry.layouts() else self.layout

    def resolve(
        self, layers: Mapping[str, tuple[str, ...]], heads: Collection[str] = ("lm_head",)
    ) -> dict[str, LayerFormat]:
        """Return what the config says of each layer; layers it does not speak of are left out.

        Args:
            layers: name of every linear layer to all the names it goes by (in the model, in the
                files), which a config may use alike.
            heads: the output heads among them.

        Raises:
            KernelError: a scheme that cannot be computed; every such layer is listed.
        """
        inside = {
            layer
            for layer, names in layers.items()
            if self._in_blocks(names) and (self.head or layer not in heads)
        }
        chosen = {layer: self.default for layer in inside}
        known = {name for names in layers.values() for name in names}
        for rule in reversed(self.rules):
            if rule.pattern.pattern in known:  # a layer's name, not a pattern
                continue
            hit = {layer for layer, names in layers.items() if rule.hits(names)}
            # a pattern speaks of layers outside the blocks only when it hits none inside
            for layer in (hit & inside) or hit:
                chosen[layer] = self._changed(rule.override)
        for layer, names in layers.items():
            for name in names:
                if name in self.exact:
                    chosen[layer] = self._changed(self.exact[name])
        bad = {
            layer: why
            for layer in layers
            if (why := _refusal(chosen.get(layer), reading=self.reading)) is not None
        }
        if bad:
            raise KernelError(_unsupported(self.method, bad))
        return {layer: chosen[layer] for layer in layers if layer in chosen}

    def settle(
        self, said: LayerFormat | None, layer: StoredLayer
    ) -> tuple[str | None, LayerFormat | None]:
        """Return (contradiction or None, the format) of a layer whose tensors are packed."""
        if said is None:
            said = self.default
        if said.scheme.weight is None:
            return "the config keeps it in 16 bit, the files hold packed tensors for it", None
        order = self.layout_for(said.scheme, g_idx="g_idx" in layer.facts)
        return None, LayerFormat(said.scheme, order)

    def _in_blocks(self, names: tuple[str, ...]) -> bool:
        prefixed = not self.blocks or any(
            name == block or name.startswith(f"{block}.") for name in names for block in self.blocks
        )
        return prefixed and (
            not self.members
            or any(f".{name}".endswith(f".{end}") for name in names for end in self.members)
        )

    def _changed(self, override: Mapping[str, Any] | None) -> LayerFormat:
        if override is None:
            return LayerFormat(Scheme(name="BF16"), self.layout)
        scheme = scheme_from_dict({**self.flat, **_fields(override)})
        return LayerFormat(scheme, self.layout_for(scheme, g_idx=self.g_idx))


def packed_layout(packing: str, scheme: Scheme | TensorSpec) -> str:
    """Return the layout of a layer in a checkpoint of auto-round with this `packing_format`."""
    spec = scheme.weight if isinstance(scheme, Scheme) else scheme
    assert spec is not None
    if spec.data_type == "fp":
        if packing == "auto_round:fp8_static":
            return "fp8_static"
        return "fp8_block" if spec.granularity.span is Span.TILE else "ct_float"
    if spec.data_type in _FLOATS:
        return _FLOAT.get((spec.data_type, spec.bits), "ct_mxfp4")
    order = _PACKING[packing]
    return f"{order}{_WITH_G_IDX}" if packing == "auto_round:gptqmodel" else order


def parse(config: Mapping[str, Any], *, reading: bool = False) -> CheckpointConfig:
    """Return a `quantization_config`, understood.

    Args:
        config: the dict.
        reading: only weights are wanted; activations may be quantized in ways not computed here.

    Raises:
        KernelError: a method, packing or scheme that is not known here, or a key of
            `extra_config` or `dynamic` that is no regular expression.
        SchemeError: a number that no scheme can have.
    """
    method = str(getattr(config.get("quant_method"), "value", config.get("quant_method")))
    if method not in METHODS:
        raise KernelError(unknown_name("quant_method", method, METHODS))
    layout, g_idx = _layout(method, config)
    exact: dict[str, Mapping[str, Any]] = {}
    rules = [_gptq_rule(key, value) for key, value in (config.get("dynamic") or {}).items()]
    for key, value in (config.get("extra_config") or {}).items():
        exact[key] = value
        rules.append(Rule(pattern(key, "extra_config"), value))
    flat = _fields(config)
    if method == "awq":
        flat = {"bits": 4, "sym": not config.get("zero_point", True), **flat}
        flat["sym"] = not config.get("zero_point", not flat["sym"])
        skips = _names(config.get("modules_to_not_convert"))
        rules += [Rule(re.compile(rf"(.*\.)?{re.escape(n)}($|\.)"), None, True) for n in skips]
    why = _refusal(LayerFormat(scheme_from_dict(flat), layout), reading=reading)
    if why is not None:
        raise KernelError(_unsupported(method, {"every layer": why}))
    return CheckpointConfig(
        method=method,
        layout=layout,
        g_idx=g_idx,
        flat=flat,
        blocks=_names(
            config.get("block_name_to_quantize")
            or config.get("to_quant_block_names")
            or config.get("quant_block_list")
        ),
        members=_names(config.get("modules_in_block_to_quantize")),
        exact=exact,
        rules=tuple(rules),
        head=method in ("gptq", "awq") and bool(config.get("lm_head", False)),
        packing=str(config.get("packing_format") or "auto_round:gptq")
        if method == "auto-round"
        else "",
        reading=reading,
    )


def _layout(method: str, config: Mapping[str, Any]) -> tuple[str, bool]:
    """Return the layout's name and whether its writer stores `g_idx`."""
    if method == "awq":
        version = str(config.get("version") or "gemm").lower()
        if version != "gemm":
            raise KernelError(unknown_name("version", version, ("gemm",)))
        return "awq", False
    variant = config.get("checkpoint_format") or config.get("format")
    if method == "gptq" or variant is not None:
        found = str(variant or "gptq").lower()
        if found not in ("gptq", "gptq_v2"):
            raise KernelError(unknown_name("checkpoint_format", found, ("gptq", "gptq_v2")))
        return found, True
    packing = str(config.get("packing_format") or "auto_round:gptq")
    if packing in _PACKING:
        return _PACKING[packing], packing == "auto_round:gptqmodel"
    named = packing.removeprefix("auto_round:")  # layouts of plugins go by their own name
    if named in registry.layouts():
        return named.removesuffix(_WITH_G_IDX), named.endswith(_WITH_G_IDX)
    known = sorted({*_PACKING, *(f"auto_round:{name}" for name in registry.layouts())} - {"auto"})
    raise KernelError(
        unknown_name("packing_format", packing, known, hint=_ELSEWHERE.format(method=method))
    )


_ELSEWHERE = (
    "Where the {method} package itself can read it, set AR_KERNELS_TAKEOVER=never to leave it to "
    "that package."
)


def _fields(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: config[key] for key in FIELDS if config.get(key) is not None}


def _names(value: object) -> tuple[str, ...]:
    """Return the names in a comma-separated string or in lists of any depth."""
    if value is None:
        return ()
    if isinstance(value, str):
        return tuple(name.strip() for name in value.split(",") if name.strip())
    if not isinstance(value, (list, tuple)):
        msg = f"names of modules must be a string or a list, not {value!r}"
        raise KernelError(msg)
    return tuple(name for part in value for name in _names(part))


def _gptq_rule(key: str, value: Mapping[str, Any]) -> Rule:
    """Return the rule of a GPTQModel `dynamic` entry: `+:regex` changes, `-:regex` skips."""
    skip = key.startswith("-:")
    named = key[2:] if key[:2] in ("-:", "+:") else key
    return Rule(pattern(named, "dynamic"), None if skip else value, from_start=True)


def pattern(text: str, where: str) -> re.Pattern[str]:
    """Return a regular expression of a config, or raise KernelError: it is none."""
    try:
        return re.compile(text)
    except re.error as error:
        msg = f"{where}: the key {text!r} is neither a layer name nor a regular expression: {error}"
        raise KernelError(msg) from error


def _refusal(layer: LayerFormat | None, *, reading: bool) -> str | None:
    """Return why a layer cannot be computed here, or None."""
    if layer is None or layer.scheme.weight is None:
        return None
    act = layer.scheme.activation
    if not reading and act is not None:
        why = refuses_activation(act)
        if why is not None:
            return why
    data_type = layer.scheme.weight.data_type
    if data_type not in registry.data_types():
        return f"data type {data_type!r} is not known here"
    return None


def _unsupported(method: str, bad: Mapping[str, str]) -> str:
    shown = "; ".join(f"{layer}: {why}" for layer, why in list(bad.items())[:8])
    more = f"; and {len(bad) - 8} more" if len(bad) > 8 else ""
    return (
        f"this {method} checkpoint cannot be opened: {shown}{more}. "
        f"Known data types: {', '.join(sorted(registry.data_types()))}. "
        + _ELSEWHERE.format(method=method)
    )
