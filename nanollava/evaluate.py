"""How well a model does, section 5 of the paper: `python -m nanollava.evaluate COMMAND`.

    python -m nanollava.evaluate toy                                # the toy run, against its controls
    python -m nanollava.evaluate scienceqa --data ScienceQA --model runs/scienceqa
    python -m nanollava.evaluate bench --questions q.jsonl --reference r.jsonl --context c.jsonl --answers a.jsonl \\
        --out llava_bench.json                                            # GPT-4 is the judge; the key is in OPENAI_API_KEY
    python -m nanollava.evaluate ablations                          # what matters, on the toy world: an hour or so
    python -m nanollava.evaluate report --model runs/stage2 --data held_out.json --images COCO/val2017
"""

import os
import signal
from itertools import islice
from pathlib import Path

from .benchmarks import scienceqa
from .infra.cli import Parser, add_command, one_line_errors, positive
from .infra.io import InputError, atomic_write, read_json, read_json_list, read_jsonl, write_json
from .infra.progress import print0
from .teacher.api import OPENAI, Chat
from .teacher.jobs import TRIES, Job
from .teacher.ledger import Ledger


def parse_arguments():
    parser = Parser(__doc__, prog="python -m nanollava.evaluate")
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND", parser_class=Parser)
    command = add_command(commands, "toy", "Held-out questions about the toy world, against two controls.")
    add = command.add_argument
    add("--run", type=Path, default=Path("runs/toy"), help="folder with stage1/ and stage2/ (default: %(default)s)")
    add("--model", type=Path, help="only this model, without the controls")
    add("--data", type=Path, default=Path("data/toy"), help="folder of `prepare_data.py toy` (default: %(default)s)")
    add("--limit", type=positive(int), help="ask only the first so many questions")
    add("--out", type=Path, help="write the table as JSON to this file, too")
    add("--picture", type=Path, help="paint some scenes with the model's answers to this file")
    add("--device", help="cuda, mps or cpu (default: the first that is there)")

    command = add_command(commands, "ablations", "What matters, and how much: tables 4 and 8 on the toy world.")
    add = command.add_argument
    add("--run", type=Path, default=Path("runs/ablations"), help="folder of all that is made (default: %(default)s)")
    add("--seeds", type=positive(int), default=3, help="how often everything is trained (default: %(default)s)")
    add("--steps", type=positive(int), default=400, help="of each training (default: %(default)s)")
    add("--jobs", type=positive(int), default=min(8, os.cpu_count()),
        help="processes at once (default: one a processor, at most 8)")
    add("--out", type=Path, help="write every figure as JSON to this file, too")

    command = add_command(commands, "report", "A page for a run: its losses, and its replies to held-out rows.")
    add = command.add_argument
    add("--model", type=Path, required=True, help="folder that train.py wrote; report.html appears in it")
    add("--data", type=Path, required=True, help="LLaVA JSON; of each row the first question is asked")
    add("--images", type=Path, required=True, help="folder of its pictures")
    add("--limit", type=positive(int), default=24, help="how many of the first rows (default: %(default)s)")
    add_device(add)

    command = add_command(commands, "scienceqa", "ScienceQA by category, the columns of the paper's table 6.")
    add = command.add_argument
    add("--data", type=Path, required=True, help="folder with problems.json, pid_splits.json and test/ID/image.png")
    add("--split", choices=scienceqa.SPLITS, default="test", help="(default: %(default)s)")
    add("--out", type=Path, help="write the result as JSON to this file, too")
    add("--ensemble", type=Path, metavar="FOLDER",
        help="ask GPT-4, too, and combine the answers as the paper does; FOLDER keeps all that GPT-4 says")
    add_chat(add)
    add_answers(add, "scienceqa-SPLIT.jsonl")

    command = add_command(commands, "bench", "LLaVA-Bench: GPT-4 grades replies against its own, table 4.")
    add = command.add_argument
    add("--questions", type=Path, required=True, help="JSONL of question_id, image, text, category")
    add("--reference", type=Path, required=True, help="JSONL of question_id and text: GPT-4's own replies")
    add("--context", type=Path, required=True, help="JSONL of image and caption, or captions and instances")
    add("--out", type=Path, required=True, help="JSON to write; FILE.ledger.jsonl beside it keeps every grade")
    add("--both-orders", action="store_true", help="ask twice, each reply standing first once")
    add_chat(add)
    add("--images", type=Path, help="folder of the pictures, for --model")
    add_answers(add, "bench.jsonl")
    return parser.parse_args()


def add_chat(add) -> None:
    """The arguments of what a language model is asked over REST; the key is in OPENAI_API_KEY."""
    add("--gpt", default="gpt-4", metavar="NAME", help="the language model that is asked (default: %(default)s)")
    add("--base-url", default=OPENAI, help="any server with /chat/completions (default: OpenAI's)")
    add("--workers", type=positive(int), default=8, help="requests under way at once (default: %(default)s)")


def add_answers(add, default: str) -> None:
    """The arguments of what can be answered here or elsewhere."""
    add("--model", type=Path, help="folder of a LLaVA that answers")
    add("--answers", type=Path, help="JSONL of question_id and text: read, and with --model completed "
        f"(default with --model: MODEL/{default})")
    add("--batch-size", type=positive(int), default=16, help="questions answered at once (default: %(default)s)")
    add_device(add)


def add_device(add) -> None:
    add("--dtype", choices=("float32", "bfloat16"), help="of weights and arithmetic (default: bfloat16 where fast)")
    add("--device", help="cuda, mps or cpu (default: the first that is there)")


if __name__ == "__main__":
    parse_arguments()  # now, for torch takes seconds: --help and mistakes are answered at once

from .benchmarks import llava_bench
from .benchmarks.report import Told, table, write_report
from .chat import answer_all, open_llava, read_answers, stream
from .conversation import IMAGE_TOKEN
from .data import check_row
from .image import open_image, preprocess
from .infra.device import best_device, best_dtype
from .infra.progress import progress
from .infra.run_log import read_log
from .llava import Llava
from .tokenizer import Tokenizer
from .toy import ablations
from .toy.score import accuracy, answer_toy, gallery, toy_table, write_toy_report


def evaluate_toy(arguments) -> None:
    device = best_device(arguments.device)
    if arguments.model:
        model, tokenizer = Llava.from_pretrained(arguments.model, device=device), Tokenizer(arguments.model)
        rows = read_json(arguments.data / "test.json")[: arguments.limit]
        said = answer_toy(model, tokenizer, rows, arguments.data / "images", "answers  ")
        columns = {"model": accuracy(rows, said)}
    else:
        columns, rows, said = toy_table(arguments.run, arguments.data, device, arguments.limit)
        write_toy_report(arguments.run, arguments.data, columns, rows, said)
    print(table(columns))
    if arguments.out:
        write_json(arguments.out, columns, indent=2)
    if arguments.picture:
        with atomic_write(arguments.picture) as beside:
            gallery(rows, said, arguments.data / "images").save(beside, "PNG")


def evaluate_ablations(arguments) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the processes below are stopped, too
    root = arguments.run.resolve()
    ablations.write_data(root)
    ablations.run(ablations.jobs(root, arguments.seeds, arguments.steps), arguments.jobs)
    found = ablations.results(root, arguments.seeds)
    print(ablations.text(found))
    if arguments.out:
        write_json(arguments.out, found, indent=2)


def evaluate_report(arguments) -> None:
    device = best_device(arguments.device)
    model, tokenizer = open_llava(arguments.model, best_dtype(device, arguments.dtype), device)
    cards = []
    rows = list(islice(read_json_list(arguments.data), arguments.limit))
    for number, row in enumerate(progress(rows, "answers  ", "rows")):
        try:
            turns, files = check_row(row)
        except ValueError as error:
            raise InputError(f"{arguments.data}, row {number}: {error}") from error
        paths = [arguments.images / file for file in files[: turns[0]["value"].count(IMAGE_TOKEN)]]
        images = [preprocess(open_image(path), model.config.image_size) for path in paths]
        reply = "".join(stream(model, tokenizer, turns[:1], images))
        cards.append((paths[0] if paths else None, [Told(turns[0]["value"], reply, turns[1]["value"])]))
    path = arguments.model / "report.html"
    write_report(path, str(arguments.model), {"Training": read_log(arguments.model / "log.jsonl")}, cards=cards)
    print(path)


def made_answers(arguments, questions: dict, default: str) -> dict[str, str]:
    """The replies that --answers holds; with --model, those that are missing are made and added."""
    if not arguments.model and not arguments.answers:
        raise InputError("name a --model that answers, or --answers that were made before")
    if not arguments.model:
        return read_answers(arguments.answers)
    device = best_device(arguments.device)
    model, tokenizer = open_llava(arguments.model, best_dtype(device, arguments.dtype), device)
    return answer_all(model, tokenizer, questions, arguments.answers or arguments.model / default, arguments.batch_size)


def evaluate_scienceqa(arguments) -> None:
    problems = scienceqa.read_problems(arguments.data, arguments.split)
    questions = scienceqa.asked(problems, arguments.data / arguments.split)
    answers = made_answers(arguments, questions, f"scienceqa-{arguments.split}.jsonl")
    columns = {"LLaVA": answers} | (ensembles(arguments, problems, answers) if arguments.ensemble else {})
    scores = {name: scienceqa.score(problems, texts) for name, texts in columns.items()}
    print(table({name: {category: value for category, value in score["accuracy"].items() if value is not None}
                 for name, score in scores.items()}))
    for name, score in scores.items():
        print0(f"{name}: {len(problems)} problems, {score['unreadable']} replies name no option, "
            f"{score['missing']} have no reply")
    if arguments.out:
        write_json(arguments.out, scores.pop("LLaVA") | scores, indent=2)


def ask(job: Job, arguments) -> list:
    """What is wanted of each item of a job, None where there is none, after asking for what the ledger lacks."""
    if job.pending():
        job.run(Chat(arguments.gpt, arguments.base_url), arguments.workers)
    return job.result()[0]


def ensembles(arguments, problems: dict, ours: dict[str, str]) -> dict[str, dict[str, str]]:
    """The answers of GPT-4 alone, of LLaVA where GPT-4 has none, and of GPT-4 as the judge (section 5.2)."""
    train = scienceqa.read_problems(arguments.data, "train")
    examples = [problem for problem in train.values() if not problem.get("image")][:2]
    with Ledger(arguments.ensemble / "alone.jsonl") as ledger:
        job = scienceqa.alone(problems, examples, ledger, arguments.gpt)
        theirs = {number: text for number, text in zip(job.items, ask(job, arguments)) if text is not None}
    both = scienceqa.complement(problems, ours, theirs)
    with Ledger(arguments.ensemble / "verdicts.jsonl") as ledger:
        job = scienceqa.judge(problems, ours, theirs, ledger, arguments.gpt)
        verdicts = {number: text for number, text in zip(job.items, ask(job, arguments)) if text is not None}
    print0(f"{arguments.gpt}: {len(problems) - len(theirs)} of {len(problems)} problems got no answer, "
        f"{len(job.items) - len(verdicts)} of {len(job.items)} in dispute no verdict")
    return {"GPT-4": theirs, "complement": both, "judge": both | verdicts}


def evaluate_bench(arguments) -> None:
    rows = read_jsonl(arguments.questions, ("question_id", "image", "text", "category"))
    if arguments.model and not arguments.images:
        raise InputError("--model needs --images, the folder of the pictures")
    questions = {str(row["question_id"]): (f"{IMAGE_TOKEN}\n{row['text']}", [Path(arguments.images or "") / row["image"]])
                 for row in rows}
    answers = made_answers(arguments, questions, "bench.jsonl")
    items = llava_bench.join(rows, arguments.reference, arguments.context, answers)
    with Ledger(arguments.out.with_name(f"{arguments.out.name}.ledger.jsonl")) as ledger:
        judge = llava_bench.job(items, arguments.both_orders, ledger, arguments.gpt)
        ask(judge, arguments)
        result = llava_bench.summary(judge)
    write_json(arguments.out, result, indent=2)
    print(table({"relative": {name: scores["relative"] for name, scores in result["scores"].items()}}))
    if result["without_grade"]:
        print0(f"no grade for {', '.join(result['without_grade'])}, which are in no mean: start again "
            f"to ask what was not rejected {TRIES} times")


def main() -> None:
    arguments = parse_arguments()
    run = {"toy": evaluate_toy, "scienceqa": evaluate_scienceqa, "bench": evaluate_bench,
           "ablations": evaluate_ablations, "report": evaluate_report}
    run[arguments.command](arguments)


if __name__ == "__main__":
    with one_line_errors():
        main()
