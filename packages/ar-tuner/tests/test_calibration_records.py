from __future__ import annotations

import pytest
import torch

from ar_tuner import TunerError
from ar_tuner.calibration.records import Chat, Tokens, document_of, ids_of, is_empty, size_of

HI = Chat((("user", "hi"), ("assistant", "hello")))


@pytest.mark.parametrize(
    ("record", "document"),
    [
        ("plain", "plain"),
        ({"text": "plain", "meta": 1}, "plain"),
        ({"content": "plain"}, "plain"),
        ({"code": "x = 1"}, "x = 1"),
        ({"prompt": "alone"}, "alone"),
        ([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}], HI),
        (
            {"messages": [{"role": "user", "content": "hi"}, {"role": "bot", "content": "hello"}]},
            HI,
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "hi"},
                    {"from": "gpt", "value": "hello"},
                ]
            },
            HI,
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]},
            Chat((("user", "hi"),)),
        ),
        ({"prompt": "hi", "response": "hello"}, HI),
        ({"question": "hi", "answer": "hello"}, HI),
        (
            {"instruction": "add", "input": "1 2", "output": "3"},
            Chat((("user", "add\n\n1 2"), ("assistant", "3"))),
        ),
        ({"instruction": "hi", "input": "", "output": "hello"}, HI),
        (
            {"system": "be", "messages": [{"role": "user", "content": "hi"}]},
            Chat((("system", "be"), ("user", "hi"))),
        ),
        (
            {"system": "be", "prompt": "hi", "response": "hello"},
            Chat((("system", "be"), *HI.messages)),
        ),
        ({"messages": [{"role": "assistant", "content": None}]}, Chat((("assistant", ""),))),
    ],
)
def test_a_record_is_a_text_or_a_chat(record, document) -> None:
    assert document_of(record, where="w") == document


@pytest.mark.parametrize(
    "record",
    [
        [3, 4, 5],
        torch.tensor([3, 4, 5]),
        torch.tensor([3, 4, 5]).numpy(),
        {"input_ids": [3, 4, 5]},
        {"input_ids": [3, 4, 5, 9, 9], "attention_mask": [1, 1, 1, 0, 0]},
    ],
    ids=["list", "tensor", "array", "dict", "masked"],
)
def test_a_record_may_be_token_ids(record) -> None:
    document = document_of(record, where="w")
    assert isinstance(document, Tokens)
    assert document.ids.tolist() == [3, 4, 5]


def test_a_field_may_be_named() -> None:
    assert document_of({"text": "no", "body": "yes"}, where="w", key="body") == "yes"
    assert document_of({"talk": [{"role": "user", "content": "x"}]}, where="w", key="talk") == Chat(
        (("user", "x"),)
    )
    with pytest.raises(TunerError, match="holds no text in the field 'body' asked for"):
        document_of({"text": "no"}, where="w", key="body")
    with pytest.raises(TunerError, match="in the field 'body'"):
        document_of({"body": {"text": "deeper"}}, where="w", key="body")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (3, "w: data of type int holds no text"),
        ({"other": 1}, "a record with the fields other holds no text.*messages"),
        ({}, "data of type dict holds no text"),
        ([0.5], "data of type list holds no text"),
        ({"messages": ["hi"]}, "'hi' is no message of a chat"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "is no message"),
        ({"messages": [{"content": "hi"}]}, "needs a role"),
        ({"input_ids": [0.5]}, "whole numbers"),
        ({"input_ids": [2**31]}, "whole numbers of 32 bits"),
        ({"input_ids": [True]}, "whole numbers"),
        ({"input_ids": "abc"}, "neither text nor token ids"),
    ],
)
def test_a_record_of_another_kind_is_refused_with_the_names_that_work(record, message) -> None:
    with pytest.raises(TunerError, match=message):
        document_of(record, where="w")


def test_what_holds_only_blanks_is_empty() -> None:
    empty = (" \n", Chat((("user", " "),)), Tokens(ids_of([])))
    assert all(map(is_empty, empty))
    assert not any(map(is_empty, ("x", HI, Tokens(ids_of([1])))))
    assert [size_of(d) for d in ("abc", HI, Tokens(ids_of([1, 1, 1])))] == [3, 7, 12]
