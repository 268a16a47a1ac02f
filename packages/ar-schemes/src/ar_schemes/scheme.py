"""`Scheme`: what one layer gets, weights and activations together."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ar_schemes.errors import SchemeError, unknown_name
from ar_schemes.spec import Granularity, Span, SuperGroup, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Mapping

FIELDS = (
    "bits",
    "group_size",
    "sym",
    "data_type",
    "act_bits",
    "act_group_size",
    "act_sym",
    "act_data_type",
    "act_dynamic",
    "super_bits",
    "super_group_size",
)
"""Keys of the flat form of a scheme: those of checkpoint configs and of `layer_config`."""
FLOAT_BITS = 16
"""From this width on, a tensor keeps its source type."""

_DEFAULT_SCALE = {
    "mx_fp": "e8m0",
    "mx_int": "e8m0",
    "nv_fp": "float8_e4m3fn",
    "nvfp4_v2": "ue5m3",
    "fp": "float32",
}


@dataclass(frozen=True)
class Scheme:
    """A named representation of a layer.

    `weight` None means the layer stays in its 16 bit source type. `activation` None means
    activations are not quantized. `roles` makes a mixed scheme: role of a layer (`experts`,
    `linear`, `lm_head`, `embedding`) to the name of the scheme it gets instead of this one.
    """

    name: str
    weight: TensorSpec | None = None
    activation: TensorSpec | None = None
    roles: Mapping[str, str] = field(default_factory=dict, hash=False)
    fixed: bool = False

    @property
    def is_float(self) -> bool:
        """True when nothing is quantized."""
        return self.weight is None and self.activation is None

    def bits_per_weight(self, rows: int, columns: int) -> float:
        """Return stored bits per weight of a [rows, columns] layer, scales and zeros included."""
        return 16.0 if self.weight is None else self.weight.bits_per_weight(rows, columns)

    def to_dict(self) -> dict[str, Any]:
        """Return the flat form (keys of `FIELDS`), without activation keys when there are none."""
        if self.weight is None:
            return {"bits": 16, "data_type": "fp"}
        out: dict[str, Any] = {
            "bits": self.weight.bits,
            "group_size": _plain(self.weight.group_size),
            "sym": self.weight.symmetric,
            "data_type": self.weight.data_type,
        }
        if self.weight.super_group is not None:
            out["super_bits"] = self.weight.super_group.bits
            out["super_group_size"] = self.weight.super_group.size
        if self.activation is not None:
            out |= {
                "act_bits": self.activation.bits,
                "act_group_size": _plain(self.activation.group_size),
                "act_sym": self.activation.symmetric,
                "act_data_type": self.activation.data_type,
                "act_dynamic": self.activation.dynamic,
            }
        return out

    def with_overrides(self, overrides: Mapping[str, Any]) -> Scheme:
        """Return the scheme with fields of its flat form replaced, renamed when something changed.

        `bits` of 16 or more give the float scheme.

        Raises:
            SchemeError: an unknown key, a value out of range, a preset whose numbers a file
                format fixes, or a float scheme without new `bits`.
        """
        given = _checked(overrides)
        if not given:
            return self
        if self.fixed:
            msg = (
                f"scheme {self.name}: its numbers are fixed by the file format, so "
                f"{', '.join(sorted(given))} cannot be changed. Choose another preset instead."
            )
            raise SchemeError(msg)
        if self.weight is None and "bits" not in given:
            msg = (
                f"scheme {self.name} keeps the weight in 16 bit, so {', '.join(sorted(given))} "
                "cannot be changed. Give bits too, or choose another scheme."
            )
            raise SchemeError(msg)
        if given.get("bits", 0) >= FLOAT_BITS:
            return Scheme(name="BF16")
        base = {} if self.weight is None else self.to_dict()
        changed = scheme_from_dict({**base, **given}, name=self.name)
        same = changed.weight == self.weight and changed.activation == self.activation
        return self if same else replace(changed, name=describe(changed), roles=self.roles)


def _plain(size: int | tuple[int, int]) -> int | list[int]:
    return list(size) if isinstance(size, tuple) else size


def describe(scheme: Scheme) -> str:
    """Return a short name for a scheme that is no preset: `W4A16G64`, `W4A16G128-asym`."""
    if scheme.weight is None:
        return "BF16"
    act = 16 if scheme.activation is None else scheme.activation.bits
    size = scheme.weight.group_size
    group = f"G{'x'.join(map(str, size))}" if isinstance(size, tuple) else f"G{size}"
    group = {"G-1": "-channel", "G0": "-tensor"}.get(group, group)
    kind = "" if scheme.weight.data_type == "int" else f"-{scheme.weight.data_type}"
    return f"W{scheme.weight.bits}A{act}{group}{kind}{'' if scheme.weight.symmetric else '-asym'}"


def scheme_from_dict(flat: Mapping[str, Any], *, name: str | None = None) -> Scheme:
    """Return the scheme for a flat form; missing keys get the defaults of `W4A16`.

    A key whose value is None counts as missing. Activation keys left out follow the weight's,
    and 16 activation bits mean none.

    Raises:
        SchemeError: an unknown key or a value out of range.
    """
    given = _checked(flat)
    bits = given.get("bits", 4)
    if bits >= FLOAT_BITS:
        return Scheme(name=name or "BF16")
    data_type = given.get("data_type", "int")
    weight = TensorSpec(
        data_type=data_type,
        bits=bits,
        granularity=Granularity.from_group_size(given.get("group_size", 128)),
        symmetric=given.get("sym", True),
        scale_dtype=_DEFAULT_SCALE.get(data_type, "float16"),
        super_group=_super_group(given),
    )
    scheme = Scheme(name=name or "", weight=weight, activation=_activation(given, weight))
    return scheme if name else replace(scheme, name=describe(scheme))


def _super_group(given: Mapping[str, Any]) -> SuperGroup | None:
    keys = ("super_group_size", "super_bits")
    found = [k for k in keys if k in given]
    if not found:
        return None
    if len(found) < len(keys):
        msg = f"{found[0]} needs the other one too: give both {' and '.join(keys)}"
        raise SchemeError(msg)
    return SuperGroup(given["super_group_size"], given["super_bits"])


def _activation(flat: Mapping[str, Any], weight: TensorSpec) -> TensorSpec | None:
    bits = flat.get("act_bits", FLOAT_BITS)
    if bits >= FLOAT_BITS:
        return None
    size = flat.get("act_group_size")
    granularity = weight.granularity if size is None else Granularity.from_group_size(size)
    if granularity.span is Span.CHANNEL:
        granularity = Granularity(Span.TOKEN)
    return TensorSpec(
        data_type=flat.get("act_data_type", weight.data_type),
        bits=bits,
        granularity=granularity,
        symmetric=flat.get("act_sym", weight.symmetric),
        dynamic=flat.get("act_dynamic", True),
        scale_dtype=weight.scale_dtype,
    )


_KINDS: tuple[tuple[type, tuple[str, ...], str], ...] = (
    (int, ("bits", "act_bits", "super_bits", "super_group_size"), "a whole number above 0"),
    (bool, ("sym", "act_sym", "act_dynamic"), "true or false"),
    (str, ("data_type", "act_data_type"), "the name of a data type"),
)


def _checked(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flat form without missing values, after checking keys and kinds of values."""
    for key in flat:
        if key not in FIELDS:
            raise SchemeError(unknown_name("scheme key", str(key), FIELDS))
    given = {k: v for k, v in flat.items() if v is not None}
    for kind, keys, allowed in _KINDS:
        for key in keys:
            value = given.get(key, kind(1))
            wrong = isinstance(value, bool) is not (kind is bool) or not isinstance(value, kind)
            if wrong or (kind is int and value < 1):
                msg = f"{key} {value!r} is not allowed: use {allowed}"
                raise SchemeError(msg)
    return given
