from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers

from ar_tuner import AutoRound
from ar_tuner.adapters import GenericAdapter
from ar_tuner.blocks import find_blocks
from ar_tuner.errors import TunerError
from ar_tuner.imagery import Asked
from ar_tuner.loading import load_model
from ar_tuner.others import fitted, samples_of
from ar_tuner.rows import RowBank
from ar_tuner.walk import execute, hidden, suspended
from ar_vlm import Inputs, VlmError, read_samples
from ar_vlm.adapter import VisionLanguageAdapter
from ar_vlm.calibration import Data, ImageCalibration, shows
from ar_vlm.testing import FAMILIES, draw_picture

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from ar_vlm import Sample

SIZES = {"nsamples": 8, "seqlen": 64, "batch_size": 4, "iters": 6}
SIZES |= {"group_size": 32, "calibration": "image"}


def quantized(folder: Path | Any, dataset: Any, **options: Any) -> tuple[Any, Any, list[Any]]:
    """Return (model, plan, events) of a quantization in memory."""
    seen: list[Any] = []
    settings = {**SIZES, "scheme": "W4A16", "distill": False, **options}
    made = AutoRound(folder, dataset=dataset, on_event=seen.append, **settings)
    model, plan = made.quantize()
    return model, plan, seen


def opened(folder: Path) -> Any:
    model, _ = load_model(folder, dtype="float32", trust_remote_code=False)
    return model.eval()


def losses(seen: list[Any]) -> dict[str, tuple[float, float]]:
    return {e.name: (e.loss_before, e.loss_after) for e in seen if e.kind == "block_done"}


def notes(seen: list[Any], level: str) -> list[str]:
    return [e.text for e in seen if e.kind == "note" and e.level == level]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_walk_with_images_is_the_models_own_forward(
    family: str, tiny: Callable[[str], Path], samples: list[Sample]
) -> None:
    """Towers, projectors and decoder blocks are stopped at; text and images go side by side."""
    model = opened(tiny(family))
    inputs = Inputs.from_pretrained(tiny(family))
    adapter = VisionLanguageAdapter(family, asked=Asked(nontext=True))
    blocks = [b.module for b in find_blocks(model, adapter).blocks]
    shown = [inputs.build(sample) for sample in (*samples[2:4], read_samples(["red square"])[0])]
    batches = fitted(shown, model, None)
    with torch.no_grad():
        plain = [model(**batch).logits for batch in batches]
    called = set()
    with suspended(model, blocks, batches) as frames:
        while any(frame.call is not None for frame in frames):
            for frame in frames:
                if (call := frame.call) is not None:
                    called.add(call.index)
                    frame.resume(execute(blocks[call.index], call))
        walked = [frame.output.logits for frame in frames]
    assert called == set(range(len(blocks)))
    assert all(torch.equal(a, b) for a, b in zip(plain, walked, strict=True))


@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen2_5_vl", "qwen3_vl", "mllama"])
def test_no_block_loses_more_than_rounding_to_nearest_with_images(
    family: str, tiny: Callable[[str], Path], samples_file: Path
) -> None:
    _, plan, seen = quantized(tiny(family), samples_file, calibration="mixed")
    found = losses(seen)
    assert len(found) == 4
    assert all(after <= before for before, after in found.values())
    assert sum(after < 0.9 * before for before, after in found.values()) == 4
    assert {r.layer.block for r in plan.quantized} == set(found)
    ready = [e for e in seen if e.kind == "calibration_ready"]
    assert [source for e in ready for source in e.sources] == [("default", 6), ("images", 2)]


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "mllama", "mistral3"])
def test_towers_and_projectors_are_tuned_in_the_same_walk(
    family: str, tiny: Callable[[str], Path], samples_file: Path
) -> None:
    _, plan, seen = quantized(tiny(family), samples_file, quant_nontext_module=True)
    found = losses(seen)
    assert all(after <= before for before, after in found.values())
    sight = [name for name in found if "language_model" not in name]
    assert any(".layers." in name or ".blocks." in name for name in sight)
    assert any("projector" in name or "merger" in name for name in sight)
    assert {r.layer.block for r in plan.quantized} == set(found)


@pytest.mark.parametrize("family", ["llava", "mllama"])
def test_the_default_recipe_learns_from_images_too(
    family: str, tiny: Callable[[str], Path], samples_file: Path, samples: list[Sample]
) -> None:
    inputs = Inputs.from_pretrained(tiny(family))
    batches = [inputs.build(sample) for sample in samples[12:]]
    model = transformers.AutoModelForImageTextToText.from_pretrained(tiny(family)).eval()

    def error(**options: Any) -> float:
        made, _, seen = quantized(tiny(family), samples_file, bits=2, nsamples=12, **options)
        stages = [e for e in seen if e.kind == "stage_done"]
        assert all(e.loss_after <= e.loss_before for e in stages)
        assert bool(stages) == bool(options.get("distill"))
        with torch.no_grad():
            gaps = [made(**b).logits - model(**b).logits for b in batches]
        return sum(float(gap.square().mean()) for gap in gaps)

    assert error(distill=True, iters=20) < error(recipe="rtn", iters=0)


def test_two_runs_with_images_give_the_same_bits(
    tiny: Callable[[str], Path], samples_file: Path
) -> None:
    one, other = (
        quantized(tiny("qwen2_vl"), samples_file, distill=True, calibration="mixed")[0]
        for _ in range(2)
    )
    state = other.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in one.state_dict().items())


def test_attention_to_images_is_quantized_when_there_are_some(
    tiny: Callable[[str], Path], samples_file: Path
) -> None:
    def reasons(**options: Any) -> set[str]:
        made = AutoRound(tiny("mllama"), group_size=32, **options).plan()
        block = "model.language_model.layers.1"
        return {r.reason for r in made.rows if r.layer.block == block and not r.quantized}

    assert all("no image samples were given" in reason for reason in reasons())
    assert reasons()
    assert not reasons(dataset=samples_file)


def test_layers_that_text_does_not_reach_ask_for_images(tiny: Callable[[str], Path]) -> None:
    rows = torch.randint(30, 300, (8, 32), generator=torch.Generator().manual_seed(0))
    told = "text alone does not reach 14 layers.*needs samples with images.*calibration 'text'"
    with pytest.raises(VlmError, match=told):
        quantized(tiny("llava"), rows, quant_nontext_module=True, calibration=None)


def test_layers_that_text_does_not_reach_are_rounded_where_that_is_asked_for() -> None:
    adapter = VisionLanguageAdapter(asked=Asked(calibration="text"))
    seen: list[tuple[str, str]] = []
    adapter.check_reached(["a.b"], lambda level, text: seen.append((level, text)))
    assert seen[0][0] == "warning"
    assert "does not reach 1 layers to be quantized (a.b)" in seen[0][1]
    adapter.check_reached([], lambda level, text: seen.append((level, text)))
    assert len(seen) == 1


def test_a_given_model_takes_its_processor(
    tiny: Callable[[str], Path], samples: list[Sample]
) -> None:
    model = transformers.AutoModelForImageTextToText.from_pretrained(tiny("llava"))
    with pytest.raises(VlmError, match=r"needs its processor.*AutoRound\(processor=\.\.\.\)"):
        quantized(model, samples)
    processor = transformers.AutoProcessor.from_pretrained(tiny("llava"))
    _, _, seen = quantized(model, samples, processor=processor)
    assert all(after <= before for before, after in losses(seen).values())


def test_a_function_makes_the_inputs(tiny: Callable[[str], Path], samples: list[Sample]) -> None:
    inputs = Inputs.from_pretrained(tiny("llava"))
    met: list[Sample] = []

    def make(sample: Sample) -> dict[str, torch.Tensor]:
        met.append(sample)
        return inputs.build(sample)

    quantized(tiny("llava"), samples, processor=make, recipe="fast")
    assert len(met) == SIZES["nsamples"]


def test_short_samples_are_not_left_out(tiny: Callable[[str], Path]) -> None:
    records = [
        {"image": draw_picture(i)[0], "question": "what?", "answer": "x" * (1 + i)}
        for i in range(8)
    ]
    _, _, seen = quantized(tiny("llava"), records, seqlen=256, recipe="fast")
    ready = next(e for e in seen if e.kind == "calibration_ready")
    assert ready.sources == (("images", 8),)
    assert not notes(seen, "warning")


def test_fewer_samples_than_asked_for_are_told(
    tiny: Callable[[str], Path], samples: list[Sample]
) -> None:
    _, _, seen = quantized(tiny("llava"), samples[:3], nsamples=8, recipe="fast")
    assert any(
        "3 samples with images, fewer than the 8 asked for" in t for t in notes(seen, "warning")
    )


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"calibration": "image"}, "calibration 'image' needs samples with images"),
        ({"calibration": "text", "dataset": [{"image": "a", "caption": "x"}]}, "shows images"),
        ({"calibration": "mixed", "dataset": [{"image": "a", "caption": "x"}]}, "'image'"),
    ],
    ids=["none", "text", "demanded"],
)
def test_a_wish_that_contradicts_the_data_is_refused(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(VlmError, match=said):
        ImageCalibration.of(Asked(**asked), demanded=True, kind="blip-2")


def test_models_that_demand_images_get_nothing_else(samples_file: Path) -> None:
    asked = Asked(dataset=str(samples_file))
    made = ImageCalibration.of(asked, demanded=True, kind="blip-2")
    assert made is not None
    assert made.share(8) == 8
    mixed = ImageCalibration.of(asked, demanded=False, kind="llava")
    assert mixed is not None
    assert (mixed.share(8), mixed.share(2)) == (2, 1)
    assert ImageCalibration.of(Asked(), demanded=True, kind="blip-2") is None


def test_sets_are_told_apart_by_what_they_show(samples_file: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "words"}))
    both = Data.of(f"{text}:num=3,{samples_file}:num=5")
    assert [r.name for r in both.shown] == [str(samples_file)]
    assert [(r.name, r.num) for r in both.text] == [(str(text), 3)]
    assert Data.of(str(text)) == Data(str(text))
    assert Data.of(samples_file).text is None
    assert Data.of(None) == Data()
    records = [{"text": "words"}, {"image": "a.png", "caption": "x"}]
    assert Data.of(records) == Data([records[0]], (records[1],))
    assert Data.of("pile-10k", unknown=True).shown == ()
    assert [r.name for r in Data.of("llava").shown] == ["llava"]
    assert Data.of("somebody/some-set").shown == ()
    assert [r.name for r in Data.of("somebody/some-set", unknown=True).shown] == [
        "somebody/some-set"
    ]


def test_the_rows_of_a_set_are_as_many_as_it_says(
    tiny: Callable[[str], Path], samples_file: Path
) -> None:
    _, _, seen = quantized(tiny("llava"), f"{samples_file}:num=2", recipe="fast")
    ready = next(e for e in seen if e.kind == "calibration_ready")
    assert ready.sources == (("images", 2),)


@pytest.mark.parametrize(
    ("record", "answer"),
    [
        ({"image": "a.png", "conversations": []}, True),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, True),
        ([{"role": "user", "content": [{"type": "video", "frames": []}]}], True),
        ({"messages": [{"role": "user", "content": "<image> is a tag"}]}, False),
        ("text", False),
        (torch.ones(3), False),
    ],
)
def test_a_record_shows_images_or_not(record: Any, answer: bool) -> None:  # noqa: FBT001
    assert shows(record) is answer


def test_images_for_a_model_without_eyes_are_refused(samples_file: Path) -> None:
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config)
    told = "calibration, quant_nontext_module: model type 'llama' is not known to see images"
    with pytest.raises(TunerError, match=told):
        AutoRound(
            model, dataset=samples_file, calibration="image", quant_nontext_module=True
        ).plan()


def test_blocks_outside_the_decoder_are_left_alone_by_default(tiny: Callable[[str], Path]) -> None:
    model = transformers.AutoModelForImageTextToText.from_pretrained(tiny("llava"))
    assert find_blocks(model, VisionLanguageAdapter()) == find_blocks(model, GenericAdapter())


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_drawn_in_any_order_keep_their_images(
    family: str, tiny: Callable[[str], Path], samples: list[Sample]
) -> None:
    """What a block gives for rows of joined samples is what it gave for them before."""
    model = opened(tiny(family))
    built = list(Inputs.from_pretrained(tiny(family)).batches(samples[:8], size=4))
    batches = fitted(built, model, None)
    adapter = VisionLanguageAdapter(family, asked=Asked(nontext=True))
    blocks = [b.module for b in find_blocks(model, adapter).blocks]
    counts = [samples_of(batch) for batch in batches]
    draw = torch.Generator().manual_seed(0)
    with suspended(model, blocks, batches) as frames:
        while (call := frames[0].call) is not None:
            block = blocks[call.index]
            outputs = [execute(block, frame.call) for frame in frames]
            states = [hidden(output) for output in outputs]
            sizes = [n if len(s) == n else 1 for s, n in zip(states, counts, strict=True)]
            reference = [
                r for s, n in zip(states, counts, strict=True) for r in (s if len(s) == n else [s])
            ]
            bank = RowBank.of([frame.call for frame in frames], sizes)
            for rows in bank._deal(4, draw, frozenset()):
                args, kwargs = bank.take(rows)
                with torch.no_grad():
                    given = hidden(block(*args, **kwargs))
                wanted = torch.stack([reference[r] for r in rows]).reshape(given.shape)
                torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-4)
            for frame, output in zip(frames, outputs, strict=True):
                frame.resume(output)
