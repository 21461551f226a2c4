"""sample.py as a user runs it: what it prints, where, and how it ends."""

import importlib
import io
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
from PIL import Image

from nanollava.infra.cli import one_line_errors
from nanollava.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture
def image(tmp_path):
    Image.new("RGB", (50, 40), "red").save(tmp_path / "cat.webp")
    return tmp_path / "cat.webp"


def test_only_the_reply_goes_to_standard_output(command, run_folder, image):
    code, out, error = command("sample", "--model", run_folder, "--image", image,
                               "--prompt", "What?", "--max-new-tokens", 5)
    assert code == 0 and out.endswith("\n") and error == ""


def test_several_prompts_make_one_conversation(command, run_folder, image, monkeypatch):
    import sample

    conversations = []

    def stream_reply(model, tokenizer, turns, *_):
        conversations.append([turn["value"] for turn in turns])
        return iter(["Yes", "."])

    monkeypatch.setattr(sample, "stream_reply", stream_reply)
    code, out, _ = command("sample", "--model", run_folder, "--image", image,
                           "--prompt", "A cat?", "--prompt", "Red?")
    assert (code, out) == (0, "Yes.\nYes.\n")
    assert conversations == [["<image>\nA cat?"], ["<image>\nA cat?", "Yes.", "Red?"]]


def test_chat_continues_after_a_reply_that_contains_the_image_token(command, run_folder, image,
                                                                    monkeypatch):
    monkeypatch.setattr(Tokenizer, "decode", lambda *_: "An <im<image>age>")
    code, out, error = command("sample", "--model", run_folder, "--image", image,
                               "--max-new-tokens", 1, "--prompt", "A cat?", "--prompt", "Red?")
    assert (code, error) == (0, "") and out == "An <im<image>age>\n" * 2


def test_without_prompt_each_line_of_standard_input_is_a_question(command, run_folder, image,
                                                                  monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("A cat?\n\nRed?\n"))
    code, out, _ = command("sample", "--model", run_folder, "--image", image,
                           "--max-new-tokens", 3)
    assert code == 0 and out.count("\n") >= 2


def test_chat_continues_after_a_question_that_contains_the_image_token(command, run_folder, image,
                                                                       monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("<image> A cat?\nRed?\n"))
    code, out, error = command("sample", "--model", run_folder, "--image", image,
                               "--max-new-tokens", 1)
    assert code == 0 and out.count("\n") == 1 and "must not contain <image>" in error


def test_same_seed_samples_the_same_reply(command, run_folder, image):
    arguments = ("sample", "--model", run_folder, "--image", image, "--prompt", "What?",
                 "--temperature", 1, "--max-new-tokens", 20, "--seed")
    assert command(*arguments, 1) == command(*arguments, 1) != command(*arguments, 2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_is_the_dtype_of_the_weights(command, run_folder, monkeypatch, dtype):
    import sample

    dtypes = set()

    def stream_reply(model, *_):
        dtypes.update(parameter.dtype for parameter in model.parameters())
        return iter(["Yes."])

    monkeypatch.setattr(sample, "stream_reply", stream_reply)
    code, *_ = command("sample", "--model", run_folder, "--prompt", "What?", "--dtype", dtype)
    assert code == 0 and {str(dtype) for dtype in dtypes} == {f"torch.{dtype}"}


def test_quantize_int8_quantizes_the_blocks(command, run_folder, monkeypatch):
    import sample

    sizes = []

    def stream_reply(model, *_):
        sizes.append(sum(weight.nbytes for weight in model.language_model.model.layers.buffers()))
        return iter(["Yes."])

    monkeypatch.setattr(sample, "stream_reply", stream_reply)
    code, *_ = command("sample", "--model", run_folder, "--prompt", "?", "--quantize", "int8")
    code, *_ = command("sample", "--model", run_folder, "--prompt", "?")
    int8 = 2 * (32 * (32 + 16 + 16 + 32) + 3 * 32 * 48)  # two blocks: attention, MLP
    scales = 2 * 2 * (32 + 16 + 16 + 32 + 48 + 48 + 32)
    assert code == 0 and sizes == [int8 + scales, 0]


def test_stage_1_model_is_announced(command, run_folder, model, tokenizer):
    model.config.stage = 1
    model.save_pretrained(run_folder, [tokenizer.path])
    _, _, error = command("sample", "--model", run_folder, "--prompt", "What?",
                          "--max-new-tokens", 2)
    assert "only been through stage 1" in error


# ---------------------------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize("arguments, message", [
    (["--image", "none.jpg"], "no image at none.jpg"),
    (["--image", "text.jpg"], "text.jpg is not an image"),
    (["--prompt", " "], "--prompt is empty"),
    (["--prompt", "<image>?"], "--prompt must not contain <image>"),
    (["--model", "nowhere"], "no model folder at nowhere"),
    (["--max-new-tokens", "0"], "--max-new-tokens"),
    (["--temperature", "nan"], "--temperature"),
    (["--device", "cuda:99"], "--device cuda:99"),
    (["--temperature", "1", "--top-p", "2"], "--top-p"),
    (["--device", "tpu"], "--device tpu"),
])
def test_user_error_is_one_line(error_of, run_folder, tmp_path, arguments, message):
    (tmp_path / "text.jpg").write_text("hello")
    assert message in error_of("sample", "--model", run_folder, "--prompt", "What?", *arguments)


def test_without_a_toy_run_the_error_says_how_to_make_one(error_of):
    assert "python train.py" in error_of("sample", "--prompt", "What?")


FLAGS = {
    "--image": "cat.jpg", "--prompt": "What?", "--model": "run", "--vision-tower": "clip",
    "--temperature": "0.7",
    "--top-p": "0.9", "--max-new-tokens": "5", "--seed": "1", "--dtype": "float32",
    "--device": "cpu", "--quantize": "int8", "--compile": None,
}
NEED_TEMPERATURE = {"--top-p", "--seed"}


@pytest.mark.parametrize("pair", list(combinations(FLAGS, 2)), ids=" ".join)
def test_pair_of_flags_acts_or_is_refused(pair, monkeypatch, capsys):
    words = [word for flag in pair for word in (flag, FLAGS[flag]) if word]
    monkeypatch.setattr(sys, "argv", ["sample.py", *words])
    parse = one_line_errors()(importlib.import_module("sample").parse_arguments)
    if NEED_TEMPERATURE & {*pair} and "--temperature" not in pair:
        with pytest.raises(SystemExit):
            parse()
        error = capsys.readouterr().err
        assert "has no effect with --temperature 0.0: it always takes the likeliest" in error
    else:
        assert parse().typed == {*pair}


def test_table_of_flags_is_complete(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sample.py"])
    settings = importlib.import_module("sample").parse_arguments().settings
    flags = {setting.split()[0] for setting in settings} - {"-h", "--help"}
    assert flags == {*FLAGS}


# ---------------------------------------------------------------------------------------------
# Start-up


def test_help_shows_examples_without_importing_torch():
    code = "import sys; sys.argv = ['sample.py', '--help']\n" \
           "try: exec(compile(open('sample.py').read(), 'sample.py', 'exec'))\n" \
           "finally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "    python sample.py --image cat.jpg" in done.stdout
    assert done.stdout.endswith("False\n")


def test_sampling_imports_neither_compiler_nor_distributed_checkpoints():
    """They take 1.5 seconds to import."""
    code = """if True:
        import sys, sample, torch
        from nanollava.llava import Llava
        Llava.from_parts("assets/toy-clip", "assets/toy-llama")
        slow = {"torch._dynamo", "torch.distributed.checkpoint"}
        sys.exit(" ".join(slow & sys.modules.keys()) or 0)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
