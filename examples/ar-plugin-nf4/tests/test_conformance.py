"""The tests that authors of plugins are given, on every part of this one."""

from __future__ import annotations

import torch
from ar_plugin_nf4.backend import Nf4Lookup
from ar_plugin_nf4.data_type import NormalFloat4
from ar_plugin_nf4.format import Nf4Format
from ar_plugin_nf4.layout import Nf4Layout

from ar_export.testing import FormatConformance
from ar_kernels.backends import Need
from ar_kernels.testing import BackendConformance, DataTypeConformance, LayoutConformance
from ar_schemes import Granularity, Span, TensorSpec, scheme

NF4 = scheme("NF4").weight
SPECS = tuple(
    NF4.with_(granularity=granularity)
    for granularity in (
        NF4.granularity,
        Granularity(Span.GROUP, (16,)),
        Granularity(Span.CHANNEL),
        Granularity(Span.TENSOR),
        Granularity(Span.TILE, (8, 32)),
    )
)
INT4 = TensorSpec(bits=4)


class TestDataType(DataTypeConformance):
    subject = NormalFloat4()
    specs = SPECS
    refused = (NF4.with_(bits=3), NF4.with_(symmetric=False), NF4.with_(scale_dtype="float32"))


class TestLayout(LayoutConformance):
    subject = Nf4Layout()
    specs = SPECS
    refused = ((INT4, 32, 128), (NF4.with_(granularity=Granularity(Span.CHANNEL)), 32, 63))


class TestBackend(BackendConformance):
    subject = Nf4Lookup()
    specs = SPECS
    shapes = ((32, 64), (64, 128))
    refused = (
        Need(INT4, 32, 128, "cpu", torch.float32),
        Need(NF4, 32, 96, "cpu", torch.float32),
        Need(NF4, 32, 64, "cpu", torch.int32),
        Need(NF4, 32, 64, "cpu", torch.float32, activation=INT4),
    )


class TestFormat(FormatConformance):
    subject = Nf4Format()
