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
class _Group:
    """Calls whose rows are alike.

    Attributes:
        calls: their numbers.
        axes: tensors that hold something for each row, and the axis of the rows.
        joinable: rows of different calls can be in one minibatch.
    """

    calls: tuple[int, ...]
    axes: Mapping[Path, int]
    joinable: bool


@dataclass(frozen=True)
class RowBank:
    """What a block was given, addressable by row.

    Rows of different calls can be joined where the calls are alike: equal shapes, equal shared
    states. What can be drawn are minibatches of rows of one group of such calls, or whole calls.
    Rows go to `device` as they are taken; None: they stay where they are.
    """

    calls: tuple[Call, ...]
    sizes: tuple[int, ...]
    groups: tuple[_Group, ...]
    device: torch.device | None = None

    @classmethod
    def of(
        cls, calls: Sequence[Call], sizes: Sequence[int], *, device: torch.device | None = None
    ) -> RowBank:
        """Return the bank of some calls; `sizes` are the rows in each."""
        kinds: dict[object, list[int]] = {}
        leaves = [dict(leaves_of((call.args, call.kwargs))) for call in calls]
        for number, (call, found, rows) in enumerate(zip(calls, leaves, sizes, strict=True)):
            kinds.setdefault(_kind(call, found, rows), []).append(number)
        groups = (_group(numbers, leaves, sizes) for numbers in kinds.values())
        return cls(tuple(calls), tuple(sizes), tuple(groups), device)

    @property
    def joinable(self) -> bool:
        """Tell whether any rows can be in one minibatch."""
        return len(self.groups) == 1 and self.groups[0].joinable

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
            units = self._units(size, generator)
            order = torch.randperm(len(units), generator=generator).tolist()
            dealt = ([r for r in units[i] if r not in without] for i in order)
            return [rows for i, rows in zip(order, dealt, strict=True) if self._may(units[i], rows)]
        order = torch.randperm(self.rows, generator=generator).tolist()
        order = [row for row in order if row not in without]
        size = min(size, len(order))
        return [order[i : i + size] for i in range(0, len(order) - size + 1, size)]

    def _may(self, unit: Sequence[int], rows: Sequence[int]) -> bool:
        """Tell whether what is left of a unit can be drawn."""
        return bool(rows) and (len(rows) == len(unit) or self._group(unit[0]).joinable)

    def held_out(self, rows: int, size: int) -> list[list[int]]:
        """Return at least the last `rows` row numbers in lists that `take` accepts.

        Raises:
            TunerError: nothing would be left.
        """
        first = self.rows - rows
        if self.joinable:
            out = [list(range(i, min(i + size, self.rows))) for i in range(first, self.rows, size)]
        else:
            out = [unit for unit in self._units(size) if unit[-1] >= first]
        if sum(len(chunk) for chunk in out) >= self.rows:
            raise TunerError(none_left(rows, self.rows))
        return out

    def chunks(self, rows: int, size: int) -> list[list[int]]:
        """Return at least the first `rows` row numbers in lists that `take` accepts."""
        if self.joinable:
            rows = min(rows, self.rows)
            return [list(range(i, min(i + size, rows))) for i in range(0, rows, size)]
        return [unit for unit in self._units(size) if unit[0] < rows]

    def _units(self, size: int, generator: torch.Generator | None = None) -> list[list[int]]:
        """Return all rows in lists that `take` accepts, ordered by their first.

        Of calls that can be joined, up to `size` rows in order, or shuffled with a generator.
        """
        starts, out = self._starts(), []
        for group in self.groups:
            calls = [list(range(starts[i], starts[i] + self.sizes[i])) for i in group.calls]
            if not group.joinable:
                out += calls
                continue
            rows = [row for call in calls for row in call]
            if generator is not None:
                rows = [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]
            out += [rows[i : i + size] for i in range(0, len(rows), size)]
        return sorted(out, key=lambda unit: unit[0])

    def take(self, rows: Sequence[int]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return (args, kwargs) for some rows; containers are fresh, so a block may change them."""
        where = [self._locate(r) for r in rows]
        first, group = self.calls[where[0][0]], self._group(rows[0])
        if not group.joinable or self._whole(where):
            move = to(self.device)
            return rebuilt((first.args, first.kwargs), (), lambda _, leaf: move(leaf))
        leaves = {
            c: dict(leaves_of((self.calls[c].args, self.calls[c].kwargs)))
            for c in {c for c, _ in where}
        }

        def choose(path: Path, leaf: Tensor) -> Tensor:
            axis = group.axes.get(path)
            if axis is None:
                return to(self.device)(leaf)
            some = [leaves[c][path].select(axis, r) for c, r in where]
            return to(self.device)(torch.stack(some, axis))

        return rebuilt((first.args, first.kwargs), (), choose)

    def _whole(self, where: list[tuple[int, int]]) -> bool:
        call = where[0][0]
        return where == [(call, r) for r in range(self.sizes[call])]

    def _group(self, row: int) -> _Group:
        call = self._locate(row)[0]
        return next(group for group in self.groups if call in group.calls)

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


def _kind(call: Call, leaves: Mapping[Path, Tensor], rows: int) -> object:
    """Return what calls have in common whose rows may be alike."""
    shapes = []
    for path, leaf in leaves.items():
        lead = _lead(leaf, rows)
        rest = leaf.shape if lead is None else (*leaf.shape[:lead], *leaf.shape[lead + 1 :])
        shapes.append((path, leaf.dtype, lead, tuple(rest)))
    return tuple(shapes), _plain((call.args, call.kwargs))


def _lead(leaf: Tensor, rows: int) -> int | None:
    """Return the axis of a tensor that may have one entry per row, or None.

    The first; the second of [3, rows, T, ...], in which positions have time, height and width.
    """
    if leaf.ndim == 0:
        return None
    if leaf.ndim > 2 and leaf.shape[0] == _PLACES and leaf.shape[1] == rows:  # noqa: PLR2004
        return 1 if rows != _PLACES else None  # either could be the rows
    return 0


_PLACES = 3


def _group(
    numbers: Sequence[int], leaves: Sequence[Mapping[Path, Tensor]], sizes: Sequence[int]
) -> _Group:
    """Return some calls as a group; rows are told by what differs between them."""
    axes: dict[Path, int] = {}
    joinable, most = True, max(sizes[i] for i in numbers)
    for path, first in leaves[numbers[0]].items():
        axis = _lead(first, sizes[numbers[0]])
        if axis is not None and any(leaves[i][path].shape[axis] != sizes[i] for i in numbers):
            axis = None
        same = all(_same(leaves[i][path], first) for i in numbers[1:])
        if axis is not None and (not same or most > 1 or len(numbers) == 1):
            axes[path] = axis
        elif not same or _may_be_rows(first, sizes[numbers[0]]):
            joinable = False
    return _Group(tuple(numbers), axes, joinable and bool(axes))


def _may_be_rows(leaf: Tensor, rows: int) -> bool:
    """Tell whether a tensor may hold several entries per row, one row after the other.

    Image features do, [rows x tiles, patches, H], and biases of heads, [rows x heads, 1, T].
    """
    return leaf.ndim > 2 and leaf.shape[0] > rows > 1 and leaf.shape[0] % rows == 0  # noqa: PLR2004


def _plain(tree: object) -> object:
    """Return the numbers and words in nested containers, tensors and other objects left out."""
    if isinstance(tree, (tuple, list)):
        return tuple(_plain(item) for item in tree)
    if isinstance(tree, (Mapping, UserDict)):
        return tuple((key, _plain(item)) for key, item in tree.items())
    return tree if isinstance(tree, (int, float, str, type(None))) else None


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
