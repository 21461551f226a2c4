from email.utils import formatdate
from time import time

import pytest
import requests

from nanollava.infra import http
from nanollava.infra.io import InputError


@pytest.fixture(autouse=True)
def no_jitter(monkeypatch):
    monkeypatch.setattr(http.random, "uniform", lambda low, high: low)


def test_delay_doubles_with_each_attempt_up_to_an_hour():
    delays = [http.retry_delay(attempt, None, "hub") for attempt in (1, 2, 3, 20)]
    assert delays == [1, 2, 4, 3600]


@pytest.mark.parametrize("value, delay", [
    ("7", 7), ("0.5", 4), ("-5", 4), ("1e9", 3600), ("inf", 4), ("nan", 4), ("soon", 4), ("", 4),
])
def test_retry_after_can_only_lengthen_the_delay(value, delay):
    assert http.retry_delay(3, {"Retry-After": value}, "hub") == delay


def test_retry_after_may_be_a_date():
    delay = http.retry_delay(1, {"Retry-After": formatdate(time() + 60, usegmt=True)}, "hub")
    assert 55 < delay <= 60


def test_jitter_adds_up_to_half(monkeypatch):
    monkeypatch.setattr(http.random, "uniform", lambda low, high: high)
    assert http.retry_delay(3, None, "hub") == 6


def test_only_a_long_delay_is_printed(capsys):
    http.retry_delay(1, {"Retry-After": "59"}, "the hub")
    assert capsys.readouterr().err == ""
    http.retry_delay(1, {"Retry-After": "2000"}, "the hub")
    assert capsys.readouterr().err.strip() == "waiting 33:20 before the next request to the hub"


def test_key_is_read_without_its_line_break_and_never_shown(monkeypatch):
    monkeypatch.delenv("SOME_KEY", raising=False)
    assert http.read_api_key("SOME_KEY") == ""
    monkeypatch.setenv("SOME_KEY", " sk-secret\n")
    assert http.read_api_key("SOME_KEY") == "sk-secret"
    monkeypatch.setenv("SOME_KEY", "sk-\u201csecret")
    with pytest.raises(InputError, match="SOME_KEY has characters that no key has") as caught:
        http.read_api_key("SOME_KEY")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("text, hidden", [
    ("no access with sk-secret", "no access with [hidden]"),
    ("the password p@ss:word is wrong", "the password [hidden] is wrong"),
    ("http://me:other@host/v1 refused", "http://host/v1 refused"),
    ("http://token@host/v1 refused", "http://host/v1 refused"),
    ("for url: /file?X-Amz-Signature=abc&X-Amz-Date=1 (gone)", "for url: /file?[hidden] (gone)"),
    ("no key letmein,\n  no entry", "no key [hidden], no entry"),
    ("Is it a cat? Yes.", "Is it a cat? Yes."),
])
def test_secrets_are_hidden_in_messages(text, hidden):
    address = http.parse_address("https://me:p%40ss%3Aword@host/v1?key=letmein&v=1", "HF_ENDPOINT")
    secrets = http.find_secrets("sk-secret", address)
    assert http.hide(text, secrets) == hidden
    with pytest.raises(InputError) as caught, http.secrets_hidden(secrets):
        raise InputError(text)
    assert str(caught.value) == hidden


@pytest.mark.parametrize("encoding, blocks, size", [
    ("", 64, 1 << 20), ("gzip", 64, 1 << 20), ("", 65, None), ("gzip, gzip", 1, None)])
def test_body_is_read_up_to_a_limit(monkeypatch, encoding, blocks, size):
    class Reply:
        url, headers = "http://host/v1", {"Content-Encoding": encoding}

        def iter_content(self, length):
            return (bytes(length) for _ in range(blocks))

    monkeypatch.setattr(http, "MAX_BODY", 1 << 20)
    if size:
        assert len(http.read_body(Reply())) == size
        return
    with pytest.raises(InputError, match="http://host/v1 sends more than 1 MB"):
        http.read_body(Reply())


def test_key_replaces_netrc_credentials(monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("machine example.org login me password other")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))

    def headers(auth):
        request = requests.Request("GET", "http://example.org", auth=auth)
        return requests.Session().prepare_request(request).headers

    assert headers(None)["Authorization"].startswith("Basic ")
    assert headers(http.BearerAuth("sk"))["Authorization"] == "Bearer sk"
    assert headers(http.BearerAuth("sk", "api-key", ""))["api-key"] == "sk"
    assert "Authorization" not in headers(http.BearerAuth(""))


@pytest.mark.parametrize("url", ["example.org", "http://", "http://[1", "nothing://example.org"])
def test_invalid_address_is_not_worth_a_retry(url):
    with pytest.raises(requests.RequestException) as caught:
        requests.get(url)
    assert http.is_invalid_request(caught.value)


def test_broken_connection_and_broken_reply_are_worth_a_retry():
    assert not http.is_invalid_request(requests.ConnectionError("reset"))
    assert not http.is_invalid_request(requests.JSONDecodeError("no JSON", "", 0))
