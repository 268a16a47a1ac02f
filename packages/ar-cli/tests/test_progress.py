from __future__ import annotations

import io

import pytest

from ar_cli.output import duration, print_table, size
from ar_cli.progress import Progress, describe

events = pytest.importorskip("ar_tuner.events")

STARTED = events.RunStarted("out.run", 4, 28, {}, 1)
DONE = events.BlockDone(0, 4, "b", 0.01, 0.004, 12.0, 2_000_000_000, 40.0)
STEP = events.BlockProgress(1, 4, "c", 20, 200, 0.5)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_elsewhere_every_block_is_one_line() -> None:
    stream = io.StringIO()
    listen = Progress(stream)
    for event in (STARTED, DONE, STEP):
        listen(event)
    assert stream.getvalue().splitlines() == [
        "28 layers in 4 blocks, 1 already done; log and finished blocks in out.run",
        "block 1/4  loss 0.01 -> 0.004  12 s  peak 2.00 GB  left 40 s",
    ]


def test_on_a_terminal_steps_show_the_time_left_and_are_wiped() -> None:
    stream = Terminal()
    listen = Progress(stream)
    for event in (DONE, STEP, DONE):
        listen(event)
    text = stream.getvalue()
    assert "block 2/4  step 20/200  loss 0.5  about 40 s left" in text
    assert "\r" in text


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (events.Note("warning", "look"), "warning: look"),
        (events.Note("info", "look"), "look"),
        (events.CalibrationReady(8, 512, 0.1), "calibration: 8 rows, 512 tokens"),
        (events.BlockStarted(0, 4, "b"), None),
        (events.RunStarted("", 1, 2, {}, 0), "2 layers in 1 blocks"),
        (
            events.BlockDone(0, 1, "b", None, None, 0.5, 10**9, 0.0),
            "block 1/1  0.5 s  peak 1.00 GB",
        ),
    ],
)
def test_an_event_is_worth_a_line_or_none(event, line) -> None:
    assert describe(event) == line


@pytest.mark.parametrize(
    ("number", "text"), [(12, "12 B"), (1500, "1.50 kB"), (3e9, "3.00 GB"), (5e13, "50.00 TB")]
)
def test_sizes_are_for_people(number, text) -> None:
    assert size(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(1.23, "1.2 s"), (42, "42 s"), (600, "10 min"), (9000, "2.5 h")]
)
def test_durations_are_for_people(seconds, text) -> None:
    assert duration(seconds) == text


def test_columns_of_numbers_are_flush_right(capsys) -> None:
    print_table(("name", "n"), [("a", 1), ("bb", 100)])
    assert capsys.readouterr().out == "name    n\n----  ---\na       1\nbb    100\n"
