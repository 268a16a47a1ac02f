"""Calibration rows of one block: minibatches of any rows from the calls the frames made."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ar_tuner.carry import to
from ar_tuner.errors import TunerError

if TYPE_CHECKING:
    from ar_tuner.walk import Call

Path = tuple[object, ...]
FRAMES = 128
"""Frames of a chain up to which a frame holds one batch. Each is a thread; some systems allow a
process few hundred. (400 of them, of 256 tokens x 8, took 50 MB more than 50 of the same rows.)"""
TOKENS = 2**16
"""Tokens of one forward beyond which no rows are added to it: its activations are in memory."""


@dataclass(frozen=True)
class RowBank:
    """What a block was given, addressable by row.

    `units` are what can be drawn: single rows, or whole calls where rows of different calls
    cannot be joined (different shapes or shared states). Rows go to `device` as they are taken;
    None: they stay where they are.
    """

    calls: tuple[Call, ...]
    sizes: tuple[int, ...]
    split: frozenset[Path]
    joinable: bool
    device: torch.device | None = None

    @classmethod
    def of(
        cls, calls: Sequence[Call], sizes: Sequence[int], *, device: torch.device | None = None
    ) -> RowBank:
        """Return the bank of some calls; `sizes` are the rows in each."""
        leaves = [dict(leaves_of((c.args, c.kwargs))) for c in calls]
        split: set[Path] = set()
        joinable = all(set(found) == set(leaves[0]) for found in leaves)
        for path in leaves[0] if joinable else ():
            tensors = [found[path] for found in leaves]
            by_row = all(
                t.ndim > 0 and t.shape[0] == n and t.shape[1:] == tensors[0].shape[1:]
                for t, n in zip(tensors, sizes, strict=True)
            )
            same = all(_same(t, tensors[0]) for t in tensors[1:])
            if by_row and (not same or max(sizes) > 1 or len(calls) == 1):
                split.add(path)
            elif not same:
                joinable = False
        return cls(tuple(calls), tuple(sizes), frozenset(split), joinable, device)

    @property
    def rows(self) -> int:
        """Number of rows in all calls."""
        return sum(self.sizes)

    def minibatches(
        self, size: int, generator: torch.Generator, *, without: frozenset[int] = frozenset()
    ) -> Callable[[], list[int]]:
        """Return a function that draws the next minibatch of row numbers.

        Rows are shuffled, handed out in turn and shuffled again when too few remain. Where rows
        cannot be joined, a minibatch is one whole call. Rows in `without` are never drawn.
        """
        queue: list[list[int]] = []

        def draw() -> list[int]:
            if not queue:
                queue.extend(self._deal(size, generator, without))
            return queue.pop()

        return draw

    def _deal(
        self, size: int, generator: torch.Generator, without: frozenset[int]
    ) -> list[list[int]]:
        if not self.joinable:
            starts = self._starts()
            order = torch.randperm(len(self.calls), generator=generator).tolist()
            calls = [list(range(starts[i], starts[i] + self.sizes[i])) for i in order]
            return [rows for rows in calls if without.isdisjoint(rows)]
        order = torch.randperm(self.rows, generator=generator).tolist()
        order = [row for row in order if row not in without]
        size = min(size, len(order))
        return [order[i : i + size] for i in range(0, len(order) - size + 1, size)]

    def held_out(self, rows: int, size: int) -> list[list[int]]:
        """Return at least the last `rows` row numbers in lists that `take` accepts.

        Raises:
            TunerError: nothing would be left.
        """
        first = self.rows - rows
        if self.joinable:
            out = [list(range(i, min(i + size, self.rows))) for i in range(first, self.rows, size)]
        else:
            starts = zip(self._starts(), self.sizes, strict=True)
            out = [list(range(s, s + n)) for s, n in starts if s + n > first]
        if sum(len(chunk) for chunk in out) >= self.rows:
            raise TunerError(none_left(rows, self.rows))
        return out

    def chunks(self, rows: int, size: int) -> list[list[int]]:
        """Return at least the first `rows` row numbers in lists that `take` accepts."""
        if self.joinable:
            rows = min(rows, self.rows)
            return [list(range(i, min(i + size, rows))) for i in range(0, rows, size)]
        starts = self._starts()
        return [list(range(s, s + n)) for s, n in zip(starts, self.sizes, strict=True) if s < rows]

    def take(self, rows: Sequence[int]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return (args, kwargs) for some rows; containers are fresh, so a block may change them."""
        where = [self._locate(r) for r in rows]
        first = self.calls[where[0][0]]
        if not self.joinable or self._whole(where):
            move = to(self.device)
            return rebuilt((first.args, first.kwargs), (), lambda _, leaf: move(leaf))
        leaves = {
            c: dict(leaves_of((self.calls[c].args, self.calls[c].kwargs)))
            for c in {c for c, _ in where}
        }

        def choose(path: Path, leaf: Tensor) -> Tensor:
            if path not in self.split:
                return to(self.device)(leaf)
            return to(self.device)(torch.stack([leaves[c][path][r] for c, r in where]))

        return rebuilt((first.args, first.kwargs), (), choose)

    def _whole(self, where: list[tuple[int, int]]) -> bool:
        call = where[0][0]
        return where == [(call, r) for r in range(self.sizes[call])]

    def _starts(self) -> list[int]:
        starts, total = [], 0
        for size in self.sizes:
            starts.append(total)
            total += size
        return starts

    def _locate(self, row: int) -> tuple[int, int]:
        for call, size in enumerate(self.sizes):
            if row < size:
                return call, row
            row -= size
        raise IndexError(row)


def none_left(held: int, rows: int) -> str:
    """Return the message for more rows held out than there are."""
    return (
        f"validation_rows {held} leaves none of the {rows} calibration rows to tune on; hold out "
        "fewer, or give more rows (nsamples)"
    )


def rows_per_frame(batch: int, rows: int, seqlen: int) -> int:
    """Return how many calibration rows go through the model in one forward.

    A batch; more where that would make too many frames, as long as a forward stays small. It
    depends on these numbers alone, so that a resumed run computes the same.
    """
    return max(batch, min(-(-rows // FRAMES), TOKENS // seqlen))


def rows_of(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Return single rows (views) of the outputs of several calls."""
    return [out[i] for out in outputs for i in range(out.shape[0])]


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b))


def leaves_of(tree: object, path: Path = ()) -> list[tuple[Path, Tensor]]:
    """Return the tensors in nested containers, each with the way to it."""
    if isinstance(tree, Tensor):
        return [(path, tree)]
    if isinstance(tree, (tuple, list)):
        return [leaf for i, item in enumerate(tree) for leaf in leaves_of(item, (*path, i))]
    if isinstance(tree, (Mapping, UserDict)):
        return [leaf for key, item in tree.items() for leaf in leaves_of(item, (*path, key))]
    return []


def rebuilt(tree: Any, path: Path, choose: Callable[[Path, Tensor], Tensor]) -> Any:
    """Return a tree of new containers with every tensor in it as `choose` makes it of it."""
    if isinstance(tree, Tensor):
        return choose(path, tree)
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(rebuilt(v, (*path, i), choose) for i, v in enumerate(tree)))
    if isinstance(tree, (tuple, list)):
        return type(tree)(rebuilt(v, (*path, i), choose) for i, v in enumerate(tree))
    if isinstance(tree, (dict, UserDict)):
        return type(tree)({k: rebuilt(v, (*path, k), choose) for k, v in tree.items()})
    return tree
