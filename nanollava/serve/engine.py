"""One thread that runs the model for all requests, one after the other in the order of arrival.

A request is a job: a function that yields pieces of its result. The thread of the connection reads
the pieces and writes them to its client, so a slow client does not delay the next job. A job whose
client is gone is canceled, and ends before its next piece.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator

from .openai import RequestError, as_request_error

DONE = object()  # the last item of a job's results


class Job:
    def __init__(self, work: Callable[[], Iterable]):
        self.work = work
        self.results = queue.SimpleQueue()  # pieces, then DONE or an exception
        self.canceled = threading.Event()

    def pieces(self, check_client: Callable[[], None]) -> Iterator:
        """Yield the pieces as they come. Raises RequestError if the work fails.

        check_client is called before each piece and while there is none. If it raises an error, or
        the caller stops reading, the job is canceled.
        """
        try:
            while True:
                check_client()
                try:
                    piece = self.results.get(timeout=0.1)
                except queue.Empty:
                    continue
                if piece is DONE:
                    return
                if isinstance(piece, Exception):
                    raise piece
                yield piece
        finally:
            self.canceled.set()


class Engine:
    def __init__(self):
        self.jobs, self.closing, self.lock = queue.SimpleQueue(), False, threading.Lock()
        self.seconds = 1.0  # that a job takes, averaged over the last ones
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def submit(self, work: Callable[[], Iterable]) -> Job:
        """Raises RequestError if the engine ends."""
        job = Job(work)
        with self.lock:  # no job comes after the end
            self.check_open()
            self.jobs.put(job)
        return job

    def check_open(self) -> None:
        if self.closing:
            raise RequestError(503, "the server is shutting down", kind="server_error")

    def seconds_to_wait(self) -> int:
        """An estimate for a job that comes now."""
        return max(1, round(self.seconds * (self.jobs.qsize() + 1)))

    def run(self) -> None:
        while job := self.jobs.get():
            start = time.perf_counter()
            if not job.canceled.is_set():
                job.results.put(self.result_of(job))
                self.seconds += 0.3 * (time.perf_counter() - start - self.seconds)

    def result_of(self, job: Job) -> object:
        """Run a job. Returns DONE or its error."""
        try:
            self.check_open()
            for piece in job.work():
                job.results.put(piece)
                if job.canceled.is_set():
                    break
            return DONE
        except Exception as error:
            return as_request_error(error)

    def close(self, seconds: float) -> None:
        """End. The job under way has `seconds` to finish; those that wait get an error."""
        with self.lock:
            self.closing = True
            self.jobs.put(None)
        self.thread.join(seconds)
