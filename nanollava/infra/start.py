"""The start of a command: standard streams, and the signals that end it.

Each command imports this file before all others, because they take seconds to import.
"""

import contextlib
import os
import signal
import sys

from .progress import print0


def start() -> None:
    """Begin a command. Until `interrupt` takes over, Ctrl-C ends it without a traceback."""
    if os.name != "posix":  # locks, signals and files that are replaced while open differ
        print0("error: nanollava runs on Linux and macOS; on Windows, use WSL, its Linux")
        sys.exit(2)
    for name, mode, errors in (("stdin", "r", "replace"), ("stdout", "w", "backslashreplace"),
                               ("stderr", "w", "backslashreplace")):
        if getattr(sys, name) is None:  # closed: the next file would take its place
            setattr(sys, name, open(os.devnull, mode))
        getattr(sys, name).reconfigure(errors=errors)  # what the encoding lacks is escaped
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, stop_at_once)


def stop_at_once(signum, frame) -> None:
    print0("stopped")
    os._exit(128 + signum)


def interrupt(signum, frame) -> None:
    """Raise KeyboardInterrupt in the main thread; but inside an import, which may swallow it, end
    the program."""
    caller = frame
    while caller:
        if caller.f_code.co_filename == "<frozen importlib._bootstrap>":
            stop_at_once(signum, frame)
        caller = caller.f_back
    raise KeyboardInterrupt(signum)


@contextlib.contextmanager
def on_stop_signals(handler):
    """Inside, Ctrl-C, `kill` and a terminal that closes call handler(signum, frame).

    A signal that is ignored, as SIGHUP under nohup, stays ignored.
    """
    signals = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    old_handlers = {signum: signal.signal(signum, handler) for signum in signals
                    if signal.getsignal(signum) is not signal.SIG_IGN}
    try:
        yield
    finally:
        for signum, old_handler in old_handlers.items():
            signal.signal(signum, old_handler)
