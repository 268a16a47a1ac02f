"""`LayerRules` (what the user wants) resolved to a `LayerPlan` (what each layer gets, and why)."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from ar_schemes.errors import SchemeError
from ar_schemes.registry import scheme as find_scheme
from ar_schemes.scheme import Scheme
from ar_schemes.spec import Span

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

Role = Literal["linear", "experts", "router", "lm_head", "embedding"]
FLOAT = Scheme(name="BF16")
SOURCE = Scheme(name="source")
"""The word of a rule for: written again as the checkpoint stores it, quantized or not."""
ALIGNMENT = 32
"""Rows and columns that packed integer layouts and all their readers need a multiple of."""


@dataclass(frozen=True)
class LayerInfo:
    """What a plan needs to know of one layer: no tensors.

    Attributes:
        name: module name in the model.
        rows: out features O (of one expert where `copies` > 1).
        columns: in features I.
        block: name of the decoder block it belongs to, None outside the blocks.
        role: what it does; routers and embeddings have rules of their own.
        copies: number of equal matrices (experts) the name stands for.
        tied: shares its weight with the embedding.
        keep: reason of the model adapter to leave it in high precision, or None.
        transposed: the model holds it as [I, O] (Conv1D of GPT-2).
        stored: scheme in which the source checkpoint holds it, None: as floats.
    """

    name: str
    rows: int
    columns: int
    block: str | None
    role: Role = "linear"
    copies: int = 1
    tied: bool = False
    keep: str | None = None
    transposed: bool = False
    stored: Scheme | None = None

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.rows * self.columns * self.copies


@dataclass(frozen=True)
class LayerRules:
    """What the user wants, before the model is known.

    Attributes:
        scheme: default of every linear layer in a block.
        layer_config: layer name, part of one, or regular expression, to a scheme: a preset
            name, a flat dict merged over the default, a number of bits, a `Scheme`, or `source`:
            as the checkpoint stores it.
        ignore_layers: names or parts of names (`mlp.gate`) that stay in 16 bit.
        quant_lm_head: quantize the output head too.
        keep_source: layers that would stay in 16 bit stay as the checkpoint stores them.
    """

    scheme: Scheme
    layer_config: Mapping[str, str | int | Scheme | Mapping[str, Any]] = field(default_factory=dict)
    ignore_layers: tuple[str, ...] = ()
    quant_lm_head: bool = False
    keep_source: bool = False


@dataclass(frozen=True)
class PlanRow:
    """One layer of a plan: what it gets and the reason.

    `kept`: it is not quantized anew (`scheme` is the float one), but written as `layer.stored`
    says, with the codes and scales of the source.
    """

    layer: LayerInfo
    scheme: Scheme
    reason: str
    kept: bool = False

    @property
    def quantized(self) -> bool:
        """True when the weight is quantized."""
        return self.scheme.weight is not None

    @property
    def written(self) -> Scheme:
        """The scheme that files will hold it in: the source's where it is kept."""
        return self.layer.stored if self.kept and self.layer.stored is not None else self.scheme

    @property
    def bits_per_weight(self) -> float:
        """Bits on disk of one weight, scales and zero points included."""
        rows, columns = self.layer.rows, self.layer.columns
        spec = self.written.weight
        if self.kept and spec is not None:  # a file's last tiles may hang over the edge
            height, width = spec.granularity.region(rows, columns)
            whole = -(-rows // height) * height, -(-columns // width) * width
            return self.written.bits_per_weight(*whole)
        return self.written.bits_per_weight(rows, columns)

    @property
    def stored_bits(self) -> float:
        """Bits on disk of the whole layer, scales and zero points included."""
        return self.bits_per_weight * self.layer.weights


@dataclass(frozen=True)
class LayerPlan:
    """One row per layer, in the model's order."""

    rows: tuple[PlanRow, ...]
    default: Scheme

    def __getitem__(self, name: str) -> PlanRow:
        """Return the row of a layer name.

        Raises:
            KeyError: no such layer.
        """
        return self._by_name[name]

    @functools.cached_property
    def _by_name(self) -> dict[str, PlanRow]:
        return {row.layer.name: row for row in self.rows}

    @property
    def quantized(self) -> tuple[PlanRow, ...]:
        """The rows whose weight is quantized."""
        return tuple(r for r in self.rows if r.quantized)

    @property
    def kept(self) -> tuple[PlanRow, ...]:
        """The rows that are written as the source stores them, quantized."""
        return tuple(r for r in self.rows if r.kept)

    def as_written(self) -> LayerPlan:
        """Return the plan of the files: what is kept has the source's scheme there."""
        rows = tuple(replace(r, scheme=r.written) for r in self.rows)
        return LayerPlan(rows=rows, default=self.default)

    def of_block(self, block: str | None) -> tuple[PlanRow, ...]:
        """Return the rows of one block (None: outside the blocks)."""
        return tuple(r for r in self.rows if r.layer.block == block)

    @property
    def bits_per_weight(self) -> float:
        """Average stored bits of the layers in blocks and the quantized ones outside."""
        rows = [r for r in self.rows if r.layer.block is not None or r.quantized or r.kept]
        weights = sum(r.layer.weights for r in rows)
        return sum(r.stored_bits for r in rows) / weights if weights else 16.0

    @property
    def fallbacks(self) -> tuple[PlanRow, ...]:
        """Layers in blocks that stay in 16 bit."""
        rows = (r for r in self.rows if not r.quantized and not r.kept)
        return tuple(r for r in rows if r.layer.block is not None)


def settled(rules: LayerRules, default: Scheme) -> LayerRules:
    """Return the rules with every entry of `layer_config` a whole scheme.

    Entries that name only some numbers are completed by `default`, so that the rules mean the same
    whatever their own scheme becomes.

    Raises:
        SchemeError: an entry names no possible scheme.
    """
    whole = {p: _from_rule(p, rule, default) for p, rule in rules.layer_config.items()}
    return replace(rules, layer_config=whole)


def make_plan(layers: Iterable[LayerInfo], rules: LayerRules) -> LayerPlan:
    """Return what each layer gets under the rules, with a reason per row.

    The last matching rule of `layer_config` wins, an exact name over any pattern.

    Raises:
        SchemeError: a rule that matches nothing or names no possible scheme, or layers whose
            group size does not divide (all of them in one message).
    """
    layers = list(layers)
    _check_rules_match(layers, rules)
    chosen = {p: _from_rule(p, rule, rules.scheme) for p, rule in rules.layer_config.items()}
    rows = tuple(_row(layer, rules, chosen) for layer in layers)
    _check_divides(rows)
    return LayerPlan(rows=rows, default=rules.scheme)


def _row(layer: LayerInfo, rules: LayerRules, chosen: Mapping[str, Scheme]) -> PlanRow:
    wanted, reason = _wanted(layer, rules, chosen)
    if wanted.weight is None:
        return _unquantized(layer, reason, keep=rules.keep_source or wanted.name == SOURCE.name)
    if layer.tied:
        return _unquantized(layer, "shares its weight with the embedding: stays in 16 bit")
    integer = wanted.weight.data_type.startswith("int") and wanted.weight.super_group is None
    if integer and (layer.rows % ALIGNMENT or layer.columns % ALIGNMENT):
        why = (
            f"shape [{layer.rows}, {layer.columns}] is not a multiple of {ALIGNMENT}: "
            "no reader accepts it packed, stays in 16 bit"
        )
        return _unquantized(layer, why, keep=rules.keep_source)
    return PlanRow(layer, wanted, reason)


def _unquantized(layer: LayerInfo, reason: str, *, keep: bool = False) -> PlanRow:
    """Return the row of a layer that is not quantized anew, kept as stored where that is asked."""
    if not keep or layer.stored is None:
        return PlanRow(layer, FLOAT, reason)
    return PlanRow(layer, FLOAT, f"{reason}; kept as the source stores it", kept=True)


def _wanted(
    layer: LayerInfo, rules: LayerRules, chosen: Mapping[str, Scheme]
) -> tuple[Scheme, str]:
    ignored = next((p for p in rules.ignore_layers if matches(p, layer.name)), None)
    if ignored is not None:
        return FLOAT, f"ignore_layers {ignored!r}"
    pattern = _last_match(chosen, layer.name)
    if pattern is not None:
        return chosen[pattern], f"layer_config {pattern!r}"
    if layer.keep is not None:
        return FLOAT, layer.keep
    if layer.role == "lm_head" and not rules.quant_lm_head:
        return FLOAT, "output head: not asked for (quant_lm_head)"
    if layer.role == "router":
        return FLOAT, "router: decides where tokens go, stays in 16 bit"
    role = rules.scheme.roles.get(layer.role)
    if role is not None:
        return find_scheme(role), f"role {layer.role} of {rules.scheme.name}"
    if layer.role == "embedding":
        return FLOAT, "embedding: stays in 16 bit"
    if layer.block is None and layer.role != "lm_head":
        return FLOAT, "outside the decoder blocks"
    return rules.scheme, "scheme"


def _last_match(patterns: Iterable[str], name: str) -> str | None:
    hits = [p for p in patterns if matches(p, name)]
    return name if name in hits else hits[-1] if hits else None


def _from_rule(pattern: str, rule: object, default: Scheme) -> Scheme:
    """Return the scheme of one entry of `layer_config`, with the entry named in any error."""
    try:
        if isinstance(rule, str) and rule.lower() == SOURCE.name:
            return SOURCE
        if isinstance(rule, (str, Scheme)):
            return find_scheme(rule)
        if isinstance(rule, int) and not isinstance(rule, bool):
            rule = {"bits": rule}
        if isinstance(rule, Mapping):
            base = default if default.weight is not None else find_scheme("W4A16")
            return base.with_overrides(rule)
    except SchemeError as error:
        msg = f"layer_config {pattern!r}: {error}"
        raise SchemeError(msg) from error
    msg = (
        f"layer_config {pattern!r}: {rule!r} is no scheme; use a preset name, a number of bits, "
        f'{SOURCE.name!r} (as it is stored), a dict such as {{"bits": 8}}, or a Scheme'
    )
    raise SchemeError(msg)


_REGEX = re.compile(r"[*+?^$()\[\]{}|\\]")


def matches(pattern: str, name: str) -> bool:
    """Tell whether a rule's pattern means a layer: exact, a dotted part, or a regular expression.

    `mlp.gate` means `...mlp.gate` and what lies under it, never `mlp.gate_proj`. A pattern with
    regular-expression characters is searched for in the whole name.
    """
    if _REGEX.search(pattern):
        return re.search(pattern, name) is not None
    return f".{pattern.strip('.')}." in f".{name}."


def _check_rules_match(layers: Sequence[LayerInfo], rules: LayerRules) -> None:
    for source, patterns in (
        ("layer_config", rules.layer_config),
        ("ignore_layers", rules.ignore_layers),
    ):
        for pattern in patterns:
            try:
                hit = any(matches(pattern, layer.name) for layer in layers)
            except re.error as error:
                msg = f"{source} {pattern!r} is no regular expression: {error}"
                raise SchemeError(msg) from error
            if not hit:
                ends = sorted({layer.name.rsplit(".", 1)[-1] for layer in layers})
                msg = (
                    f"{source} {pattern!r} matches none of the {len(layers)} layers. "
                    f"Layer names end in: {', '.join(ends[:20])}. See `ar plan MODEL`."
                )
                raise SchemeError(msg)


def _check_divides(rows: Sequence[PlanRow]) -> None:
    bad = [r for r in rows if r.scheme.weight is not None and not _divides(r)]
    if not bad:
        return
    lines = []
    for row in bad:
        spec = row.scheme.weight
        assert spec is not None
        options = [
            d for d in range(min(1024, row.layer.columns), 15, -1) if not row.layer.columns % d
        ]
        lines.append(
            f"  {row.layer.name}: {spec.granularity} does not divide "
            f"[{row.layer.rows}, {row.layer.columns}]; sizes that do: "
            f"{', '.join(map(str, options[:6])) or 'none'}"
        )
    msg = (
        f"{len(bad)} layers cannot be quantized as asked:\n"
        + "\n".join(lines)
        + "\nChoose another group size (-1: one scale per channel), give these layers one with "
        "layer_config, or keep them in 16 bit with ignore_layers."
    )
    raise SchemeError(msg)


def _divides(row: PlanRow) -> bool:
    spec = row.scheme.weight
    if spec is None or spec.granularity.span not in (Span.GROUP, Span.TILE):
        return True
    region = spec.granularity.region(row.layer.rows, row.layer.columns)
    return row.layer.columns % region[1] == 0 and (
        spec.granularity.span is Span.GROUP or row.layer.rows % region[0] == 0
    )
