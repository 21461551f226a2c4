"""What clients of OpenAI's API send, as turns, images and settings; and the error for all else."""

import base64
import json
import time
from pathlib import Path

import pytest

from nanollava.chat import Usage
from nanollava.serve.openai import Completion, RequestError, parse_body, parse_request

GOLDEN = Path(__file__).parents[1] / "golden"
URL = "data:image/png;base64," + base64.b64encode(b"an image").decode()


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def text(value):
    return {"type": "text", "text": value}


def image(url=URL):
    return {"type": "image_url", "image_url": {"url": url, "detail": "high"}}


def turns_of(*messages):
    return [(turn["from"], turn["value"])
            for turn in parse_request({"messages": list(messages)}).turns]


def error_of(content):
    """The error with which a request is refused, and the field that it names."""
    with pytest.raises(RequestError) as caught:
        parse_request(content)
    error = caught.value.content["error"]
    assert (caught.value.status, error["type"]) == (400, "invalid_request_error")
    return error["message"], error["param"]


# ---------------------------------------------------------------------------------------------
# Messages


def test_messages_become_turns():
    assert turns_of(user("Hi."), assistant("Hello."), user("What is it?")) == [
        ("human", "Hi."), ("gpt", "Hello."), ("human", "What is it?")]


def test_parts_become_one_text_with_the_images_in_their_places():
    request = parse_request({"messages": [user([image(), text("A"), image(), text("B")])]})
    assert request.turns[0]["value"] == "<image>\nA\n<image>\nB"
    assert request.images == [b"an image"] * 2


def test_system_and_developer_messages_begin_the_first_question():
    system = {"role": "system", "content": "Be brief."}
    developer = {"role": "developer", "content": [text("Be kind.")]}
    assert turns_of(system, user("A"), assistant("B"), developer, user("C")) == [
        ("human", "Be brief.\nBe kind.\nA"), ("gpt", "B"), ("human", "C")]


def test_neighbors_with_the_same_role_become_one_turn():
    assert turns_of(user("A"), user("B"), assistant("C"), assistant("D"), user("E")) == [
        ("human", "A\nB"), ("gpt", "C\nD"), ("human", "E")]


@pytest.mark.parametrize("content", ["", None, []])
def test_reply_of_an_earlier_turn_may_be_empty(content):
    assert turns_of(user("A"), assistant(content), user("B"))[1] == ("gpt", "")


@pytest.mark.parametrize("reply", ["<image>", "an <image>.", "<<image>>", "<<<image>image>>"])
def test_marker_of_an_image_in_a_reply_is_mere_text(reply):
    request = parse_request({"messages": [user("A"), assistant(reply), user("B")]})
    assert "<image>" not in request.turns[1]["value"] and not request.images


@pytest.mark.parametrize("messages, param", [
    ([], "messages"),
    ([assistant("A")], "messages[0]"),
    ([assistant("A"), user("B")], "messages[0]"),
    ([user("A"), assistant("B")], "messages"),
    ([{"role": "system", "content": "A"}], "messages"),
    ([user("")], "messages"),
    ([user(" \n")], "messages"),
    ([user(None)], "messages"),
    ([user([])], "messages"),
    ([user("A"), assistant("B"), user("")], "messages"),
    ([user("see <image>")], "messages[0].content"),
    ([user([text("A"), text("<image>")])], "messages[0].content[1]"),
    ([{"role": "system", "content": "<image>"}, user("A")], "messages[0].content"),
    ([{"role": "system", "content": [image()]}, user("A")], "messages[0].content[0]"),
    ([user("A"), assistant([image()]), user("B")], "messages[1].content[0]"),
])
def test_conversation_that_our_models_cannot_read_is_refused(messages, param):
    assert error_of({"messages": messages})[1] == param


@pytest.mark.parametrize("url", [
    "http://127.0.0.1/a.png", "https://example.org/a.png", "file:///etc/passwd", "/etc/passwd", "",
    "data:", "data:image/png,abc", "data:image/png;base64", "data:image/png;base64,a",
    "data:image/png;base64,\u00e9", "data:image/png;base64,YQ!==", " " + URL,
    "data:" + ";a" * 10**6 + ";base64,YQ=="], ids=lambda url: url[:30])
def test_image_that_is_no_data_url_is_refused(url):
    message, param = error_of({"messages": [user([image(url)])]})
    assert param == "messages[0].content[0].image_url.url" and len(message) < 200


# ---------------------------------------------------------------------------------------------
# Settings


def test_settings_have_defaults():
    request = parse_request({"messages": [user("A")]})
    assert (request.max_new_tokens, request.temperature, request.top_p) == (512, 0.0, 1.0)
    assert (request.seed, request.stops, request.stream, request.include_usage) == (
        None, [], False, False)


def test_settings_are_read():
    request = parse_request({
        "model": "any", "messages": [user("A")], "max_tokens": 3, "temperature": 1, "top_p": 0.5,
        "seed": -7, "stop": ["a", "b"], "stream": True, "stream_options": {"include_usage": True},
        "n": 1, "user": "unknown fields are ignored"})
    assert (request.max_new_tokens, request.temperature, request.top_p) == (3, 1.0, 0.5)
    assert (request.seed, request.stops, request.stream, request.include_usage) == (
        -7, ["a", "b"], True, True)


def test_null_means_the_default():
    names = ("model", "max_tokens", "temperature", "top_p", "seed", "stop", "stream",
             "stream_options", "n", "max_completion_tokens")
    content = {"messages": [user("A")]}
    assert parse_request(content | dict.fromkeys(names)) == parse_request(content)


def test_one_stop_may_be_a_string():
    assert parse_request({"messages": [user("A")], "stop": "###"}).stops == ["###"]


def test_newer_name_of_max_tokens_goes_first():
    content = {"messages": [user("A")], "max_tokens": 3, "max_completion_tokens": 5}
    assert parse_request(content).max_new_tokens == 5


def test_temperature_that_float32_cannot_divide_by_is_zero():
    assert parse_request({"messages": [user("A")], "temperature": 1e-300}).temperature == 0.0


WRONG = {
    "model": [7, [], {}, True],
    "messages": [None, 7, "A", {}, [7], [None], [[]]],
    "stream": [0, 1, "true", [], {}],
    "stream_options": [7, "A", [], True, {"include_usage": 1}],
    "temperature": [-0.1, 2.1, "1", True, [], {}, 10**400],
    "top_p": [-0.1, 1.1, "1", True, []],
    "max_tokens": [0, -1, 1.0, 0.5, "1", True, [], 2**31, 10**30],
    "max_completion_tokens": [0, "1", 2**31],
    "stop": ["", 7, {}, [7], [""], [None], ["a"] * 5, [["a"]]],
    "seed": ["1", 1.0, True, 2**63, -(2**63) - 1, []],
    "n": [0, 2, "1", True, 1.0]}


@pytest.mark.parametrize("name, value", [
    (name, value) for name, values in WRONG.items() for value in values],
    ids=lambda value: str(value)[:20])
def test_wrong_field_is_named(name, value):
    message, param = error_of({"messages": [user("A")], "stream": True} | {name: value})
    assert param.startswith(name) and message.startswith(param) and len(message) < 200


@pytest.mark.parametrize("message, param", [
    ({}, "messages[0]"),
    ({"content": "A"}, "messages[0]"),
    ({"role": 7}, "messages[0].role"),
    ({"role": "tool", "content": "A"}, "messages[0].role"),
    ({"role": ["user"]}, "messages[0].role"),
    (user(7), "messages[0].content"),
    (user({}), "messages[0].content"),
    (user([7]), "messages[0].content"),
    (user([{}]), "messages[0].content"),
    (user([{"type": "input_audio"}]), "messages[0].content"),
    (user([{"type": ["text"]}]), "messages[0].content"),
    (user([text("A"), {"type": "text"}]), "messages[0].content[1]"),
    (user([text(7)]), "messages[0].content[0]"),
    (user([image(7)]), "messages[0].content[0]"),
    (user([{"type": "image_url", "image_url": URL}]), "messages[0].content[0]"),
    (user([{"type": "image_url"}]), "messages[0].content[0]"),
])
def test_wrong_part_of_a_message_is_named(message, param):
    text, named = error_of({"messages": [message]})
    assert named == param and text.startswith(param)


def test_missing_messages_are_named():
    assert error_of({}) == ("it has no 'messages'", "messages")


def test_options_of_a_stream_need_a_stream():
    content = {"messages": [user("A")], "stream_options": {"include_usage": True}}
    assert error_of(content) == ("stream_options needs stream", "stream_options")


# ---------------------------------------------------------------------------------------------
# Bodies


@pytest.mark.parametrize("body", [
    b"", b" ", b"{", b"[]", b"null", b"7", b'"A"', b"{}{}", b"{'a': 1}", b"\xff{}", b"\x00",
    b"[" * 10**5, b'{"a":' * 10**5, b'{"a": NaN}', b'{"a": Infinity}', b'{"a": 1e999}',
    b'{"a": "\\ud800"}', b'{"\\udfff": 1}', '{"a": 1}'.encode("utf-16")],
    ids=lambda body: repr(body)[:20])
def test_body_that_is_no_json_object_of_unicode_is_refused(body):
    with pytest.raises(RequestError) as caught:
        parse_body(body)
    assert caught.value.status == 400 and "\n" not in str(caught.value)


def test_body_that_can_be_read_but_not_written_is_refused(monkeypatch):
    """Whether there is such a depth depends on the Python."""
    def fail(*_, **options):
        raise RecursionError("nested too deeply")

    monkeypatch.setattr(json, "dumps", fail)
    with pytest.raises(RequestError, match="nested too deeply"):
        parse_body(b"{}")


def test_body_is_read():
    assert parse_body('{"a": "\u00e9\\ud83d\\ude00"}'.encode()) == {"a": "\u00e9\U0001f600"}


def test_many_messages_are_joined_in_linear_time():
    """A string that grows with each message would be copied 60,000 times."""
    messages, start = [user("a" * 100)] * 60_000, time.process_time()
    assert len(parse_request({"messages": messages}).turns[0]["value"]) == 60_000 * 101 - 1
    assert time.process_time() - start < 5


# ---------------------------------------------------------------------------------------------
# Answers


def test_requests_of_openais_client_are_read():
    plain, streamed = json.loads((GOLDEN / "openai.json").read_text())["requests"]
    for recorded, stream in ((plain, False), (streamed, True)):
        request = parse_request(recorded["body"])
        assert request.turns == [
            {"from": "human", "value": "Answer in one word.\nWhat color is it?\n<image>"}]
        assert request.images == [(GOLDEN / "images" / "flat.png").read_bytes()]
        assert (request.max_new_tokens, request.temperature, request.seed) == (8, 0.5, 1)
        assert (request.stream, request.include_usage) == (stream, stream)


def test_whole_answer_has_the_fields_of_openais():
    answer = Completion("toy").whole("A cat.", Usage(10, 4, 3, "stop"))
    assert (answer["object"], answer["model"]) == ("chat.completion", "toy")
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": "A cat.", "refusal": None}
    assert (choice["index"], choice["finish_reason"]) == (0, "stop")
    assert answer["usage"] == {"prompt_tokens": 10, "completion_tokens": 3, "total_tokens": 13,
                               "prompt_tokens_details": {"cached_tokens": 4}}


def test_chunks_of_one_answer_share_its_id():
    completion = Completion("toy")
    first, last, usage = (completion.chunk({"content": "A"}), completion.chunk({}, "length"),
                          completion.usage_chunk(Usage(1, 0)))
    assert first["id"] == last["id"] == usage["id"] != Completion("toy").id
    assert first["object"] == last["object"] == usage["object"] == "chat.completion.chunk"
    assert [chunk["choices"][0]["finish_reason"] for chunk in (first, last)] == [None, "length"]
    assert usage["choices"] == [] and usage["usage"]["total_tokens"] == 1
