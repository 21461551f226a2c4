"""Make the data that LLaVA is trained on, section 3 of the paper.

    python prepare_data.py toy                                 # draw the toy world: data/toy
    python prepare_data.py toy --out data/other --seed 1 --scenes 20000
    python prepare_data.py show                                # what exactly is trained on? a row of data/toy, colored
    python prepare_data.py show --data llava_instruct_150k.json --model vicuna-7b-v1.3 --row 7
    python prepare_data.py weights llava-hf/llava-1.5-7b-hf    # from the Hugging Face hub, to llava-1.5-7b-hf
"""

import random
from pathlib import Path

from nanollava import hub
from nanollava.conversation import TEMPLATES, show, tokenize_conversation
from nanollava.files import InputError, Parser, one_line_errors, positive, read_json
from nanollava.tokenizer import Tokenizer
from nanollava.toy import write_world

ASSETS = Path(__file__).resolve().parent / "assets"


def parse_arguments():
    parser = Parser(__doc__)
    commands = parser.add_subparsers(metavar="COMMAND", parser_class=Parser)

    command = commands.add_parser("toy", doc="Draw the toy world: pictures, captions, boxes, conversations, a test.")
    add = command.add_argument
    add("--out", type=Path, default=Path("data/toy"), help="folder to write (default: %(default)s)")
    add("--seed", type=int, default=0, help="another seed, other scenes (default: %(default)s)")
    add("--scenes", type=positive(int), default=8000, help="pictures to train on (default: %(default)s)")
    command.set_defaults(run=draw_toy_world)

    command = commands.add_parser("show", doc="Print a row as the model reads it: green is learned, grey is only read.")
    add = command.add_argument
    add("--data", type=Path, default=Path("data/toy/instruct.json"), help="LLaVA JSON (default: %(default)s)")
    add("--model", type=Path, default=ASSETS / "toy-llama", help="folder of the tokenizer (default: assets/toy-llama)")
    add("--template", choices=TEMPLATES, default="vicuna_v1", help="the words around the turns (default: %(default)s)")
    add("--row", type=int, help="which row, from 0 (default: one by chance)")
    command.set_defaults(run=show_row)

    command = commands.add_parser("weights", doc="Download a CLIP, LLaMA or LLaVA from the Hugging Face hub.")
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


def download_weights(arguments) -> None:
    out = arguments.out or Path(arguments.repository.rpartition("/")[2])
    hub.fetch(arguments.repository, out, arguments.revision)
    print(out)


if __name__ == "__main__":
    with one_line_errors():
        main()
