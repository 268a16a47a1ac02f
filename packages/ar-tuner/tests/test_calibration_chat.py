from __future__ import annotations

import json

import pytest

from ar_tuner import TunerError
from ar_tuner.calibration import SetRequest, calibration_rows, parse_sets
from ar_tuner.calibration.chat import Renderer
from ar_tuner.calibration.records import Chat

CHAT = Chat((("user", "hi"), ("assistant", "hello")))
LED = Chat((("system", "be kind"), *CHAT.messages))


def rendered(document, tokenizer, **options):
    request = SetRequest("set", **options)
    return Renderer.of(request, tokenizer)(document)


def test_chats_go_through_the_template_where_there_is_one(words) -> None:
    assert rendered(CHAT, words(template="any")) == ("<s> user: hi assistant: hello", "chat")
    assert rendered(CHAT, words()) == ("hi\n\nhello", "untemplated")
    assert rendered(CHAT, words(template="any"), chat=False) == ("hi\n\nhello", "plain")


def test_text_goes_through_the_template_only_when_asked(words) -> None:
    tokenizer = words(template="any")
    assert rendered("hi", tokenizer) == ("hi", "text")
    assert rendered("hi", tokenizer, chat=True) == ("<s> user: hi assistant:", "chat")


def test_a_system_prompt_takes_the_place_of_the_record_s_own(words) -> None:
    found, _ = rendered(LED, words(template="any"), chat=True, system_prompt="be brief")
    assert found == "<s> system: be brief user: hi assistant: hello"


def test_a_record_s_system_words_join_the_user_s_where_the_template_has_no_such_role(words) -> None:
    found = rendered(LED, words(template="no system"))
    assert found == ("<s> user: be kind\n\nhi assistant: hello", "chat")


def test_a_chat_the_template_does_not_take_is_plain_text_unless_it_was_asked_for(words) -> None:
    odd = Chat((("user", "one"), ("user", "two")))
    assert rendered(odd, words(template="any")) == ("one\n\ntwo", "refused")
    with pytest.raises(TunerError, match="does not take one of the chats: roles must alternate"):
        rendered(odd, words(template="any"), chat=True)
    with pytest.raises(TunerError, match="this system_prompt: System role not supported"):
        rendered(CHAT, words(template="no system"), chat=True, system_prompt="x")


def test_the_template_cannot_be_asked_of_a_tokenizer_without_one(words) -> None:
    with pytest.raises(TunerError, match="dataset set: apply_chat_template.*no chat template"):
        rendered("hi", words(), chat=True)


def test_a_split_of_chats_is_templated_with_every_option(tmp_path, words) -> None:
    talk = [{"messages": [{"role": "user", "content": f"{'x' * i} y z"}]} for i in range(3, 9)]
    (tmp_path / "a.json").write_text(json.dumps({"test_sft": talk, "train_sft": []}))
    request = f"{tmp_path / 'a.json'}:split=test_sft:system_prompt=be"
    rows, report = calibration_rows(
        request, words(template="any", begins=True), nsamples=4, seqlen=6, seed=0
    )
    assert rows[:, :4].tolist() == [[99, 7, 2, 5]] * 4  # <s> system: be user:
    assert report.notes() == []


def test_the_system_prompt_of_one_set_is_not_that_of_the_next(tmp_path, words) -> None:
    for name in ("a", "b"):
        talk = [[{"role": "user", "content": f"{'x' * i} y z"}] for i in range(3, 9)]
        (tmp_path / f"{name}.json").write_text(json.dumps(talk))
    first, second = (str(tmp_path / f"{name}.json") for name in "ab")
    rows, report = calibration_rows(
        f"{first}:system_prompt=be,{second}", words(template="any"), nsamples=6, seqlen=5, seed=0
    )
    begins = sorted(tuple(row[:2].tolist()) for row in rows)
    assert begins == [(99, 5)] * 3 + [(99, 7)] * 3  # <s> user: / <s> system:
    assert [rows for _, rows in report.sources] == [3, 3]
    assert [r.system_prompt for r in parse_sets("a:system_prompt=be,b")] == ["be", None]


def test_chats_taken_as_plain_text_are_reported(words) -> None:
    odd = [[{"role": "user", "content": f"{'x' * i} yy zzz"}] * 2 for i in range(4, 9)]
    _, report = calibration_rows(odd, words(template="any"), nsamples=2, seqlen=5, seed=0)
    assert "chats of dataset are plain text: the chat template does not" in report.notes()[-1].text
    assert report.notes()[-1].level == "warning"
    _, report = calibration_rows(odd, words(), nsamples=2, seqlen=5, seed=0)
    assert "the tokenizer has no chat template" in report.notes()[-1].text


def test_a_real_template_is_applied_without_a_second_beginning(tmp_path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    vocabulary = {w: i for i, w in enumerate(["<s>", "</s>", "user", "assistant", "a", "b", "?"])}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    plain.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, bos_token="<s>", eos_token="</s>", unk_token="?"
    )
    tokenizer.chat_template = (
        "{{ bos_token }} {% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    )
    talk = [[{"role": "human", "content": "a a"}, {"role": "gpt", "content": "b b b"}]]
    rows, _ = calibration_rows(talk, tokenizer, nsamples=1, seqlen=8, seed=0)
    assert rows.tolist() == [[0, 2, 4, 4, 3, 5, 5, 5]]
    rows, _ = calibration_rows(["a b a b"], tokenizer, nsamples=1, seqlen=4, seed=0)
    assert rows.tolist() == [[0, 4, 5, 4]]
