"""Ask a LLaVA about pictures, section 5.1 of the paper. The reply goes to standard output as it is made.

    python sample.py --image cat.jpg                                    # a chat about the toy world's cat
    python sample.py --image cat.jpg --prompt "What color is the cat?"
    python sample.py --image cat.jpg --prompt "How many cats are there?" --prompt "Where is the cat?"
    python sample.py --model llava-1.5-7b-hf --image photo.jpg --prompt "What is unusual about this picture?"
"""

import sys
from pathlib import Path

from nanollava.infra.cli import Parser, one_line_errors, positive, seed
from nanollava.infra.io import InputError
from nanollava.infra.progress import print0

TOY = Path("runs/toy")


def parse_arguments():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--image", type=Path, action="append", default=[], help="a picture; several are shown in the order given")
    add("--prompt", action="append", help="a question; several make a conversation; none: a chat, or a question a line")
    add("--model", type=Path, help="folder of a LLaVA (default: the toy run, runs/toy/stage2)")
    add("--temperature", type=float, default=0.0, help="0: the likeliest token; 1: as the model believes (default: 0)")
    add("--top-p", type=float, default=1.0, help="draw from the likeliest tokens up to this probability (default: 1)")
    add("--max-new-tokens", type=positive(int), default=512, help="longest reply (default: %(default)s)")
    add("--seed", type=seed, help="the same seed draws the same reply")
    add("--dtype", choices=("float32", "bfloat16"), help="of weights and arithmetic (default: bfloat16 where fast)")
    add("--device", help="cuda, mps or cpu (default: the first that is there)")
    add("--compile", action="store_true", help="let torch.compile make the blocks faster; that takes minutes at first")
    return parser.parse_args()


if __name__ == "__main__":
    parse_arguments()  # now, for torch takes seconds: --help and mistakes are answered at once

import torch

from nanollava.chat import open_llava, stream
from nanollava.conversation import IMAGE_TOKEN
from nanollava.image import open_image, preprocess
from nanollava.infra.device import best_device, best_dtype


def main() -> None:
    arguments = parse_arguments()
    if not arguments.temperature >= 0 or not 0 <= arguments.top_p <= 1:
        raise InputError("--temperature must be 0 or more, and --top-p between 0 and 1")
    for prompt in arguments.prompt or []:
        check(prompt)
    pictures = [open_image(path) for path in arguments.image]
    folder = arguments.model or toy_run()
    device = best_device(arguments.device)
    model, tokenizer = open_llava(folder, best_dtype(device, arguments.dtype), device)
    if arguments.compile:
        model.compile_blocks()
    if model.config.stage == 1:
        print0(f"{folder} went through stage 1 only: it can caption, but hardly converse")
    if arguments.seed is not None:
        torch.manual_seed(arguments.seed)

    images = [preprocess(picture, model.config.image_size) for picture in pictures]
    turns, how = [], (arguments.max_new_tokens, arguments.temperature, arguments.top_p)
    for question in arguments.prompt or questions():
        marks = "" if turns else f"{IMAGE_TOKEN}\n" * len(images)
        turns.append({"from": "human", "value": marks + question})
        reply = ""
        for piece in stream(model, tokenizer, turns, images, *how):
            print(piece, end="", flush=True)
            reply += piece
        print()
        turns.append({"from": "gpt", "value": reply})


def toy_run() -> Path:
    """The toy world's model. Raises InputError, saying how to make one, where there is none."""
    for folder in (TOY / "stage2", TOY / "stage1"):
        if (folder / "config.json").is_file():
            return folder
    raise InputError(f"there is no model in {TOY} yet: `python train.py` makes one, or name another with --model")


def check(prompt: str) -> None:
    if not prompt.strip():
        raise InputError("--prompt is empty: ask something")
    if IMAGE_TOKEN in prompt:
        raise InputError(f"--prompt must not contain {IMAGE_TOKEN}: --image says where pictures come from")


def questions():
    """The lines of standard input, asked for on a terminal; empty ones are passed over."""
    if sys.stdin.isatty():
        print0("ask away; Ctrl-D ends")
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            if sys.stdin.isatty():
                print0("")
            return
        if IMAGE_TOKEN in line:
            print0(f"please ask without {IMAGE_TOKEN}: --image says where pictures come from")
        elif line.strip():
            yield line.strip()


if __name__ == "__main__":
    with one_line_errors():
        main()
