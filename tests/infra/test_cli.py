import argparse
import errno
import os
import re
import signal
import subprocess
import sys

import pytest
import torch

from nanollava.infra import cli
from nanollava.infra.cli import (
    Parser,
    check_flags,
    format_table,
    in_range,
    one_line_errors,
    percent_table,
)
from nanollava.infra.io import InputError

NEEDS = {"--top": ("--data", "--stage 2")}
CONFLICTS = {("--lr", "--stage 0"): "stage 0 has its own rate"}


def parse(*words):
    parser = Parser("A test.\n\n    example")
    parser.add_argument("--stage", type=int, default=0)
    parser.add_argument("--lr", type=in_range(0.001, 10.0))
    parser.add_argument("--top", action="store_true")
    parser.add_argument("--data")
    return parser.parse_args(words)


@pytest.mark.parametrize("words", [
    (), ("--stage", "1", "--lr=1"), ("--top", "--data", "x"), ("--top", "--stage=2")])
def test_flags_that_act_are_accepted(words):
    check_flags(parse(*words), NEEDS, CONFLICTS)


@pytest.mark.parametrize("words, message", [
    (("--lr", "1"), "--lr has no effect with --stage 0: stage 0 has its own rate"),
    (("--lr=1", "--stage=0"), "--lr has no effect with --stage 0"),
    (("--top",), "--top has no effect without --data or --stage 2"),
])
def test_flags_without_effect_are_refused(words, message):
    with pytest.raises(InputError, match=message):
        check_flags(parse(*words), NEEDS, CONFLICTS)


def test_flags_of_a_subcommand_are_seen():
    parser = Parser("Commands.")
    commands = parser.add_subparsers(parser_class=lambda **options: Parser("One.", **options))
    commands.add_parser("one").add_argument("--lr", default=3)
    arguments = parser.parse_args(["one", "--lr", "4"])
    assert arguments.typed == {"--lr"} and "--lr 4" in arguments.settings


@pytest.mark.parametrize("limits, good, bad, words", [
    ((1, 5000), ["1", "5000"], ["0", "-1", "5001", "1.5", "", "x", "1e3", "9" * 5000],
     "is not a whole number from 1 to 5,000"),
    ((0.5, 10.0), ["0.5", "1e1"], ["0", "1e-320", "11", "inf", "-inf", "nan", "1e308", "x"],
     "is not a number from 0.5 to 10"),
    ((0.5, 10.0, 0), ["0", "0.0", "3"], ["0.1", "-1", "nan"], "is not 0 or a number from 0.5"),
])
def test_number_outside_its_range_is_refused_with_the_range(limits, good, bad, words):
    convert = in_range(*limits)
    for text in good:
        assert type(convert(text)) is type(limits[0]) and convert(text) == float(text)
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=re.escape(f"'{text}' {words}")):
            convert(text)


WORKER = ("Caught {0} in DataLoader worker process 0.\nOriginal Traceback (most recent call "
          "last):\n  File \"data.py\", line 7\n{0}: ")


@pytest.mark.parametrize("error, line", [
    (InputError("row 3 is empty"), "row 3 is empty"),
    (InputError("no \x1b[2J\n\u2028\udcff.png"), r"no \x1b[2J\n\u2028\udcff.png"),
    (InputError(WORKER.format("nanollava.infra.io.InputError") + "no a.png"), "no a.png"),
    (OSError(errno.ENOSPC, "No space", "a.json"), "a.json: No space"),
    (OSError(WORKER.format("OSError") + "unreadable"), "input or output: OSError: unreadable"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
     "DataLoader worker (pid 7) is killed by signal: Killed: if memory is short, lower --workers"),
])
def test_error_of_the_user_or_the_system_is_one_line(capsys, error, line):
    with pytest.raises(SystemExit) as exit:
        with one_line_errors():
            raise error
    assert exit.value.code == 2
    assert capsys.readouterr() == ("", f"error: {line}\n")


GPU = ("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 15.77 GiB of "
       "which 1.04 GiB is free.\nSee documentation for Memory Management")
MPS = ("MPS backend out of memory (MPS allocated: 9.05 GB, max allowed: 9.07 GB). Tried to "
       "allocate 1.00 GB on private pool.")
CPU = ("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: "
       "you tried to allocate 4096 bytes. Error code 12 (Cannot allocate memory)")


@pytest.mark.parametrize("error, line", [
    (torch.OutOfMemoryError(GPU), "the GPU's memory is full, 2.00 GiB more did not fit"),
    (RuntimeError(MPS), "the GPU's memory is full, 1.00 GB more did not fit"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
     "the GPU's memory is full"),
    (RuntimeError(CPU), "the memory is full, 4096 bytes more did not fit"),
    (RuntimeError(WORKER.format("RuntimeError") + CPU),
     "the memory is full, 4096 bytes more did not fit"),
    (MemoryError(), "the memory is full"),
])
def test_full_memory_is_one_line_that_says_what_to_do(capsys, error, line):
    with pytest.raises(SystemExit) as exit:
        with one_line_errors("lower --batch-size"):
            raise error
    assert exit.value.code == 2
    assert capsys.readouterr() == ("", f"error: {line}: lower --batch-size\n")


def test_message_of_torch_says_that_memory_is_full():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60, dtype=torch.uint8)
    assert cli.memory_error(error.value) == \
        "the memory is full, 1152921504606846976 bytes more did not fit"


@pytest.mark.parametrize("rank, error", [
    ("0", InputError("row 3 is empty")), ("1", InputError("row 3 is empty")),
    ("0", RuntimeError("Connection closed by peer")), ("1", RuntimeError("Connection closed"))])
def test_only_rank_0_reports_its_mistake_at_once(monkeypatch, capsys, rank, error):
    """torchrun ends the others while they wait."""
    waits = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(cli, "IS_RANK0", rank == "0")
    monkeypatch.setattr(cli.time, "sleep", waits.append)
    monkeypatch.setattr(cli.os, "_exit", sys.exit)  # a normal exit would wait for other ranks
    with pytest.raises(SystemExit):
        with one_line_errors():
            raise error
    assert str(error) in capsys.readouterr().err
    assert bool(waits) == (rank == "1" or isinstance(error, RuntimeError))


START = "from nanollava.infra.start import print0, signal, start, sys; start()\n"


@pytest.mark.parametrize("code, closed, environment, result", [
    # closed standard streams: the output goes nowhere, and no file takes their place
    ("print(len(sys.stdin.read())); print0('x')", (0,), {}, (0, "0\n", "x\n")),
    ("print('x'); print0('y')", (1,), {}, (0, "", "y\n")),
    ("print('x'); print0('y')", (2,), {}, (0, "x\n", "")),
    ("print(open(__file__).fileno() > 2)", (0, 2), {}, (0, "True\n", "")),
    # an encoding without the character
    ("print('\u2581 \udcff'); print0('\u2581')", (), {"PYTHONIOENCODING": "ascii"},
     (0, "\\u2581 \\udcff\n", "\\u2581\n")),
    # input that is not UTF-8
    ("print(ascii(sys.stdin.readline()))", (), {"PYTHONUTF8": "1"}, (0, "'\\ufffd'\n", "")),
    # Ctrl-C before main
    ("signal.raise_signal(signal.SIGINT)", (), {}, (130, "", "stopped\n")),
])
def test_start_prepares_streams_and_ctrl_c(tmp_path, code, closed, environment, result):
    script = tmp_path / "script.py"
    script.write_text(START + code.encode("unicode_escape").decode())
    done = subprocess.run(
        [sys.executable, script], input=b"\xff", capture_output=True,
        env=os.environ | {"PYTHONPATH": os.getcwd()} | environment,
        preexec_fn=lambda: [os.close(descriptor) for descriptor in closed])
    assert (done.returncode, done.stdout.decode(), done.stderr.decode()) == result


def test_windows_is_refused_in_one_line():
    code = "import os; os.name = 'nt'; from nanollava.infra.start import start; start()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == ("error: nanollava runs on Linux and macOS; on Windows, use WSL, its "
                           "Linux\n")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has it")
@pytest.mark.parametrize("target, result", [
    ("/dev/full", (2, "error: input or output: No space left on device\n")),
    ("closed pipe", (141, "")),
])
def test_output_that_cannot_be_written_is_reported(target, result):
    code = "from nanollava.infra.cli import *\nwith one_line_errors(): print('x')"
    reader, writer = os.pipe()
    os.close(reader)
    with open(target if target == "/dev/full" else writer, "w") as stdout:
        done = subprocess.run([sys.executable, "-c", code], stdout=stdout, stderr=subprocess.PIPE,
                              text=True)
    assert (done.returncode, done.stderr) == result


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_signal_ends_a_command_as_ctrl_c_does(capsys, monkeypatch, name):
    signum = getattr(signal, name)
    before = signal.signal(signum, signal.default_int_handler)  # some shells ignore it
    kept = []
    with pytest.raises(SystemExit) as exit:
        with one_line_errors():
            try:
                signal.raise_signal(signum)
            except KeyboardInterrupt:
                kept.append("what there is")
                raise
    assert (exit.value.code, kept) == (128 + signum, ["what there is"])
    assert capsys.readouterr() == ("", "stopped\n")
    assert signal.signal(signum, before) is signal.default_int_handler


def test_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    with one_line_errors():
        signal.raise_signal(signal.SIGHUP)
    assert signal.signal(signal.SIGHUP, before) is signal.SIG_IGN


def test_table_aligns_numbers_right_and_fills_short_rows():
    text = format_table(["kind", "here", "paper"], [["all", "7.2%", "88%"], ["counts", "100.0%"]])
    assert text == (
        "kind       here   paper\n"
        "all        7.2%     88%\n"
        "counts   100.0%")


def test_percent_table_leaves_missing_cells_empty():
    lines = percent_table({"one": {"kind": 50.0, "all": 80.0}, "other": {"all": 7.25}}).splitlines()
    assert lines[0].split() == ["one", "other"]
    assert lines[1].split() == ["kind", "50.0%"]
    assert lines[2].split() == ["all", "80.0%", "7.2%"]
