"""The plugins of vLLM and SGLang, against stand-ins with the engines' interfaces.

The stand-ins have the modules, the abstract methods and the parameters (cut for tensor
parallelism, merged for fused layers) that vLLM 0.10 to 0.12 and SGLang 0.5 have. The engines
themselves were not run.
"""

from __future__ import annotations

import sys
import tomllib
from abc import ABC, abstractmethod
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from ar_kernels import KernelError, layout
from ar_kernels.engines import claims
from ar_kernels.engines.claims import METHOD, claimed, format_of
from ar_kernels.hf.config import LayerFormat, parse
from ar_kernels.testing import quantized
from ar_schemes import Granularity, Scheme, Span, TensorSpec, scheme

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from ar_kernels import QuantizedWeight

W3 = {"quant_method": "auto-round", "bits": 3, "group_size": 32, "sym": True}
G32 = Granularity(Span.GROUP, (32,))
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}


class _Loaded(nn.Parameter):
    """A parameter that copies its share of a checkpoint's tensor into itself."""

    rank = 0

    def __new__(cls, data: Tensor, **_: Any) -> _Loaded:
        return super().__new__(cls, data, requires_grad=False)  # type: ignore[call-arg]

    def __init__(
        self,
        data: Tensor,  # noqa: ARG002 - taken by __new__
        weight_loader: Any,
        output_dim: int | None = None,
        input_dim: int | None = None,
        packed_dim: int | None = None,
        packed_factor: Any = 1,
    ) -> None:
        self.weight_loader = weight_loader
        self.output_dim, self.input_dim = output_dim, input_dim
        self.packed_dim, self.packed_factor = packed_dim, packed_factor

    def load_row_parallel_weight(self, loaded: Tensor) -> None:
        if self.input_dim is not None:
            size = self.data.shape[self.input_dim]
            loaded = loaded.narrow(self.input_dim, self.rank * size, size)
        assert loaded.shape == self.data.shape
        self.data.copy_(loaded)

    def load_merged(self, loaded: Tensor, offset: int, size: int) -> None:
        if self.output_dim is None:  # the same for every part
            self.data.copy_(loaded)
            return
        if self.packed_dim == self.output_dim:
            size, offset = int(size // self.packed_factor), int(offset // self.packed_factor)
        share = loaded.narrow(self.output_dim, self.rank * size, size)
        own = self.data.narrow(self.output_dim, offset, size)
        assert own.shape == share.shape
        own.copy_(share)


class _Column(_Loaded):
    def __init__(self, **kwargs: Any) -> None:
        assert "input_dim" not in kwargs
        super().__init__(**kwargs)


class _Config(ABC):
    def __init__(self) -> None:
        self.packed_modules_mapping: dict[str, list[str]] = {}

    @abstractmethod
    def get_name(self) -> str: ...

    @abstractmethod
    def get_supported_act_dtypes(self) -> list[torch.dtype]: ...

    @classmethod
    @abstractmethod
    def get_min_capability(cls) -> int: ...

    @staticmethod
    @abstractmethod
    def get_config_filenames() -> list[str]: ...

    @classmethod
    @abstractmethod
    def from_config(cls, config: dict[str, Any]) -> _Config: ...

    @abstractmethod
    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any: ...


class _SglangConfig(_Config):
    @abstractmethod
    def get_scaled_act_names(self) -> list[str]: ...


class _Method(ABC):
    @abstractmethod
    def create_weights(self, layer: nn.Module, *args: Any, **extra: Any) -> None: ...

    @abstractmethod
    def apply(self, layer: nn.Module, *args: Any, **kwargs: Any) -> Tensor: ...


class _Linear(nn.Module):
    """A layer of an engine: fused parts, each cut along its output, or cut along its input."""


class _Unquantized:
    pass


def modules(monkeypatch: pytest.MonkeyPatch, tree: dict[str, dict[str, Any]]) -> None:
    for name, content in tree.items():
        made = ModuleType(name)
        made.__path__ = []  # type: ignore[attr-defined]
        for key, value in content.items():
            setattr(made, key, value)
        monkeypatch.setitem(sys.modules, name, made)
        parent, _, own = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], own, made)


PARAMETERS = {
    "PackedvLLMParameter": _Loaded,
    "GroupQuantScaleParameter": _Loaded,
    "RowvLLMParameter": _Loaded,
    "ChannelQuantScaleParameter": _Column,
    "PackedColumnParameter": _Column,
}


def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> Callable[[], type[Any]]:
    known: list[str] = ["awq", "gptq", "auto-round"]
    classes: dict[str, type[Any]] = {}

    def register(name: str) -> Callable[[type[Any]], type[Any]]:
        def wrapper(cls: type[Any]) -> type[Any]:
            assert name not in known
            assert issubclass(cls, _Config)
            known.append(name)
            classes[name] = cls
            return cls

        return wrapper

    layers = "vllm.model_executor.layers"
    modules(
        monkeypatch,
        {
            "vllm": {},
            "vllm.model_executor": {},
            "vllm.model_executor.parameter": PARAMETERS,
            layers: {},
            f"{layers}.linear": {
                "LinearBase": _Linear,
                "LinearMethodBase": _Method,
                "UnquantizedLinearMethod": _Unquantized,
                "WEIGHT_LOADER_V2_SUPPORTED": ["AWQLinearMethod"],
            },
            f"{layers}.quantization": {
                "QUANTIZATION_METHODS": known,
                "register_quantization_config": register,
            },
            f"{layers}.quantization.base_config": {"QuantizationConfig": _Config},
        },
    )
    return lambda: classes[METHOD]


def fake_sglang(monkeypatch: pytest.MonkeyPatch) -> Callable[[], type[Any]]:
    methods: dict[str, type[Any]] = {}
    on_cpu: dict[str, type[Any]] = {}
    choices: list[str] = []
    layers = "sglang.srt.layers"
    modules(
        monkeypatch,
        {
            "sglang": {},
            "sglang.srt": {},
            "sglang.srt.server_args": {"add_quantization_method_choices": choices.extend},
            layers: {},
            f"{layers}.parameter": PARAMETERS,
            f"{layers}.linear": {"LinearBase": _Linear, "WEIGHT_LOADER_V2_SUPPORTED": []},
            f"{layers}.quantization": {
                "QUANTIZATION_METHODS": methods,
                "CPU_QUANTIZATION_METHODS": on_cpu,
            },
            f"{layers}.quantization.base_config": {
                "QuantizationConfig": _SglangConfig,
                "LinearMethodBase": _Method,
            },
            f"{layers}.quantization.unquant": {"UnquantizedLinearMethod": _Unquantized},
        },
    )

    def found() -> type[Any]:
        assert choices == [METHOD]
        assert on_cpu[METHOD] is methods[METHOD]
        return methods[METHOD]

    return found


@pytest.fixture(params=["vllm", "sglang"])
def config_class(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type[Any]:
    """The config class as the engine knows it after its plugin was called twice."""
    found = {"vllm": fake_vllm, "sglang": fake_sglang}[request.param](monkeypatch)
    plugin = import_module(f"ar_kernels.engines.{request.param}")
    plugin.register()
    plugin.register()
    layers = {"vllm": "vllm.model_executor", "sglang": "sglang.srt"}[request.param]
    listed = sys.modules[f"{layers}.layers.linear"].WEIGHT_LOADER_V2_SUPPORTED
    assert listed.count("ArLinearMethod") == 1
    return found()


@pytest.fixture
def rank() -> Iterator[Callable[[int], None]]:
    def choose(number: int) -> None:
        _Loaded.rank = number

    yield choose
    _Loaded.rank = 0


def serve(
    method: Any, weights: list[QuantizedWeight], order: str, *, parts: int, along_input: bool
) -> _Linear:
    """Return a layer made, loaded and finished as an engine does for one rank of `parts`."""
    rows, columns = sum(w.shape[0] for w in weights), weights[0].shape[1]
    sizes = [w.shape[0] if along_input else w.shape[0] // parts for w in weights]
    own = columns // parts if along_input else columns
    layer = _Linear()
    method.create_weights(
        layer, own, sizes, columns, rows, torch.bfloat16, weight_loader=lambda *_: None
    )
    offset = 0
    for weight, size in zip(weights, sizes, strict=True):
        for name, tensor in layout(order).pack(weight).items():
            if name not in dict(layer.named_parameters()):
                continue
            parameter = getattr(layer, name)
            if along_input:
                parameter.load_row_parallel_weight(tensor)
            else:
                parameter.load_merged(tensor, offset, size)
        offset += size
    method.process_weights_after_loading(layer)
    return layer


def check(method: Any, layer: _Linear, weight: Tensor) -> None:
    x = torch.randn(5, weight.shape[1], dtype=torch.bfloat16)
    bias = torch.randn(weight.shape[0], dtype=torch.bfloat16)
    found = method.apply(layer, x, bias).double()
    expected = x.double() @ weight.double().t() + bias.double()
    assert (found - expected).norm() / expected.norm() < 8e-3
    assert all(name.startswith("ar_ready_") for name, _ in layer.named_parameters())


@pytest.mark.parametrize("parts", [1, 2])
def test_a_fused_layer_is_loaded_in_parts_and_multiplied(
    config_class: type[Any], parts: int, rank: Callable[[int], None]
) -> None:
    config = config_class.from_config(W3)
    config.packed_modules_mapping = FUSED
    method = config.get_quant_method(_Linear(), "model.layers.0.self_attn.qkv_proj")
    spec = method.form.scheme.weight
    weights = [quantized(spec, n, 128, seed=n) for n in (128, 64, 64)]
    for number in range(parts):
        rank(number)
        layer = serve(method, weights, method.form.layout, parts=parts, along_input=False)
        shares = [w.dequantize().chunk(parts)[number] for w in weights]
        check(method, layer, torch.cat(shares))


@pytest.mark.parametrize(
    ("spec", "order"),
    [
        (
            TensorSpec(bits=2, granularity=Granularity(Span.GROUP, (32,)), symmetric=False),
            "gptq_v2",
        ),
        (TensorSpec(bits=3, granularity=Granularity(Span.CHANNEL)), "gptq"),
        (TensorSpec(bits=3, granularity=G32), "gptq_g_idx"),
        (scheme("MXFP4").weight, "ct_mxfp4"),
    ],
    ids=["int2-g32-asym", "int3-channel", "int3-g_idx", "mxfp4"],
)
@pytest.mark.parametrize("along_input", [True, False], ids=["row parallel", "column parallel"])
def test_every_kind_of_tensor_is_cut_right(
    config_class: type[Any],
    spec: TensorSpec,
    order: str,
    along_input: bool,
    rank: Callable[[int], None],
) -> None:
    any_method = config_class.from_config(W3).get_quant_method(_Linear(), "model.layers.0.mlp.up")
    method = type(any_method)(LayerFormat(Scheme(name="", weight=spec), order))
    weight = quantized(spec, 128, 256)
    for number in range(2):
        rank(number)
        layer = serve(method, [weight], order, parts=2, along_input=along_input)
        check(method, layer, weight.dequantize().chunk(2, dim=int(along_input))[number])


def test_the_config_answers_the_engine(config_class: type[Any]) -> None:
    config = config_class.from_config({**W3, "extra_config": {"model.layers.0.q": {"bits": 16}}})
    assert config.get_name() == METHOD
    assert torch.bfloat16 in config.get_supported_act_dtypes()
    assert config_class.get_min_capability() == 80
    assert config_class.override_quantization_method(W3, None) == METHOD
    assert (
        config_class.override_quantization_method(W3, None, hf_config=SimpleNamespace()) == METHOD
    )
    assert config.get_quant_method(nn.Embedding(2, 2), "model.embed_tokens") is None
    kept = config.get_quant_method(_Linear(), "model.layers.0.q")
    assert isinstance(kept, _Unquantized)


@pytest.mark.parametrize(
    ("change", "user", "expected"),
    [
        ({}, None, METHOD),
        ({"bits": 2, "group_size": 128}, None, METHOD),
        ({"bits": 4, "group_size": 96}, None, METHOD),
        ({"bits": 4, "group_size": 128}, None, None),
        ({"bits": 8, "group_size": -1}, None, None),
        ({"bits": 4, "group_size": 128}, METHOD, METHOD),
        ({}, "gptq", None),
        ({"quant_method": "unheard_of"}, None, None),
        ({"quant_method": "gptq"}, None, METHOD),
        ({"quant_method": "gptq", "desc_act": True}, None, None),
    ],
)
def test_only_checkpoints_an_engine_has_no_kernels_for_are_taken(
    change: dict[str, Any], user: str | None, expected: str | None
) -> None:
    assert claimed({**W3, **change}, user) == expected


def test_parts_of_a_fused_layer_that_differ_are_refused() -> None:
    config = parse({**W3, "extra_config": {"model.layers.0.k_proj": {"bits": 2}}})
    assert format_of(config, "model.layers.0.q_proj", FUSED) is not None
    with pytest.raises(KernelError, match=r"qkv_proj is one layer .*k_proj: int2"):
        format_of(config, "model.layers.0.qkv_proj", FUSED)


def test_a_layout_that_cannot_be_cut_is_refused() -> None:
    with pytest.raises(KernelError, match="layout mlx cannot be served; known: gptq"):
        claims.dimensions("mlx")


@pytest.mark.parametrize("group", ["vllm.general_plugins", "sglang.srt.plugins"])
def test_the_entry_points_lead_to_the_plugins(group: str) -> None:
    pyproject = Path(__file__).parents[1] / "pyproject.toml"
    with pyproject.open("rb") as file:
        targets = tomllib.load(file)["project"]["entry-points"][group]
    module, _, function = targets["ar_kernels"].partition(":")
    assert callable(getattr(import_module(module), function))
