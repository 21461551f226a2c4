"""What the downloader and the teacher's client share: API keys, delays before a retry."""

import math
import os
import random
from email.utils import parsedate_to_datetime
from time import time

import requests

from .io import InputError

MAX_DELAY = 3600.0  # seconds before a retry, even if the server asks for more


def read_api_key(name: str) -> str:
    """The key in an environment variable, "" if it is not set.

    Raises InputError, without showing the key, if it has characters that no header can carry.
    """
    key = os.environ.get(name, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise InputError(f"{name} has characters that no key has: copy it again")
    return key


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


def retry_delay(attempt: int, headers) -> float:
    """Seconds to wait after failed attempt 1, 2, ...: exponential backoff with jitter.

    At least as long as the Retry-After of the reply's `headers` (None without a reply) asks for.
    The jitter keeps parallel workers from retrying in the same instant.
    """
    backoff = 2.0 ** (attempt - 1)
    delay = max(backoff, parse_retry_after((headers or {}).get("Retry-After", "")))
    return min(delay, MAX_DELAY) * random.uniform(1.0, 1.5)


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
