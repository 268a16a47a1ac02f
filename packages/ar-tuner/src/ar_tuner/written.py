"""What `quantize_and_save` returns: the directory, and the model when it is asked for."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from torch import nn

    from ar_tuner.residence import Residence


class Written:
    """A finished checkpoint. Unpacks as (model, directory).

    Args:
        path: its directory.
        model: the model, perhaps with blocks away.
        residence: what brings them back.
        release: called when nothing can ask for the blocks any more.
    """

    def __init__(
        self, path: Path, model: nn.Module, residence: Residence, release: Callable[[], None]
    ) -> None:
        self.path = path
        self._model = model
        self._residence = residence
        self._whole = False
        self._release = weakref.finalize(self, release)

    @property
    def model(self) -> nn.Module:
        """The model with the dequantized weights; blocks that are on disk are read back."""
        self.bring_back()
        return self._model

    def bring_back(self) -> None:
        """Read back what is on disk; a second call does nothing."""
        if not self._whole:
            self._residence.whole()
            self._whole = True
            self._release()

    def __iter__(self) -> Iterator[Any]:
        yield self.model
        yield self.path

    def __getitem__(self, index: int) -> Any:
        return (lambda: self.model, lambda: self.path)[index]()

    def __len__(self) -> int:
        return 2
