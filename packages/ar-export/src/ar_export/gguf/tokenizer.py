"""A tokenizer as GGUF keys, from the files that Transformers keeps beside a model.

Byte-level BPE (`gpt2` there) and BPE with byte fallback (`llama` there) come from tokenizer.json,
SentencePiece from tokenizer.model where the sentencepiece package is installed.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from ar_export.errors import ExportError
from ar_export.gguf.pretokenizer import pretokenizer

if TYPE_CHECKING:
    from pathlib import Path

    import gguf

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_ADDED_SCORE, _PAD_SCORE = -1000.0, -10000.0


def write_tokenizer(
    writer: gguf.GGUFWriter, folder: Path, *, vocab_size: int, architecture: str
) -> None:
    """Add the tokenizer in a folder to a GGUF file.

    Args:
        writer: takes the keys.
        folder: directory with tokenizer.json or tokenizer.model.
        vocab_size: rows of the embedding; the list of tokens is padded to it.
        architecture: name of the GGUF architecture.

    Raises:
        ExportError: no tokenizer there, or of a kind that llama.cpp does not know.
    """
    path = folder / "tokenizer.json"
    if path.is_file():
        document = json.loads(path.read_text(encoding="utf-8"))
        _from_json(writer, folder, document, vocab_size, architecture)
    elif (folder / "tokenizer.model").is_file():
        _from_sentencepiece(writer, folder, vocab_size)
    else:
        msg = (
            f"{folder}: no tokenizer.json and no tokenizer.model; a GGUF file holds its tokenizer, "
            "so put the model's tokenizer files beside it"
        )
        raise ExportError(msg)
    _specials(writer, folder)


def _from_json(
    writer: gguf.GGUFWriter,
    folder: Path,
    document: dict[str, Any],
    vocab_size: int,
    architecture: str,
) -> None:
    model = document.get("model") or {}
    if model.get("type") != "BPE":
        msg = f"{folder}: a {model.get('type')} tokenizer; llama.cpp knows BPE and SentencePiece"
        raise ExportError(msg)
    fallback = bool(model.get("byte_fallback"))
    ids: dict[str, int] = dict(model["vocab"])
    added = {str(t["content"]): t for t in document.get("added_tokens") or ()}
    ids |= {content: int(token["id"]) for content, token in added.items()}
    by_id = {number: token for token, number in ids.items()}
    if by_id and max(by_id) >= vocab_size:
        msg = f"{folder}: token ids up to {max(by_id)}, but the embedding has {vocab_size} rows"
        raise ExportError(msg)
    tokens, kinds, scores = [], [], []
    for number in range(vocab_size):
        token = by_id.get(number)
        tokens.append(f"[PAD{number}]" if token is None else token)
        kinds.append(_kind(token, added, model, fallback=fallback))
        scores.append(
            _PAD_SCORE if token is None else _ADDED_SCORE if token in added else -float(number)
        )
    writer.add_tokenizer_model("llama" if fallback else "gpt2")
    writer.add_tokenizer_pre("default" if fallback else pretokenizer(folder, document))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    if fallback:
        writer.add_token_scores(scores)
    writer.add_token_merges([_merge(m) for m in model.get("merges") or ()])
    if fallback:
        writer.add_add_space_prefix(_has_prefix_space(document) and architecture != "gemma3")


def _kind(
    token: str | None, added: dict[str, Any], model: dict[str, Any], *, fallback: bool
) -> int:
    if token is None:
        return _UNUSED
    if fallback and _BYTE_TOKEN.fullmatch(token):
        return _BYTE
    if token in added:
        if fallback and token == model.get("unk_token"):
            return _UNKNOWN
        looks = token.startswith("<|") and token.endswith("|>")
        return _CONTROL if added[token].get("special") or looks else _USER
    return _NORMAL


def _merge(merge: str | list[str]) -> str:
    """Return a merge as `a b`; spaces inside a part are written as the byte-level space."""
    parts = merge if isinstance(merge, list) else merge.split(" ", 1)
    return " ".join(part.replace(" ", "\u0120") for part in parts)


def _has_prefix_space(document: dict[str, Any]) -> bool:
    text = json.dumps([document.get("normalizer"), document.get("pre_tokenizer")])
    return '"Prepend"' in text or '"prepend_scheme": "first"' in text or "always" in text


def _from_sentencepiece(writer: gguf.GGUFWriter, folder: Path, vocab_size: int) -> None:
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        msg = (
            f"{folder / 'tokenizer.model'} is a SentencePiece model and there is no "
            "tokenizer.json: pip install sentencepiece, or save the fast tokenizer beside it"
        )
        raise ExportError(msg) from error
    pieces = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    tokens: list[bytes | str] = []
    kinds, scores = [], []
    for i in range(vocab_size):
        if i >= pieces.vocab_size():
            tokens.append(f"[PAD{i}]")
            kinds.append(_UNUSED)
            scores.append(_PAD_SCORE)
            continue
        tokens.append(pieces.IdToPiece(i).encode())
        scores.append(float(pieces.GetScore(i)))
        kinds.append(
            _UNKNOWN
            if pieces.IsUnknown(i)
            else _CONTROL
            if pieces.IsControl(i)
            else _UNUSED
            if pieces.IsUnused(i)
            else _BYTE
            if pieces.IsByte(i)
            else _NORMAL
        )
    added = folder / "added_tokens.json"
    if added.is_file():
        for token, number in json.loads(added.read_text(encoding="utf-8")).items():
            if number < vocab_size:
                tokens[number], kinds[number], scores[number] = token, _USER, _ADDED_SCORE
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)


def _specials(writer: gguf.GGUFWriter, folder: Path) -> None:
    config = _json(folder / "tokenizer_config.json")
    ids = _ids(folder)
    numbers = {}
    for name in _SPECIAL:
        token = config.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and token in ids:
            numbers[name] = ids[token]
    whole = _json(folder / "config.json")
    for name in ("bos", "eos"):
        number = whole.get(f"{name}_token_id")
        number = number[0] if isinstance(number, list) and number else number
        if isinstance(number, int):
            numbers.setdefault(name, number)
    for name, number in numbers.items():
        writer.add_uint32(f"tokenizer.ggml.{_SPECIAL[name]}_token_id", number)
    for name in ("bos", "eos"):
        wanted = config.get(f"add_{name}_token")
        if isinstance(wanted, bool):
            writer.add_bool(f"tokenizer.ggml.add_{name}_token", wanted)
    template = config.get("chat_template")
    file = folder / "chat_template.jinja"
    if file.is_file():
        template = file.read_text(encoding="utf-8")
    if isinstance(template, str):
        writer.add_chat_template(template)


def _ids(folder: Path) -> dict[str, int]:
    document = _json(folder / "tokenizer.json")
    out: dict[str, int] = dict((document.get("model") or {}).get("vocab") or {})
    return out | {t["content"]: t["id"] for t in document.get("added_tokens") or ()}


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    return found if isinstance(found, dict) else {}
