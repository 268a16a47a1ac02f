"""Documents of data that is given as objects: lists, tensors, DataLoaders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from ar_tuner.calibration.records import Tokens, document_of, ids_of, is_empty, token_ids
from ar_tuner.errors import TunerError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ar_tuner.calibration.records import Document

WHERE = "dataset"


def given_documents(dataset: Any) -> Iterator[Document]:
    """Return the documents of an object, read while iterating; empty ones are left out.

    A list of texts, records, chats or token ids; a tensor [N, T]; anything that yields these or
    batches of them, such as a DataLoader or a `datasets.Dataset`.

    Raises:
        TunerError: an object that cannot be iterated, or is a mapping; while reading: an item
            that is neither text, nor a chat, nor token ids.
    """
    if isinstance(dataset, Mapping) and "input_ids" not in dataset:
        names = ", ".join(map(str, dataset))
        msg = f"dataset is a mapping ({names}): give one of its values, such as dataset['train']"
        raise TunerError(msg)
    if hasattr(dataset, "ndim") or isinstance(dataset, Mapping):  # a tensor, what a tokenizer gave
        dataset = [dataset]
    try:
        iterator: Iterable[Any] = iter(dataset)
    except TypeError as error:
        msg = (
            f"dataset of type {type(dataset).__name__} is not understood: use a file, a name, a "
            "list of texts or token ids, or a DataLoader"
        )
        raise TunerError(msg) from error
    return (d for item in iterator for d in _of_item(item) if not is_empty(d))


def _of_item(item: Any) -> Iterator[Document]:
    """Yield the documents of one item, which may be a batch of them."""
    if isinstance(item, Mapping):
        if item.get("input_ids") is not None:
            yield from _of_tokens(item["input_ids"], item.get("attention_mask"))
        elif isinstance(item.get("text"), (list, tuple)):
            yield from (document_of(text, where=WHERE) for text in item["text"])
        else:
            yield document_of(item, where=WHERE)
    elif isinstance(item, (list, tuple)) and item and not isinstance(item[0], (int, Mapping)):
        for part in item:
            yield from _of_item(part)
    elif isinstance(item, (str, list, tuple)):
        yield document_of(item, where=WHERE)
    else:
        yield from _of_tokens(item, None)


def _of_tokens(value: Any, mask: Any) -> Iterator[Tokens]:
    """Yield the rows of token ids, without what a mask says is padding."""
    ids = torch.atleast_2d(token_ids(value))
    kept = torch.ones_like(ids) if mask is None else torch.atleast_2d(token_ids(mask))
    if kept.shape != ids.shape:
        msg = f"attention_mask {list(kept.shape)} does not fit input_ids {list(ids.shape)}"
        raise TunerError(msg)
    for row, used in zip(ids, kept, strict=True):
        yield Tokens(ids_of(row[used != 0].tolist()))
