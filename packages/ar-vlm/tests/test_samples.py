from __future__ import annotations

import base64
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from ar_tuner.errors import TunerError
from ar_vlm import Message, Picture, Sample, VlmError, read_samples
from ar_vlm.testing import draw_picture


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(10):
        draw_picture(number)[0].save(tmp_path / f"{number}.png")
    return tmp_path


def saved(path: Path, *records: object) -> Path:
    path.write_text("\n".join(json.dumps(r) for r in records), encoding="utf-8")
    return path


def shape(sample: Sample) -> list[tuple[str, list[str]]]:
    """Roles and parts, images as the names of their files."""
    name = {str: str, Picture: lambda p: f"[{Path(p.source).name}]"}
    return [(m.role, [name[type(p)](p) for p in m.parts]) for m in sample.messages]


def test_messages_keep_images_and_texts_in_their_order(folder: Path) -> None:
    parts = [
        {"type": "image", "path": "0.png"},
        {"type": "text", "text": "and"},
        {"type": "image", "path": "1.png"},
        {"type": "text", "text": "differ?"},
    ]
    record = {
        "messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "yes"}]
    }
    (sample,) = read_samples(saved(folder / "a.jsonl", record))
    assert shape(sample) == [
        ("user", ["[0.png]", "and", "[1.png]", "differ?"]),
        ("assistant", ["yes"]),
    ]
    assert [i.size for i in sample.images()] == [draw_picture(n)[0].size for n in (0, 1)]


def test_llava_json_puts_images_where_the_text_says(folder: Path) -> None:
    said = [
        {"from": "human", "value": "<image>\nWhat is this?\n<image>"},
        {"from": "gpt", "value": "two"},
    ]
    (folder / "a.json").write_text(
        json.dumps([{"image": ["0.png", "1.png"], "conversations": said}])
    )
    (sample,) = read_samples(folder / "a.json")
    assert shape(sample) == [
        ("user", ["[0.png]", "What is this?", "[1.png]"]),
        ("assistant", ["two"]),
    ]


def test_an_image_that_no_text_speaks_of_comes_before_the_question(folder: Path) -> None:
    said = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "what?"}]
    (sample,) = read_samples([{"image": folder / "0.png", "messages": said}])
    assert shape(sample) == [("system", ["be brief"]), ("user", ["[0.png]", "what?"])]


def test_more_marks_than_images_are_an_error_that_names_the_record(folder: Path) -> None:
    said = [{"from": "human", "value": "<image> <image>"}]
    file = saved(folder / "a.jsonl", {"text": "fine"}, {"image": "0.png", "conversations": said})
    with pytest.raises(VlmError, match="record 2: the text speaks of more images than there are"):
        read_samples(file)


def test_a_mark_without_any_image_is_text() -> None:
    (sample,) = read_samples([{"messages": [{"role": "user", "content": "use the <image> tag"}]}])
    assert shape(sample) == [("user", ["use the <image> tag"])]


@pytest.mark.parametrize(
    "record",
    [
        {"image": "0.png", "question": "what?", "answer": "a circle"},
        {"image": {"path": "0.png"}, "prompt": "what?", "response": "a circle"},
    ],
    ids=["question", "prompt"],
)
def test_a_question_beside_an_image_is_a_chat(folder: Path, record: dict[str, object]) -> None:
    (sample,) = read_samples(saved(folder / "a.jsonl", record))
    assert shape(sample) == [("user", ["[0.png]", "what?"]), ("assistant", ["a circle"])]


def test_captions_and_plain_texts_are_samples(folder: Path) -> None:
    file = saved(folder / "a.jsonl", {"image": "0.png", "caption": "a dot"}, {"text": "only words"})
    caption, text = read_samples(file)
    assert shape(caption) == [("user", ["[0.png]"]), ("assistant", ["a dot"])]
    assert text == Sample(text="only words")


def test_a_folder_of_images_is_looked_in_first(folder: Path, tmp_path_factory) -> None:
    other = tmp_path_factory.mktemp("other")
    Image.new("RGB", (5, 5)).save(other / "0.png")
    file = saved(folder / "a.jsonl", {"image": "train/0.png", "caption": "x"})
    assert read_samples(file, images=other)[0].images()[0].size == (5, 5)
    assert read_samples(file)[0].images()[0].size == draw_picture(0)[0].size


def test_missing_images_are_told_together(folder: Path) -> None:
    file = saved(folder / "a.jsonl", *({"image": f"no{i}.png", "caption": "x"} for i in range(6)))
    with pytest.raises(
        VlmError, match="6 images are not there: .*no0.*no3.png', \\.\\.\\..*Looked in"
    ):
        read_samples(file)


def test_a_folder_that_is_not_there_is_an_error(folder: Path) -> None:
    with pytest.raises(VlmError, match="image folder .*nowhere' does not exist"):
        read_samples([{"text": "x"}], images=folder / "nowhere")


def test_addresses_are_not_fetched_unless_asked() -> None:
    record = {"image": "https://example.org/a.png", "caption": "x"}
    with pytest.raises(VlmError, match="is on the network: allow downloads"):
        read_samples([record])
    (sample,) = read_samples([record], allow_download=True)  # opened when its turn comes
    assert sample.pictures[0].source == "https://example.org/a.png"


def test_bytes_data_addresses_and_images_are_pictures(folder: Path) -> None:
    raw = (folder / "0.png").read_bytes()
    address = "data:image/png;base64," + base64.b64encode(raw).decode()
    held = Image.open(io.BytesIO(raw))
    values = [raw, {"bytes": raw, "path": None}, address, held, f"file://{folder / '0.png'}"]
    samples = read_samples([{"image": v, "caption": "x"} for v in values])
    pixels = {s.images()[0].tobytes() for s in samples}
    assert pixels == {draw_picture(0)[0].tobytes()}


def test_video_frames_are_images_evenly_spread(folder: Path) -> None:
    frames = [Image.new("RGB", (8, 8), (20 * i, 0, 0)) for i in range(12)]
    frames[0].save(folder / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    listed = [f"{i}.png" for i in range(10)]
    asked = [{"type": "video", "frames": listed}, {"type": "text", "text": "what happens?"}]
    chat, film, folded = read_samples(
        [
            {"messages": [{"role": "user", "content": asked}]},
            {"video": "a.webp", "question": "<video> what?", "answer": "red"},
            {"video": ".", "question": "what?", "answer": "dots"},
        ],
        images=folder,
    )
    assert [Path(p.source).name for p in chat.pictures] == [f"{i * 10 // 8}.png" for i in range(8)]
    assert [p.frame for p in film.pictures] == [i * 12 // 8 for i in range(8)]
    assert film.images()[7].getpixel((0, 0)) == (200, 0, 0)
    assert len(folded.pictures) == 8


def test_a_video_that_pillow_cannot_read_says_what_to_give(folder: Path) -> None:
    (folder / "a.mp4").write_bytes(b"x")
    with pytest.raises(VlmError, match="give its frames as images"):
        read_samples([{"video": "a.mp4", "question": "x", "answer": "y"}], images=folder)


def test_an_unreadable_image_is_named(folder: Path) -> None:
    (folder / "broken.png").write_bytes(b"no image")
    (sample,) = read_samples([{"image": "broken.png", "caption": "x"}], images=folder)
    with pytest.raises(VlmError, match="broken.png' cannot be read"):
        sample.images()


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"images_list": []}, "fields images_list is no sample"),
        (3, "data of type int is no sample"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "is not understood"),
        ({"messages": [{"content": "x"}]}, "needs a role"),
        ({"image": 3.5, "caption": "x"}, "float '3.5' is no image"),
    ],
    ids=["fields", "number", "part", "message", "image"],
)
def test_what_is_no_sample_is_an_error(record: object, said: str) -> None:
    with pytest.raises(VlmError, match=f"record 1: .*{said}"):
        read_samples([record])


def test_a_name_is_looked_up_on_a_hub_with_consent_only() -> None:
    with pytest.raises(TunerError, match="allow downloads"):
        read_samples("somebody/some-set")


def test_llavas_sets_are_read_from_the_hub_and_their_images_from_a_folder_first(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []
    said = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "dots"}]
    rows = [{"image": name, "conversations": said} for name in ("0.png", "far.jpg")]

    def load_dataset(path: str, **options: Any) -> list[Any]:
        asked.append((path, options["data_files"]))
        return rows

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(VlmError, match="allow downloads to fetch it and its images"):
        read_samples("llava")
    near, far = read_samples("llava_conv_58k", images=folder, allow_download=True)
    assert asked == [("liuhaotian/LLaVA-Instruct-150K", "conversation_58k.json")]
    assert near.pictures[0].source == folder / "0.png"
    assert far.pictures[0].source == "http://images.cocodataset.org/train2017/far.jpg"


def test_a_limit_stops_reading() -> None:
    assert len(read_samples(({"text": str(i)} for i in range(10**9)), limit=3)) == 3


def test_samples_pass_through() -> None:
    sample = Sample((Message("user", ("x",)),))
    assert read_samples([sample]) == [sample]
