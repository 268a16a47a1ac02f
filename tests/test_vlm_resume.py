"""Runs calibrated with images that are killed and taken up again give what an unbroken one does."""

from __future__ import annotations

import multiprocessing
import os
import signal
from typing import TYPE_CHECKING, Any

import pytest

from ar_tuner import AutoRound, TunerError, events
from ar_vlm import read_samples
from ar_vlm.testing import make_tiny, write_samples

if TYPE_CHECKING:
    from pathlib import Path

OPTIONS: dict[str, Any] = {
    **{"scheme": "W4A16", "group_size": 32, "iters": 3, "nsamples": 4, "seqlen": 48},
    **{"batch_size": 2, "algorithm": "signround", "calibration": "image"},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("qwen3_vl", tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_samples(tmp_path_factory.mktemp("samples"), 4)


def killed(source: Path, out: Path, finished: int, **options: Any) -> int:
    """Run in a process that is killed after so many blocks; return how it ended."""
    started: list[int] = []

    def stop(event: Any) -> None:
        if isinstance(event, events.BlockStarted):
            started.append(event.index)
        if len(started) > finished:
            os.kill(os.getpid(), signal.SIGKILL)

    def run() -> None:
        AutoRound(source, on_event=stop, **OPTIONS, **options).quantize_and_save(out)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(timeout=120)
    return process.exitcode or 0


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


@pytest.mark.parametrize(
    ("whole", "finished"),
    [(False, 2), (True, 1), (True, 6)],
    ids=["decoder", "tower", "decoder after the tower"],
)
def test_a_killed_run_with_images_goes_on_to_the_same_files(
    whole, finished, source, pictures, tmp_path
) -> None:
    options = {"dataset": pictures, "quant_nontext_module": whole}
    AutoRound(source, **OPTIONS, **options).quantize_and_save(tmp_path / "whole")
    assert killed(source, tmp_path / "out", finished, **options) == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    seen: list[Any] = []
    again = AutoRound(source, resume=True, on_event=seen.append, **OPTIONS, **options)
    again.quantize_and_save(tmp_path / "out")
    assert next(e for e in seen if isinstance(e, events.RunStarted)).resumed_blocks == finished
    one, other = files(tmp_path / "whole"), files(tmp_path / "out")
    assert "model.safetensors" in one
    assert {n for n in one.keys() | other.keys() if one.get(n) != other.get(n)} == set()


def test_a_run_does_not_go_on_with_other_pictures(source, pictures, tmp_path) -> None:
    assert killed(source, tmp_path / "out", 1, dataset=read_samples(pictures)) == -signal.SIGKILL
    others = read_samples(write_samples(tmp_path / "others", 4, first=50))
    chats = [
        type(a)(messages=(*b.messages[:-1], *a.messages[-1:]))
        for a, b in zip(read_samples(pictures), others, strict=True)
    ]
    with pytest.raises(TunerError, match="calibration differ"):
        AutoRound(source, dataset=chats, resume=True, **OPTIONS).quantize_and_save(tmp_path / "out")
