"""The two backends that are always there."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ar_kernels import KernelError
from ar_kernels.backends import ExactBackend, Need
from ar_kernels.backends.dense import Dense
from ar_kernels.backends.reference import Reference, decode_meta, encode_meta
from ar_kernels.testing import BackendConformance, quantized
from ar_schemes import Granularity, Span, SuperGroup, TensorSpec

SPECS = tuple(
    TensorSpec(bits=bits, granularity=granularity, symmetric=symmetric)
    for bits, granularity in (
        (2, Granularity(Span.GROUP, (16,))),
        (4, Granularity(Span.GROUP, (32,))),
        (3, Granularity(Span.TILE, (16, 32))),
        (8, Granularity(Span.CHANNEL)),
        (5, Granularity(Span.TENSOR)),
    )
    for symmetric in (True, False)
)
NEED = Need(SPECS[0], 32, 64, "cpu", torch.float32)
REFUSED = (
    replace(NEED, spec=TensorSpec(bits=1)),
    replace(NEED, spec=TensorSpec(data_type="unheard_of")),
    replace(NEED, dtype=torch.int32),
    replace(NEED, dtype=torch.float8_e4m3fn),
    replace(NEED, activation=TensorSpec(bits=8, granularity=Granularity(Span.TOKEN))),
)


class TestReference(BackendConformance):
    subject = Reference()
    specs = SPECS
    refused = REFUSED


class TestDense(BackendConformance):
    subject = Dense()
    specs = SPECS
    refused = REFUSED


def test_dense_holds_the_dequantized_weight_and_nothing_else() -> None:
    weight = quantized(NEED.spec, 32, 64)
    packed = Dense().pack(weight, replace(NEED, dtype=torch.bfloat16))
    assert packed.meta == ()
    assert packed.buffers.keys() == {"weight"}
    assert torch.equal(packed.buffers["weight"], weight.dequantize(torch.bfloat16))
    assert not isinstance(Dense(), ExactBackend)


@pytest.mark.parametrize("subject", [Dense(), Reference()], ids=lambda b: b.name)
def test_activations_of_another_type_come_back_in_their_own(subject: Dense | Reference) -> None:
    packed = subject.pack(quantized(NEED.spec, 32, 64), NEED)
    x = torch.randn(2, 64, dtype=torch.bfloat16)
    assert subject.linear(x, packed, torch.zeros(32)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "spec",
    [
        TensorSpec(),
        TensorSpec("mx_fp", 8, Granularity(Span.TILE, (128, 128)), False, False, "e8m0"),
        TensorSpec("q" * 40, 3, super_group=SuperGroup(8, 6)),
    ],
    ids=["default", "everything else", "long"],
)
@pytest.mark.parametrize("names", [(), ("codes", "scale", "extra.global_scale")], ids=str)
def test_meta_carries_spec_and_names(spec: TensorSpec, names: tuple[str, ...]) -> None:
    meta = encode_meta(spec, names)
    assert all(0 <= n < 2**63 for n in meta)
    assert decode_meta(meta) == (spec, names)


def test_meta_of_a_default_spec_is_short() -> None:
    assert len(encode_meta(TensorSpec(), ("codes", "scale"))) <= 4


def test_meta_with_an_unknown_field_is_refused() -> None:
    text = b'[{"colour":1},[]]'
    meta = tuple(int.from_bytes(text[i : i + 7], "little") for i in range(0, len(text), 7))
    with pytest.raises(KernelError, match="colour"):
        decode_meta(meta)
