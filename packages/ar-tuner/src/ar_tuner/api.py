"""`AutoRound`: the one object a script needs."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ar_schemes import LayerPlan, LayerRules, make_plan, scheme
from ar_tuner import events
from ar_tuner.algorithms.opt_rtn import gains
from ar_tuner.auto_scheme.choose import Chooser, Subject
from ar_tuner.auto_scheme.front import plan_file, write_json
from ar_tuner.auto_scheme.request import AutoScheme, check_options
from ar_tuner.auto_scheme.rows import scoring_rows
from ar_tuner.auto_scheme.terrain import Sizer, Terrain, float_facts, terrain
from ar_tuner.blocks import Discovery, find_blocks, layers_of
from ar_tuner.compiling import Compiled, plain, refusal
from ar_tuner.devices import CPU, Machine, default, parse, place
from ar_tuner.errors import TunerError
from ar_tuner.experts import own_wiring
from ar_tuner.imagery import adapter_for
from ar_tuner.plans import check_computable, with_scale_dtype
from ar_tuner.registry import adjust_plan, algorithm, host, implied_scheme, stage
from ar_tuner.renaming import layers_in_files
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
    from ar_tuner.refine import Rows
    from ar_tuner.residence import Residence
    from ar_tuner.settings import Settings
    from ar_tuner.streaming import Blueprint
    from ar_tuner.wiring import Wiring
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
            (`gguf:q4_k_m`), else W4A16. An `AutoScheme` chooses one for each layer.
        dataset: calibration data: None (an embedded text), a .txt/.json/.jsonl/.parquet file or a
            directory of them, named sets and combinations (`a.json:num=64,pile-10k`), a list of
            strings, records or token tensors, a DataLoader. See docs/calibration.md. With ar-vlm,
            samples with images among them.
        processor: takes text and images, for a loaded model that sees (or a function from a
            sample to model inputs); None: that of the directory.
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
        processor: Any = None,
        on_event: Callable[[RunEvent], None] | None = None,
        **options: Any,
    ) -> None:
        self.settings: Settings = make_settings(options)
        self._check_names()
        self._asked = scheme
        self._formats: tuple[str, ...] = ()
        self.scheme = self._scheme()
        self.dataset = dataset
        self.processor = processor
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
        self.chooser: Chooser | None = None
        if isinstance(scheme, AutoScheme):
            check_options(self.settings)
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
        plan = self.plan()
        return (plan,) if self.chooser is None else self.chooser.plans

    def front(self) -> dict[str, Any]:
        """Return what an `AutoScheme` chose, the front it chose from and what was measured.

        Raises:
            TunerError: the scheme is no `AutoScheme`.
        """
        if self.chooser is None:
            msg = f"scheme {self.scheme.name} is the same everywhere: there is no front"
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
        model = self.given if self.given is not None else self.blueprint().model
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
                known = self._prepared
                self._prepared = self._plan_for(known.model, known.tokenizer, known.residence)
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
            self.draft()
            model, tokenizer = self.given, self._tokenizer
            if model is not None:
                discovery = self._describe(model)[1]
                placement = self._placement(discovery)
                residence: Residence = Kept(model, discovery.blocks, placement)
            else:
                from ar_tuner.loading import load_tokenizer
                from ar_tuner.opening import open_directory

                found = self.blueprint()
                adapter, discovery = self._describe(found.model)[:2]
                placement, settings = self._placement(discovery), self.settings
                if self.chooser is not None:  # it looks at all blocks before any is tuned
                    settings = dataclasses.replace(settings, low_cpu_mem_usage=False)
                blocks = discovery.blocks
                model, residence = open_directory(found, blocks, placement, settings, adapter)
                trust = self.settings.trust_remote_code
                tokenizer = tokenizer or load_tokenizer(found.path, trust)
            model.eval().requires_grad_(requires_grad=False)
            self._prepared = self._plan_for(model, tokenizer, residence)
        return self._prepared

    def blueprint(self) -> Blueprint:
        """Return the model of a directory before its weights are read."""
        if self._blueprint is None:
            from ar_tuner.opening import make_blueprint as make

            assert self.source is not None
            self._blueprint = make(self.source, trust_remote_code=self.settings.trust_remote_code)
        return self._blueprint

    def wiring(self, model: nn.Module) -> Wiring:
        """Return how a model is made of files: those it is in, or those it would be saved in."""
        return own_wiring(model) if self.source is None else self.blueprint().wiring

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
        from ar_tuner.supply import rows_by_use

        return rows_by_use(self, tokenizer, model)

    def emit(self, event: RunEvent) -> None:
        """Tell the listener and every plugin of an event."""
        if self._listener is not None:
            self._listener(event)
        host().notify("ar_run_event", event=event)

    def _plan_for(self, model: nn.Module, tokenizer: Any, residence: Residence) -> Prepared:
        adapter, discovery, layers, plan = self._describe(model)
        if (chooser := self.chooser) is not None:
            subject = Subject(
                model,
                adapter,
                discovery.blocks,
                lambda: scoring_rows(self, chooser, tokenizer, model),
            )
            plan = chooser.choose(self._terrain(model, layers), subject)
            self.scheme = plan.default
        return Prepared(model, tokenizer, adapter, discovery, plan, residence)

    def _describe(
        self, model: nn.Module
    ) -> tuple[ModelAdapter, Discovery, list[LayerInfo], LayerPlan]:
        adapter = adapter_for(self, model)
        wiring = self.wiring(model)
        discovery = find_blocks(model, adapter, paths=self.settings.block_paths, wiring=wiring)
        source = None if self.source is None else self.blueprint().source
        found = list(layers_of(model, discovery, adapter))
        layers = layers_in_files(found, wiring, source, model)
        return adapter, discovery, layers, self._resolved(model, layers, self._rules())

    def _rules(self) -> LayerRules:
        return LayerRules(
            scheme=self.scheme,
            layer_config=self.settings.layer_config,
            ignore_layers=self.settings.ignored,
            quant_lm_head=self.settings.quant_lm_head,
            keep_source=self.settings.keep_source,
        )

    def _resolved(
        self, model: nn.Module, layers: Sequence[LayerInfo], rules: LayerRules
    ) -> LayerPlan:
        plan = make_plan(layers, rules)
        for name in self._formats:
            plan = adjust_plan(name, plan, self._config(model))
        shared = "float16" if len(self._formats) > 1 else None  # what every format can hold
        plan = with_scale_dtype(plan, self.settings.scale_dtype or shared)
        check_computable(plan)
        return plan

    def _terrain(self, model: nn.Module, layers: Sequence[LayerInfo]) -> Terrain:
        """Return what an `AutoScheme` chooses on."""
        return terrain(
            layers,
            self._rules(),
            resolve=lambda rules: self._resolved(model, layers, rules),
            size=Sizer(self._formats, self._config(model), float_facts(model, self.source)),
        )

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
        if isinstance(which, AutoScheme):  # until something is chosen
            return next(iter(which.schemes.values()))
        if which is None:
            which = implied_scheme(self._formats)
        overrides = {
            "bits": self.settings.bits,
            "group_size": self.settings.group_size,
            "sym": self.settings.sym,
        }
        return scheme(which).with_overrides(overrides)
