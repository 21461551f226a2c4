"""OpenAI's chat completions, as their clients speak them: JSON to our turns, pieces to JSON.

The fields follow OpenAI's public API reference. Unknown ones are ignored.
"""

import base64
import binascii
import json
import re
import time
import traceback
import uuid
from dataclasses import dataclass, field

from ..chat import TooLongError, Usage
from ..conversation import IMAGE_TOKEN
from ..infra.cli import LESS_MEMORY, memory_error
from ..infra.io import InputError
from ..infra.json_io import parse_json
from ..infra.progress import print0
from ..infra.shapes import shape_error

MAX_NEW_TOKENS = 512  # of a reply, if a request does not say
DATA_URL = re.compile(r"data:[\w/+.-]*(;[\w=.-]+)*;base64,", re.ASCII)
ROLES = ("system", "developer", "user", "assistant")


class RequestError(Exception):
    """A status and the error object of OpenAI's API for it."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None,
                 kind: str = "invalid_request_error", headers: dict | None = None):
        super().__init__(message)
        self.status, self.headers = status, headers or {}
        self.content = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def as_request_error(error: Exception) -> RequestError:
    """An error of any class as one for the client. What is not the client's fault is logged."""
    if isinstance(error, RequestError):
        return error.with_traceback(None)  # its frames hold tensors and bodies
    if isinstance(error, TooLongError):
        return RequestError(400, str(error), "messages", "context_length_exceeded")
    if isinstance(error, InputError):
        return RequestError(400, str(error), "messages", "image_parse_error")
    if full := memory_error(error):
        print0(f"{full}: lower --cache-gib, or {LESS_MEMORY}")
        return RequestError(503, f"{full}: shorten the conversation, or try again later",
                            kind="server_error")
    traceback.print_exception(error)
    return RequestError(500, "the server failed; its log says why", kind="server_error")


@dataclass
class Request:
    """What a client asks for."""

    turns: list[dict]  # {"from": "human" | "gpt", "value": text}, the last one human
    images: list[bytes]  # files, one for each `<image>` in the turns
    max_new_tokens: int = MAX_NEW_TOKENS
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stops: list[str] = field(default_factory=list)
    stream: bool = False
    include_usage: bool = False


def parse_body(body: bytes) -> dict:
    """Raises RequestError unless the body is a JSON object whose texts are Unicode."""
    try:
        content = parse_json(body, "the body", dict)
        json.dumps(content, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:  # also a lone surrogate, NaN
        raise RequestError(400, str(error).splitlines()[0]) from None
    return content


def is_role(value) -> None:
    if value not in ROLES:
        raise ValueError(f"must be one of {', '.join(ROLES)}")


def is_content(value) -> None:
    if reason := shape_error(value, str if isinstance(value, str) else [{"type": is_part_type}]):
        raise ValueError(f"must be a string or a list of parts: {reason}")


def is_part_type(value) -> None:
    if value not in ("text", "image_url"):
        raise ValueError("must be text or image_url")


def is_stop(value) -> None:
    texts = [value] if isinstance(value, str) else value
    if shape_error(texts, [str]) or len(texts) > 4 or "" in texts:
        raise ValueError("must be a string that is not empty, or a list of at most 4 of them")


FIELDS = {
    "model?": str, "messages": [{"role": is_role, "content?": is_content}], "stream?": bool,
    "stream_options?": {"include_usage?": bool}, "temperature?": (0.0, 2.0), "top_p?": (0.0, 1.0),
    "max_tokens?": range(1, 2**31), "max_completion_tokens?": range(1, 2**31), "stop?": is_stop,
    "seed?": range(-(2**63), 2**63), "n?": range(1, 2)}
PART = {"text": {"text": str}, "image_url": {"image_url": {"url": str}}}


def parse_request(content: dict) -> Request:
    """Raises RequestError, which names the field."""
    if reason := shape_error(content, FIELDS):
        place = reason.split()[0]  # "it has no 'messages'", "seed must be an integer, not ..."
        raise RequestError(400, reason, reason.split("'")[1] if place == "it" else place)

    def get(name: str, default):
        value = content.get(name)
        return default if value is None else value

    options = get("stream_options", None)
    stream, stops = get("stream", False), get("stop", [])
    if options is not None and not stream:
        raise RequestError(400, "stream_options needs stream", "stream_options")
    turns, images = parse_messages(content["messages"])
    max_new_tokens = get("max_completion_tokens", get("max_tokens", MAX_NEW_TOKENS))
    temperature = round(float(get("temperature", 0.0)), 6)  # a smaller one is 0 in float32
    return Request(turns, images, max_new_tokens, temperature, float(get("top_p", 1.0)),
                   get("seed", None),
                   [stops] if isinstance(stops, str) else stops, stream,
                   bool((options or {}).get("include_usage")))


def parse_messages(messages: list[dict]) -> tuple[list[dict], list[bytes]]:
    """Messages to turns and image files.

    A model knows one system prompt, the one of its training, so a client's system message becomes
    the beginning of the first question. Consecutive messages of one role become one turn.
    """
    turns, images, begin = [], [], []  # turns: a speaker and its texts
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        text, files = parse_content(message.get("content"), message["role"], f"{where}.content")
        if message["role"] in ("system", "developer"):
            begin += [text]
            continue
        speaker = "gpt" if message["role"] == "assistant" else "human"
        if not turns and speaker == "gpt":
            raise RequestError(400, "a conversation begins with a user message", where)
        images += files
        if not turns or turns[-1][0] != speaker:
            turns.append((speaker, []))
        turns[-1][1].append(text)
    if turns:
        turns[0][1][:0] = begin
    turns = [{"from": speaker, "value": "\n".join(texts)} for speaker, texts in turns]
    if not turns or turns[-1]["from"] != "human":
        raise RequestError(400, "the last message must be a user's", "messages")
    for turn in turns[::2]:
        if not turn["value"].strip():
            raise RequestError(400, "a user message is empty", "messages")
    return turns, images


def parse_content(content, role: str, where: str) -> tuple[str, list[bytes]]:
    """The content of a message to text, with `<image>` where there is an image, and image files."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
    texts, images = [], []
    for number, part in enumerate(parts):
        place = f"{where}[{number}]" if parts is content else where
        if reason := shape_error(part, PART[part["type"]]):
            raise RequestError(400, f"{place}: {reason}", place)
        if part["type"] == "text":
            if IMAGE_TOKEN in part["text"] and role != "assistant":
                raise RequestError(400, f"{place} must not contain {IMAGE_TOKEN}; a part of type "
                                   "image_url gives an image", place)
            # in a reply it is text that the model made up, not the place of an image
            texts.append(part["text"].replace(IMAGE_TOKEN, "[image]"))
        elif role != "user":
            raise RequestError(400, f"{place}: only user messages have images", place)
        else:
            texts.append(IMAGE_TOKEN)
            images.append(parse_data_url(part["image_url"]["url"], f"{place}.image_url.url"))
    return "\n".join(texts), images


def parse_data_url(url: str, where: str) -> bytes:
    """The content of a data: URL. No other URL is ever fetched."""
    head = DATA_URL.match(url, 0, 200)
    if not head:
        raise RequestError(400, f"{where} must be a data: URL in base64, such as "
                           "data:image/jpeg;base64,...; this server fetches nothing", where)
    try:
        return base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise RequestError(400, f"{where} is not base64", where) from None


class Completion:
    """The objects that answer one request."""

    def __init__(self, model: str):
        self.id, self.model, self.created = f"chatcmpl-{uuid.uuid4().hex}", model, int(time.time())

    def whole(self, text: str, usage: Usage) -> dict:
        return self.build("chat.completion", [{
            "index": 0, "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": None, "finish_reason": usage.finish_reason}], usage=usage_json(usage))

    def chunk(self, delta: dict, finish_reason: str | None = None) -> dict:
        return self.build("chat.completion.chunk", [{
            "index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}])

    def usage_chunk(self, usage: Usage) -> dict:
        return self.build("chat.completion.chunk", [], usage=usage_json(usage))

    def build(self, kind: str, choices: list[dict], **more) -> dict:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model,
                "choices": choices, **more}


def usage_json(usage: Usage) -> dict:
    return {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": usage.cached_tokens}}
