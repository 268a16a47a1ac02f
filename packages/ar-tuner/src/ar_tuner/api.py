"""`AutoRound`: the one object a script needs."""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ar_schemes import LayerPlan, LayerRules, make_plan, scheme
from ar_tuner import events
from ar_tuner.auto_scheme.choose import Chooser, Subject
from ar_tuner.auto_scheme.front import plan_file, write_json
from ar_tuner.auto_scheme.request import AutoScheme
from ar_tuner.auto_scheme.terrain import Sizer, Terrain, float_facts, terrain
from ar_tuner.blocks import Discovery, find_blocks, layers_of
from ar_tuner.errors import TunerError
from ar_tuner.names import strangers
from ar_tuner.registry import adjust_plan, algorithm, find_adapter, host, scheme_for_format
from ar_tuner.settings import make_settings
from ar_tuner.sink import parse_formats

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor, nn

    from ar_kernels import QuantizedWeight
    from ar_schemes import LayerInfo, Scheme
    from ar_tuner.adapters import ModelAdapter
    from ar_tuner.algorithms.base import Algorithm
    from ar_tuner.events import RunEvent
    from ar_tuner.settings import Settings


@dataclass(frozen=True)
class Prepared:
    """A model with its blocks found and its plan made."""

    model: nn.Module
    tokenizer: Any
    adapter: ModelAdapter
    discovery: Discovery
    plan: LayerPlan


class AutoRound:
    """Quantizes a model with signed-gradient rounding.

    Args:
        model: directory of a Transformers checkpoint, or a loaded model.
        tokenizer: for a loaded model whose calibration data is text.
        scheme: preset name (`W4A16`), flat dict or `Scheme`; None: what the format implies
            (`gguf:q4_k_m`), else W4A16. An `AutoScheme` chooses one for each layer.
        dataset: calibration data: None (an embedded text), a .txt/.json/.jsonl/.parquet file, a
            list of strings or of token tensors, a DataLoader, or the name of a `datasets` set.
        on_event: called with every event of the run.
        **options: fields of `ar_tuner.settings.Settings`.

    Raises:
        TunerError, SchemeError: any mistake in the arguments, before any work.
    """

    def __init__(
        self,
        model: str | Path | nn.Module,
        tokenizer: Any = None,
        scheme: str | Scheme | Mapping[str, Any] | AutoScheme | None = None,
        *,
        dataset: Any = None,
        on_event: Callable[[RunEvent], None] | None = None,
        **options: Any,
    ) -> None:
        self.settings: Settings = make_settings(options)
        self._asked = scheme
        self._formats: tuple[str, ...] = ()
        self.scheme = self._scheme()
        self.dataset = dataset
        self.source = Path(model) if isinstance(model, (str, Path)) else None
        self.given = None if isinstance(model, (str, Path)) else model
        self._tokenizer = tokenizer
        self._listener = on_event
        self._prepared: Prepared | None = None
        if self.source is not None:
            from ar_tuner.loading import check_source

            self.source = check_source(self.source, allow_download=self.settings.allow_download)
        self.chooser: Chooser | None = None
        if isinstance(scheme, AutoScheme):
            self.chooser = Chooser(scheme, source=self.source, emit=self.emit)

    def plan(self) -> LayerPlan:
        """Return what each layer would get.

        Loads no weights when the model is a directory, but for an `AutoScheme`, which has to
        look at them.
        """
        if self._prepared is None and self.chooser is not None:
            return self.prepare().plan
        return self.draft() if self._prepared is None else self._prepared.plan

    def plans(self) -> tuple[LayerPlan, ...]:
        """Return the plan of each target of an `AutoScheme`, from one scoring."""
        if self.chooser is None:
            return (self.plan(),)
        self.prepare()
        return self.chooser.plans

    def front(self) -> dict[str, Any]:
        """Return what an `AutoScheme` chose, the front it chose from and what was measured.

        Raises:
            TunerError: the scheme is no `AutoScheme`.
        """
        if self.chooser is None:
            msg = f"scheme {self.scheme.name} is the same everywhere: there is no front to show"
            raise TunerError(msg)
        self.prepare()
        return self.chooser.to_dict()

    def save_plan(self, path: str | Path) -> None:
        """Write the plan as a file that `layer_config` takes."""
        write_json(Path(path), plan_file(self.plan()))

    def save_front(self, path: str | Path) -> None:
        """Write `front()` as a JSON file."""
        write_json(Path(path), self.front())

    def draft(self) -> LayerPlan:
        """Return the plan as far as it is known without weights.

        For an `AutoScheme` it is one in which every option occurs.
        """
        model = self.given
        if model is None:
            from ar_tuner.loading import load_meta

            assert self.source is not None
            model = load_meta(self.source, trust_remote_code=self.settings.trust_remote_code)
        _, _, layers, plan = self._describe(model)
        return plan if self.chooser is None else self.chooser.draft(self._terrain(model, layers))

    def write_as(self, format: str | Sequence[str]) -> tuple[str, ...]:  # noqa: A002
        """Make the plan one for these formats, and return them.

        Raises:
            TunerError: no format, one twice, or formats that imply different schemes.
        """
        formats = parse_formats(format)
        if formats != self._formats:
            self._formats = formats
            self.scheme = self._scheme()
            if self._prepared is not None:
                self._prepared = self._plan_for(self._prepared.model, self._prepared.tokenizer)
        return formats

    def quantize(self) -> tuple[nn.Module, LayerPlan]:
        """Return the model with its weights quantized and dequantized in place, and the plan."""
        from ar_tuner.job import quantize_in_memory

        prepared = self.prepare()
        quantize_in_memory(self, prepared)
        return prepared.model, prepared.plan

    def quantize_and_save(
        self,
        output_dir: str | Path = "ar_quantized",
        format: str | Sequence[str] = "auto_round",  # noqa: A002 - auto-round's name for it
        *,
        check: Callable[[Path, Callable[[str], QuantizedWeight], nn.Module], None] | None = None,
    ) -> tuple[nn.Module, Path]:
        """Quantize, write the checkpoint, and return (model, directory).

        Several formats (a list, or separated by commas) get one folder each in the directory,
        named after the format, from one tuning run.

        `check(directory, weight_of_layer, model)` runs on the finished checkpoint while the exact
        weights are still at hand.

        Raises:
            TunerError: also when the output directory exists and is not empty, before any work.
        """
        from ar_tuner.job import quantize_to_directory

        return quantize_to_directory(self, Path(output_dir), self.write_as(format), check)

    def prepare(self) -> Prepared:
        """Return the loaded model with its plan; the plan is made before weights are read."""
        if self._prepared is None:
            self.draft()
            model, tokenizer = self.given, self._tokenizer
            if model is None:
                from ar_tuner.loading import load_model

                assert self.source is not None
                model, found = load_model(
                    self.source,
                    dtype=self.settings.model_dtype,
                    device=self.settings.device_map,
                    trust_remote_code=self.settings.trust_remote_code,
                )
                tokenizer = tokenizer or found
            model.eval().requires_grad_(requires_grad=False)
            self._prepared = self._plan_for(model, tokenizer)
        return self._prepared

    def algorithm(self) -> Algorithm:
        """Return the algorithm of the recipe."""
        recipe = self.settings.chosen
        return algorithm("rtn" if recipe.iters == 0 else recipe.algorithm)

    def calibration_rows(self, tokenizer: Any, model: nn.Module) -> Tensor:
        """Return the calibration tokens [N, T], after telling what they are made of."""
        from ar_tuner.calibration import calibration_rows, check_seqlen

        recipe = self.settings.chosen
        began = time.perf_counter()
        seqlen = check_seqlen(
            recipe.seqlen, getattr(model, "config", None), asked=self.settings.seqlen is not None
        )
        rows, report = calibration_rows(
            self.dataset,
            tokenizer,
            nsamples=recipe.nsamples,
            seqlen=seqlen,
            seed=self.settings.seed,
            allow_download=self.settings.allow_download,
        )
        for note in report.notes():
            self.emit(events.Note("warning", note))
        self.emit(
            events.CalibrationReady(len(rows), int(rows.numel()), time.perf_counter() - began)
        )
        return rows

    def emit(self, event: RunEvent) -> None:
        """Tell the listener and every plugin of an event."""
        if self._listener is not None:
            self._listener(event)
        host().notify("ar_run_event", event=event)

    def _plan_for(self, model: nn.Module, tokenizer: Any) -> Prepared:
        adapter, discovery, layers, plan = self._describe(model)
        if self.chooser is not None:
            subject = Subject(
                model, adapter, discovery.blocks, lambda: self._scoring_rows(model, tokenizer)
            )
            plan = self.chooser.choose(self._terrain(model, layers), subject)
            self.scheme = plan.default
        return Prepared(model, tokenizer, adapter, discovery, plan)

    def _describe(
        self, model: nn.Module
    ) -> tuple[ModelAdapter, Discovery, list[LayerInfo], LayerPlan]:
        adapter = find_adapter(getattr(model, "config", None))
        discovery = find_blocks(model, adapter, paths=self.settings.block_paths)
        layers = list(layers_of(model, discovery, adapter))
        layers += self._strangers(model, layers)
        return adapter, discovery, layers, self._resolved(model, layers, self._rules())

    def _rules(self) -> LayerRules:
        return LayerRules(
            scheme=self.scheme,
            layer_config=self.settings.layer_config,
            ignore_layers=self.settings.ignored,
            quant_lm_head=self.settings.quant_lm_head,
        )

    def _resolved(
        self, model: nn.Module, layers: Sequence[LayerInfo], rules: LayerRules
    ) -> LayerPlan:
        plan = make_plan(layers, rules)
        for name in self._formats:
            plan = adjust_plan(name, plan, self._config(model))
        shared = "float16" if len(self._formats) > 1 else None  # what every format can hold
        plan = with_scale_dtype(plan, self.settings.scale_dtype or shared)
        _check_computable(plan)
        return plan

    def _terrain(self, model: nn.Module, layers: Sequence[LayerInfo]) -> Terrain:
        """Return what an `AutoScheme` chooses on."""
        return terrain(
            layers,
            self._rules(),
            resolve=lambda rules: self._resolved(model, layers, rules),
            size=Sizer(self._formats, self._config(model), float_facts(model, self.source)),
        )

    def _scoring_rows(self, model: nn.Module, tokenizer: Any) -> Tensor:
        """Return the tokens [N, T] that an `AutoScheme` scores with."""
        from ar_tuner.calibration import calibration_rows, check_seqlen

        assert self.chooser is not None
        asked = self.chooser.asked
        rows, report = calibration_rows(
            self.dataset if asked.dataset is None else asked.dataset,
            tokenizer,
            nsamples=asked.number("nsamples"),
            seqlen=check_seqlen(
                asked.number("seqlen"),
                getattr(model, "config", None),
                asked=asked.seqlen is not None,
            ),
            seed=asked.seed,
            allow_download=self.settings.allow_download,
        )
        for note in report.notes():
            self.emit(events.Note("warning", note))
        return rows

    def _strangers(self, model: nn.Module, layers: Sequence[LayerInfo]) -> list[LayerInfo]:
        if self.source is None:
            return []
        return strangers(self.source, model.state_dict().keys(), layers)

    def _config(self, model: nn.Module) -> dict[str, Any]:
        if self.source is not None:
            config: dict[str, Any] = json.loads((self.source / "config.json").read_text("utf-8"))
            return config
        described: Any = model.config
        config = json.loads(json.dumps(described.to_dict(), default=str))
        config.setdefault("architectures", [type(model).__name__])
        return config

    def _scheme(self) -> Scheme:
        which = self._asked
        if isinstance(which, AutoScheme):
            return next(iter(which.schemes.values()))
        if which is None:
            implied = {f: scheme_for_format(f) for f in self._formats}
            names = sorted({name for name in implied.values() if name is not None})
            if len(names) > 1:
                pairs = ", ".join(f"{f} implies {n}" for f, n in implied.items() if n is not None)
                msg = f"these formats cannot come from one run: {pairs}. Run them one by one."
                raise TunerError(msg)
            which = names[0] if names else "W4A16"
        overrides = {
            "bits": self.settings.bits,
            "group_size": self.settings.group_size,
            "sym": self.settings.sym,
        }
        return scheme(which).with_overrides(overrides)


def with_scale_dtype(plan: LayerPlan, dtype: str | None) -> LayerPlan:
    """Return the plan with scales of integers stored in another type."""
    if dtype is None:
        return plan

    def changed(which: Scheme) -> Scheme:
        if which.weight is None or which.weight.data_type != "int":
            return which
        return dataclasses.replace(which, weight=which.weight.with_(scale_dtype=dtype))

    rows = tuple(dataclasses.replace(row, scheme=changed(row.scheme)) for row in plan.rows)
    return LayerPlan(rows=rows, default=changed(plan.default))


def _check_computable(plan: LayerPlan) -> None:
    from ar_kernels import data_types

    if not plan.quantized:
        msg = f"scheme {plan.default.name} quantizes no layer of this model: see `ar plan`"
        raise TunerError(msg)
    for row in plan.quantized:
        spec = row.scheme.weight
        assert spec is not None
        kind = data_types().get(spec.data_type)
        why: str | None = f"no installed package knows the data type {spec.data_type!r}"
        why = why if kind is None else kind.refuses(spec)
        act = row.scheme.activation
        if why is None and act is not None:
            other = data_types().get(act.data_type)
            why = f"no installed package knows the activation data type {act.data_type!r}"
            why = why if other is None else other.refuses(act)
        if row.layer.copies > 1:
            why = "it is one tensor of fused experts, and this version tunes linear layers only"
        if why is not None:
            msg = f"scheme {row.scheme.name} (layer {row.layer.name}) cannot be computed: {why}"
            raise TunerError(msg)
