"""The chat page: it is safe to show any text, and in a browser it chats as the endpoint does."""

import base64
import json
import os
import re
import select
import shutil
import subprocess
import threading
import time

import pytest
import requests

from nanollava.chat import Usage
from nanollava.serve.replies import Replies
from nanollava.serve.server import PAGE, Server
from nanollava.settings import TOY_IMAGE

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
                None)
needs_browser = pytest.mark.skipif(not CHROMIUM or os.name != "posix",
                                   reason="needs Chromium and its pipe")
HOSTILE = "<img src=x onerror='hacked = 1'><script>hacked = 1</script> & </p>"


@pytest.fixture
def replies(model, tokenizer):
    """Replies of a random model; with `pieces` set, these instead. Requests are noted."""
    replies = Replies(model, tokenizer, "toy", 2**24)
    model.config.text.max_position_embeddings = 96  # replies are short
    reply, replies.pieces, replies.requests = replies.reply, None, []

    def note_and_reply(request):
        replies.requests.append(request)
        if replies.pieces is None:
            yield from reply(request)
        else:
            yield from replies.pieces
            yield Usage(10, 0, 2, "stop")

    replies.reply = note_and_reply
    return replies


@pytest.fixture
def server(replies):
    server = Server(("127.0.0.1", 0), replies, "", max_waiting=4)
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()
    server.engine.close(10)


class Browser:
    """Chromium without a window. Through a pipe it takes JSON messages that end with a zero."""

    def __init__(self, folder):
        # it reads from file 3 and writes to file 4
        self.process = subprocess.Popen(
            ["sh", "-c", 'exec "$@" 3<&0 4>&1 </dev/null >/dev/null', "sh", CHROMIUM, "--headless",
             "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync", f"--user-data-dir={folder}",
             "--remote-debugging-pipe"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0)
        self.rest, self.count, self.session = b"", 0, {}

    def call(self, method: str, **parameters) -> dict:
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters} | self.session
        self.process.stdin.write(json.dumps(message).encode() + b"\0")
        while (answer := self.read()).get("id") != self.count:
            pass  # an event
        assert "result" in answer, answer
        return answer["result"]

    def read(self) -> dict:
        while b"\0" not in self.rest:
            readable, _, _ = select.select([self.process.stdout], [], [], 60)
            assert readable, "the browser does not answer"
            piece = self.process.stdout.read(2**16)
            assert piece, "the browser has ended"
            self.rest += piece
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def open(self, url: str) -> None:
        """Open a page in a new tab, which is the one that `run` is about."""
        self.session = {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.call("Target.attachToTarget", targetId=target,
                                               flatten=True)["sessionId"]}
        self.call("Page.navigate", url=url)
        self.wait_for("document.readyState === 'complete'")

    def run(self, script: str):
        """The value of an expression in the page."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait_for(self, script: str) -> None:
        until = time.monotonic() + 30
        while not self.run(script):
            assert time.monotonic() < until, (script, self.run("document.body.innerText"))
            time.sleep(0.01)

    def ask(self, question: str, num_turns: int) -> None:
        """Ask, and wait until the chat has a number of turns, the last one with its reply."""
        self.run(f"$('question').value = {json.dumps(question)}; $('send').click()")
        self.wait_for(f"turns.length === {num_turns} && !running")

    def texts(self, selector: str) -> list[str]:
        return self.run(f"[...document.querySelectorAll('{selector}')].map(e => e.textContent)")

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()


# ---------------------------------------------------------------------------------------------
# Without a browser


def test_page_comes_with_a_policy_that_lets_it_load_nothing_and_talk_to_its_server_only(server):
    answer = requests.get(server.url, timeout=10)
    assert answer.content == PAGE.read_bytes()
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy


def test_page_names_no_other_site_and_never_makes_html_of_text():
    page = PAGE.read_text()
    assert not re.findall(r"https?:|//\w+\.|innerHTML|outerHTML|insertAdjacentHTML|setHTML|"
                          r"createContextualFragment|document\.write|\beval\b|Function\(|srcdoc",
                          page)


def test_page_is_small_enough_to_read():
    lines = PAGE.read_text().splitlines()
    assert len(lines) < 450 and max(map(len, lines)) <= 100


def test_example_image_is_served_if_there_is_one(server, monkeypatch, tmp_path):
    answer = requests.get(f"{server.url}/example.jpg", timeout=10)
    assert (answer.content, answer.headers["Content-Type"]) == (TOY_IMAGE.read_bytes(),
                                                                "image/jpeg")
    monkeypatch.setattr("nanollava.serve.server.TOY_IMAGE", tmp_path / "cat.jpg")
    assert requests.get(f"{server.url}/example.jpg", timeout=10).status_code == 404


# ---------------------------------------------------------------------------------------------
# In a browser


@needs_browser
def test_link_asks_about_the_example_and_the_page_shows_the_reply_of_the_endpoint(server, browser):
    url = "data:image/jpeg;base64," + base64.b64encode(TOY_IMAGE.read_bytes()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}},
               {"type": "text", "text": "What is there?"}]
    expected = requests.post(f"{server.url}/v1/chat/completions", timeout=30, json={
        "messages": [{"role": "user", "content": content}]}).json()["choices"][0]["message"]
    browser.open(f"{server.url}/#example&q=What+is+there%3F")
    browser.wait_for("document.querySelector('.note')?.textContent.startsWith('Prompt')")
    assert expected["content"].strip()
    assert browser.texts(".reply") == [expected["content"]]
    assert browser.texts(".asked") == ["What is there?"]
    assert browser.run("document.querySelector('.question img').src") == url


@needs_browser
def test_next_question_has_the_chat_before_it_and_may_bring_an_image(server, replies, browser):
    browser.open(server.url)
    replies.pieces = ["A ", "cat."]
    browser.ask("What is there?", 1)
    browser.run("$('example').click()")
    browser.wait_for("attached.length === 1")
    browser.ask("And here?", 2)
    assert replies.requests[-1].turns == [
        {"from": "human", "value": "What is there?"}, {"from": "gpt", "value": "A cat."},
        {"from": "human", "value": "<image>\nAnd here?"}]
    assert replies.requests[-1].images == [TOY_IMAGE.read_bytes()]


@needs_browser
def test_edited_question_replaces_its_turn_and_those_after_it(server, replies, browser):
    browser.open(server.url)
    replies.pieces = ["Yes."]
    for number, question in enumerate(["One?", "Two?", "Three?"], 1):
        browser.ask(question, number)
    browser.run("document.querySelectorAll('.edit')[1].click()")
    assert browser.run("$('question').value") == "Two?"
    browser.ask("2?", 2)
    assert browser.texts(".asked") == ["One?", "2?"]
    assert [turn["value"] for turn in replies.requests[-1].turns] == ["One?", "Yes.", "2?"]


@needs_browser
def test_stop_keeps_what_came_and_ends_the_computation(server, replies, browser):
    ended = threading.Event()

    def pieces():
        try:
            while True:
                time.sleep(0.01)
                yield "word "
        finally:
            ended.set()

    replies.pieces = pieces()
    browser.open(f"{server.url}/#q=Go")
    browser.wait_for("document.querySelector('.reply')?.textContent.length > 20")
    browser.run("$('stop').click()")
    browser.wait_for("!running")
    assert browser.texts(".note") == ["Stopped."]
    assert browser.texts(".reply")[0].startswith("word word ")
    assert ended.wait(10)


@needs_browser
def test_tags_in_question_and_reply_stay_text(server, replies, browser):
    replies.pieces = [HOSTILE]
    browser.open(server.url)
    browser.ask(HOSTILE, 1)
    assert browser.texts(".reply") == browser.texts(".asked") == [HOSTILE]
    assert browser.run("document.querySelectorAll('.reply *, .asked *').length") == 0
    assert browser.run("typeof hacked") == "undefined"


@needs_browser
def test_error_is_in_the_chat_with_a_key_field_or_a_retry(server, browser):
    server.key = "secret"
    browser.open(server.url)
    browser.ask("Hello?", 1)
    assert browser.texts(".turn .error") == ["The server asks for an API key."]
    browser.run("document.querySelector('.key input').value = 'secret';"
                "document.querySelector('.key button').click()")
    browser.wait_for("turns[0].reply && !running")
    assert browser.texts(".turn .error") == [""]
    browser.ask("word " * 200, 2)
    assert "the model reads at most 96" in browser.texts(".turn .error")[1]
    assert browser.texts(".again")[1] == "Retry"


@needs_browser
def test_image_in_the_chat_opens_as_the_words_of_its_patches(server, browser):
    browser.open(f"{server.url}/#example&q=What+is+there%3F")
    browser.wait_for("document.querySelector('.note')?.textContent.startsWith('Prompt')")
    browser.run("document.querySelector('.question img').click()")
    browser.wait_for("document.querySelectorAll('#grid button').length === 16")
    browser.run("document.querySelectorAll('#grid button')[5].click()")
    assert browser.texts("#words")[0].startswith("Row 2, column 2: ")
