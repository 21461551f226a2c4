"""How well a model sees: `python -m nanollava.evaluate toy`, `scienceqa`, `bench` or `report` (section 5).

The toy world: held-out questions about pictures that no training met, scored by exact match, type by type, against two
controls: the same questions about the wrong picture (what can be guessed from the words alone) and the
model after stage 1 only (what the projector brings before the language model has learned to use it).
"""

import textwrap
from collections import defaultdict
from itertools import islice
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from . import bench, gpt, scienceqa
from .chat import answer_all, open_llava, read_answers, replies, stream
from .conversation import IMAGE
from .data import check_row
from .files import InputError, Parser, one_line_errors, positive, read_json, read_json_list, read_lines, say, \
    whole_file, write_json
from .image import open_image, preprocess
from .llava import Llava
from .progress import Progress, progress
from .report import Told, write_report
from .tokenizer import Tokenizer
from .training import best_device, best_dtype, read_log


def same(reply: str, truth: str) -> bool:
    """True if a reply is the right sentence, up to capitals, spaces and the final stop."""
    one, other = (text.lower().strip(" .").split() for text in (reply, truth))
    return one == other


def answer_toy(model, tokenizer, rows, images: Path, label="", batch_size=64) -> list[str]:
    """The model's replies to rows of test.json, each about one picture."""
    files = sorted({row["image"] for row in rows})
    seen = {}  # file -> (P, D); test pictures are few and asked about many times
    for start in range(0, len(files), batch_size):
        batch = files[start : start + batch_size]
        pixels = torch.stack([preprocess(open_image(images / file), model.config.image_size) for file in batch])
        with torch.no_grad():
            seen.update(zip(batch, model.see(pixels)))
    said = [""] * len(rows)
    order = sorted(range(len(rows)), key=lambda number: rows[number]["type"])  # replies of a type are about as long
    with Progress(label, len(rows), "questions") as progress:
        for start in range(0, len(rows), batch_size):
            batch = order[start : start + batch_size]
            texts = replies(model, tokenizer, [rows[number]["conversations"][:1] for number in batch],
                            pictures=torch.stack([seen[rows[number]["image"]] for number in batch]))
            for number, text in zip(batch, texts):
                said[number] = text
            progress.update(start + len(batch))
    return said


def accuracy(rows, said: list[str]) -> dict[str, float]:
    """Percent right for each type, and for all questions together."""
    right = defaultdict(list)
    for row, reply in zip(rows, said):
        right[row["type"]].append(same(reply, row["conversations"][1]["value"]))
    right["all"] = [hit for hits in list(right.values()) for hit in hits]
    return {kind: 100 * sum(hits) / len(hits) for kind, hits in right.items()}


def table(columns: dict[str, dict[str, float]]) -> str:
    """Columns of percentages by row name, as text."""
    rows = list(next(iter(columns.values())))
    width = max(map(len, rows)) + 2
    lines = [" " * width + "".join(f"{name:>22}" for name in columns)]
    for row in rows:
        cells = (f"{column[row]:>21.1f}%" if row in column else " " * 22 for column in columns.values())
        lines.append(f"{row:<{width}}" + "".join(cells))
    return "\n".join(lines)


def toy_table(run: Path, data: Path, device: str = "cpu", limit: int | None = None):
    """The columns of the toy evaluation for a folder that holds stage2/ and maybe stage1/; the rows of test.json
    and what the model of stage 2 said to them."""
    rows = read_json(data / "test.json")
    files = sorted({row["image"] for row in rows})
    other = dict(zip(files, files[1:] + files[:1]))
    rows = rows[:limit]
    wrong = [{**row, "image": other[row["image"]]} for row in rows]
    said = {}
    for stage, columns in (("stage2", {"after stage 2": rows, "wrong picture": wrong}),
                           ("stage1", {"after stage 1": rows})):
        if stage == "stage2" or (run / stage).is_dir():
            model, tokenizer = Llava.from_pretrained(run / stage, device=device), Tokenizer(run / stage)
            for name, asked in columns.items():
                said[name] = answer_toy(model, tokenizer, asked, data / "images", label=name)
    return {name: accuracy(rows, texts) for name, texts in said.items()}, rows, said["after stage 2"]


def gallery(rows, said: list[str], images: Path, across: int = 4, down: int = 2, questions: int = 3) -> Image.Image:
    """The first pictures of rows of test.json, and under each what the model said: blue if right, red if wrong."""
    side, margin, line = 192, 24, 17
    font, height = ImageFont.load_default(13), side + (3 * questions + 1) * line + margin
    sheet = Image.new("RGB", (across * (side + margin + 40) + margin, down * height + margin), "white")
    write = ImageDraw.Draw(sheet)
    for number, file in enumerate(sorted({row["image"] for row in rows})[: across * down]):
        x, y = margin + number % across * (side + margin + 40), margin + number // across * height
        sheet.paste(open_image(images / file).resize((side, side), Image.Resampling.NEAREST), (x, y))
        asked = [(row["conversations"], reply) for row, reply in zip(rows, said) if row["image"] == file]
        top = y + side + 6
        for turns, reply in asked[number % 2 :: 2][:questions]:  # not the same types everywhere
            color = "#1050c0" if same(reply, turns[1]["value"]) else "#d01010"
            write.text((x, top), turns[0]["value"].replace(IMAGE, "").strip(), "black", font)
            for said_line in textwrap.wrap(reply, 38)[:3]:
                top += line - 2
                write.text((x, top), said_line, color, font)
            top += line + 2
    return sheet


def write_toy_report(run: Path, data: Path, columns: dict, rows, said: list[str], pictures: int = 24) -> None:
    """RUN/report.html: the losses of both stages, the table, and what the model said about some of the pictures."""
    logs = {f"Stage {stage}": read_log(run / f"stage{stage}" / "log.jsonl") for stage in (1, 2)}
    told = {}
    for row, reply in zip(rows, said):
        question, truth = (turn["value"] for turn in row["conversations"])
        told.setdefault(row["image"], []).append(Told(question, reply, truth, same(reply, truth)))
    cards = [(data / "images" / file, asked) for file, asked in list(told.items())[:pictures]]
    write_report(run / "report.html", "A toy LLaVA", logs, columns, cards)


def parse_arguments():
    parser = Parser(__doc__, prog="python -m nanollava.evaluate")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)
    command = commands.add_parser("toy", doc="Held-out questions about the toy world, against two controls.")
    command.set_defaults(run_command=evaluate_toy)
    add = command.add_argument
    add("--run", type=Path, default=Path("runs/toy"), help="folder with stage1/ and stage2/ (default: %(default)s)")
    add("--data", type=Path, default=Path("data/toy"), help="folder of `prepare_data.py toy` (default: %(default)s)")
    add("--limit", type=positive(int), help="ask only the first so many questions")
    add("--out", type=Path, help="write the table as JSON to this file, too")
    add("--picture", type=Path, help="paint some scenes with the model's answers to this file")
    add("--device", help="cuda, mps or cpu (default: the first that is there)")

    command = commands.add_parser("report", doc="A page for a run: its losses, and its replies to held-out rows.")
    command.set_defaults(run_command=evaluate_report)
    add = command.add_argument
    add("--model", type=Path, required=True, help="folder that train.py wrote; report.html appears in it")
    add("--data", type=Path, required=True, help="LLaVA JSON; of each row the first question is asked")
    add("--images", type=Path, required=True, help="folder of its pictures")
    add("--limit", type=positive(int), default=24, help="how many of the first rows (default: %(default)s)")
    add_device(add)

    command = commands.add_parser("scienceqa", doc="ScienceQA by category, the columns of the paper's table 6.")
    command.set_defaults(run_command=evaluate_scienceqa)
    add = command.add_argument
    add("--data", type=Path, required=True, help="folder with problems.json, pid_splits.json and test/ID/image.png")
    add("--split", choices=scienceqa.SPLITS, default="test", help="(default: %(default)s)")
    add("--out", type=Path, help="write the result as JSON to this file, too")
    add("--ensemble", type=Path, metavar="FOLDER",
        help="ask GPT-4, too, and combine the answers as the paper does; FOLDER keeps all that GPT-4 says")
    add_chat(add)
    add_answers(add, "scienceqa-SPLIT.jsonl")

    command = commands.add_parser("bench", doc="LLaVA-Bench: GPT-4 grades replies against its own, table 4.")
    command.set_defaults(run_command=evaluate_bench)
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
    add("--base-url", default=gpt.OPENAI, help="any server with /chat/completions (default: OpenAI's)")
    add("--workers", type=positive(int), default=8, help="requests under way at once (default: %(default)s)")


def add_answers(add, default: str) -> None:
    """The arguments of what can be answered here or elsewhere."""
    add("--model", type=Path, help="folder of a LLaVA that answers")
    add("--answers", type=Path, help="JSONL of question_id and text: read, and with --model completed "
        f"(default with --model: MODEL/{default})")
    add("--batch-size", type=positive(int), default=16, help="questions answered at once (default: %(default)s)")
    add_device(add)


def add_device(add) -> None:
    add("--dtype", choices=("float32", "bfloat16"), help="of the arithmetic (default: bfloat16 where it is fast)")
    add("--device", help="cuda, mps or cpu (default: the first that is there)")


def evaluate_toy(arguments) -> None:
    columns, rows, said = toy_table(arguments.run, arguments.data, best_device(arguments.device), arguments.limit)
    print(table(columns))
    write_toy_report(arguments.run, arguments.data, columns, rows, said)
    if arguments.out:
        write_json(arguments.out, columns, indent=2)
    if arguments.picture:
        with whole_file(arguments.picture) as beside:
            gallery(rows, said, arguments.data / "images").save(beside, "PNG")


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
        paths = [arguments.images / file for file in files[: turns[0]["value"].count(IMAGE)]]
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
        say(f"{name}: {len(problems)} problems, {score['unreadable']} replies name no option, "
            f"{score['missing']} have no reply")
    if arguments.out:
        write_json(arguments.out, scores.pop("LLaVA") | scores, indent=2)


def ask(job: gpt.Job, arguments) -> list:
    """What is wanted of each item of a job, None where there is none, after asking for what the ledger lacks."""
    if job.open():
        job.run(gpt.Chat(arguments.gpt, arguments.base_url), arguments.workers)
    return job.result()[0]


def ensembles(arguments, problems: dict, ours: dict[str, str]) -> dict[str, dict[str, str]]:
    """The answers of GPT-4 alone, of LLaVA where GPT-4 has none, and of GPT-4 as the judge (section 5.2)."""
    train = scienceqa.read_problems(arguments.data, "train")
    examples = [problem for problem in train.values() if not problem.get("image")][:2]
    with gpt.Ledger(arguments.ensemble / "alone.jsonl") as ledger:
        job = scienceqa.alone(problems, examples, ledger, arguments.gpt)
        theirs = {number: text for number, text in zip(job.items, ask(job, arguments)) if text is not None}
    both = scienceqa.complement(problems, ours, theirs)
    with gpt.Ledger(arguments.ensemble / "verdicts.jsonl") as ledger:
        job = scienceqa.judge(problems, ours, theirs, ledger, arguments.gpt)
        verdicts = {number: text for number, text in zip(job.items, ask(job, arguments)) if text is not None}
    say(f"{arguments.gpt}: {len(problems) - len(theirs)} of {len(problems)} problems got no answer, "
        f"{len(job.items) - len(verdicts)} of {len(job.items)} in dispute no verdict")
    return {"GPT-4": theirs, "complement": both, "judge": both | verdicts}


def evaluate_bench(arguments) -> None:
    rows = read_lines(arguments.questions, ("question_id", "image", "text", "category"))
    if arguments.model and not arguments.images:
        raise InputError("--model needs --images, the folder of the pictures")
    questions = {str(row["question_id"]): (f"{IMAGE}\n{row['text']}", [Path(arguments.images or "") / row["image"]])
                 for row in rows}
    answers = made_answers(arguments, questions, "bench.jsonl")
    items = bench.join(rows, arguments.reference, arguments.context, answers)
    with gpt.Ledger(arguments.out.with_name(f"{arguments.out.name}.ledger.jsonl")) as ledger:
        judge = bench.job(items, arguments.both_orders, ledger, arguments.gpt)
        ask(judge, arguments)
        result = bench.summary(judge)
    write_json(arguments.out, result, indent=2)
    print(table({"relative": {name: scores["relative"] for name, scores in result["scores"].items()}}))
    if result["without_grade"]:
        say(f"no grade for {', '.join(result['without_grade'])}, which are in no mean: start again to ask again")


def main() -> None:
    arguments = parse_arguments()
    arguments.run_command(arguments)


if __name__ == "__main__":
    with one_line_errors():
        main()
