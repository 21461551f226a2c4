"""What the two that speak HTTP share, the downloader and the teacher's client: keys that nobody sees, patience, and
files that one run at a time may write."""

import math
import os
import random
from email.utils import parsedate_to_datetime
from time import time

import requests

from .io import InputError

LONGEST_WAIT = 3600.0  # seconds between two attempts, however long a server asks for


def read_api_key(name: str) -> str:
    """A key from the environment, "" where there is none. Raises InputError if it cannot be one, without showing it."""
    key = os.environ.get(name, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise InputError(f"{name} holds letters that no key has: copy it again")
    return key


class BearerAuth:
    """Signs requests with a key. Given as `auth`, it goes before what a ~/.netrc may say."""

    def __init__(self, key: str, header: str = "Authorization", before: str = "Bearer "):
        self.key, self.header, self.before = key, header, before

    def __call__(self, request):
        if self.key:
            request.headers[self.header] = self.before + self.key
        return request


def is_invalid_request(error: requests.RequestException) -> bool:
    """True for what no patience mends: an address, or a header, that cannot be one."""
    return isinstance(error, ValueError) and not isinstance(error, requests.JSONDecodeError)


def retry_delay(attempt: int, headers) -> float:
    """Seconds to wait before attempt 1, 2, ...: twice as long each time, or as long as the server asks for if that is
    longer; and a random share more, lest all workers come back at once."""
    wanted, seconds = (headers or {}).get("Retry-After", ""), 0.0
    try:
        seconds = float(wanted)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(wanted).timestamp() - time()
        except (ValueError, TypeError):
            pass
    asked = seconds if math.isfinite(seconds) else 0.0
    return min(max(2.0 ** (attempt - 1), asked), LONGEST_WAIT) * random.uniform(1.0, 1.5)
