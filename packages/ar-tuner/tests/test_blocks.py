from __future__ import annotations

import pytest
import torch
from torch import nn

from ar_tuner import TunerError
from ar_tuner.adapters import GenericAdapter
from ar_tuner.blocks import find_blocks, layers_of, weights_of

ADAPTER = GenericAdapter()


@pytest.mark.parametrize(
    ("kind", "prefix", "linears"),
    [
        ("llama", "model.layers", 7),
        ("qwen3", "model.layers", 7),
        ("gemma2", "model.layers", 7),
        ("gpt2", "transformer.h", 4),
    ],
)
def test_the_blocks_of_a_decoder_are_found(model, kind, prefix, linears) -> None:
    made = model(kind)
    found = find_blocks(made, ADAPTER)
    assert found.lists == (prefix,)
    assert [b.name for b in found.blocks] == [f"{prefix}.0", f"{prefix}.1"]
    layers = list(layers_of(made, found, ADAPTER))
    assert sum(x.block == f"{prefix}.0" for x in layers) == linears


def test_transposed_weights_are_told_by_their_true_shape(model) -> None:
    made = model("gpt2")
    found = find_blocks(made, ADAPTER)
    shapes = {x.name: (x.rows, x.columns) for x in layers_of(made, found, ADAPTER)}
    assert shapes["transformer.h.0.attn.c_attn"] == (192, 64)
    ref = weights_of(found.blocks[0], ["transformer.h.0.attn.c_attn"])[0]
    stored = found.blocks[0].module.get_parameter(ref.parameter)
    assert ref.transposed
    assert ref.view(stored).shape == (192, 64)


def test_a_tied_head_is_known_also_without_weights(model) -> None:
    transformers = pytest.importorskip("transformers")
    made = model("qwen3")
    with torch.device("meta"):
        meta = transformers.Qwen3ForCausalLM(made.config)
    for which in (made, meta):
        found = find_blocks(which, ADAPTER)
        head = next(x for x in layers_of(which, found, ADAPTER) if x.role == "lm_head")
        assert head.tied


def test_paths_that_a_user_names_are_taken(model) -> None:
    made = model("llama")
    assert len(find_blocks(made, ADAPTER, paths=("model.layers",)).blocks) == 2
    for path in ("model.nothing", "model.embed_tokens"):
        with pytest.raises(TunerError, match=r"is no list of modules.*model\.layers"):
            find_blocks(made, ADAPTER, paths=(path,))


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(TunerError):
        find_blocks(nn.Sequential(nn.Linear(4, 4)), ADAPTER)


@pytest.mark.parametrize(
    ("name", "shape", "kept"),
    [
        ("layers.0.attn.indexer.wq", (64, 64), True),
        ("layers.0.linear_attn.in_proj_a", (4, 64), True),
        ("layers.0.mlp.up_proj", (96, 64), False),
        ("layers.0.mlp.gate_scalar", (1, 64), True),
    ],
)
def test_small_sensitive_layers_are_kept(name, shape, kept) -> None:
    layer = nn.Linear(shape[1], shape[0], bias=False)
    assert (ADAPTER.keep(name, layer) is not None) is kept


def test_routers_are_told_from_gate_projections() -> None:
    assert ADAPTER.is_router("layers.0.mlp.gate", nn.Linear(64, 8))
    assert not ADAPTER.is_router("layers.0.mlp.gate_proj", nn.Linear(64, 96))


def test_the_entry_of_a_shell_without_forward_is_its_text_model() -> None:
    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Linear(4, 4)

        def forward(self, input_ids):
            return self.w(input_ids)

    class Shell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.text, self.other = Text(), nn.Linear(2, 2)

    shell = Shell()
    assert ADAPTER.entry(shell) is shell.text
    assert ADAPTER.entry(shell.text) is shell.text


class Plain(nn.Linear):
    def forward(self, x):
        out = x @ self.weight.T
        return out if self.bias is None else out + self.bias


class Clipped(nn.Linear):
    def forward(self, x):
        return super().forward(x.clamp(-1, 1))


class Grouped(nn.Linear):
    def forward(self, x):
        return torch.einsum("tgi,goi->tgo", x, self.weight.view(4, -1, self.in_features))


@pytest.mark.parametrize(
    ("kind", "kept"), [(Plain, False), (nn.Linear, False), (Clipped, True), (Grouped, True)]
)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers_that_compute_otherwise_are_kept(kind, kept, bias) -> None:
    with torch.device("meta"):
        layer = kind(64, 64, bias=bias)
    reason = GenericAdapter().keep("model.layers.0.mlp.proj", layer)
    assert (reason is not None) is kept
    assert reason is None or kind.__name__ in reason
