from __future__ import annotations

import dataclasses

import pytest
import torch

from ar_kernels import data_type
from ar_kernels.numerics.activation import fake_quant_activation
from ar_schemes import Scheme, scheme
from ar_tuner.auto_scheme.candidates import Inputs, Maker, ranges_of
from ar_tuner.auto_scheme.scorers.delta_loss import DeltaLoss
from ar_tuner.auto_scheme.scorers.fisher import Fisher, blended
from ar_tuner.blocks import weights_of

OPTIONS = {name: scheme(name) for name in ("W2A16G32", "W4A16G32")}


def draws(task, logits, number) -> torch.Tensor:
    generator = torch.Generator().manual_seed(task.seed * 1_000_003 + number)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_fisher_is_the_quadratic_form_of_sampled_gradients(kind, model, rows, oracle) -> None:
    made = model(kind)
    task = oracle.task(made, rows[:3])
    before = {k: v.clone() for k, v in made.state_dict().items()}
    values = Fisher().values(task)
    energy = oracle.energies(task)
    refs = {r.layer: (b, r) for b in task.blocks for r in weights_of(b, list(task.layers))}
    sums = {(layer, o): [0.0, 0.0] for layer in task.layers for o in OPTIONS}
    for number, row in enumerate(task.rows):
        for block, ref in refs.values():
            block.module.get_parameter(ref.parameter).requires_grad_()
        logits = made(row[None]).logits[0]
        labels = draws(task, logits.detach(), number)
        torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
        for layer, (block, ref) in refs.items():
            stored = block.module.get_parameter(ref.parameter)
            gradient, weight = ref.view(stored.grad), ref.view(stored.detach())
            for option, which in OPTIONS.items():
                product = (gradient * (oracle.left(weight, which, energy[layer]) - weight)).sum(1)
                sums[layer, option][0] += float(product.square().sum())
                sums[layer, option][1] += float(product.sum() ** 2)
            stored.grad = None
            stored.requires_grad = False
    for (layer, option), (by_row, whole) in sums.items():
        assert values[layer][option][0] == pytest.approx(by_row, rel=1e-3)
        assert values[layer][option][1] == pytest.approx(whole, rel=1e-3)
    assert all(torch.equal(v, before[k]) for k, v in made.state_dict().items())
    assert all(not p.requires_grad and p.grad is None for p in made.parameters())


def test_a_tied_embedding_is_scored_in_both_its_places(model, rows, oracle) -> None:
    made = model("qwen3")
    name = "model.embed_tokens"
    task = oracle.task(made, rows[:2], {"W4A16G32": OPTIONS["W4A16G32"]}, ends=(name,))
    values = Fisher().values(task)
    weight = made.model.embed_tokens.weight
    spec = OPTIONS["W4A16G32"].weight
    kind = data_type("int")
    change = kind.fake_quant(weight, spec, kind.parameters(weight, spec)) - weight.detach()
    by_row = 0.0
    for number, row in enumerate(task.rows):
        weight.requires_grad_()
        logits = made(row[None]).logits[0]
        labels = draws(task, logits.detach(), number)
        torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
        by_row += float((weight.grad * change).sum(1).square().sum())
        weight.grad = None
        weight.requires_grad = False
    assert values[name]["W4A16G32"][0] == pytest.approx(by_row, rel=1e-3)


@pytest.mark.parametrize("scorer", [Fisher(), DeltaLoss()], ids=lambda s: s.name)
def test_scores_do_not_depend_on_how_memory_is_spent(scorer, model, rows, oracle) -> None:
    made = model()
    options = {**OPTIONS, "MXFP4": scheme("MXFP4")}
    ends = ("lm_head", "model.embed_tokens")
    task = oracle.task(made, rows[:2], options, ends=ends)
    first = scorer.values(task)
    assert first == scorer.values(task)
    for changes in ({"by_block": False}, {"maker": Maker(as_codes=False)}):
        other = scorer.values(dataclasses.replace(task, **changes))
        for layer, named in first.items():
            for option, value in named.items():
                assert other[layer][option] == pytest.approx(value, rel=1e-3), (layer, option)


def test_more_bits_lose_less_and_floats_nothing(model, rows, oracle) -> None:
    options = {**OPTIONS, "BF16": Scheme(name="BF16")}
    task = oracle.task(model(), rows, options)
    fisher = Fisher()
    scores = fisher.scores(fisher.values(task), rows.numel())
    for layer in task.layers:
        assert 0 < scores[layer, "W4A16G32"] < scores[layer, "W2A16G32"]
        assert (layer, "BF16") not in scores


def test_finished_layers_are_not_scored_again_and_change_nothing(model, rows, oracle) -> None:
    task = oracle.task(model(), rows[:3])
    whole = Fisher().values(task)
    saved: dict[str, object] = {}

    class Killed(Exception):
        pass

    def save(layer, values):
        saved[layer] = values

    def report(done, total):
        if done == 1:
            raise Killed

    with pytest.raises(Killed):
        Fisher().values(dataclasses.replace(task, save=save, report=report))
    assert saved.keys() == {n for n, la in task.layers.items() if la.block == task.blocks[1].name}
    made: list[str] = []

    class Counting(Maker):
        def of_block(self, block, open_to, inputs):
            made.extend(layer for layer, options in open_to.items() if options)
            return super().of_block(block, open_to, inputs)

    rest = dataclasses.replace(task, known=saved, maker=Counting())
    assert {**saved, **Fisher().values(rest)} == whole
    assert not set(made) & saved.keys()


def test_delta_loss_is_gradient_at_the_quantized_model_times_change(model, rows, oracle) -> None:
    made = model()
    task = oracle.task(made, rows[:4], batch_size=2)
    values = DeltaLoss().values(task)
    energy = oracle.energies(task)
    option = "W2A16G32"
    refs = {r.layer: (b, r) for b in task.blocks for r in weights_of(b, list(task.layers))}
    floats = {}
    for layer, (block, ref) in refs.items():
        stored = block.module.get_parameter(ref.parameter)
        floats[layer] = stored.detach().clone()
        stored.data = oracle.left(stored.detach(), OPTIONS[option], energy[layer])
        stored.requires_grad_()
    sums = dict.fromkeys(refs, 0.0)
    for batch in task.batches:
        logits = made(batch).logits[:, :-1].reshape(-1, 128)
        labels = batch[:, 1:].reshape(-1)
        torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
        for layer, (block, ref) in refs.items():
            stored = block.module.get_parameter(ref.parameter)
            sums[layer] += float((stored.grad * (stored.detach() - floats[layer])).abs().sum())
            stored.grad = None
    for layer, total in sums.items():
        assert values[layer][option][0] == pytest.approx(total, rel=1e-3)
    scores = DeltaLoss().scores(values, 10)
    assert scores[layer, option] == values[layer][option][0] / 10


def test_quantized_activations_count(model, rows, oracle) -> None:
    made = model()
    both = scheme("MXFP4")
    options = {"weights": dataclasses.replace(both, activation=None, name="weights"), "both": both}
    task = oracle.task(made, rows[:2], options)
    values = Fisher().values(task)
    for named in values.values():
        assert named["weights"][3] == 0
        assert named["both"][3] > 0
        assert named["both"][0] == pytest.approx(named["weights"][0], rel=1e-5)
    # by hand: one layer alone, and two that are given the same
    last = task.blocks[1].module.mlp
    for names in (("down_proj",), ("gate_proj", "up_proj")):
        seen = []

        def hook(module, args, seen=seen):
            x = seen[0] if seen else args[0].detach().requires_grad_()
            seen.append(x)
            return (x,)

        total = 0.0
        handles = [getattr(last, n).register_forward_pre_hook(hook) for n in names]
        for number, row in enumerate(task.rows):
            seen.clear()
            logits = made(row[None]).logits[0]
            labels = draws(task, logits.detach(), number)
            torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
            x = seen[0]
            error = fake_quant_activation(x.detach(), both.activation) - x.detach()
            total += float((x.grad * error).square().sum())
        for handle in handles:
            handle.remove()
        found = [values[f"{task.blocks[1].name}.mlp.{n}"]["both"][3] for n in names]
        assert sum(found) == pytest.approx(total, rel=1e-3)


def test_static_ranges_are_the_largest_of_a_fused_group() -> None:
    inputs = Inputs(peaks={"a.q_proj": torch.tensor(2.0), "a.k_proj": torch.tensor(6.0)})
    static = scheme("FP8_STATIC")
    found = ranges_of(dict.fromkeys(("a.q_proj", "a.k_proj", "a.unseen"), static), inputs)
    assert found["a.q_proj"] == found["a.k_proj"] == found["a.unseen"] == torch.tensor([6 / 448])
    assert ranges_of({"a.q_proj": scheme("W4A16")}, inputs) == {}


def test_blending_trusts_differences_only_beyond_their_noise() -> None:
    noisy = {str(i): (1.0, w, 0.5) for i, w in enumerate((0.5, 0.9, 1.1, 1.6))}
    assert all(0.7 < v < 1.6 for v in blended(noisy).values())
    spread = max(blended(noisy).values()) / min(blended(noisy).values())
    assert spread < 1.01  # all of it may be noise
    sure = {k: (1.0, w * (1 if k != "0" else 8), 1e-6) for k, (_, w, _) in noisy.items()}
    for key, (_, whole, _) in sure.items():
        assert blended(sure)[key] == pytest.approx(whole, rel=1e-3)
    few = {"a": (1.0, 9.0, 0.1), "b": (2.0, 0.1, 0.1)}
    assert blended(few) == {"a": 1.0, "b": 2.0}
    assert blended({**sure, "zero": (0.0, 0.0, 2.0)})["zero"] == 0.0


def test_compiling_is_of_the_search_alone(model, rows, oracle, monkeypatch) -> None:
    compiled = []

    def fake(function):
        compiled.append(function.__name__)
        return function

    monkeypatch.setattr(torch, "compile", fake)
    task = oracle.task(model(), rows[:1])
    plain = Fisher().values(task)
    assert not compiled
    assert Fisher().values(dataclasses.replace(task, maker=Maker(compiled=True))) == plain
    assert set(compiled) == {"search"}
