"""Make the data that LLaVA is trained on (section 3 of the paper).

    python prepare_data.py toy                                 # draw the toy world: data/toy
    python prepare_data.py show                                # a row of the toy world as tokens
    python prepare_data.py show --data llava_instruct_150k.json --model vicuna-7b-v1.3 --row 7
    python prepare_data.py instruct --captions captions_train2017.json \\
        --kind conversation --limit 100 --out conversation.json      # needs OPENAI_API_KEY
    python prepare_data.py weights llava-hf/llava-1.5-7b-hf    # download public weights
    python prepare_data.py gguf runs/toy/stage2 --out gguf     # for llama.cpp
"""

from nanollava.infra.start import start

if __name__ == "__main__":
    start()  # before other imports, which take long

import random
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from nanollava import conversation
from nanollava.benchmarks import scienceqa
from nanollava.infra.cli import (Parser, add_command, check_flags, in_range, one_line_errors,
                                 out_file, out_folder, positive, seed)
from nanollava.infra.io import InputError, check_not_input
from nanollava.infra.json_io import read_json_list, write_json
from nanollava.infra.shapes import check_shape
from nanollava.infra.progress import print0
from nanollava.settings import add_vision_tower
from nanollava.teacher import prompts
from nanollava.teacher.api import OPENAI, Chat
from nanollava.teacher.captions import write_pretrain
from nanollava.teacher.coco import AnnotatedImage, read_coco
from nanollava.teacher.jobs import TRIES, Job
from nanollava.teacher.ledger import Ledger, dollars
from nanollava.tokenizer import Tokenizer
from nanollava.toy.dataset import random_row, write_world
from nanollava.toy.scienceqa import write_problems

ASSETS = Path(__file__).resolve().parent / "assets"

# A flag that has no effect is refused. {flag: the flags of which it needs one}
NEEDS = {"--row": ("--data",)}
# {(flag, other): why the flag has no effect together with the other}
CONFLICTS = {("--instances", "--kind conversation"): "conversations are made from captions alone"}


def parse_arguments():
    parser = Parser(__doc__)
    parser.set_defaults(run=lambda arguments: parser.print_help())
    commands = parser.add_subparsers(metavar="COMMAND", parser_class=Parser)
    for name, (add_arguments, run) in COMMANDS.items():
        command = add_command(commands, name, run.__doc__)
        command.set_defaults(run=run)
        add_arguments(command.add_argument)
    arguments = parser.parse_args()
    check_flags(arguments, NEEDS, CONFLICTS)
    return arguments


def main(arguments) -> None:
    arguments.run(arguments)


def add_toy_arguments(add) -> None:
    add("--out", type=out_folder, default=Path("data/toy"),
        help="folder to write (default: %(default)s)")
    add("--seed", type=seed, default=0, help="draws the scenes (default: %(default)s)")
    add("--scenes", type=in_range(1, 1_000_000), default=8000,
        help="number of training images (default: %(default)s)")


def draw_toy_world(arguments) -> None:
    """Draw the toy world: images, captions, boxes, conversations, a test."""
    write_world(arguments.out, arguments.seed, arguments.scenes)
    print(arguments.out)


def add_toy_scienceqa_arguments(add) -> None:
    add("--out", type=out_folder, default=Path("data/toy-scienceqa"),
        help="folder to write (default: %(default)s)")
    add("--seed", type=seed, default=0, help="draws the problems (default: %(default)s)")


def draw_toy_problems(arguments) -> None:
    """Draw a ScienceQA of the toy world: problems, splits, images."""
    write_problems(arguments.out, arguments.seed)
    print(arguments.out)


def add_show_arguments(add) -> None:
    add("--data", type=Path, help="LLaVA JSON (default: a new row of the toy world)")
    add("--row", type=in_range(0, 10**9), help="row of --data, from 0 (default: a random one)")
    add("--model", type=Path, default=ASSETS / "toy-llama",
        help="folder of the tokenizer (default: assets/toy-llama)")
    add("--template", choices=conversation.TEMPLATES, default="vicuna_v1",
        help="conversation template (default: %(default)s)")


def show_row(arguments) -> None:
    """Print a row as tokens: green ones are learned, gray ones only read."""
    name, row = "the toy world", random_row(random.Random())
    if arguments.data:
        rows = list(read_json_list(arguments.data))
        if not rows:
            raise InputError(f"{arguments.data} has no rows")
        number = random.randrange(len(rows)) if arguments.row is None else arguments.row
        if not 0 <= number < len(rows):
            raise InputError(f"--row {number}: {arguments.data} has rows 0 to {len(rows) - 1}")
        name, row = f"{arguments.data}, row {number}", rows[number]
    tokenizer = Tokenizer(arguments.model)
    check_shape(row, {"conversations": list}, name)
    try:
        tokens, labels = conversation.tokenize_conversation(
            row["conversations"], tokenizer, arguments.template)
    except ValueError as error:
        raise InputError(f"{name}: {error}") from error
    print(conversation.visualize_tokens(tokens, labels, tokenizer, len(tokenizer)))


def price(text: str) -> tuple[float, float]:
    prompt, completion = map(in_range(0.0, 100_000.0), text.split(","))
    return prompt, completion


price.__name__ = "IN,OUT"  # argparse: "invalid IN,OUT value: '30'"


def add_instruct_arguments(add) -> None:
    add("--captions", type=Path, required=True, help="COCO's captions_*.json")
    add("--instances", type=Path, help="COCO's instances_*.json, for --kind detail and reasoning")
    add("--kind", choices=conversation.INSTRUCTION_KINDS, default="conversation",
        help="what to write (default: %(default)s)")
    add("--out", type=out_file, required=True,
        help="LLaVA JSON to write; FILE.ledger.jsonl next to it keeps every answer")
    add("--base-url", default=OPENAI, help="a server with /chat/completions (default: OpenAI's)")
    add("--model", default="gpt-4", help="name of the language model (default: %(default)s)")
    add("--workers", type=in_range(1, 1024), default=8,
        help="parallel requests (default: %(default)s)")
    add("--limit", type=positive, metavar="N", help="use only the first N images")
    add("--max-tokens", type=in_range(1, 10**12), default=float("inf"), metavar="N",
        help="start no request once all runs on this FILE have used N tokens")
    add("--max-reply-tokens", type=positive, default=2048, metavar="N",
        help="longest answer (default: %(default)s)")
    add("--price", type=price, default=(0.0, 0.0), metavar="IN,OUT",
        help="dollars per million prompt and completion tokens, to show the cost")
    add("--timeout", type=in_range(0.1, 86_400.0), default=600.0, metavar="SECONDS",
        help="for one answer (default: %(default)s)")
    add("--seed", type=seed, default=0,
        help="draws the place of each image and some questions (default: %(default)s)")
    add("--dry-run", action="store_true",
        help="print the messages for one image and an estimate of the cost; needs no key")


def ask_teacher(arguments) -> None:
    """Let a language model write instruction data about COCO's images."""
    out, images = arguments.out, read_images(arguments)
    check_not_input(out)
    path = out.with_name(f"{out.name}.ledger.jsonl")
    if out.exists() and not path.exists():
        raise InputError(f"{out} exists without {path.name} next to it: choose another --out")
    ledger = Ledger(path)
    job = prompts.job(arguments.kind, images, ledger, arguments.model, arguments.seed)
    if arguments.dry_run:
        ledger.load()
        print_plan(job, arguments.price)
        return
    with ledger:
        pending, failed = job.pending(), Counter()
        try:
            if pending:
                chat = Chat(arguments.model, arguments.base_url, arguments.timeout,
                            arguments.max_reply_tokens)
                failed = job.run(chat, arguments.workers, arguments.max_tokens, arguments.price)
        finally:  # paid answers are written, however the run ends
            written = write_answers(job, out)
    for reason, count in failed.items():
        print0(f"{count} failed: {reason}")
    if ledger.total_tokens >= arguments.max_tokens:
        print0(f"the budget of --max-tokens {arguments.max_tokens} is spent")
    if not written:
        raise InputError(f"no image has an answer yet, so {out} is not written")
    print(out)


def read_images(arguments) -> list[AnnotatedImage]:
    if arguments.kind != "conversation" and not arguments.instances:
        raise InputError(f"--kind {arguments.kind} needs --instances, COCO's boxes")
    images, left_out = read_coco(arguments.captions, arguments.instances)
    print_left_out(left_out)
    if not images:
        raise InputError(f"{arguments.captions} has no image with a caption")
    return images[: arguments.limit]


def print_left_out(left_out: Counter) -> None:
    for reason, count in left_out.items():
        print0(f"left out: {count} {reason}")


def write_answers(job: Job, out: Path) -> bool:
    """Write the rows that the ledger has answers for and report the rest; False without rows."""
    results, rejected, given_up = job.result()
    rows = [row for row in results if row]
    if rows:
        write_json(out, rows)
    if job.ledger.answers:
        print0(f"{len(rows)} of {len(job.items)} images have an answer, "
               f"{given_up} given up after {TRIES} replies, "
               f"{len(job.items) - len(rows) - given_up} pending; {job.ledger.prompt_tokens} "
               f"prompt and {job.ledger.completion_tokens} completion tokens in all")
    for reason, count in rejected.most_common():
        print0(f"{count} rejected: {reason}")
    return bool(rows)


def print_plan(job: Job, prices: tuple[float, float]) -> None:
    """Print the messages for one image and the estimated cost of all that the ledger lacks."""
    pending = job.pending()
    for message in job.messages((pending or job.items)[0]):
        print(f"[{message['role']}]\n{message['content']}\n")
    prompt, completion = prompts.estimate(job.kind, pending)
    cost = f", ${dollars(prompt, completion, prices):.2f}" if any(prices) else ""
    print0(f"{len(pending)} of {len(job.items)} images are pending: about {prompt} prompt and "
           f"{completion} completion tokens{cost}")


def add_captions_arguments(add) -> None:
    add("--captions", type=Path, required=True, help="COCO's captions_*.json, a .json or .jsonl of "
        "{image, caption}, or lines of image TAB caption")
    add("--out", type=out_file, required=True, help="LLaVA JSON to write")
    add("--balance", action="store_true",
        help="thin out frequent subjects with the filter that made CC595K of CC3M")
    add("--seed", type=seed, default=0,
        help="draws questions, places of images and what --balance keeps (default: %(default)s)")


def convert_captions(arguments) -> None:
    """Turn images with captions into data for stage 1."""
    count, kept, left_out = write_pretrain(
        arguments.captions, arguments.out, arguments.seed, arguments.balance)
    print_left_out(left_out)
    print(arguments.out)
    print0(f"{kept} of {count} captions")


def add_scienceqa_arguments(add) -> None:
    add("--data", type=Path, required=True,
        help="folder with problems.json and pid_splits.json; for train.py, name it as --images")
    add("--split", choices=scienceqa.SPLITS, default="train", help="(default: %(default)s)")
    add("--order", choices=scienceqa.ORDERS, default="reason-first",
        help="lecture and solution before or after the letter (default: %(default)s)")
    add("--out", type=out_file, required=True, help="LLaVA JSON to write")


def convert_scienceqa(arguments) -> None:
    """Turn ScienceQA's problems into data for stage 2."""
    rows = scienceqa.read_rows(arguments.data, arguments.split, arguments.order)
    check_not_input(arguments.out)
    write_json(arguments.out, rows)
    print(arguments.out)
    print0(f"{len(rows)} problems, {sum('image' in row for row in rows)} with an image")


def add_stats_arguments(add) -> None:
    add("data", type=Path, metavar="FILE")


def print_stats(arguments) -> None:
    """Count what a LLaVA JSON file holds, and name its unusable rows."""
    from nanollava.data_checks import stats  # imports torch

    numbers, errors = stats(arguments.data)
    for name, number in numbers.items():
        print(f"{name:<24}{number:>12,.{0 if number == int(number) else 1}f}")
    for error in errors[:10]:
        print0(f"{arguments.data}, {error}")


def add_weights_arguments(add) -> None:
    add("repository", metavar="OWNER/NAME", help="as on huggingface.co; HF_TOKEN opens gated ones")
    add("--revision", default="main", help="branch, tag or commit (default: %(default)s)")
    add("--out", type=out_folder, help="folder to write (default: NAME)")


def download_weights(arguments) -> None:
    """Download a CLIP, LLaMA or LLaVA from the Hugging Face hub."""
    from nanollava.weights import hub  # imports torch

    out = arguments.out or Path(arguments.repository.rpartition("/")[2])
    hub.fetch(arguments.repository, out, arguments.revision)
    print(out)


def add_gguf_arguments(add) -> None:
    add("model", type=Path, metavar="RUN", help="folder of a LLaVA")
    add_vision_tower(add)
    add("--out", type=out_folder, required=True,
        help="folder to write: model.gguf (language model) and mmproj.gguf (vision, projector)")
    add("--type", choices=("float32", "float16", "bfloat16", "q8_0"), default="float16",
        help="of the matrices; q8_0 rounds to 8 bits (default: %(default)s)")
    add("--class-token", choices=("last", "first"), default="last",
        help="where llama.cpp puts the ViT's class token: last since May 2025, a bug; first where "
        "that is mended (default: %(default)s)")


def convert_to_gguf(arguments) -> None:
    """Write a LLaVA for llama.cpp, Ollama and LM Studio."""
    from nanollava.llava import Llava  # these import torch
    from nanollava.tokenizer import open_tokenizer
    from nanollava.weights import gguf

    model = Llava.from_pretrained(arguments.model, dtype=None, vision_tower=arguments.vision_tower)
    tokenizer = open_tokenizer(arguments.model, model.config)
    name = arguments.model.resolve().name
    gguf.write_llava(arguments.out, asdict(model.config), model.state_dict(), tokenizer,
                     arguments.type, arguments.class_token, name)
    print(arguments.out)


COMMANDS = {
    "toy": (add_toy_arguments, draw_toy_world),
    "toy-scienceqa": (add_toy_scienceqa_arguments, draw_toy_problems),
    "show": (add_show_arguments, show_row),
    "instruct": (add_instruct_arguments, ask_teacher),
    "captions": (add_captions_arguments, convert_captions),
    "scienceqa": (add_scienceqa_arguments, convert_scienceqa),
    "stats": (add_stats_arguments, print_stats),
    "weights": (add_weights_arguments, download_weights),
    "gguf": (add_gguf_arguments, convert_to_gguf),
}


if __name__ == "__main__":
    with one_line_errors():
        main(parse_arguments())
