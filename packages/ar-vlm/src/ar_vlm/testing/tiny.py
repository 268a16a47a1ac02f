"""A small random model of a family, a tokenizer trained on the spot, a processor: in a folder."""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ar_tuner.testing import tiny_model
from ar_vlm.testing.drawing import COLORS, NUMBERS, SHAPES, draw_picture
from ar_vlm.testing.families import FAMILIES

if TYPE_CHECKING:
    from ar_vlm.testing.family import Family

VOCABULARY = 320
"""Of `ar_tuner.testing`'s tiny models."""
_SPECIAL = 300
"""First of the special tokens where there is no tokenizer."""
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}MARK{% else %}{{ c['text'] }}{% endif %}{% endfor %}{{ '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def make_tiny(family: str, folder: str | Path, *, seed: int = 0) -> Path:
    """Write a small random model with tokenizer and processor into a folder, and return it.

    It takes no network and no file but those written. Where Transformers cannot save the processor
    without torchvision, its parts are saved.

    Args:
        family: one of `FAMILIES`.
        folder: made if it is not there.
        seed: of the weights.
    """
    folder, known = Path(folder), FAMILIES[family]
    tokenizer = make_tokenizer(known)
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in known.tokens.items()}
    model = make_model(family, ids=ids, seed=seed)
    model.save_pretrained(folder)
    _save_processor(family, known, tokenizer, folder)
    return folder


def make_model(family: str, *, ids: dict[str, int] | None = None, seed: int = 0) -> Any:
    """Return a small random model; `ids` are those of its special tokens, by their names."""
    import transformers

    known = FAMILIES[family]
    ids = {n: _SPECIAL + i for i, n in enumerate(known.tokens)} if ids is None else ids
    kind = known.kind or family
    named = _ids(transformers.CONFIG_MAPPING[kind], ids, known)
    return tiny_model(kind, seed=seed, **{**known.config, **named})


def make_tokenizer(family: Family) -> Any:
    """Return a byte-level tokenizer trained on what is said of drawn pictures."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE(unk_token=None))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    words = [*COLORS, *SHAPES, *NUMBERS, "user: what is in the image?", "assistant:"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 4,
        special_tokens=["<pad>", "<s>", "</s>", *dict.fromkeys(family.tokens.values())],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(words + [draw_picture(i)[1] for i in range(64)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",  # noqa: S106 - no password
        bos_token="<s>",  # noqa: S106
        eos_token="</s>",  # noqa: S106
        extra_special_tokens=family.tokens,
    )


def _ids(config: Any, ids: dict[str, int], family: Family) -> dict[str, int]:
    """Return the fields of a configuration that name special tokens."""
    fields = {f.name for f in dataclasses.fields(config)}
    named = {f"{n.removesuffix('_token')}_token_id": v for n, v in ids.items()}
    named |= {n.replace("_id", "_index"): v for n, v in named.items()}
    named |= {n.replace("_token_id", "_id"): v for n, v in named.items()}
    image = ids[family.image]
    named |= {"image_token_id": image, "image_token_index": image}
    return {name: value for name, value in named.items() if name in fields}


def _save_processor(kind: str, family: Family, tokenizer: Any, folder: Path) -> None:
    import transformers

    name, maker = family.parts or _part_names(kind, torchvision=family.torchvision)
    pictures = getattr(transformers, maker)(**family.pictures)
    template = TEMPLATE.replace("MARK", family.mark)
    found = getattr(transformers, name)
    whole = not getattr(found, "is_dummy", False)
    known = inspect.signature(found.__init__).parameters if whole else family.processor
    given = {**family.tokens, **family.processor}
    options = {name: value for name, value in given.items() if name in known}
    if not whole or set(found.get_attributes()) - {"image_processor", "tokenizer"}:
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
        pictures.save_pretrained(folder)
        settings = json.dumps({"processor_class": name, **options}, indent=2)
        (folder / "processor_config.json").write_text(settings, encoding="utf-8")
        return
    processor = found(
        image_processor=pictures, tokenizer=tokenizer, chat_template=template, **options
    )
    processor.save_pretrained(folder)


def _part_names(kind: str, *, torchvision: bool) -> tuple[str, str]:
    """Return the names of the classes of a type's processor and image processor."""
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    names: Any = IMAGE_PROCESSOR_MAPPING_NAMES.get(kind)
    names = IMAGE_PROCESSOR_MAPPING_NAMES[kind.removesuffix("_moe")] if names is None else names
    name: Any = PROCESSOR_MAPPING_NAMES[kind]
    return name, names["torchvision" if torchvision else "pil"]
