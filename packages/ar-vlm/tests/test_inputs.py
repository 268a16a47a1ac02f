from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers

from ar_tuner.loading import load_model
from ar_tuner.others import fitted, joined
from ar_vlm import Inputs, Message, Sample, VlmError, load_processor, read_samples
from ar_vlm.inputs import processors
from ar_vlm.inputs.expand import Pair
from ar_vlm.inputs.text import rendered
from ar_vlm.testing import FAMILIES, draw_picture

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

WHOLE = ["llava", "gemma3", "mllama", "idefics3"]
"""Families whose processor loads here as it is."""


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_takes_what_is_built(
    family: str, tiny: Callable[[str], Path], samples: list[Sample]
) -> None:
    model, _ = load_model(tiny(family), dtype="float32", trust_remote_code=False)
    inputs = Inputs.from_pretrained(tiny(family))
    for sample in samples[:4]:  # the last holds two images
        built = inputs.built(sample)
        assert built.way == "chat"
        assert built.seen
        with torch.no_grad():
            logits = model.eval()(**fitted([built.inputs], model, None)[0]).logits
        assert logits.shape[:2] == (1, built.tokens)
        assert torch.isfinite(logits).all()


@pytest.mark.parametrize("family", WHOLE)
def test_inputs_are_those_of_the_processor(
    family: str, tiny: Callable[[str], Path], samples: list[Sample]
) -> None:
    processor = transformers.AutoProcessor.from_pretrained(tiny(family))
    chat = samples[3].chat()
    images = iter(samples[3].images())
    for part in (p for m in chat for p in m["content"] if p["type"] == "image"):
        part["image"] = next(images)
    expected = processor.apply_chat_template(
        chat, tokenize=True, return_dict=True, return_tensors="pt"
    )
    built = Inputs.from_pretrained(tiny(family)).build(samples[3])
    assert built.keys() == expected.keys()
    assert all(torch.equal(built[k], expected[k]) for k in expected)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "glm4v"])
def test_our_expansion_is_that_of_the_processor(
    family: str, tiny: Callable[[str], Path], samples: list[Sample]
) -> None:
    ours = Inputs(processors._pair(tiny(family), trust=False)).build(samples[3])
    theirs = Inputs(processors._bare(tiny(family), trust=False)).build(samples[3])
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_rows_of_an_image_are_marked_where_the_tokenizer_has_marks(
    tiny: Callable[[str], Path], samples: list[Sample]
) -> None:
    pair = load_processor(tiny("mistral3"))
    assert isinstance(pair, Pair)
    text, _ = rendered(samples[0], pair)
    ids = pair(text=[text], images=samples[0].images())["input_ids"][0]
    tokens = pair.tokenizer.convert_ids_to_tokens(ids)
    marks = [t for t in tokens if t.startswith("[IMG")]
    assert marks == ["[IMG]", "[IMG]", "[IMG_BREAK]", "[IMG]", "[IMG]", "[IMG_END]"]


def test_a_folder_without_a_processor_says_why_each_way_failed(tmp_path: Path) -> None:
    transformers.LlavaConfig().save_pretrained(tmp_path)
    with pytest.raises(
        VlmError, match="processor: .*processor without video: .*parts: .*processor="
    ):
        load_processor(tmp_path)


def test_samples_without_images_become_ids_alone(tiny: Callable[[str], Path]) -> None:
    inputs = Inputs.from_pretrained(tiny("llava"))
    chat, text = read_samples(
        [{"messages": [{"role": "user", "content": "one red circle"}]}, {"text": "two squares"}]
    )
    decode = inputs.processor.tokenizer.decode
    assert inputs.build(chat).keys() == inputs.build(text).keys() == {"input_ids"}
    assert decode(inputs.build(chat)["input_ids"][0]) == "user: one red circle\nassistant:"
    assert decode(inputs.build(text)["input_ids"][0]) == "two squares"
    assert not inputs.built(chat).seen


def test_long_texts_are_cut_and_images_are_not(
    tiny: Callable[[str], Path], samples: list[Sample]
) -> None:
    whole = Inputs.from_pretrained(tiny("mllama")).build(samples[3])
    length = whole["input_ids"].shape[1]
    cut = Inputs.from_pretrained(tiny("mllama"), seqlen=length - 5).built(samples[3])
    assert (cut.tokens, cut.cut) == (length - 5, 5)
    assert cut.inputs["cross_attention_mask"].shape[1] == length - 5
    assert torch.equal(cut.inputs["pixel_values"], whole["pixel_values"])
    short = Inputs.from_pretrained(tiny("llava"), seqlen=4)
    built = short.built(samples[3])
    mark = short.processor.tokenizer.convert_tokens_to_ids("<image>")
    features = int((Inputs(short.processor).build(samples[3])["input_ids"] == mark).sum())
    assert int((built.inputs["input_ids"] == mark).sum()) == features
    assert built.cut > 0


def test_batches_hold_samples_of_equal_shapes(
    tiny: Callable[[str], Path], samples: list[Sample]
) -> None:
    inputs = Inputs.from_pretrained(tiny("qwen2_5_vl"))
    batches = list(inputs.batches(samples, size=3))
    rows = [b["input_ids"].shape[0] for b in batches]
    assert sum(rows) == len(samples)
    assert 1 < max(rows) <= 3
    singles = {tuple(inputs.build(s)["input_ids"][0].tolist()) for s in samples}
    assert {tuple(row.tolist()) for b in batches for row in b["input_ids"]} == singles
    model = transformers.AutoModelForImageTextToText.from_pretrained(tiny("qwen2_5_vl")).eval()
    batch = next(b for b in batches if b["input_ids"].shape[0] > 1)
    one = next(
        built
        for s in samples
        if torch.equal((built := inputs.build(s))["input_ids"][0], batch["input_ids"][1])
    )
    with torch.no_grad():
        together, alone = model(**batch).logits[1], model(**one).logits[0]
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


def test_a_function_of_the_user_makes_the_inputs() -> None:
    def made(sample: Sample) -> dict[str, Any]:
        return {"input_ids": torch.tensor([[3, 4, 5]]), "seen": torch.ones(1, 2), "note": "x"}

    inputs = Inputs.from_pretrained("nowhere", processor=made)
    built = inputs.built(Sample(text="x"))
    assert built.inputs.keys() == {"input_ids", "seen"}
    assert built.way == "given"
    wrong = Inputs.from_pretrained("nowhere", processor=lambda sample: {"ids": torch.ones(3)})
    with pytest.raises(VlmError, match=r"must hold input_ids \[1, T\]"):
        wrong.build(Sample(text="x"))


class Plain:
    """A processor whose chat template is a text or nothing."""

    image_token = "<image>"
    chat_template = None

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer


def pictured(*texts: str) -> Sample:
    (sample,) = read_samples(
        [{"image": draw_picture(0)[0], "messages": [{"role": "user", "content": t} for t in texts]}]
    )
    return sample


@pytest.mark.parametrize(
    ("template", "text", "way"),
    [
        (None, "user: <image>what?", "untemplated"),
        ("{% for m in messages %}[{{ m['content'] }}]{% endfor %}", "[<image>what?]", "chat"),
        ("{{ raise_exception('no') }}", "user: <image>what?", "refused"),
        ("{% for m in messages %}no image{% endfor %}", "user: <image>what?", "refused"),
    ],
    ids=["none", "string-contents", "refuses", "loses-images"],
)
def test_a_template_that_does_not_take_parts_is_worked_around(
    template: str | None, text: str, way: str, tiny: Callable[[str], Path]
) -> None:
    processor = Plain(transformers.AutoTokenizer.from_pretrained(tiny("llava")))
    processor.tokenizer.chat_template = template
    assert rendered(pictured("what?"), processor) == (text, way)


def test_what_the_processor_does_not_take_is_an_error_with_its_reason(
    tiny: Callable[[str], Path],
) -> None:
    inputs = Inputs.from_pretrained(tiny("qwen2_vl"))
    inputs.processor.image_processor.size = {"shortest_edge": 1, "longest_edge": 0}
    with pytest.raises(VlmError, match="1 images is not taken by the processor: "):
        inputs.build(pictured("what?"))


def test_inputs_of_different_keys_are_not_joined() -> None:
    one, other = (
        {"input_ids": torch.ones(1, 3)},
        {"input_ids": torch.ones(1, 3), "x": torch.ones(1)},
    )
    assert [b["input_ids"].shape[0] for b in joined([one, other, one], size=8)] == [2, 1]


def test_an_empty_sample_is_an_error(tiny: Callable[[str], Path]) -> None:
    with pytest.raises(VlmError, match="a sample of 0 tokens is empty"):
        Inputs.from_pretrained(tiny("llava")).build(Sample((Message("user", ()),) * 0, ""))
