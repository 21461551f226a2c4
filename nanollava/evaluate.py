"""Measure a model, section 5 of the paper: `python -m nanollava.evaluate COMMAND`.

    python -m nanollava.evaluate toy                         # the toy run and its controls
    python -m nanollava.evaluate scienceqa --data ScienceQA --model runs/scienceqa
    python -m nanollava.evaluate bench --questions q.jsonl --reference r.jsonl --context c.jsonl \\
        --answers a.jsonl --out llava_bench.json             # judged by GPT-4: set OPENAI_API_KEY
    python -m nanollava.evaluate lens                        # are image features words?
    python -m nanollava.evaluate ablations                   # on the toy world, about an hour
    python -m nanollava.evaluate report --model runs/stage2 --data test.json --images val2017
"""

from .infra.start import start

if __name__ == "__main__":
    start()  # before other imports, which take long

import os
from itertools import islice
from pathlib import Path

from .benchmarks import llava_bench, scienceqa
from .conversation import IMAGE_TOKEN
from .infra.cli import (LESS_MEMORY, Parser, add_command, add_device, check_flags, in_range,
                        one_line_errors, out_file, out_folder, percent_table, positive)
from .infra.io import InputError, check_not_input, check_writable, locked_folder, path_inside
from .infra.json_io import read_json, read_json_list, read_jsonl, write_json
from .infra.shapes import quote
from .infra.progress import print0, progress
from .settings import add_llava_flags, add_quantize, add_vision_tower
from .teacher.api import OPENAI, Chat
from .teacher.jobs import TRIES, Job
from .teacher.ledger import Ledger

# Modules that import torch are imported inside the commands, so that --help answers without delay.

TOWER_FLAG = {"--vision-tower": ("--model",)}
MODEL_FLAGS = TOWER_FLAG | dict.fromkeys(("--batch-size", "--dtype", "--device", "--quantize"),
                                         ("--model",))
CHAT_FLAGS = dict.fromkeys(("--gpt", "--base-url", "--workers", "--max-reply-tokens"),
                           ("--ensemble",))
# By command, the flags that would be silently ignored: `check_flags` refuses them.
NEEDS = {"scienceqa": MODEL_FLAGS | CHAT_FLAGS, "bench": MODEL_FLAGS | {"--images": ("--model",)},
         "toy": TOWER_FLAG}
CONFLICTS = {"toy": {("--run", "--model"): "--model is evaluated without the controls of a run"}}


def parse_arguments():
    parser = Parser(__doc__, prog="python -m nanollava.evaluate")
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND",
                                     parser_class=Parser)
    for name, (add_arguments, run) in COMMANDS.items():
        add_arguments(add_command(commands, name, run.__doc__).add_argument)
    return parser.parse_args()


def main(arguments) -> None:
    check_flags(arguments, NEEDS.get(arguments.command, {}), CONFLICTS.get(arguments.command, {}))
    if "answers" in arguments and not arguments.model and not arguments.answers:
        raise InputError("give --model, a LLaVA that answers, or --answers, a file of its answers")
    _, run = COMMANDS[arguments.command]
    text, result = run(arguments)
    print(text)
    if "out" in arguments and arguments.out:
        check_not_input(arguments.out)
        write_json(arguments.out, result, indent=2)


def add_toy_arguments(add) -> None:
    add("--run", type=Path, default=Path("runs/toy"),
        help="folder with stage1/ and stage2/ (default: %(default)s)")
    add("--model", type=Path, help="evaluate this model alone, without the controls")
    add_vision_tower(add)
    add("--data", type=Path, default=Path("data/toy"),
        help="folder of `prepare_data.py toy` (default: %(default)s)")
    add("--limit", type=positive, help="ask only the first N questions")
    add("--out", type=out_file, help="also write the table to this file, as JSON")
    add_device(add)
    add_quantize(add)


def evaluate_toy(arguments) -> tuple[str, dict]:
    """Accuracy on the toy world's test questions, with two controls."""
    from .chat import open_llava
    from .toy.score import accuracy, answer_rows, evaluate_run, read_test

    if arguments.model:
        rows = read_test(arguments.data)[: arguments.limit]
        model, tokenizer = open_llava(arguments.model, "float32", arguments.device,
                                      arguments.vision_tower, arguments.quantize)
        predictions = answer_rows(model, tokenizer, rows, arguments.data / "images", "answers")
        columns = {"model": accuracy(rows, predictions)}
    else:
        check_writable(arguments.run / "report.html")
        columns = evaluate_run(arguments.run, arguments.data, arguments.device, arguments.limit,
                               arguments.quantize)
    return percent_table(columns), columns


def add_lens_arguments(add) -> None:
    add("--run", type=Path, nargs="+", default=[Path("runs/toy")],
        help="folders with stage1/ and stage2/ (default: runs/toy)")
    add("--scenes", type=in_range(10, 100_000), default=300,
        help="number of validation images (default: %(default)s)")
    add("--out", type=out_file, help="also write all results to this file, as JSON")
    add_device(add)


def evaluate_lens(arguments) -> tuple[str, list]:
    """Do patches become words, and does the model look at what it names, on the toy world."""
    from .infra.device import best_device
    from .toy import lens

    device = best_device(arguments.device)
    results = [lens.evaluate_lens(run, device, arguments.scenes) for run in arguments.run]
    return lens.format_lens(results), results


def add_ablation_arguments(add) -> None:
    add("--run", type=out_folder, default=Path("runs/ablations"),
        help="folder for data and models; finished ones are kept (default: %(default)s)")
    add("--seeds", type=in_range(1, 1000), default=3,
        help="how many times to train each model (default: %(default)s)")
    add("--steps", type=in_range(1, 1_000_000), default=400,
        help="training steps of each stage (default: %(default)s)")
    add("--jobs", type=in_range(1, 256), default=min(8, os.cpu_count()),
        help="processes to run at the same time (default: one per CPU, at most 8)")
    add("--out", type=out_file, help="also write all results to this file, as JSON")


def evaluate_ablations(arguments) -> tuple[str, dict]:
    """The paper's ablations, tables 4 and 8, on the toy world."""
    from .toy import ablations

    root = arguments.run.resolve()
    steps_file = root / "steps.json"
    with locked_folder(root):
        steps = read_json(steps_file, int) if steps_file.exists() else arguments.steps
        if steps != arguments.steps:
            raise InputError(f"{root} has runs of {quote(steps)} steps: repeat that --steps or "
                             "choose another --run")
        write_json(steps_file, arguments.steps)
        ablations.write_data(root)
        tasks = ablations.list_tasks(root, arguments.seeds, arguments.steps)
        ablations.run_tasks(tasks, arguments.jobs)
    results = ablations.read_results(root, arguments.seeds)
    return ablations.format_results(results), results


def add_report_arguments(add) -> None:
    add_llava_flags(add, required=True,
                    help="folder written by train.py; report.html is written to it")
    add("--data", type=Path, required=True,
        help="LLaVA JSON; the first question of each row is asked")
    add("--images", type=Path, required=True, help="folder of the images")
    add("--limit", type=positive, default=24, help="number of rows (default: %(default)s)")


def evaluate_report(arguments) -> tuple[str, None]:
    """Write a page with the losses of a run and its replies to rows of a file."""
    from .benchmarks.report import Exchange, write_report
    from .chat import open_llava, stream_reply
    from .data_checks import check_row
    from .image import open_image
    from .infra.run_log import read_log

    path = arguments.model / "report.html"
    check_writable(path)
    model, tokenizer = open_llava(arguments.model, arguments.dtype, arguments.device,
                                  arguments.vision_tower, arguments.quantize)
    cards = []
    rows = list(islice(read_json_list(arguments.data), arguments.limit))
    for number, row in enumerate(progress(rows, "answers", "rows")):
        try:
            turns, files = check_row(row)
            paths = [Path(path_inside(arguments.images, file)) for file in files]
        except ValueError as error:
            raise InputError(f"{arguments.data}, row {number}: {error}") from error
        question, answer = turns[0]["value"], turns[1]["value"]
        paths = paths[: question.count(IMAGE_TOKEN)]
        images = [model.config.preprocess(open_image(path)) for path in paths]
        reply = "".join(stream_reply(model, tokenizer, turns[:1], images))
        cards.append((paths[0] if paths else None, [Exchange(question, reply, answer)]))
    curves = {"Training": read_log(arguments.model / "log.jsonl")}
    write_report(path, str(arguments.model), curves, cards=cards)
    return str(path), None


def add_scienceqa_arguments(add) -> None:
    add("--data", type=Path, required=True,
        help="folder with problems.json, pid_splits.json and test/ID/image.png")
    add("--split", choices=scienceqa.SPLITS, default="test", help="(default: %(default)s)")
    add("--out", type=out_file, help="also write the result to this file, as JSON")
    add("--ensemble", type=out_folder, metavar="FOLDER",
        help="also ask GPT-4 and combine its answers with LLaVA's; FOLDER keeps all its replies")
    add_chat(add)
    add_answers(add, "scienceqa-SPLIT.jsonl")


def evaluate_scienceqa(arguments) -> tuple[str, dict]:
    """ScienceQA accuracy by category, the columns of table 6."""
    problems = scienceqa.read_problems(arguments.data, arguments.split)
    questions = scienceqa.questions_with_images(problems, arguments.data / arguments.split)
    file_name = f"scienceqa-{arguments.split}.jsonl"
    answers = {"LLaVA": collect_answers(arguments, questions, file_name)}
    if arguments.ensemble:
        answers |= ensembles(arguments, problems, answers["LLaVA"])
    scores = {name: scienceqa.score(problems, replies) for name, replies in answers.items()}
    columns = {name: {category: percent for category, percent in score["accuracy"].items()
                      if percent is not None} for name, score in scores.items()}
    for name, score in scores.items():
        print0(f"{name}: {len(problems)} problems, {score['unreadable']} replies name no option, "
               f"{score['missing']} replies missing")
    return percent_table(columns), scores.pop("LLaVA") | scores


def ensembles(arguments, problems: dict, llava: dict[str, str]) -> dict[str, dict[str, str]]:
    """Answers by problem: GPT-4 alone, LLaVA as its complement, GPT-4 as judge (section 5.2)."""
    train = scienceqa.read_problems(arguments.data, "train")
    examples = [problem for problem in train.values() if not problem.get("image")][:2]
    with Ledger(arguments.ensemble / "alone.jsonl") as ledger:
        job = scienceqa.gpt_job(problems, examples, ledger, arguments.gpt)
        gpt = ask_all(job, arguments)
    combined = scienceqa.complement(problems, llava, gpt)
    with Ledger(arguments.ensemble / "verdicts.jsonl") as ledger:
        job = scienceqa.verdict_job(problems, llava, gpt, ledger, arguments.gpt)
        verdicts = ask_all(job, arguments)
    print0(f"{arguments.gpt}: no answer to {len(problems) - len(gpt)} of {len(problems)} problems, "
           f"no verdict on {len(job.items) - len(verdicts)} of {len(job.items)} disputed ones")
    return {"GPT-4": gpt, "complement": combined, "judge": combined | verdicts}


def add_bench_arguments(add) -> None:
    add("--questions", type=Path, required=True, help="JSONL of question_id, image, text, category")
    add("--reference", type=Path, required=True,
        help="JSONL of question_id and text: GPT-4's own replies")
    add("--context", type=Path, required=True,
        help="JSONL of image and caption, or captions and instances")
    add("--out", type=out_file, required=True,
        help="JSON to write; OUT.ledger.jsonl next to it keeps every grade")
    add("--both-orders", action="store_true",
        help="grade each reply twice, once as the first and once as the second")
    add_chat(add)
    add("--images", type=Path, help="folder of the images, for --model")
    add_answers(add, "bench.jsonl")


def evaluate_bench(arguments) -> tuple[str, dict]:
    """LLaVA-Bench, table 4: GPT-4 grades replies relative to its own."""
    if arguments.model and not arguments.images:
        raise InputError("--model needs --images, the folder of the images")
    rows = list(read_jsonl(arguments.questions, llava_bench.QUESTION))
    folder = arguments.images or Path()
    questions = {str(row["question_id"]): (f"{IMAGE_TOKEN}\n{row['text']}",
                                           [Path(path_inside(folder, row["image"]))])
                 for row in rows}
    if len(questions) < len(rows):
        raise InputError(f"{arguments.questions} has several questions with the same question_id")
    answers = collect_answers(arguments, questions, "bench.jsonl")
    items = llava_bench.build_items(rows, arguments.reference, arguments.context, answers)
    with Ledger(arguments.out.with_name(f"{arguments.out.name}.ledger.jsonl")) as ledger:
        job = llava_bench.judge_job(items, arguments.both_orders, ledger, arguments.gpt)
        ask_all(job, arguments)
        result = llava_bench.summarize(job)
    if result["without_grade"]:
        print0(f"no grade for {', '.join(result['without_grade'])}: the means leave them out. "
               f"Run the command again to ask for those rejected fewer than {TRIES} times.")
    relative = {category: scores["relative"] for category, scores in result["scores"].items()}
    return percent_table({"relative": relative}), result


# ---------------------------------------------------------------------------------------------
# What several commands share


def add_answers(add, default: str) -> None:
    """Arguments for replies that are made here or read from a file."""
    add_llava_flags(add, help="folder of the LLaVA that answers")
    add("--answers", type=Path,
        help="JSONL of question_id and text to read; with --model, missing answers are added to it "
             f"(default with --model: MODEL/{default})")
    add("--batch-size", type=in_range(1, 65_536), default=16,
        help="questions per batch (default: %(default)s)")


def add_chat(add) -> None:
    """Arguments for the language model behind a REST API; its key is in OPENAI_API_KEY."""
    add("--gpt", default="gpt-4", metavar="NAME",
        help="language model to ask (default: %(default)s)")
    add("--base-url", default=OPENAI,
        help="any server with /chat/completions (default: OpenAI's)")
    add("--workers", type=in_range(1, 1024), default=8,
        help="requests in flight at the same time (default: %(default)s)")
    add("--max-reply-tokens", type=positive, default=2048, metavar="N",
        help="longest reply of the language model (default: %(default)s)")


def collect_answers(arguments, questions: dict, default: str) -> dict[str, str]:
    """The replies in --answers by question id; with --model, missing ones are made and added."""
    from .benchmarks.answers import answer_all, read_answers
    from .chat import open_llava
    from .weights.safetensors_io import fingerprint

    if not arguments.model:
        return read_answers(arguments.answers, questions)
    path = arguments.answers or arguments.model / default
    check_writable(path)
    model, tokenizer = open_llava(arguments.model, arguments.dtype, arguments.device,
                                  arguments.vision_tower, arguments.quantize)
    # replies of quantized and of exact weights are different
    folders = map(fingerprint, filter(None, (arguments.model, arguments.vision_tower)))
    weights = " ".join([*folders, *filter(None, [arguments.quantize])])
    return answer_all(model, tokenizer, questions, path, arguments.batch_size, weights)


def ask_all(job: Job, arguments) -> dict:
    """Ask for the replies that the ledger lacks, and return the good ones by item id."""
    if job.pending():
        chat = Chat(arguments.gpt, arguments.base_url,
                    max_reply_tokens=arguments.max_reply_tokens)
        job.run(chat, arguments.workers)
    results, _, _ = job.result()
    return {job.item_id(item): result for item, result in zip(job.items, results)
            if result is not None}


COMMANDS = {
    "toy": (add_toy_arguments, evaluate_toy),
    "lens": (add_lens_arguments, evaluate_lens),
    "ablations": (add_ablation_arguments, evaluate_ablations),
    "report": (add_report_arguments, evaluate_report),
    "scienceqa": (add_scienceqa_arguments, evaluate_scienceqa),
    "bench": (add_bench_arguments, evaluate_bench),
}


if __name__ == "__main__":
    with one_line_errors(LESS_MEMORY):
        main(parse_arguments())
