"""Make the data that LLaVA is trained on, section 3 of the paper.

    python prepare_data.py toy                                 # draw the toy world: data/toy
    python prepare_data.py toy --out data/other --seed 1 --scenes 20000
    python prepare_data.py show                                # what exactly is trained on? a row of data/toy, colored
    python prepare_data.py show --data llava_instruct_150k.json --model vicuna-7b-v1.3 --row 7
    python prepare_data.py instruct --captions captions_train2017.json --instances instances_train2017.json \\
        --kind conversation --limit 100 --out conversation.json         # asks GPT-4; the key is in OPENAI_API_KEY
    python prepare_data.py weights llava-hf/llava-1.5-7b-hf    # from the Hugging Face hub, to llava-1.5-7b-hf
"""

import random
from pathlib import Path

from nanollava.benchmarks import scienceqa
from nanollava.conversation import INSTRUCTION_KINDS, TEMPLATES, show, tokenize_conversation
from nanollava.infra.cli import Parser, add_command, one_line_errors, positive, seed
from nanollava.infra.io import InputError, read_json, write_json
from nanollava.infra.progress import print0
from nanollava.teacher import prompts
from nanollava.teacher.api import OPENAI, Chat
from nanollava.teacher.captions import write_pretrain
from nanollava.teacher.coco import read_coco
from nanollava.teacher.jobs import TRIES, Job
from nanollava.teacher.ledger import Ledger, dollars
from nanollava.tokenizer import Tokenizer
from nanollava.toy.dataset import write_world
from nanollava.toy.scienceqa import write_problems

ASSETS = Path(__file__).resolve().parent / "assets"


def parse_arguments():
    parser = Parser(__doc__)
    commands = parser.add_subparsers(metavar="COMMAND", parser_class=Parser)

    command = add_command(commands, "toy", "Draw the toy world: pictures, captions, boxes, conversations, a test.")
    add = command.add_argument
    add("--out", type=Path, default=Path("data/toy"), help="folder to write (default: %(default)s)")
    add("--seed", type=seed, default=0, help="another seed, other scenes (default: %(default)s)")
    add("--scenes", type=positive(int), default=8000, help="pictures to train on (default: %(default)s)")
    command.set_defaults(run=draw_toy_world)

    command = add_command(commands, "toy-scienceqa", "Draw a ScienceQA of the toy world: problems, splits, pictures.")
    add = command.add_argument
    add("--out", type=Path, default=Path("data/toy-scienceqa"), help="folder to write (default: %(default)s)")
    add("--seed", type=seed, default=0, help="another seed, other problems (default: %(default)s)")
    command.set_defaults(run=draw_toy_problems)

    command = add_command(commands, "show", "Print a row as the model reads it: green is learned, grey is only read.")
    add = command.add_argument
    add("--data", type=Path, default=Path("data/toy/instruct.json"), help="LLaVA JSON (default: %(default)s)")
    add("--model", type=Path, default=ASSETS / "toy-llama", help="folder of the tokenizer (default: assets/toy-llama)")
    add("--template", choices=TEMPLATES, default="vicuna_v1", help="the words around the turns (default: %(default)s)")
    add("--row", type=int, help="which row, from 0 (default: one by chance)")
    command.set_defaults(run=show_row)

    command = add_command(commands, "instruct", "Have a language model write instruction data about COCO's pictures.")
    add = command.add_argument
    add("--captions", type=Path, required=True, help="COCO's captions_*.json")
    add("--instances", type=Path, help="COCO's instances_*.json, for --kind detail and reasoning")
    add("--kind", choices=INSTRUCTION_KINDS, default="conversation", help="what to write (default: %(default)s)")
    add("--out", type=Path, required=True, help="LLaVA JSON to write; FILE.ledger.jsonl beside it keeps every answer")
    add("--base-url", default=OPENAI, help="any server with /chat/completions (default: OpenAI's)")
    add("--model", default="gpt-4", help="(default: %(default)s)")
    add("--workers", type=positive(int), default=8, help="requests under way at once (default: %(default)s)")
    add("--limit", type=positive(int), help="only the first so many pictures")
    add("--max-tokens", type=positive(int), default=float("inf"),
        help="of all runs on this FILE together; what is under way then still comes")
    add("--price", type=price, default=(0.0, 0.0), metavar="IN,OUT", help="dollars for a million tokens")
    add("--timeout", type=positive(float), default=600.0, help="seconds for one answer (default: %(default)s)")
    add("--seed", type=seed, default=0, help="draws where pictures stand, and some questions (default: %(default)s)")
    add("--dry-run", action="store_true", help="print the messages for one picture and an estimate; needs no key")
    command.set_defaults(run=ask_teacher)

    command = add_command(commands, "captions", "Pictures with captions to data for stage 1.")
    add = command.add_argument
    add("--captions", type=Path, required=True,
        help="COCO's captions_*.json, a .json or .jsonl of {image, caption}, or lines of image TAB caption")
    add("--out", type=Path, required=True, help="LLaVA JSON to write")
    add("--balance", action="store_true", help="thin out what is common, as the paper made 595K of 3M")
    add("--seed", type=seed, default=0, help="draws questions, orders and what is thinned out (default: %(default)s)")
    command.set_defaults(run=expand_captions)

    command = add_command(commands, "scienceqa", "ScienceQA's problems to data for stage 2.")
    add = command.add_argument
    add("--data", type=Path, required=True, help="folder with problems.json and pid_splits.json; --images of training")
    add("--split", choices=scienceqa.SPLITS, default="train", help="(default: %(default)s)")
    add("--order", choices=scienceqa.ORDERS, default="reason-first",
        help="lecture and solution before the letter, or after it (default: %(default)s)")
    add("--out", type=Path, required=True, help="LLaVA JSON to write")
    command.set_defaults(run=expand_scienceqa)

    command = add_command(commands, "stats", "What is in a LLaVA JSON, and which of its rows are broken.")
    command.add_argument("data", type=Path, metavar="FILE")
    command.set_defaults(run=print_stats)

    command = add_command(commands, "weights", "Download a CLIP, LLaMA or LLaVA from the Hugging Face hub.")
    add = command.add_argument
    add("repository", metavar="OWNER/NAME", help="as on huggingface.co; HF_TOKEN opens what asks for consent")
    add("--revision", default="main", help="a branch, a tag or a commit (default: %(default)s)")
    add("--out", type=Path, help="folder to write (default: NAME)")
    command.set_defaults(run=download_weights)
    parser.set_defaults(run=lambda arguments: parser.print_help())
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    arguments.run(arguments)


def draw_toy_world(arguments) -> None:
    write_world(arguments.out, arguments.seed, arguments.scenes)
    print(arguments.out)


def draw_toy_problems(arguments) -> None:
    write_problems(arguments.out, arguments.seed)
    print(arguments.out)


def show_row(arguments) -> None:
    rows = read_json(arguments.data)
    number = random.randrange(len(rows)) if arguments.row is None else arguments.row
    if not 0 <= number < len(rows):
        raise InputError(f"--row {number}: {arguments.data} has rows 0 to {len(rows) - 1}")
    tokenizer = Tokenizer(arguments.model)
    try:
        tokens, labels = tokenize_conversation(rows[number]["conversations"], tokenizer, arguments.template)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{arguments.data}, row {number}: {error}") from error
    print(show(tokens, labels, tokenizer, len(tokenizer)))


def price(text: str) -> tuple[float, float]:
    read, written = (positive(float)(part) for part in text.split(","))
    return read, written


price.__name__ = "IN,OUT"  # argparse: "invalid IN,OUT value: '30'"


def ask_teacher(arguments) -> None:
    out, kind, model = arguments.out, arguments.kind, arguments.model
    if kind != "conversation" and not arguments.instances:
        raise InputError(f"--kind {kind} is written from captions and boxes: name COCO's boxes with --instances")
    pictures, left_out = read_coco(arguments.captions, arguments.instances)
    for reason, count in left_out.items():
        print0(f"{count} {reason}: left out")
    if not pictures:
        raise InputError(f"{arguments.captions} has no picture with a caption")
    pictures = pictures[: arguments.limit]
    if not out.name or out.is_dir():
        raise InputError(f"--out {out} is a folder: name a file in it")
    path = out.with_name(f"{out.name}.ledger.jsonl")
    if out.exists() and not path.exists():
        raise InputError(f"{out} is there, but no {path.name} beside it: choose another --out")
    ledger = Ledger(path)
    job = prompts.job(kind, pictures, ledger, model, arguments.seed)
    if arguments.dry_run:
        ledger.load()
        print_plan(job, arguments.price)
        return
    with ledger:
        missing, failed = job.pending(), {}
        try:
            if missing:
                chat = Chat(model, arguments.base_url, timeout=arguments.timeout)
                failed = job.run(chat, arguments.workers, arguments.max_tokens, arguments.price)
        finally:  # what was paid for is handed over, however it ended
            written = hand_over(job, out)
    for problem, count in failed.items():
        print0(f"{count} failed: {problem}")
    if ledger.prompt_tokens + ledger.completion_tokens >= arguments.max_tokens:
        print0(f"the budget of --max-tokens {arguments.max_tokens} is spent")
    if not written:
        raise InputError(f"no picture has an answer yet, so there is no {out}")
    print(out)


def hand_over(job: Job, out: Path) -> bool:
    """Write what the ledger has, and say what it has not; whether there was anything to write."""
    found, rejected, given_up = job.result()
    rows = [row for row in found if row]
    if rows:
        write_json(out, rows)
    if job.ledger.lines:
        print0(f"{len(rows)} of {len(job.items)} pictures, {given_up} given up after {TRIES} replies, "
            f"{len(job.items) - len(rows) - given_up} still to be asked about; "
            f"{job.ledger.prompt_tokens} tokens read and {job.ledger.completion_tokens} written in all")
    for reason, count in rejected.most_common():
        print0(f"{count} rejected: {reason}")
    return bool(rows)


def print_plan(job: Job, prices: tuple[float, float]) -> None:
    """What would be asked about one picture, and what all that is not yet in the ledger would cost."""
    missing = job.pending()
    for message in job.messages((missing or job.items)[0]):
        print(f"[{message['role']}]\n{message['content']}\n")
    read, written = prompts.estimate(job.kind, missing)
    print0(f"{len(missing)} of {len(job.items)} pictures are still to be asked about: "
        f"about {read} tokens to read and {written} to write"
        + (f", ${dollars(read, written, prices):.2f}" if any(prices) else ""))


def expand_captions(arguments) -> None:
    count, written = write_pretrain(arguments.captions, arguments.out, arguments.seed, arguments.balance)
    print(arguments.out)
    print0(f"{written} of {count} captions")


def expand_scienceqa(arguments) -> None:
    made = scienceqa.read_rows(arguments.data, arguments.split, arguments.order)
    write_json(arguments.out, made)
    print(arguments.out)
    print0(f"{len(made)} problems, {sum('image' in row for row in made)} with a picture")


def print_stats(arguments) -> None:
    from nanollava.data import stats

    numbers, broken = stats(arguments.data)
    for name, number in numbers.items():
        print(f"{name.replace('_', ' '):<24}{number:>12,.{0 if number == int(number) else 1}f}")
    for problem in broken[:10]:
        print0(f"{arguments.data}, {problem}")


def download_weights(arguments) -> None:
    from nanollava.weights import hub

    out = arguments.out or Path(arguments.repository.rpartition("/")[2])
    hub.fetch(arguments.repository, out, arguments.revision)
    print(out)


if __name__ == "__main__":
    with one_line_errors():
        main()
