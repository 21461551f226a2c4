"""What the downloader and the teacher's client share: keys, limits, delays before a retry.

A server is not trusted: a reply is read up to a limit, and no message repeats a key.
"""

import contextlib
import math
import os
import random
import re
from email.utils import parsedate_to_datetime
from time import time
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlsplit

import requests

from .io import InputError
from .progress import format_time, print0

MAX_DELAY = 3600.0  # seconds before a retry, even if the server asks for more
LONG_DELAY = 60.0  # seconds; the user is informed of a longer delay
MAX_BODY = 2**25  # bytes of a JSON reply, after decompression
# in messages: user and password of an address; its query, which may hold a key or a signature
CREDENTIALS = re.compile(r"//[^/\s@]+@")
QUERY = re.compile(r"\?[^\s?=&]+=[^\s'\"]*")


def read_api_key(name: str) -> str:
    """The key in an environment variable, "" if it is not set.

    Raises InputError, without showing the key, if it has characters that no header can carry.
    """
    key = os.environ.get(name, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise InputError(f"{name} has characters that no key has: copy it again")
    return key


def parse_address(url: str, name: str) -> SplitResult:
    """The address of a server. Raises InputError, which names the setting, if it is none.

    The message does not show the address, since a password may be in it.
    """
    try:
        address = urlsplit(url)
        if address.hostname and address.scheme in ("http", "https") and address.port != 0:
            return address
    except ValueError:
        pass
    raise InputError(f"{name} is not the address of a server: "
                     "it must begin with http:// or https://")


def find_secrets(key: str, address: SplitResult) -> list[str]:
    """The key, and what an address holds before and behind host and path, longest first."""
    values = [value for _, value in parse_qsl(address.query)]
    secrets = {key, address.username, address.password, address.query, *values} - {None}
    secrets |= {coding(secret) for coding in (quote, unquote) for secret in secrets}
    return sorted((secret for secret in secrets if len(secret) >= 4), key=len, reverse=True)


def hide(text: str, secrets: list[str]) -> str:
    """The text on one line, without secrets and without credentials and queries of addresses."""
    for secret in secrets:
        text = text.replace(secret, "[hidden]")
    text = QUERY.sub("?[hidden]", CREDENTIALS.sub("//", text))
    return " ".join(text.split())


@contextlib.contextmanager
def secrets_hidden(secrets: list[str], *errors: type[Exception]):
    """Raise errors of these types, and InputError, again with a message without secrets."""
    try:
        yield
    except (InputError, *errors) as error:
        raise type(error)(hide(str(error), secrets)) from None


def read_body(reply: requests.Response) -> bytes:
    """The body of a reply that was requested with stream=True.

    Raises InputError if it is longer than MAX_BODY, before it fills the memory.
    """
    body = bytearray()
    # what is compressed twice may grow a million times with a single block
    if "," not in reply.headers.get("Content-Encoding", ""):
        for block in reply.iter_content(1 << 14):
            body += block
            if len(body) > MAX_BODY:
                break
        else:
            return bytes(body)
    raise InputError(f"{reply.url} sends more than {MAX_BODY >> 20} MB where a short reply was "
                     "expected: check the address of the server")


class BearerAuth:
    """The `auth` of a request: a key in a header. With `auth` set, requests ignores ~/.netrc."""

    def __init__(self, key: str, header: str = "Authorization", prefix: str = "Bearer "):
        self.key, self.header, self.prefix = key, header, prefix

    def __call__(self, request):
        if self.key:
            request.headers[self.header] = self.prefix + self.key
        return request


def is_invalid_request(error: requests.RequestException) -> bool:
    """True for a malformed address or header, where a retry cannot help."""
    return isinstance(error, ValueError) and not isinstance(error, requests.JSONDecodeError)


def retry_delay(attempt: int, headers, server: str) -> float:
    """Seconds to wait after failed attempt 1, 2, ...: exponential backoff with jitter.

    At least as long as the Retry-After of the reply's `headers` (None without a reply) asks for.
    The jitter keeps parallel workers from retrying in the same instant. A long delay is printed.
    """
    backoff = 2.0 ** (attempt - 1)
    delay = max(backoff, parse_retry_after((headers or {}).get("Retry-After", "")))
    delay = min(delay, MAX_DELAY) * random.uniform(1.0, 1.5)
    if delay > LONG_DELAY:
        print0(f"waiting {format_time(delay)} before the next request to {server}")
    return delay


def parse_retry_after(value: str) -> float:
    """Seconds from now, given as a number or as a date; 0 if it is neither."""
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time()
        except (ValueError, TypeError):
            return 0.0
    return seconds if math.isfinite(seconds) else 0.0
