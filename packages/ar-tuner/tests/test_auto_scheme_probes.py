from __future__ import annotations

import copy
import math

import pytest
import torch

from ar_kernels.numerics.activation import fake_quant_activation
from ar_schemes import scheme
from ar_tuner.auto_scheme.probes import ROWS, Probe, chosen, factors, measured, measured_noise
from ar_tuner.auto_scheme.space import Unit


def divergence(reference, candidate, rows) -> float:
    with torch.no_grad():
        ours, theirs = (m(rows).logits.log_softmax(-1) for m in (reference, candidate))
    return float((ours.exp() * (ours - theirs)).sum() / rows.numel())


def test_a_probe_is_the_divergence_of_the_model_with_the_unit_changed(model, rows, oracle) -> None:
    made = model()
    options = {"W2A16G32": scheme("W2A16G32"), "MXFP4": scheme("MXFP4")}
    task = oracle.task(made, rows, options, ends=("lm_head",))
    mlp = "model.layers.0.mlp"
    unit = Unit((f"{mlp}.gate_proj", f"{mlp}.up_proj"), tuple(options))
    head = Unit(("lm_head",), tuple(options))
    probes = [Probe(unit, "W2A16G32", 1.0), Probe(unit, "MXFP4", 1.0), Probe(head, "MXFP4", 1.0)]
    before = {k: v.clone() for k, v in made.state_dict().items()}
    steps: list[int] = []
    found = measured(task, probes, lambda done, total: steps.append(total - done))
    assert steps == list(reversed(range(len(rows))))
    energy = oracle.energies(task)

    changed = copy.deepcopy(made)
    for layer in unit.layers:
        module = changed.get_submodule(layer)
        module.weight.data = oracle.left(module.weight.data, options["W2A16G32"], energy[layer])
    assert found[0].measured == pytest.approx(divergence(made, changed, rows), rel=1e-3)

    changed = copy.deepcopy(made)
    act = options["MXFP4"].activation
    for layer in unit.layers:
        module = changed.get_submodule(layer)
        module.weight.data = oracle.left(module.weight.data, options["MXFP4"], energy[layer])
        module.register_forward_pre_hook(lambda m, args: (fake_quant_activation(args[0], act),))
    assert found[1].measured == pytest.approx(divergence(made, changed, rows), rel=1e-3)
    assert found[2].measured > 0
    assert all(torch.equal(v, before[k]) for k, v in made.state_dict().items())
    assert found[0].to_dict()["measured_loss"] == found[0].measured


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_noise_is_what_the_smallest_change_causes_and_is_taken_off(
    dtype, model, rows, oracle
) -> None:
    made = model().to(dtype)
    task = oracle.task(made, rows)
    before = {k: v.clone() for k, v in made.state_dict().items()}
    noise = measured_noise(task)
    assert noise == measured_noise(task)
    assert all(torch.equal(v, before[k]) for k, v in made.state_dict().items())
    assert (noise < 1e-7) is (dtype is torch.float32)
    probe = Probe(Unit(("model.layers.0.mlp.down_proj",), ()), "W2A16G32", 1.0)
    (plain,) = measured(task, [probe], lambda done, total: None)
    (clean,) = measured(task, [probe], lambda done, total: None, noise=noise)
    assert clean.measured == max(0.0, plain.measured - noise)


def test_only_the_first_rows_are_measured(model, rows, oracle) -> None:
    many = rows.repeat(3, 1)
    task = oracle.task(model(), many)
    steps: list[int] = []
    unit = Unit(("model.layers.0.mlp.down_proj",), ())
    measured(task, [Probe(unit, "W2A16G32", 1.0)], lambda done, total: steps.append(total))
    assert steps == [ROWS] * ROWS


def test_probes_cover_the_range_of_each_option_above_the_floor() -> None:
    units = [Unit((f"layer{i}",), ("a", "b")) for i in range(40)]
    losses = {(f"layer{i}", "a"): 10.0 ** (-i / 10) for i in range(40)}
    losses |= {(f"layer{i}", "b"): 1e-9 for i in range(40)}
    found = chosen(units, losses, floor=1e-3)
    assert {p.option for p in found} == {"a"}
    values = [p.predicted for p in found]
    assert values == sorted(values)
    assert len(values) == 8
    assert values[-1] / values[0] > 100
    assert min(values) > 1e-3
    assert len(chosen(units[:1], losses, floor=1e-3)) == 1
    assert chosen(units, losses, floor=10.0) == []


def test_factors_are_means_of_logarithms_by_option() -> None:
    unit = Unit(("x",), ())
    probes = [Probe(unit, "a", 1.0, 2.0), Probe(unit, "a", 1.0, 8.0), Probe(unit, "b", 4.0, 1.0)]
    found = factors(probes, ("a", "b", "c"))
    assert found["a"] == pytest.approx(4.0)
    assert found["b"] == pytest.approx(0.25)
    assert found["c"] == pytest.approx(math.exp((math.log(16) - math.log(4)) / 3))
    assert factors([Probe(unit, "a", 1.0, 0.0)], ("a",)) == {"a": 1.0}
