"""`AutoRound`: the one object a script needs."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ar_schemes import LayerPlan, LayerRules, make_plan, scheme
from ar_tuner import events
from ar_tuner.blocks import Discovery, find_blocks, layers_of
from ar_tuner.errors import TunerError
from ar_tuner.registry import algorithm, find_adapter, host
from ar_tuner.settings import make_settings

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor, nn

    from ar_kernels import QuantizedWeight
    from ar_schemes import Scheme
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
        scheme: preset name (`W4A16`), flat dict or `Scheme`.
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
        scheme: str | Scheme | Mapping[str, Any] = "W4A16",
        *,
        dataset: Any = None,
        on_event: Callable[[RunEvent], None] | None = None,
        **options: Any,
    ) -> None:
        self.settings: Settings = make_settings(options)
        self.scheme = self._scheme(scheme)
        self.dataset = dataset
        self.source = Path(model) if isinstance(model, (str, Path)) else None
        self.given = None if isinstance(model, (str, Path)) else model
        self._tokenizer = tokenizer
        self._listener = on_event
        self._prepared: Prepared | None = None
        if self.source is not None:
            from ar_tuner.loading import check_source

            self.source = check_source(self.source, allow_download=self.settings.allow_download)

    def plan(self) -> LayerPlan:
        """Return what each layer would get; loads no weights when the model is a directory."""
        if self._prepared is not None:
            return self._prepared.plan
        model = self.given
        if model is None:
            from ar_tuner.loading import load_meta

            assert self.source is not None
            model = load_meta(self.source, trust_remote_code=self.settings.trust_remote_code)
        return self._describe(model)[2]

    def quantize(self) -> tuple[nn.Module, LayerPlan]:
        """Return the model with its weights quantized and dequantized in place, and the plan."""
        from ar_tuner.job import quantize_in_memory

        prepared = self.prepare()
        quantize_in_memory(self, prepared)
        return prepared.model, prepared.plan

    def quantize_and_save(
        self,
        output_dir: str | Path = "ar_quantized",
        format: str = "auto_round",  # noqa: A002 - auto-round's name for it
        *,
        check: Callable[[Path, Callable[[str], QuantizedWeight], nn.Module], None] | None = None,
    ) -> tuple[nn.Module, Path]:
        """Quantize, write the checkpoint, and return (model, directory).

        `check(directory, weight_of_layer, model)` runs on the finished checkpoint while the exact
        weights are still at hand.

        Raises:
            TunerError: also when the output directory exists and is not empty, before any work.
        """
        from ar_tuner.job import quantize_to_directory

        return quantize_to_directory(self, Path(output_dir), format, check)

    def prepare(self) -> Prepared:
        """Return the loaded model with its plan; the plan is made before weights are read."""
        if self._prepared is None:
            self.plan()
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
            adapter, discovery, plan = self._describe(model)
            self._prepared = Prepared(model, tokenizer, adapter, discovery, plan)
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

    def _describe(self, model: nn.Module) -> tuple[ModelAdapter, Discovery, LayerPlan]:
        adapter = find_adapter(getattr(model, "config", None))
        discovery = find_blocks(model, adapter, paths=self.settings.block_paths)
        rules = LayerRules(
            scheme=self.scheme,
            layer_config=self.settings.layer_config,
            ignore_layers=self.settings.ignored,
            quant_lm_head=self.settings.quant_lm_head,
        )
        plan = make_plan(layers_of(model, discovery, adapter), rules)
        _check_computable(plan)
        return adapter, discovery, plan

    def _scheme(self, which: str | Scheme | Mapping[str, Any]) -> Scheme:
        overrides = {
            "bits": self.settings.bits,
            "group_size": self.settings.group_size,
            "sym": self.settings.sym,
        }
        return scheme(which).with_overrides(overrides)


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
        if why is None and row.scheme.activation is not None:
            why = "this version does not quantize activations"
        if row.layer.copies > 1:
            why = "it is one tensor of fused experts, and this version tunes linear layers only"
        if row.layer.role == "embedding":
            why = "this version does not quantize embeddings"
        if why is not None:
            msg = f"scheme {row.scheme.name} (layer {row.layer.name}) cannot be computed: {why}"
            raise TunerError(msg)
