"""Jobs run one after the other; what happens when one fails, is canceled, or the engine ends."""

import threading
import weakref

import pytest

from nanollava.chat import TooLongError
from nanollava.infra.io import InputError
from nanollava.serve.engine import Engine
from nanollava.serve.openai import RequestError


@pytest.fixture
def engine():
    engine = Engine()
    yield engine
    engine.close(5)
    assert not engine.thread.is_alive()


def stay():
    """A client that stays."""


def failing(error):
    yield "begun"
    raise error


class Gate:
    """A job that begins, waits until it is opened, and goes on forever."""

    def __init__(self):
        self.begun, self.opened, self.ended = (threading.Event() for _ in range(3))

    def work(self):
        try:
            self.begun.set()
            assert self.opened.wait(5)
            while True:
                yield "more"
        finally:
            self.ended.set()


def test_pieces_arrive_in_order(engine):
    assert list(engine.submit(lambda: "a cat").pieces(stay)) == list("a cat")


def test_jobs_run_one_after_the_other_in_the_order_of_arrival(engine):
    steps = []

    def work(name):
        for step in range(3):
            steps.append((name, step))
            yield step

    jobs = [engine.submit(lambda name=name: work(name)) for name in range(20)]
    assert [list(job.pieces(stay)) for job in jobs] == [[0, 1, 2]] * 20
    assert steps == [(name, step) for name in range(20) for step in range(3)]


@pytest.mark.parametrize("error, status, code", [
    (RequestError(418, "no"), 418, None),
    (TooLongError("no"), 400, "context_length_exceeded"),
    (InputError("no"), 400, "image_parse_error"),
    (ValueError("no"), 500, None), (MemoryError(), 503, None), (OSError("no"), 500, None),
    (StopIteration(), 500, None)], ids=lambda value: type(value).__name__)
def test_error_of_a_job_reaches_its_client_and_the_next_job_runs(engine, capsys, error, status,
                                                                code):
    pieces = engine.submit(lambda: failing(error)).pieces(stay)
    assert next(pieces) == "begun"
    with pytest.raises(RequestError) as caught:
        next(pieces)
    assert (caught.value.status, caught.value.content["error"]["code"]) == (status, code)
    assert ("Traceback" in capsys.readouterr().err) == (status == 500)
    assert list(engine.submit(lambda: "next").pieces(stay)) == list("next")


@pytest.mark.parametrize("kind, arguments", [
    (InputError, ["no"]), (RequestError, [400, "no"]), (KeyError, ["no"])])
def test_error_that_is_sent_keeps_no_tensors_alive(engine, kind, arguments):
    class Tensor:
        pass

    deleted = threading.Event()

    def work():
        tensor = Tensor()
        tensor.finalizer = weakref.finalize(tensor, deleted.set)
        raise kind(*arguments)
        yield

    with pytest.raises(RequestError) as caught:
        list(engine.submit(work).pieces(stay))
    assert caught.value and deleted.wait(5)


def test_job_ends_at_the_next_piece_after_its_client_is_gone(engine):
    gate, is_gone = Gate(), threading.Event()

    def check_client():
        if is_gone.is_set():
            raise ConnectionResetError

    pieces = engine.submit(gate.work).pieces(check_client)
    gate.opened.set()
    assert next(pieces) == "more"
    is_gone.set()
    with pytest.raises(ConnectionResetError):
        list(pieces)
    assert gate.ended.wait(5)


def test_client_that_is_gone_while_there_is_no_piece_is_noticed(engine):
    gate = Gate()

    def check_client():
        if gate.begun.is_set():
            raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        list(engine.submit(gate.work).pieces(check_client))
    gate.opened.set()
    assert gate.ended.wait(5)


def test_job_ends_when_its_pieces_are_no_longer_read(engine):
    gate = Gate()
    gate.opened.set()
    pieces = engine.submit(gate.work).pieces(stay)
    assert next(pieces) == "more"
    pieces.close()
    assert gate.ended.wait(5)


def test_job_that_is_canceled_while_it_waits_does_not_run(engine):
    first, steps = Gate(), []
    pieces = engine.submit(first.work).pieces(stay)
    waiting = engine.submit(lambda: steps.append("run") or ())
    waiting.canceled.set()
    first.opened.set()
    next(pieces)
    pieces.close()
    assert list(engine.submit(lambda: "last").pieces(stay)) == list("last") and not steps


def test_time_to_wait_grows_with_the_queue(engine):
    gate = Gate()
    running = engine.submit(gate.work)
    assert gate.begun.wait(5)
    engine.seconds = 10.0
    assert engine.seconds_to_wait() == 10
    waiting = engine.submit(lambda: ())
    assert engine.seconds_to_wait() == 20
    running.canceled.set()
    gate.opened.set()
    assert list(waiting.pieces(stay)) == []


def test_end_lets_the_job_under_way_finish_and_refuses_the_others():
    engine, gate = Engine(), Gate()
    running = engine.submit(lambda: yield_after(gate))
    assert gate.begun.wait(5)
    waiting = engine.submit(lambda: "never")
    closer = threading.Thread(target=engine.close, args=(5,))
    closer.start()
    while not engine.closing:
        pass
    with pytest.raises(RequestError, match="the server is shutting down"):
        engine.submit(lambda: "too late")
    gate.opened.set()
    assert list(running.pieces(stay)) == ["done"]
    with pytest.raises(RequestError) as caught:
        list(waiting.pieces(stay))
    assert caught.value.status == 503
    closer.join(5)
    assert not engine.thread.is_alive()


def yield_after(gate):
    gate.begun.set()
    assert gate.opened.wait(5)
    yield "done"


def test_end_does_not_wait_longer_than_it_says():
    engine, gate = Engine(), Gate()
    job = engine.submit(gate.work)
    assert gate.begun.wait(5)
    engine.close(0.01)
    assert engine.thread.is_alive()
    job.canceled.set()
    gate.opened.set()
    engine.thread.join(5)
