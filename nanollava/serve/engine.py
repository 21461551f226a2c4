"""One thread that runs the model for all requests, one after the other in the order of arrival.

A request is a job: a function that yields pieces of its result. The thread of the connection reads
the pieces and writes them to its client, so a slow client does not delay the next job. A job whose
client is gone is canceled, and ends before its next piece.
"""

import queue
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator

from ..infra.io import InputError
from .openai import RequestError

DONE = object()  # the last item of a job's results


class Job:
    def __init__(self, work: Callable[[], Iterable]):
        self.work = work
        self.results = queue.SimpleQueue()  # pieces, then DONE or an exception
        self.canceled = threading.Event()

    def pieces(self, check_client: Callable[[], None]) -> Iterator:
        """Yield the pieces as they come. Raises what the work raises.

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
        self.jobs, self.closing = queue.SimpleQueue(), False
        self.seconds = 1.0  # that a job takes, averaged over the last ones
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def submit(self, work: Callable[[], Iterable]) -> Job:
        job = Job(work)
        self.jobs.put(job)
        return job

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
            if self.closing:
                raise RequestError(503, "the server ends", kind="server_error")
            for piece in job.work():
                job.results.put(piece)
                if job.canceled.is_set():
                    break
            return DONE
        except (InputError, RequestError) as error:
            return error.with_traceback(None)  # its frames hold tensors
        except Exception:
            traceback.print_exc()
            return RequestError(500, "the server failed; its log says why", kind="server_error")

    def close(self, seconds: float) -> None:
        """End. The job under way has `seconds` to finish; those that wait get an error."""
        self.closing = True
        self.jobs.put(None)
        self.thread.join(seconds)
