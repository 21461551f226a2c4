"""prepare_data.py as a user runs it: output, files, the flags that it refuses."""

import json
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest

import prepare_data
from nanollava.infra.io import InputError
from nanollava.infra.json_io import read_json

ROOT = Path(__file__).parents[2]


def test_help_shows_examples(command):
    code, out, _ = command("prepare_data", "--help")
    assert code == 0 and "    python prepare_data.py toy" in out
    assert command("prepare_data") == (0, out, "")


def test_torch_is_imported_only_where_needed():
    """Importing torch takes seconds; most subcommands do not use it."""
    code = "import sys, prepare_data; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# ---------------------------------------------------------------------------------------------
# Flags without effect

# every optional flag of every subcommand, with a value; required arguments
FLAGS = {
    "toy": ({"--out": "x", "--seed": "1", "--scenes": "3"}, []),
    "toy-scienceqa": ({"--out": "x", "--seed": "1"}, []),
    "show": ({"--data": "x", "--row": "1", "--model": "x", "--template": "v0"}, []),
    "instruct": (
        {"--instances": "x", "--kind": "detail", "--base-url": "http://x", "--model": "x",
         "--workers": "2", "--limit": "2", "--max-tokens": "9", "--max-reply-tokens": "9",
         "--price": "1,2", "--timeout": "9", "--seed": "1", "--dry-run": None},
        ["--captions", "x", "--out", "x"]),
    "captions": ({"--balance": None, "--seed": "1"}, ["--captions", "x", "--out", "x"]),
    "scienceqa": ({"--split": "val", "--order": "answer-first"}, ["--data", "x", "--out", "x"]),
    "stats": ({}, ["x"]),
    "weights": ({"--revision": "x", "--out": "x"}, ["a/b"]),
    "gguf": ({"--type": "q8_0", "--class-token": "first", "--vision-tower": "x"},
             ["x", "--out", "x"]),
}
PAIRS = [(name, pair) for name, (flags, _) in FLAGS.items() for pair in combinations(flags, 2)]


def parse(monkeypatch, name, *flags):
    values, required = FLAGS[name]
    words = [word for flag in flags for word in (flag, values[flag]) if word is not None]
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", name, *required, *words])
    return prepare_data.parse_arguments()


def is_refused(name, *flags):
    """The expected behavior, written independently of the program's own table."""
    if name == "show":
        return "--row" in flags and "--data" not in flags
    return name == "instruct" and "--instances" in flags and "--kind" not in flags


@pytest.mark.parametrize("name, pair", PAIRS, ids=str)
def test_pair_of_flags_acts_or_is_refused(monkeypatch, name, pair):
    if not is_refused(name, *pair):
        parse(monkeypatch, name, *pair)
        return
    with pytest.raises(InputError, match="has no effect") as caught:
        parse(monkeypatch, name, *pair)
    assert any(flag in str(caught.value) for flag in pair)


def test_pairs_cover_every_flag(command):
    for name, (flags, required) in FLAGS.items():
        help_text = command("prepare_data", name, "--help")[1]
        options = {line.split()[0] for line in help_text.splitlines() if line.startswith("  --")}
        assert options == {*flags, *(word for word in required if word.startswith("--"))}


# ---------------------------------------------------------------------------------------------
# toy, show


def test_toy_world_is_drawn_once(command, error_of, tmp_path):
    arguments = "prepare_data", "toy", "--out", tmp_path / "toy", "--scenes", 3
    assert command(*arguments)[:2] == (0, f"{tmp_path / 'toy'}\n")
    assert len(read_json(tmp_path / "toy" / "pretrain.json")) == 3
    assert str(tmp_path / "toy") in error_of(*arguments)


def test_show_prints_a_row_of_data(command, world):
    code, out, error = command(
        "prepare_data", "show", "--data", world / "instruct.json", "--row", 0)
    assert (code, error) == (0, "")
    assert "\033[32m" in out and "\033[90m" in out and "</s>" in out


def test_show_without_data_draws_a_row_of_the_toy_world(command, tmp_path):
    code, out, error = command("prepare_data", "show")
    assert (code, error) == (0, "") and "\033[32m" in out and "[image]" in out
    assert list(tmp_path.iterdir()) == []


def test_show_refuses_a_row_that_does_not_exist(error_of, world, tmp_path):
    arguments = "prepare_data", "show", "--data", world / "instruct.json", "--row"
    assert "--row 10000: " in error_of(*arguments, 10_000)
    (tmp_path / "empty.json").write_text("[]")
    assert "no rows" in error_of("prepare_data", "show", "--data", "empty.json")
    (tmp_path / "broken.json").write_text('[{"conversations": []}]')
    assert "broken.json, row 0" in error_of("prepare_data", "show", "--data", "broken.json")


# ---------------------------------------------------------------------------------------------
# instruct


@pytest.fixture
def coco(tmp_path):
    """COCO files about forty images: --captions and --instances."""
    images = [{"id": number, "file_name": f"{number}.jpg", "width": 100, "height": 50}
              for number in range(40)]
    captions = [{"id": number, "image_id": number, "caption": f"Cat number {number}."}
                for number in range(40)]
    boxes = [{"id": number, "image_id": number, "category_id": 1, "bbox": [0, 0, 50, 50]}
             for number in range(40)]
    (tmp_path / "captions.json").write_text(json.dumps({"images": images, "annotations": captions}))
    (tmp_path / "instances.json").write_text(json.dumps(
        {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "cat"}]}))
    return tmp_path / "captions.json", tmp_path / "instances.json"


@pytest.fixture
def instruct(coco, server, tmp_path):
    """The start of a command that asks a server on this machine, which answers well."""
    server.reply = lambda body: (
        "Question:\nWhat?\n===\nAnswer:\n" + body["messages"][-1]["content"].splitlines()[0])
    return ("prepare_data", "instruct", "--captions", coco[0], "--out", tmp_path / "out.json",
            "--base-url", f"http://127.0.0.1:{server.server_port}/v1", "--model", "toy")


def test_instruct_pays_for_no_request_twice(command, instruct, coco, server, tmp_path):
    arguments = *instruct, "--kind", "reasoning", "--instances", coco[1]
    code, out, error = command(*arguments, "--limit", 30)
    assert (code, out) == (0, f"{tmp_path / 'out.json'}\n")
    assert "30 of 30 images have an answer" in error
    request = server.requests[-1]["messages"][-1]["content"]
    assert "Cat number" in request and "cat: [0.000, 0.000, 0.500, 1.000]" in request
    assert command(*arguments)[0] == 0 and len(server.requests) == 40
    rows = read_json(tmp_path / "out.json")
    assert [row["image"] for row in rows] == [f"{number}.jpg" for number in range(40)]
    assert rows[7]["conversations"][1]["value"] == "Cat number 7."
    before = (tmp_path / "out.json").read_bytes()
    assert command(*arguments)[0] == 0 and len(server.requests) == 40
    assert (tmp_path / "out.json").read_bytes() == before
    assert not any(b"sk-secret" in path.read_bytes() for path in tmp_path.glob("out*"))


def test_instruct_writes_paid_answers_when_the_run_fails(command, instruct, server, tmp_path):
    server.faults = [None] * 6 + [(429, {"message": "no credit", "code": "insufficient_quota"})]
    code, _, error = command(*instruct, "--workers", 1)
    assert code == 2 and "no credit" in error
    assert "6 of 40 images have an answer, 0 given up after 3 replies, 34 pending" in error
    assert len(read_json(tmp_path / "out.json")) == 6


def test_instruct_keeps_answers_in_flight_when_a_signal_stops_it(command, instruct, server,
                                                                 signal_in_flight, tmp_path):
    signum = signal_in_flight(4)
    code, out, error = command(*instruct, "--workers", 4)
    assert (code, out) == (128 + signum, "") and "waiting for 4 requests in flight" in error
    assert len(server.requests) == len(read_json(tmp_path / "out.json")) == 4


def test_instruct_keeps_one_kind_and_model_per_file(command, error_of, instruct, coco, tmp_path):
    arguments = *instruct, "--limit", 3
    assert command(*arguments)[0] == 0
    before = (tmp_path / "out.json").read_bytes()
    for change in (["--kind", "reasoning", "--instances", coco[1]], ["--model", "other"]):
        assert "another kind or model" in error_of(*arguments, *change)
    assert (tmp_path / "out.json").read_bytes() == before


def test_instruct_refuses_to_overwrite_a_file_without_a_ledger(command, error_of, instruct,
                                                               tmp_path):
    (tmp_path / "out.json").write_text("[]")
    assert "choose another --out" in error_of(*instruct)
    assert (tmp_path / "out.json").read_text() == "[]"


def test_instruct_continues_after_kill_9(command, instruct, server, tmp_path, monkeypatch):
    """A process of its own is killed after some answers; the next run requests only the rest."""
    arguments = [*map(str, instruct[1:]), "--workers", "3"]
    process = subprocess.Popen([sys.executable, ROOT / "prepare_data.py", *arguments],
                               stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    reply = server.reply

    def kill_at_10(body):
        if len(server.requests) >= 10:
            process.kill()
            process.wait()
        return reply(body)

    server.reply = kill_at_10
    process.wait(timeout=60)
    assert process.returncode == -9 and not (tmp_path / "out.json").exists()
    lines = (tmp_path / "out.json.ledger.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n")]
    server.reply = reply
    monkeypatch.setenv("OPENAI_API_KEY", "sk-second")  # tells the two runs apart
    assert command("prepare_data", *arguments)[0] == 0
    keys = [headers["Authorization"] for headers in server.headers]
    assert len(kept) >= 7  # at most the three in flight were lost
    assert keys.count("Bearer sk-second") == 40 - len(kept)
    assert len(read_json(tmp_path / "out.json")) == 40


def test_instruct_reports_failures_and_rejected_replies(command, instruct, server):
    bad_reply = {"choices": [{"message": {"content": "What?"}}]}
    server.faults = [(400, {"message": "too long for me"}), (200, bad_reply)]
    code, _, error = command(*instruct, "--workers", 1)
    assert code == 0
    assert error.startswith("first failure among the images: 400 too long for me\n")
    assert "39 of 40 images have an answer" in error and "1 failed: 400 too long for me" in error
    assert "1 rejected: a block does not begin with 'Question:'" in error


def test_instruct_stops_at_the_token_budget(command, instruct, tmp_path):
    code, _, error = command(*instruct, "--workers", 1, "--max-tokens", 30)  # 13 an answer
    assert code == 0 and "the budget of --max-tokens 30 is spent" in error
    assert len(read_json(tmp_path / "out.json")) == 3


def test_dry_run_needs_no_key_and_writes_nothing(command, error_of, coco, monkeypatch, tmp_path):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    arguments = ("prepare_data", "instruct", "--captions", coco[0], "--out",
                 tmp_path / "new" / "out.json")
    code, out, error = command(*arguments, "--dry-run", "--price", "30,60")
    assert code == 0 and out.count("[user]") == 3 and "Cat number 0." in out
    assert "40 of 40 images are pending: about" in error and "$" in error
    assert not (tmp_path / "new").exists()
    assert "OPENAI_API_KEY" in error_of(*arguments)


def test_dry_run_counts_what_the_ledger_lacks(command, instruct):
    dry_run = *instruct[:6], "--model", "toy", "--dry-run"
    command(*instruct, "--limit", 30)
    _, out, error = command(*dry_run)
    assert "10 of 40 images are pending" in error and "Cat number 30." in out
    command(*instruct)
    assert "0 of 40 images are pending: about 0 prompt and 0 completion" in command(*dry_run)[2]


@pytest.mark.parametrize("arguments, message", [
    (["--kind", "detail"], "--instances"),
    (["--price", "3"], "--price"),
    (["--base-url", "localhost"], "--base-url"),
    (["--captions", "none.json"], "none.json"),
    (["--out", "."], "--out: cannot write ."),
])
def test_mistake_in_instruct_is_one_line(error_of, coco, tmp_path, arguments, message):
    assert message in error_of("prepare_data", "instruct", "--captions", coco[0],
                               "--out", tmp_path / "out.json", *arguments)


# ---------------------------------------------------------------------------------------------
# captions, stats, scienceqa


def test_captions_become_rows_that_stats_counts(command, coco, tmp_path):
    code, out, error = command("prepare_data", "captions", "--captions", coco[0],
                               "--out", tmp_path / "pretrain.json")
    assert code == 0 and "40 of 40 captions" in error
    code, out, error = command("prepare_data", "stats", tmp_path / "pretrain.json")
    assert code == 0 and out.split()[:2] == ["rows", "40"] and error == ""


def test_stats_names_unusable_rows(command, tmp_path):
    (tmp_path / "data.json").write_text('[{"conversations": []}]')
    code, out, error = command("prepare_data", "stats", "data.json")
    assert code == 0 and error.startswith("data.json, row 0: ")


def test_scienceqa_writes_rows_that_train(command, parts, world, tmp_path):
    from tests.benchmarks.test_scienceqa import COMET, NOUN

    (tmp_path / "test" / "7").mkdir(parents=True)
    image = world / "images" / "train_000000.png"
    (tmp_path / "test" / "7" / "image.png").write_bytes(image.read_bytes())
    (tmp_path / "problems.json").write_text(json.dumps({"7": COMET, "8": NOUN}))
    (tmp_path / "pid_splits.json").write_text(json.dumps({"test": ["7", "8"]}))
    code, out, error = command("prepare_data", "scienceqa", "--data", tmp_path, "--split", "test",
                               "--out", "sqa.json")
    assert (code, out) == (0, "sqa.json\n") and "2 problems, 1 with an image" in error
    code, *_ = command("train", "--stage", 2, *parts, "--data", "sqa.json", "--images", tmp_path,
                       "--out", "run")
    assert code == 0


def test_captions_reports_what_it_leaves_out(command, coco, tmp_path):
    content = read_json(coco[0])
    content["annotations"].append({"image_id": 10**6, "caption": "A cat."})
    coco[0].write_text(json.dumps(content))
    _, _, error = command("prepare_data", "captions", "--captions", coco[0], "--out", "out.json")
    assert "left out: 1 annotations of images that are not listed\n" in error


# ---------------------------------------------------------------------------------------------
# gguf


@pytest.fixture
def run_folder(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path / "run", [tokenizer.path])
    return tmp_path / "run"


def test_gguf_writes_two_files_once(command, error_of, run_folder, tmp_path):
    arguments = "prepare_data", "gguf", run_folder, "--out", tmp_path / "gguf", "--type", "q8_0"
    assert command(*arguments) == (0, f"{tmp_path / 'gguf'}\n", "")
    files = {path.name: path.stat().st_size for path in (tmp_path / "gguf").iterdir()}
    assert files.keys() == {"model.gguf", "mmproj.gguf"}
    assert "gguf exists already" in error_of(*arguments)


def test_gguf_refuses_what_is_no_llava(error_of, run_folder, tmp_path):
    arguments = "--out", tmp_path / "gguf"
    assert "no model folder at nowhere" in error_of("prepare_data", "gguf", "nowhere", *arguments)
    llama = ROOT / "assets" / "toy-llama"
    assert "toy-llama" in error_of("prepare_data", "gguf", llama, *arguments)
    (run_folder / "tokenizer.model").unlink()
    assert "no tokenizer at" in error_of("prepare_data", "gguf", run_folder, *arguments)
    assert not (tmp_path / "gguf").exists()


def test_gguf_leaves_nothing_on_a_full_disk(error_of, run_folder, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nanollava.weights.gguf_io.encode", fail)
    error = error_of("prepare_data", "gguf", run_folder, "--out", tmp_path / "gguf")
    assert error.endswith("gguf: No space left on device\n")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
