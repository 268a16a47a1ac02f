"""Decoder blocks run as one step: what is taken, what is left, and that both write the same."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from ar_kernels import QuantLinear, data_type
from ar_kernels.hf import decoding
from ar_kernels.native import library
from ar_schemes import Granularity, Span, TensorSpec

transformers = pytest.importorskip("transformers")
blocks = pytest.importorskip("ar_kernels.hf.blocks")
pytestmark = pytest.mark.skipif(
    library.missing() is not None, reason="the native library is not built"
)
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 128,
}
IDS = torch.arange(14).reshape(2, 7)
SEEN = torch.ones_like(IDS)
SEEN[1, :3] = 0
BOUND = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def model_of(kind: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Return a random model with layers of 4 bits in its blocks."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SHAPE, **changes})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).to(dtype).eval()
    spec = TensorSpec(granularity=Granularity(Span.GROUP, (32,)))
    numbers = data_type("int")
    for name, module in list(model.model.named_modules()):
        if type(module) is nn.Linear:
            weight = 4 * module.weight.data.float()  # so that blocks change their input
            found = numbers.quantize(weight, spec, numbers.parameters(weight, spec))
            bias = None if module.bias is None else torch.randn_like(module.bias)
            layer = QuantLinear.from_weight(found, layout="gptq", bias=bias, dtype=dtype)
            layer.prepare("cpu_native")
            model.model.set_submodule(name, layer)
    return model


def written(model: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (logits of each step, tokens) of a padded batch of two."""
    asked = {"max_new_tokens": 6, "do_sample": False, "output_logits": True}
    out = model.generate(IDS, attention_mask=SEEN, return_dict_in_generate=True, **asked, **options)
    return torch.stack(out.logits).float(), out.sequences


def taken(model: Any) -> int:
    """Return how many blocks run as one step."""
    return sum(isinstance(m, blocks.NativeBlock) for m in model.modules())


@pytest.mark.parametrize("isa", library.ISAS)
@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Llama", {}),
        ("Llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}),
        ("Mistral", {"sliding_window": 5}),
        ("Qwen2", {}),
        ("Qwen3", {"head_dim": 64}),
    ],
    ids=lambda v: v if isinstance(v, str) else "-".join(v) or "plain",
)
def test_the_model_writes_as_before(
    kind: str, changes: dict[str, Any], dtype: torch.dtype, isa: str, monkeypatch: Any
) -> None:
    if isa not in library.supported():
        pytest.skip(f"the processor lacks {isa}")
    monkeypatch.setenv(library.ISA_ENV, isa)
    if library.missing() is not None:
        pytest.skip(str(library.missing()))
    plain, ours = (model_of(kind, dtype, **changes) for _ in range(2))
    assert decoding.speed_up(ours)["blocks as one step"] == 2
    assert taken(ours) == 2
    for options in ({}, {"cache_implementation": "static"}):
        (a, _), (b, _) = written(plain, **options), written(ours, **options)
        assert (a[0] - b[0]).norm() <= BOUND[dtype] * a[0].norm()
        if dtype == torch.float32:
            assert (a - b).norm() <= BOUND[dtype] * a.norm()


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Llama", {"hidden_act": "gelu"}),
        ("Gemma2", {}),  # four norms
        ("Granite", {"residual_multiplier": 0.5}),  # another sum
        ("Glm", {"pad_token_id": 0, "eos_token_id": 1}),  # one projection to gate and up
        ("Cohere", {"pad_token_id": 0}),  # attention and perceptron side by side
        ("Olmo2", {}),  # norms behind
    ],
)
def test_other_blocks_stay(kind: str, changes: dict[str, Any]) -> None:
    model = model_of(kind, **changes)
    assert "blocks as one step" not in decoding.speed_up(model)
    assert taken(model) == 0


def test_a_layer_without_positions_is_seen() -> None:
    model = model_of("SmolLM3", pad_token_id=0, no_rope_layers=[1, 0])
    assert decoding.speed_up(model)["blocks as one step"] == 1


def test_replaced_and_hooked_modules_are_respected() -> None:
    model = model_of("Qwen3")
    decoding.speed_up(model)
    before, _ = written(model)
    calls = []
    block = model.model.layers[0]
    hook = block.mlp.up_proj.register_forward_hook(lambda *_: calls.append(1))
    again, _ = written(model)
    assert len(calls) == 6
    assert torch.allclose(again, before, atol=1e-5)
    hook.remove()

    class Adapted(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base = base

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x) + 1

    block.self_attn.v_proj = Adapted(block.self_attn.v_proj)
    changed, _ = written(model)
    assert not torch.allclose(changed, before, atol=1e-3)
    block.self_attn.v_proj = block.self_attn.v_proj.base
    assert torch.allclose(written(model)[0], before, atol=1e-5)


def test_new_weights_are_used() -> None:
    changes = {"attention_bias": True, "mlp_bias": True}
    model, other = (model_of("Llama", **changes) for _ in range(2))
    decoding.speed_up(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    written(model)
    model.load_state_dict(other.state_dict())
    assert torch.allclose(written(model)[0], written(other)[0], atol=1e-4)
    for each in (model, other):
        norm = each.model.layers[1].input_layernorm
        norm.weight = nn.Parameter(2 * norm.weight.detach())
    assert torch.allclose(written(model)[0], written(other)[0], atol=1e-4)
    half = model.to(torch.bfloat16)
    assert half.model.layers[0].mlp.up_proj.dtype == torch.bfloat16
    assert (written(half)[0][0] - written(other)[0][0]).norm() < 0.05 * written(other)[0][0].norm()


def test_gradients_eager_attention_and_copies() -> None:
    model = model_of("Llama")
    decoding.speed_up(model)
    expected = written(model)[0]
    assert torch.equal(written(copy.deepcopy(model))[0], expected)
    model.set_attn_implementation("eager")
    out = model(IDS, use_cache=True)
    step = model(IDS[:, :1], past_key_values=out.past_key_values, output_attentions=True)
    assert step.attentions[0].shape == (2, 4, 1, 8)
    x = torch.randn(2, 1, 64, requires_grad=True)
    model(inputs_embeds=x, use_cache=True).logits.sum().backward()
    assert x.grad is not None


def test_a_float_model_has_no_such_blocks() -> None:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).eval()
    decoding.speed_up(model)
    assert blocks.take_blocks(model) == 0
