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
from ar_tuner.algorithms.opt_rtn import gains
from ar_tuner.blocks import Discovery, find_blocks, layers_of
from ar_tuner.compiling import Compiled, plain, refusal
from ar_tuner.devices import CPU, Machine, default, parse, place
from ar_tuner.errors import TunerError
from ar_tuner.names import strangers
from ar_tuner.refine import Rows, share_out, wanted_rows
from ar_tuner.registry import adjust_plan, algorithm, find_adapter, host, scheme_for_format, stage
from ar_tuner.residence import Kept
from ar_tuner.settings import make_settings
from ar_tuner.sink import parse_formats
from ar_tuner.source import without_quantization

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import nn

    from ar_kernels import QuantizedWeight
    from ar_schemes import LayerInfo, Scheme
    from ar_tuner.adapters import ModelAdapter
    from ar_tuner.algorithms.base import Algorithm
    from ar_tuner.compiling import Forward
    from ar_tuner.devices import Placement
    from ar_tuner.events import RunEvent
    from ar_tuner.residence import Residence
    from ar_tuner.settings import Settings
    from ar_tuner.streaming import Blueprint
    from ar_tuner.written import Written


@dataclass(frozen=True)
class Prepared:
    """A model with its blocks found and its plan made; `residence` brings blocks into memory."""

    model: nn.Module
    tokenizer: Any
    adapter: ModelAdapter
    discovery: Discovery
    plan: LayerPlan
    residence: Residence


class AutoRound:
    """Quantizes a model with signed-gradient rounding.

    Args:
        model: directory of a Transformers checkpoint, or a loaded model.
        tokenizer: for a loaded model whose calibration data is text.
        scheme: preset name (`W4A16`), flat dict or `Scheme`; None: what the format implies
            (`gguf:q4_k_m`), else W4A16.
        dataset: calibration data: None (an embedded text), a .txt/.json/.jsonl/.parquet file or a
            directory of them, named sets and combinations (`a.json:num=64,pile-10k`), a list of
            strings, records or token tensors, a DataLoader. See docs/calibration.md.
        on_event: called with every event of the run.
        **options: fields of `ar_tuner.settings.Settings`.

    Raises:
        TunerError, SchemeError: any mistake in the arguments, before any work.
    """

    def __init__(
        self,
        model: str | Path | nn.Module,
        tokenizer: Any = None,
        scheme: str | Scheme | Mapping[str, Any] | None = None,
        *,
        dataset: Any = None,
        on_event: Callable[[RunEvent], None] | None = None,
        **options: Any,
    ) -> None:
        self.settings: Settings = make_settings(options)
        self._check_names()
        self._asked = scheme
        self._formats: tuple[str, ...] = ()
        self.scheme = self._scheme()
        self.dataset = dataset
        self._check_dataset()
        self.source = Path(model) if isinstance(model, (str, Path)) else None
        self.given = None if isinstance(model, (str, Path)) else model
        self._tokenizer = tokenizer
        self._listener = on_event
        self._prepared: Prepared | None = None
        self._blueprint: Blueprint | None = None
        self._forward: Forward | None = None
        machine = Machine.here()
        self.devices = parse(self.settings.device_map, machine)
        if self.source is not None:
            from ar_tuner.loading import check_source

            self.source = check_source(self.source, allow_download=self.settings.allow_download)
            self.devices = default(machine) if self.devices.nothing else self.devices

    def plan(self) -> LayerPlan:
        """Return what each layer would get; loads no weights when the model is a directory."""
        if self._prepared is not None:
            return self._prepared.plan
        return self._describe(self.given if self.given is not None else self.blueprint().model)[2]

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
                plan = self._describe(self._prepared.model)[2]
                self._prepared = dataclasses.replace(self._prepared, plan=plan)
        return formats

    def quantize(self) -> tuple[nn.Module, LayerPlan]:
        """Return the model with its weights quantized and dequantized in place, and the plan."""
        from ar_tuner.job import quantize_in_memory

        prepared = self.prepare()
        prepared.residence.keep = True
        quantize_in_memory(self, prepared)
        prepared.residence.whole()
        return prepared.model, prepared.plan

    def quantize_and_save(
        self,
        output_dir: str | Path = "ar_quantized",
        format: str | Sequence[str] = "auto_round",  # noqa: A002 - auto-round's name for it
        *,
        check: Callable[[Path, Callable[[str], QuantizedWeight], nn.Module], None] | None = None,
    ) -> Written:
        """Quantize, write the checkpoint, and return (model, directory).

        The result unpacks as a pair. Of a model in a directory, blocks are in memory only while
        their turn lasts, so the quantized model is read back when it is asked for: by unpacking,
        or by `.model`. `.path` costs nothing.

        Several formats (a list, or separated by commas) get one folder each in the directory,
        named after the format, from one tuning run.

        `check(directory, weight_of_layer, model)` runs on the finished checkpoint while the exact
        weights are still at hand.

        Raises:
            TunerError: also when the output directory exists and is not empty, before any work.
        """
        from ar_tuner.job import quantize_to_directory

        formats = self.write_as(format)
        try:
            return quantize_to_directory(self, Path(output_dir), formats, check)
        finally:
            if self.given is None:
                self._prepared = None  # a further run starts from the floats of the directory

    def prepare(self) -> Prepared:
        """Return the loaded model with its plan; the plan is made before weights are read."""
        if self._prepared is None:
            model, tokenizer = self.given, self._tokenizer
            if model is not None:
                adapter, discovery, plan = self._describe(model)
                placement = self._placement(discovery)
                residence: Residence = Kept(model, discovery.blocks, placement)
            else:
                from ar_tuner.loading import load_tokenizer
                from ar_tuner.opening import open_directory

                found = self.blueprint()
                adapter, discovery, _ = self._describe(found.model)
                placement = self._placement(discovery)
                blocks = discovery.blocks
                model, residence = open_directory(found, blocks, placement, self.settings, adapter)
                if tokenizer is None:
                    tokenizer = load_tokenizer(found.path, self.settings.trust_remote_code)
                adapter, discovery, plan = self._describe(model)
            model.eval().requires_grad_(requires_grad=False)
            self._prepared = Prepared(model, tokenizer, adapter, discovery, plan, residence)
        return self._prepared

    def blueprint(self) -> Blueprint:
        """Return the model of a directory before its weights are read."""
        if self._blueprint is None:
            from ar_tuner.opening import make_blueprint

            assert self.source is not None
            trust = self.settings.trust_remote_code
            self._blueprint = make_blueprint(self.source, trust_remote_code=trust)
        return self._blueprint

    def algorithm(self) -> Algorithm:
        """Return the algorithm of the recipe.

        Searched scales are not worth a calibration when every layer is too wide to gain by them.
        """
        recipe = self.settings.chosen
        forced = recipe.disable_opt_rtn is False
        idle = not forced and not any(gains(row.scheme) for row in self.plan().quantized)
        return algorithm("rtn" if recipe.algorithm == "opt_rtn" and idle else recipe.algorithm)

    def forward(self) -> Forward:
        """Return what runs blocks in the tuning loop: compiled if asked for and possible."""
        if self._forward is None:
            self._forward = plain
            if self.settings.enable_torch_compile and self.settings.chosen.iters:
                why = refusal(self.devices.devices[0] if self.devices.devices else CPU)
                if why is None:
                    self._forward = Compiled(lambda text: self.emit(events.Note("warning", text)))
                else:
                    text = f"nothing can be compiled here, so blocks are tuned as they are: {why}"
                    self.emit(events.Note("warning", text))
        return self._forward

    def tune_with(self, forward: Forward) -> None:
        """Run blocks in the tuning loop with a function of the caller's."""
        self._forward = forward

    def calibration_rows(self, tokenizer: Any, model: nn.Module) -> Rows:
        """Return the calibration tokens by use, after telling what they are made of."""
        from ar_tuner.calibration import calibration_rows, check_ids, check_seqlen

        recipe = self.settings.chosen
        numbers = None if recipe.stage is None else recipe.stage_settings(self.settings.seed)
        began = time.perf_counter()
        seqlen = check_seqlen(
            recipe.seqlen, getattr(model, "config", None), asked=self.settings.seqlen is not None
        )
        rows, report = calibration_rows(
            self.dataset,
            tokenizer,
            nsamples=recipe.nsamples if numbers is None else wanted_rows(recipe.nsamples, numbers),
            seqlen=seqlen,
            seed=self.settings.seed,
            allow_download=self.settings.allow_download,
        )
        check_ids(rows, getattr(model, "config", None))
        for note in dataclasses.replace(report, asked=min(recipe.nsamples, report.asked)).notes():
            self.emit(note)
        seconds = time.perf_counter() - began
        self.emit(events.CalibrationReady(len(rows), rows.numel(), seconds, report.sources))
        if numbers is None:
            return Rows(rows)
        shared = share_out(rows, report.documents, recipe.nsamples, numbers)
        if shared is None:
            few = f"{len(rows)} calibration rows are too few to hold any out"
            text = f"{recipe.stage} is left out: {few}"
            self.emit(events.Note("warning", text))
        return Rows(rows[: recipe.nsamples]) if shared is None else shared

    def emit(self, event: RunEvent) -> None:
        """Tell the listener and every plugin of an event."""
        if self._listener is not None:
            self._listener(event)
        host().notify("ar_run_event", event=event)

    def _describe(self, model: nn.Module) -> tuple[ModelAdapter, Discovery, LayerPlan]:
        adapter = find_adapter(getattr(model, "config", None))
        discovery = find_blocks(model, adapter, paths=self.settings.block_paths)
        rules = LayerRules(
            scheme=self.scheme,
            layer_config=self.settings.layer_config,
            ignore_layers=self.settings.ignored,
            quant_lm_head=self.settings.quant_lm_head,
        )
        layers = list(layers_of(model, discovery, adapter))
        plan = make_plan([*layers, *self._strangers(layers)], rules)
        for name in self._formats:
            plan = adjust_plan(name, plan, self._config(model))
        shared = "float16" if len(self._formats) > 1 else None  # what every format can hold
        plan = with_scale_dtype(plan, self.settings.scale_dtype or shared)
        _check_computable(plan)
        return adapter, discovery, plan

    def _strangers(self, layers: Sequence[LayerInfo]) -> list[LayerInfo]:
        if self.source is None:
            return []
        found = self.blueprint()
        return strangers(found.source, found.wiring.unknown, layers)

    def _placement(self, discovery: Discovery) -> Placement:
        sizes = [(b.name, sum(p.nbytes for p in b.module.parameters())) for b in discovery.blocks]
        return place(self.devices, sizes, low_gpu_mem_usage=self.settings.low_gpu_mem_usage)

    def _config(self, model: nn.Module) -> dict[str, Any]:
        if self.source is not None:
            from ar_tuner.loading import read_config

            return without_quantization(read_config(self.source))
        described: Any = model.config
        config: dict[str, Any] = json.loads(json.dumps(described.to_dict(), default=str))
        config.setdefault("architectures", [type(model).__name__])
        return config

    def _check_names(self) -> None:
        recipe = self.settings.chosen
        algorithm(recipe.algorithm)
        if recipe.stage is not None:
            stage(recipe.stage)

    def _check_dataset(self) -> None:
        from ar_tuner.calibration import check_dataset

        recipe = self.settings.chosen
        nsamples = recipe.nsamples if recipe.iters else None
        check_dataset(self.dataset, nsamples=nsamples, allow_download=self.settings.allow_download)

    def _scheme(self) -> Scheme:
        which = self._asked
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
