"""The walk: every block gets its exact inputs, by suspending the model's own forward before it.

Each calibration batch runs the model's forward in a thread of its own. A call of a block stops
the thread and hands the arguments to the controller, which computes the output (with whatever
weights it likes) and gives it back. Masks, rotary tables, shared states and token ids stay alive
in the suspended frames; nothing is cached, cast or special-cased. One thread runs at a time.
"""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ar_tuner.carry import Route
from ar_tuner.errors import TunerError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import nn

PATIENCE = 3600.0
"""Seconds a frame may compute between two blocks before the walk gives up."""


@dataclass(frozen=True)
class Call:
    """One call of a block: which one, and what it was given."""

    index: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Stop(BaseException):
    """Unwinds a frame that is no longer needed (no `Exception`, so that models cannot catch it)."""


@dataclass
class _Running:
    """The frame that computes now, if one does.

    No thread-local: torch.compile, which looks at a block while no frame computes, can follow an
    attribute but not that.
    """

    frame: Frame | None = None


class Frame:
    """A forward of the model that stands before a block.

    `call` is the pending call of a block, or None when the forward has ended.
    """

    def __init__(self, run: Callable[[], object], running: _Running) -> None:
        self.call: Call | None = None
        self.output: object = None
        self._run = run
        self._running = running
        self._answer: object = None
        self._error: BaseException | None = None
        self._kill = False
        self._go = threading.Semaphore(0)
        self._ready = threading.Semaphore(0)
        self._thread = threading.Thread(target=self._main, daemon=True, name="ar-frame")

    def start(self) -> None:
        """Run to the first block."""
        self._thread.start()
        self._advance()

    def resume(self, answer: object) -> None:
        """Give the pending call its output and run to the next block.

        Raises:
            Exception: whatever the model raised on its way.
        """
        self._answer = answer
        self._advance()

    def close(self) -> None:
        """Unwind the frame; does nothing when it has ended."""
        if self._thread.is_alive():
            self._kill = True
            self._go.release()
            self._thread.join(timeout=PATIENCE)
        self.call, self._answer = None, None

    @property
    def mine(self) -> bool:
        """True in the frame's own thread."""
        return threading.get_ident() == self._thread.ident

    def ask(self, call: Call) -> object:
        """Stop here until the controller answers the call (runs in the frame's thread)."""
        self.call = call
        self._ready.release()
        self._go.acquire()
        if self._kill:
            raise _Stop
        answer, self._answer = self._answer, None
        return answer

    def _advance(self) -> None:
        self.call = None
        self._running.frame = self
        self._go.release()
        if not self._ready.acquire(timeout=PATIENCE):
            msg = f"the model computed more than {PATIENCE:.0f} s between two blocks; giving up"
            raise TunerError(msg)
        self._running.frame = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _main(self) -> None:
        self._go.acquire()
        try:
            if not self._kill:
                self.output = self._run()
        except _Stop:
            return
        except BaseException as error:  # noqa: BLE001 - handed to the controller, which raises it
            self._error = error
        self.call = None
        self._ready.release()


@contextlib.contextmanager
def suspended(
    entry: nn.Module,
    blocks: Sequence[nn.Module],
    batches: Sequence[Mapping[str, object]],
    *,
    grad: bool = False,
) -> Iterator[list[Frame]]:
    """Yield one frame per batch, each standing before its first block.

    `grad`: what the model computes between and behind the blocks can be differentiated.
    On leaving, frames are unwound and the blocks have their own forward again. Calls of blocks
    from other threads than the frames' run normally.
    """
    running = _Running()
    originals = [block.forward for block in blocks]

    def patched(index: int) -> Callable[..., object]:
        def forward(*args: Any, **kwargs: Any) -> object:
            frame = running.frame
            if frame is None or not frame.mine:
                return originals[index](*args, **kwargs)
            return frame.ask(Call(index, args, without_cache(kwargs)))

        return forward

    def runner(batch: Mapping[str, object]) -> Callable[[], object]:
        def run() -> object:
            with torch.set_grad_enabled(grad):
                return entry(**batch)

        return run

    frames: list[Frame] = []
    own = ["forward" in block.__dict__ for block in blocks]
    try:
        for index, block in enumerate(blocks):
            block.forward = patched(index)
        for batch in batches:
            frames.append(Frame(runner(batch), running))
            frames[-1].start()
        yield frames
    finally:
        for frame in frames:
            frame.close()
        for block, original, had in zip(blocks, originals, own, strict=True):
            if had:
                block.forward = original
            else:
                del block.forward


def trace_calls(
    entry: nn.Module,
    blocks: Sequence[nn.Module],
    batch: Mapping[str, object],
    *,
    run: Callable[[Call], object] | None = None,
) -> list[int]:
    """Return the block indices in the order one plain forward calls them.

    `run` answers the calls; None: the blocks do, where they are.
    """
    order: list[int] = []
    with suspended(entry, blocks, [batch]) as frames:
        frame = frames[0]
        while frame.call is not None:
            call = frame.call
            order.append(call.index)
            frame.resume(execute(blocks[call.index], call) if run is None else run(call))
    return order


def execute(block: Callable[..., object], call: Call, route: Route = Route()) -> object:  # noqa: B008 - frozen
    """Return the block's output for a call, with the weights it has."""
    with torch.no_grad():
        return route.run(block, call.args, call.kwargs)


def hidden(output: object) -> torch.Tensor:
    """Return the hidden state in a block's output: the tensor itself, or the first of several."""
    first = output[0] if isinstance(output, (tuple, list)) else output
    if not isinstance(first, torch.Tensor):
        msg = (
            f"a block returned {type(first).__name__}, not a tensor or a tuple that begins with one"
        )
        raise TunerError(msg)
    return first


def without_cache(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments without a key-value cache, which would remember earlier passes."""
    cached = {"past_key_values": None, "past_key_value": None, "use_cache": False}
    return {k: None if _is_cache(v) else cached.get(k, v) for k, v in kwargs.items()}


def _is_cache(value: object) -> bool:
    """Tell whether a value is one of Transformers' caches (some models name it otherwise)."""
    return any(c.__name__ in ("Cache", "EncoderDecoderCache") for c in type(value).__mro__)
