"""Ask a LLaVA about images, section 5.1 of the paper. The reply is printed as it is generated.

    python sample.py --image cat.jpg               # a chat about the toy world's cat
    python sample.py --image cat.jpg --prompt "What color is the cat?"
    python sample.py --image cat.jpg --prompt "Is there a cat?" --prompt "Where is the cat?"
    python sample.py --model llava-1.5-7b-hf --image photo.jpg --prompt "What is unusual here?"
"""

from nanollava.infra.start import start

if __name__ == "__main__":
    start()  # before other imports, which take long

import sys
from pathlib import Path

from nanollava.conversation import IMAGE_TOKEN
from nanollava.infra.cli import (LESS_MEMORY, Parser, check_flags, in_range, one_line_errors,
                                 seed)
from nanollava.infra.io import InputError
from nanollava.infra.progress import print0
from nanollava.settings import add_llava_flags, find_toy_model

GREEDY = "--temperature 0.0"  # the default
NO_SAMPLING = "it always takes the likeliest token; set a higher --temperature to sample"
CONFLICTS = {("--top-p", GREEDY): NO_SAMPLING, ("--seed", GREEDY): NO_SAMPLING}


def parse_arguments():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--image", type=Path, action="append", default=[],
        help="image file; several are shown in this order")
    add("--prompt", action="append",
        help="question; several make a conversation (default: questions from standard input)")
    add_llava_flags(add, help="folder of a LLaVA (default: runs/toy/stage2)")
    add("--temperature", type=in_range(0.001, 100.0, 0), default=0.0,
        help="0 takes the likeliest token, 1 samples from the model's distribution (default: 0)")
    add("--top-p", type=in_range(0.0, 1.0), default=1.0,
        help="sample from the likeliest tokens up to this total probability (default: 1)")
    add("--max-new-tokens", type=in_range(1, 1_000_000), default=512,
        help="maximum length of a reply (default: %(default)s)")
    add("--seed", type=seed, help="random seed of sampling")
    add("--compile", action="store_true", help="compile the blocks: faster after some minutes")
    arguments = parser.parse_args()
    check_flags(arguments, {}, CONFLICTS)
    for prompt in arguments.prompt or []:
        if not prompt.strip():
            raise InputError("--prompt is empty")
        if IMAGE_TOKEN in prompt:
            raise InputError(f"--prompt must not contain {IMAGE_TOKEN}; --image gives the images")
    return arguments


if __name__ == "__main__":  # before torch is imported, which takes seconds
    with one_line_errors():
        arguments = parse_arguments()

import torch

from nanollava.chat import ChatCache, open_llava, stream_reply
from nanollava.image import open_image
from nanollava.infra.device import compile_blocks


def main(arguments) -> None:
    files = [open_image(path) for path in arguments.image]
    folder = arguments.model or find_toy_model()
    model, tokenizer = open_llava(folder, arguments.dtype, arguments.device,
                                  arguments.vision_tower, arguments.quantize)
    if arguments.compile:
        compile_blocks(model)
    if model.config.stage == 1:
        print0(f"{folder} has only been through stage 1: it captions images, but hardly converses")
    if arguments.seed is not None:
        torch.manual_seed(arguments.seed)

    images = [model.config.preprocess(file) for file in files]  # (3, H, W) each
    turns, cache = [], ChatCache(model)
    for question in arguments.prompt or read_questions():
        if not turns:  # the images come before the first question
            question = f"{IMAGE_TOKEN}\n" * len(images) + question
        turns.append({"from": "human", "value": question})
        reply = ""
        for piece in stream_reply(model, tokenizer, turns, images, arguments.max_new_tokens,
                                  arguments.temperature, arguments.top_p, cache):
            print(piece, end="", flush=True)
            reply += piece
        print()
        # <image> in a reply is text that the model made up, not the place of an image
        turns.append({"from": "gpt", "value": reply.replace(IMAGE_TOKEN, "image")})


def read_questions():
    """Yield the lines of standard input, with a prompt if it is a terminal."""
    interactive = sys.stdin.isatty()
    if interactive:
        print0("Ask a question; Ctrl-D ends the chat.")
    while True:
        if interactive:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:  # the end of the input
            if interactive:
                print0("")
            return
        if IMAGE_TOKEN in line:
            print0(f"a question must not contain {IMAGE_TOKEN}; --image gives the images")
        elif line.strip():
            yield line.strip()


if __name__ == "__main__":
    with one_line_errors(LESS_MEMORY):
        main(arguments)
