from __future__ import annotations

from collections import UserDict, namedtuple

import pytest
import torch
from torch import nn

from ar_tuner import AutoRound, TunerError
from ar_tuner.blocks import Block
from ar_tuner.carry import Route, moved
from ar_tuner.devices import CPU, Asked, Machine, Placement, checked_device, default, parse, place
from ar_tuner.residence import Kept, send

NONE = Machine()
TWO = Machine("cuda", 2)
CUDA0, CUDA1 = torch.device("cuda", 0), torch.device("cuda", 1)
OTHER = torch.device("cpu", 0)
"""Tensors sent there are copied, as to any other device, and come out on the CPU."""
BLOCKS = [(f"model.layers.{i}", 100) for i in range(4)]


@pytest.mark.parametrize(
    ("asked", "machine", "devices"),
    [
        ("cpu", NONE, (CPU,)),
        ("auto", NONE, (CPU,)),
        ("auto", TWO, (CUDA0, CUDA1)),
        ("cuda", TWO, (CUDA0,)),
        ("cuda:1", TWO, (CUDA1,)),
        (1, TWO, (CUDA1,)),
        ("0, 1", TWO, (CUDA0, CUDA1)),
        ("cuda:0,cpu", TWO, (CUDA0, CPU)),
        ("xpu", Machine("xpu", 1), (torch.device("xpu", 0),)),
        ("hpu:0", Machine("hpu", 1), (torch.device("hpu", 0),)),
        (torch.device("mps"), Machine("mps", 1), (torch.device("mps", 0),)),
        (None, TWO, ()),
    ],
)
def test_a_device_map_is_understood(asked, machine, devices) -> None:
    assert parse(asked, machine).devices == devices


@pytest.mark.parametrize(
    ("asked", "machine", "message"),
    [
        ("cuda", NONE, "'cuda' cannot be used here: this machine has no cuda. Available: cpu$"),
        ("cuda:2", TWO, r"cuda has 2 here. Available: cpu, cuda:0, cuda:1"),
        (2, TWO, "'2' cannot be used here: cuda has 2 here"),
        ("0,5", TWO, "'5' cannot be used here"),
        (0, NONE, "'0' cannot be used here: this machine has no accelerator. Available: cpu"),
        ("xpu", TWO, "'xpu' cannot be used here: this machine has no xpu"),
        ("meta", TWO, "'meta' cannot be used here"),
        ("nonsense", TWO, "'nonsense' cannot be used here"),
        ("", TWO, "'' cannot be used here"),
        (True, TWO, "'True' cannot be used here"),
        ({"": "cuda:7"}, TWO, "'cuda:7' cannot be used here"),
        ({}, TWO, "names no device"),
    ],
)
def test_a_device_that_is_not_there_is_refused_with_what_is(asked, machine, message) -> None:
    with pytest.raises(TunerError, match=message):
        parse(asked, machine)


def test_this_machine_knows_its_devices(model) -> None:
    assert checked_device("cpu") == CPU
    assert default(Machine.here()).devices[0].type in ("cpu", Machine.here().kind)
    assert default(TWO).devices == (CUDA0,)
    with pytest.raises(TunerError, match="'cuda:99' cannot be used here"):
        AutoRound(model(), device_map="cuda:99")


def test_blocks_are_shared_out_in_runs_of_about_equal_size() -> None:
    plan = place(parse("0,1", TWO), BLOCKS, low_gpu_mem_usage=False)
    assert plan == Placement(CUDA0, (CUDA0, CUDA0, CUDA1, CUDA1))
    uneven = [("a", 600), ("b", 100), ("c", 100), ("d", 100)]
    assert place(parse("0,1", TWO), uneven, low_gpu_mem_usage=False).blocks == (
        *(CUDA0, CUDA1, CUDA1, CUDA1),
    )
    eight = place(Asked(Machine("cuda", 8).devices), BLOCKS, low_gpu_mem_usage=False)
    assert len(set(eight.blocks)) == 4
    empty = place(parse("0,1", TWO), [("a", 0)], low_gpu_mem_usage=False)
    assert empty.blocks == (CUDA0,)


def test_states_wait_on_the_cpu_when_device_memory_is_short() -> None:
    plan = place(parse("cuda:1", TWO), BLOCKS, low_gpu_mem_usage=True)
    assert plan == Placement(CPU, (CUDA1,) * 4)


def test_nothing_asked_moves_nothing() -> None:
    assert place(Asked(), BLOCKS, low_gpu_mem_usage=True) == Placement(None, (None,) * 4)


def test_a_map_by_name_gives_the_longest_name_the_say() -> None:
    asked = parse({"": "cpu", "model.layers": 0, "model.layers.3": "cuda:1"}, TWO)
    plan = place(asked, BLOCKS, low_gpu_mem_usage=False)
    assert plan == Placement(CPU, (CUDA0, CUDA0, CUDA0, CUDA1))
    plain = parse({"model.layers": 1}, TWO)
    assert place(plain, BLOCKS, low_gpu_mem_usage=False).home == CUDA1
    named = parse({"model.layers": 1, "model.embed_tokens": 0, "lm_head": 0}, TWO)
    assert place(named, BLOCKS, low_gpu_mem_usage=False).home == CUDA0


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"model.layers.0": 0}, r"says nothing of 3 blocks: model\.layers\.1"),
        ({"": 0, "model.layers.0.mlp": 1}, r"model\.layers\.0\.mlp would split a block"),
        ({"model.layers": 0, "lm_head": 1, "model.norm": 0}, "outside the blocks on 2 devices"),
    ],
)
def test_a_map_that_cannot_be_followed_is_refused(asked, message) -> None:
    with pytest.raises(TunerError, match=message):
        place(parse(asked, TWO), BLOCKS, low_gpu_mem_usage=False)


Pair = namedtuple("Pair", "first second")  # noqa: PYI024 - what models return


def test_a_tree_in_which_nothing_moves_is_returned_itself() -> None:
    tree = {"a": [torch.ones(1), {"b": (torch.ones(1), "text")}], "c": None}
    assert moved(tree, lambda t: t) is tree
    assert moved(tree, lambda t: t.to("cpu")) is tree


def test_every_tensor_of_a_tree_moves_and_its_kind_stays() -> None:
    tree = (Pair(torch.ones(1), 3), UserDict(a=[torch.ones(2)]), {"k": torch.ones(1)}, "text")
    out = moved(tree, lambda t: t + 1)
    assert isinstance(out[0], Pair)
    assert (float(out[0].first), out[0].second, out[3]) == (2.0, 3, "text")
    assert isinstance(out[1], UserDict)
    assert out[1]["a"][0].tolist() == [2.0, 2.0]
    assert float(tree[2]["k"]) == 1.0


def test_what_a_block_writes_into_its_arguments_reaches_the_caller() -> None:
    states = {"old": torch.zeros(1), "gone": torch.zeros(1), "seen": (inner := [torch.ones(1)])}
    old = states["old"]

    def block(x, *, states):
        assert states is not kept
        states["new"] = x + 1
        del states["gone"]
        states["seen"].append(x)
        return x * 2, states["old"]

    kept = states
    out = Route(OTHER, CPU).run(block, (torch.ones(1),), {"states": states})
    assert float(out[0]) == 2.0
    assert set(states) == {"old", "new", "seen"}
    assert states["old"] is old
    assert float(states["new"]) == 2.0
    assert [float(t) for t in inner] == [1.0, 1.0]
    assert states["seen"] is inner


def test_a_list_that_a_block_leaves_alone_is_left_alone() -> None:
    states = [torch.ones(1), torch.ones(1)]
    before = list(states)
    Route(OTHER, CPU).run(lambda x, s: x, (torch.ones(1), states), {})
    assert all(a is b for a, b in zip(states, before, strict=True))


def test_tied_parameters_stay_tied_when_they_move() -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    second.weight = first.weight
    first.register_buffer("b", torch.ones(1), persistent=False)
    before = first.weight
    send([first, second], OTHER)
    assert first.weight is not before
    assert second.weight is first.weight
    assert torch.equal(first.weight, before)
    assert first.weight.requires_grad
    assert "b" not in first.state_dict()


def test_what_holds_no_data_is_not_moved() -> None:
    hollow = nn.Linear(2, 2, device="meta")
    hollow.register_buffer("b", torch.ones(1, device="meta"))
    send([hollow], OTHER)
    assert all(t.is_meta for t in (hollow.weight, hollow.bias, hollow.b))


def test_a_model_in_memory_comes_back_to_where_it_was(model) -> None:
    made = model()
    blocks = [Block(f"model.layers.{i}", b) for i, b in enumerate(made.model.layers)]
    embedding, up = made.model.embed_tokens.weight, made.model.layers[1].mlp.up_proj.weight
    residence = Kept(made, blocks, Placement(OTHER, (CPU, OTHER)))
    assert made.model.embed_tokens.weight is not embedding
    residence.enter(1)
    assert made.model.layers[1].mlp.up_proj.weight is not up
    assert made.model.layers[0].mlp.up_proj.weight.is_cpu
    residence.leave(1)
    residence.settle(1, dict)
    residence.whole()
    assert all(p.device == CPU for p in made.parameters())
    assert torch.equal(made.model.layers[1].mlp.up_proj.weight, up)


@pytest.mark.parametrize(
    "options",
    [
        {"device_map": "cpu"},
        {"device_map": "cpu:0"},
        {"device_map": "cpu,cpu:0"},
        {"device_map": {"": "cpu", "model.layers": "cpu:0"}},
        {"device_map": "cpu:0", "low_gpu_mem_usage": True},
        {"device_map": {"": "cpu:0", "model.layers.1": "cpu"}, "low_gpu_mem_usage": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_devices_do_not_change_a_bit(model, rows, kind, options) -> None:
    numbers = {"iters": 2, "nsamples": 8, "seqlen": 32, "batch_size": 4, "group_size": 32}
    one, _ = AutoRound(model(kind), dataset=rows, **numbers).quantize()
    two, _ = AutoRound(model(kind), dataset=rows, **numbers, **options).quantize()
    other = two.state_dict()
    assert all(torch.equal(value, other[name]) for name, value in one.state_dict().items())
