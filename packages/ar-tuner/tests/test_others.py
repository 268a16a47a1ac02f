from __future__ import annotations

import torch

from ar_tuner.others import fitted, interleaved, joined, samples_of
from ar_tuner.refine import Others, Rows


def sample(tokens: int, value: float = 0.0) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.full((1, tokens), 7), "seen": torch.full((1, 2), value)}


def test_samples_of_equal_shapes_share_batches() -> None:
    parts = [sample(3, 1.0), sample(4), sample(3, 2.0), sample(3, 3.0)]
    batches = list(joined(parts, size=2))
    assert [samples_of(b) for b in batches] == [2, 1, 1]
    assert batches[0]["seen"][:, 0].tolist() == [1.0, 2.0]
    assert batches[1]["seen"][:, 0].tolist() == [3.0]


def test_only_floats_are_cast() -> None:
    model = torch.nn.Linear(2, 2).to(torch.bfloat16)
    given = {**sample(3), "mask": torch.ones(1, 3, dtype=torch.bool)}
    (made,) = fitted([given], model, None)
    assert made["seen"].dtype == torch.bfloat16
    assert made["input_ids"].dtype == torch.int64
    assert made["mask"].dtype == torch.bool


def test_two_lists_are_spread_evenly() -> None:
    assert interleaved([1, 2, 3, 4], [10]) == [1, 2, 10, 3, 4]
    assert interleaved([], [10, 20]) == [10, 20]


def test_samples_are_shared_out_by_use() -> None:
    samples = [sample(3, float(i)) for i in range(40)]
    found = Others.shared_out(samples, 8, stage=True)
    assert (len(found.walk), len(found.stage), len(found.held_out)) == (8, 38, 2)
    values = [[float(s["seen"][0, 0]) for s in part] for part in (found.stage, found.held_out)]
    assert set(values[0]).isdisjoint(values[1])
    assert Others.shared_out(samples, 8, stage=False) == Others(tuple(samples[:8]))
    assert Others.shared_out(samples[:1], 8, stage=True) == Others(tuple(samples[:1]))


def test_everything_there_is_makes_the_fingerprint() -> None:
    rows = Rows(torch.ones(2, 4), others=Others((sample(3),), (), (sample(4),)))
    assert [tuple(t.shape) for t in rows.all] == [(2, 4), (1, 3), (1, 2), (1, 4), (1, 2)]
    assert rows.count == 3
