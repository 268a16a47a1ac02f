"""A small random model of a family, a tokenizer trained on the spot, a processor: in a folder."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ar_vlm.testing.drawing import COLORS, NUMBERS, SHAPES, draw_picture
from ar_vlm.testing.families import FAMILIES

if TYPE_CHECKING:
    from ar_vlm.testing.families import Family

VOCABULARY = 352
TEXT = {
    **{"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
    **{"vocab_size": VOCABULARY, "max_position_embeddings": 512, "sliding_window": 8},
    **{"moe_intermediate_size": 32, "num_experts": 4, "num_local_experts": 4},
    **{"num_experts_per_tok": 2, "query_pre_attn_scalar": 16},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
VISION = {
    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "depth": 2},
    **{"num_attention_heads": 2, "num_heads": 2, "num_key_value_heads": 2, "head_dim": 16},
    **{"attention_heads": 2, "out_hidden_size": 64, "projection_dim": 64},
    **{"num_position_embeddings": 64, "vision_output_dim": 64},
}
_EYES = re.compile("vision|image|vq")
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
    from transformers.models.auto import modeling_auto

    known = FAMILIES[family]
    ids = {n: 340 + i for i, n in enumerate(known.tokens)} if ids is None else ids
    found = transformers.CONFIG_MAPPING[family]
    options = _merged(_small(found, TEXT), known.config)
    config = found(**{**options, **_ids(found, ids, known)})
    torch.manual_seed(seed)
    name = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[family]
    model: Any = getattr(transformers, name)(config).float().eval()
    for parameter in model.parameters():  # some are left empty, gates are left at zero
        if not torch.isfinite(parameter).all() or parameter.ndim > 2 or not parameter.any():  # noqa: PLR2004
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def make_tokenizer(family: Family) -> Any:
    """Return a byte-level tokenizer trained on what is said of drawn pictures."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE(unk_token=None))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    words = [*COLORS, *SHAPES, *NUMBERS, "user: what is in the image?", "assistant:"]
    trainer = trainers.BpeTrainer(
        vocab_size=330,
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


def _small(config: Any, sizes: dict[str, Any]) -> dict[str, Any]:
    """Return small sizes for the fields that a configuration class has."""
    fields = {f.name: f.default for f in dataclasses.fields(config)}
    out = {k: v for k, v in sizes.items() if k in fields and not isinstance(fields[k], (str, list))}
    import transformers

    for name, spec in (getattr(config, "sub_configs_defaults", None) or {}).items():
        kind = spec.model_type
        inner = transformers.CONFIG_MAPPING[kind] if kind else spec.config_class
        if dataclasses.is_dataclass(inner):
            made = _small(inner, VISION if _EYES.search(name) else TEXT)
            own = {"model_type": getattr(inner, "model_type", kind)}
            out[name] = {**(spec.init_kwargs or {}), **made, **own}
    return out


def _merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    both = {**first, **second}
    for name in first.keys() & second.keys():
        if isinstance(first[name], dict) and isinstance(second[name], dict):
            both[name] = _merged(first[name], second[name])
    return both


def _ids(config: Any, ids: dict[str, int], family: Family) -> dict[str, int]:
    """Return the fields of a configuration that name special tokens."""
    fields = {f.name for f in dataclasses.fields(config)}
    named = {f"{n.removesuffix('_token')}_token_id": v for n, v in ids.items()}
    named |= {n.replace("_id", "_index"): v for n, v in named.items()}
    image = ids[family.image]
    named |= {"image_token_id": image, "image_token_index": image}
    return {name: value for name, value in named.items() if name in fields}


def _save_processor(kind: str, family: Family, tokenizer: Any, folder: Path) -> None:
    import transformers
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    names: Any = IMAGE_PROCESSOR_MAPPING_NAMES.get(kind)
    names = IMAGE_PROCESSOR_MAPPING_NAMES[kind.removesuffix("_moe")] if names is None else names
    pictures = getattr(transformers, names["pil"])(**family.pictures)
    template = TEMPLATE.replace("MARK", family.mark)
    name: Any = PROCESSOR_MAPPING_NAMES[kind]
    found = getattr(transformers, name)
    whole = not getattr(found, "is_dummy", False)
    known = inspect.signature(found.__init__).parameters if whole else family.processor
    given = {**family.tokens, **family.processor}
    options = {name: value for name, value in given.items() if name in known}
    if not whole or "video_processor" in found.get_attributes():  # needs torchvision
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
