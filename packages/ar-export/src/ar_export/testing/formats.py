"""What every checkpoint format must do."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch

from ar_export.errors import ExportError
from ar_export.formats.base import Format
from ar_export.reader import format_of, open_checkpoint
from ar_export.registry import format as find_format
from ar_export.registry import formats
from ar_export.sink import ar_open_sink
from ar_export.testing.model import (
    ExampleRequest,
    example_plan,
    example_weights,
    float_tensors,
    write_model,
)
from ar_export.verify import verify
from ar_kernels import data_types, equal, layout
from ar_schemes import schemes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from ar_export.formats.base import Readable
    from ar_kernels import QuantizedWeight
    from ar_schemes import LayerPlan, Scheme

_SHAPES = ((512, 512), (4096, 11008), (48, 80), (7, 13))
"""Shapes that `refuses` must have an answer for: two usual ones, two that little divides."""
_SMALL = 100_000
"""Shard size that splits the example model."""


class FormatConformance:
    """Mixin of tests for one registered format, over every spelling and every scheme there is.

    A container format, one with an `open` of its own, is not asked for safetensors names.

    Attributes:
        subject: the format.
    """

    subject: ClassVar[Format]

    @pytest.fixture
    def model_directory(self, tmp_path: Path) -> Path:
        """Return the directory of the float model; override to put more files beside it."""
        return write_model(tmp_path / "float")

    @classmethod
    def carried(cls, spelling: str) -> list[str]:
        """Return the schemes that are computed here and not refused, by name."""
        return [
            one.name
            for one in schemes().values()
            if computable(one)
            and all(
                cls.subject.refuses(spelling, row.scheme, row.layer.rows, row.layer.columns) is None
                for row in cls.plan(spelling, one.name).quantized
            )
        ]

    @classmethod
    def plan(cls, spelling: str, preset: str, **changes: str) -> LayerPlan:
        """Return an example plan, after the format's own adjustment where it has one."""
        found = example_plan(preset, **changes)
        adjust = getattr(cls.subject, "adjust", None)
        adjusted: LayerPlan = found if adjust is None else adjust(spelling, found, {})
        return adjusted

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """Make one test of each spelling, or of each scheme that it carries."""
        spellings = self.subject.spellings
        if "preset" in metafunc.fixturenames:
            pairs = [(s, p) for s in spellings for p in self.carried(s)]
            metafunc.parametrize(("spelling", "preset"), pairs, ids=[f"{s}-{p}" for s, p in pairs])
        elif "spelling" in metafunc.fixturenames:
            metafunc.parametrize("spelling", spellings)

    @property
    def is_container(self) -> bool:
        """True for formats that open their files themselves."""
        return hasattr(self.subject, "open")

    def request_for(
        self, spelling: str, preset: str, output: Path, source: Path | None, **changes: Any
    ) -> ExampleRequest:
        """Return a request for the example model."""
        plan = changes.pop("plan", None) or self.plan(spelling, preset)
        return ExampleRequest(output, plan, spelling, source, **changes)

    def write(self, request: ExampleRequest) -> tuple[Path, dict[str, QuantizedWeight]]:
        """Return the checkpoint that a sink makes of a request, and the weights in it."""
        sink = ar_open_sink(request)
        assert sink is not None, f"no sink for format {request.format}"
        weights = example_weights(request.plan)
        for name, weight in weights.items():
            sink.put(name, weight)
        for name, tensor in float_tensors(request.plan).items():
            sink.put_tensor(name, tensor)
        return sink.commit(), weights

    def is_refused(self, request: ExampleRequest) -> bool:
        """Tell whether the format refuses a plan as a whole, which it must do before work."""
        try:
            self.subject.config(request)
        except ExportError:
            with pytest.raises(ExportError):
                ar_open_sink(request)
            return True
        return False

    def check(self, path: Path, weights: Mapping[str, QuantizedWeight], plan: LayerPlan) -> None:
        """Assert that a checkpoint gives back what was written, to the bit."""
        found = open_checkpoint(path)
        if found.format == "float":
            for name, weight in weights.items():
                assert torch.equal(
                    found.tensor(f"{name}.weight"), weight.dequantize(torch.bfloat16)
                )
        else:
            assert found.format == self.subject.name
            assert set(found.quantized) == set(weights)
            for name, weight in weights.items():
                assert equal(found.weight(name), weight), name
                assert found.quantized[name].scheme.weight == plan[name].scheme.weight, name
        for name, tensor in float_tensors(plan).items():
            assert torch.equal(found.tensor(name).float(), tensor.float()), name
        if not self.is_container:
            report = verify(path, expected=weights)
            assert report.ok, report.findings
            # of what engines check nothing is amiss; that they lack a kernel is no fault of a file
            assert {f.level for f in report.findings} <= {"note"}, report.findings

    def test_it_is_a_format_with_a_summary_on_one_line(self) -> None:
        assert isinstance(self.subject, Format)
        assert self.subject.summary.strip()
        assert "\n" not in self.subject.summary

    def test_its_spellings_are_its_own_and_lead_to_it(self) -> None:
        assert self.subject.spellings[0] == self.subject.name
        for spelling in self.subject.spellings:
            owners = [f.name for f in formats().values() if spelling in f.spellings]
            assert owners == [self.subject.name], spelling
            assert find_format(spelling).name == self.subject.name

    def test_it_gives_one_sentence_or_none_for_every_scheme_and_shape(self, spelling: str) -> None:
        for one in schemes().values():
            for shape in _SHAPES:
                why = self.subject.refuses(spelling, one, *shape)
                assert why is None or (why == why.strip() and why and "\n" not in why), one.name

    def test_it_carries_some_scheme(self, spelling: str) -> None:
        assert self.carried(spelling), spelling

    def test_a_refused_plan_raises_before_work_and_names_every_layer(
        self, spelling: str, tmp_path: Path, model_directory: Path
    ) -> None:
        for one in schemes().values():
            plan = self.plan(spelling, one.name)
            bad = [
                row.layer.name
                for row in plan.quantized
                if self.subject.refuses(spelling, row.scheme, row.layer.rows, row.layer.columns)
            ]
            if bad:
                output = tmp_path / "refused"
                request = self.request_for(spelling, one.name, output, model_directory, plan=plan)
                with pytest.raises(ExportError) as raised:
                    ar_open_sink(request)
                assert all(name in str(raised.value) for name in bad), one.name
                assert not output.exists()

    def test_its_config_is_plain_json_and_the_same_twice(
        self, spelling: str, preset: str, tmp_path: Path, model_directory: Path
    ) -> None:
        request = self.request_for(spelling, preset, tmp_path / "out", model_directory)
        config = self.subject.config(request)
        assert json.loads(json.dumps(config)) == config
        assert self.subject.config(request) == config

    def test_its_config_is_read_by_it_alone(
        self, spelling: str, preset: str, tmp_path: Path, model_directory: Path
    ) -> None:
        request = self.request_for(spelling, preset, tmp_path / "out", model_directory)
        config = self.subject.config(request)
        if config is not None:
            assert self.subject.reads(config)
            assert format_of(config) is find_format(spelling)
            assert not self.subject.reads(None)

    def test_the_config_of_another_format_is_not_read(
        self, tmp_path: Path, model_directory: Path
    ) -> None:
        assert not self.subject.reads({"quant_method": "no-such-method"})
        assert not self.subject.reads({})
        for config, owner in self.foreign(tmp_path, model_directory):
            assert format_of(config) is owner, (self.subject.name, owner.name)

    def foreign(self, output: Path, source: Path) -> Iterator[tuple[dict[str, Any], Format]]:
        """Yield a config of every other format that writes one, and the format."""
        for other in formats().values():
            if other.name == self.subject.name:
                continue
            for one in schemes().values():
                plan = example_plan(one.name)
                rows = [(r.scheme, r.layer.rows, r.layer.columns) for r in plan.quantized]
                if rows and not any(other.refuses(other.name, *row) for row in rows):
                    config = other.config(ExampleRequest(output / "x", plan, other.name, source))
                    if config is not None:
                        yield config, other
                    break

    def test_what_is_written_comes_back_to_the_bit(
        self, spelling: str, preset: str, tmp_path: Path, model_directory: Path
    ) -> None:
        for shard in (10**9, _SMALL):
            request = self.request_for(
                spelling, preset, tmp_path / str(shard), model_directory, max_shard_bytes=shard
            )
            path, weights = self.write(request)
            assert weights, preset
            self.check(path, weights, request.plan)
            self.check_names(open_checkpoint(path))

    def check_names(self, found: Readable) -> None:
        """Assert that suffixes, the layout's facts and the stored names are the same."""
        for name, entry in found.quantized.items():
            assert entry.scheme.weight is not None
            facts = layout(entry.layout).facts(entry.scheme.weight, entry.rows, entry.columns)
            suffixes = set(self.subject.suffixes(entry))
            assert suffixes >= facts.keys(), name
            if not self.is_container:
                stored = {n.removeprefix(f"{name}.") for n in found.names if n.startswith(name)}
                assert facts.keys() <= stored - {"bias"} <= suffixes, name

    def test_mixed_schemes_come_back_or_are_refused_before_work(
        self, spelling: str, tmp_path: Path, model_directory: Path
    ) -> None:
        names = self.carried(spelling)
        for i, (first, second) in enumerate(zip(names, names[1:], strict=False)):
            plan = self.plan(spelling, first, down_proj=second)
            output = tmp_path / f"mixed{i}"
            request = self.request_for(spelling, first, output, model_directory, plan=plan)
            if self.is_refused(request):
                assert not output.exists(), (first, second)
            else:
                self.check(*self.write(request), plan)

    def test_equal_weights_give_equal_bytes(
        self, spelling: str, tmp_path: Path, model_directory: Path
    ) -> None:
        preset = self.carried(spelling)[0]
        one, two = (
            digests(
                self.write(
                    self.request_for(spelling, preset, tmp_path / name / "out", model_directory)
                )[0]
            )
            for name in ("a", "b")
        )
        assert one == two


def computable(one: Scheme) -> bool:
    """Tell whether a scheme quantizes weights, with arithmetic that is installed."""
    if one.weight is None:
        return False
    specs = [one.weight, *(s.weight for s in map(schemes().get, one.roles.values()) if s)]
    kinds = data_types()
    return all(
        spec is None or (spec.data_type in kinds and kinds[spec.data_type].refuses(spec) is None)
        for spec in specs
    )


def digests(path: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of a checkpoint, a directory or one file."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
