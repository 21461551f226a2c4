import signal

import pytest

from nanollava.infra.cli import (
    Parser,
    check_flags,
    format_table,
    one_line_errors,
    percent_table,
    positive,
)
from nanollava.infra.io import InputError

NEEDS = {"--top": ("--data", "--stage 2")}
CONFLICTS = {("--lr", "--stage 0"): "stage 0 has its own rate"}


def parse(*words):
    parser = Parser("A test.\n\n    example")
    parser.add_argument("--stage", type=int, default=0)
    parser.add_argument("--lr", type=positive(float))
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


def test_positive_rejects_zero_and_infinity():
    assert positive(int)("3") == 3
    for text in ("0", "-1", "inf", "nan"):
        with pytest.raises(ValueError):
            positive(float)(text)


def test_user_error_is_one_line_and_exit_code_2(capsys):
    with pytest.raises(SystemExit) as exit:
        with one_line_errors():
            raise InputError("row 3 is empty")
    assert exit.value.code == 2
    assert capsys.readouterr() == ("", "error: row 3 is empty\n")


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
    assert capsys.readouterr() == ("", "\nstopped\n")
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
