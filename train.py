"""Train LLaVA in its two stages, section 4.2 of the paper: the projector alone, then projector and LLM.

    python train.py                          # the toy world: data, stage 1, stage 2, evaluation, on a laptop
    python train.py --stage 0 --out assets   # makes the toy world's CLIP and LLaMA, once

The real thing starts from a CLIP and a Vicuna, with the paper's data and numbers:

    python train.py --preset 7b --stage 1 --vision clip-vit-large-patch14 --llm vicuna-7b-v1.3 \\
        --data chat.json --images CC3M --out runs/stage1
    python train.py --preset 7b --stage 2 --model runs/stage1 \\
        --data llava_instruct_150k.json --images COCO/train2017 --out runs/stage2
"""

import shutil
from pathlib import Path

from nanollava.conversation import TEMPLATES
from nanollava.infra.cli import Parser, one_line_errors, positive, seed
from nanollava.infra.io import InputError
from nanollava.infra.progress import print0

ASSETS = Path(__file__).resolve().parent / "assets"
PAPER = {1: dict(epochs=1, batch_size=128, lr=2e-3, save_every=500),
         2: dict(epochs=3, batch_size=32, lr=2e-5, save_every=500)}  # its appendix
LORA_LR = 2e-4  # as in LLaVA-1.5's own recipe for LoRA: ten times the rate of the weights themselves
PRESETS = {
    "toy": {1: dict(epochs=0.4, batch_size=8, lr=4e-3, save_every=250),
            2: dict(epochs=0.5, batch_size=16, lr=4e-4, save_every=250)},
    "7b": PAPER,
    "13b": PAPER,
}


def parse_arguments():
    parser = Parser(__doc__)
    add = parser.add_argument_group("what to train").add_argument
    add("--stage", type=int, choices=(0, 1, 2), help="0 makes the toy CLIP and LLaMA; default: 1, then 2, if missing")
    add("--small-llm", action="store_true", help="stage 0 makes a LLaMA of a third of the size, for the ablations")
    add("--preset", choices=PRESETS, default="toy", help="steps and rates: the toy world's (default) or the paper's")
    add("--vision", type=Path, help="folder of a CLIP (default: assets/toy-clip)")
    add("--llm", type=Path, help="folder of a LLaMA (default: assets/toy-llama)")
    add("--model", type=Path, help="folder of a LLaVA to go on from, instead of --vision and --llm")
    add("--projector", choices=("linear", "mlp2x_gelu"), default="linear", help="the paper's (default), or LLaVA-1.5's")
    add("--template", choices=TEMPLATES, help="words around the turns (default: the model's, or vicuna_v1)")
    add("--feature-layer", type=int, choices=(-1, -2), default=-2, help="which block of the CLIP is read (default: -2)")
    add("--lora-rank", type=positive(int), help="stage 2 learns thin matrices beside the LLM's (LoRA; 128 is usual)")
    add = parser.add_argument_group("data").add_argument
    add("--data", type=Path, nargs="+", metavar="FILE",
        help="LLaVA JSON, one or several, or a folder of `prepare_data.py toy` (default: data/toy)")
    add("--images", type=Path, nargs="+", metavar="FOLDER", help="folder of their pictures, or one for each FILE")
    add("--eval-data", type=Path, metavar="FILE", help="held-out LLaVA JSON: its loss is logged, the best model kept")
    add("--eval-images", type=Path, metavar="FOLDER", help="folder of its pictures (default: the first of --images)")
    add("--max-length", type=positive(int), default=2048, help="cut off what is beyond so many tokens (default: 2048)")
    add("--skip-bad", action="store_true", help="leave out rows that are broken or whose pictures are")
    add("--workers", type=int, choices=range(65), metavar="N",
        help="processes that open pictures (default: none on a CPU, else 8)")
    add = parser.add_argument_group("how").add_argument
    add("--epochs", type=positive(float), help="times through the data; may be a fraction")
    add("--batch-size", type=positive(int), help="conversations a step, all processes together")
    add("--micro-batch", type=positive(int), help="conversations that a process takes at once (default: its share)")
    add("--lr", type=positive(float), help="highest learning rate")
    add("--seed", type=seed, default=0, help="of a new toy world, a new projector, the order of the data (default: 0)")
    add("--dtype", choices=("float32", "bfloat16"), help="of arithmetic and result (default: bfloat16 where fast)")
    add("--device", help="cuda, mps or cpu (default: the first that is there)")
    add("--keep-activations", action="store_true",
        help="compute no block a second time in the backward pass: faster, takes more memory (see --plan); the "
        "toy does so anyway")
    add("--compile", action="store_true", help="let torch.compile make the blocks faster; that takes minutes at first")
    add = parser.add_argument_group("where").add_argument
    add("--out", type=Path, help="folder to write (default: runs/toy/stage1, say; without --stage: runs/toy)")
    add("--save-every", type=positive(int), help="steps from one checkpoint to the next (default: 500; toy: 250)")
    add("--plan", action="store_true", help="only say what --preset 7b or 13b needs: memory, operations, hours")
    add("--gpus", type=positive(int), default=8, help="how many there would be, for --plan (default: 8)")
    add("--resume", action="store_true", help="go on from the last checkpoint in --out, if there is one")
    return parser.parse_args()


if __name__ == "__main__":
    parse_arguments()  # now, for torch takes seconds: --help and mistakes are answered at once

import torch

from nanollava.benchmarks.report import percent_table, write_report
from nanollava.data import Conversations, length_grouped_batches, eval_batches, load_batches
from nanollava.infra import distributed
from nanollava.infra.device import pick_compute_dtype, best_device, best_dtype
from nanollava.infra.resume import Checkpoints
from nanollava.infra.run_log import read_log
from nanollava.llava import Llava
from nanollava.plan import SIZES, plan
from nanollava.tokenizer import Tokenizer
from nanollava.toy.dataset import write_world
from nanollava.toy.score import toy_table, write_toy_report
from nanollava.toy.stage0 import parts_table, train_parts
from nanollava.training import adamw, fit, freeze, learner, mean_loss
from nanollava.weights import safetensors_io


def main() -> None:
    arguments = parse_arguments()
    parts = arguments.vision or arguments.llm
    if parts and arguments.model:
        raise InputError("--model goes on from a LLaVA, --vision and --llm begin one: give one or the other")
    if arguments.small_llm and arguments.stage != 0:
        raise InputError("--small-llm is for --stage 0, which makes one")
    if arguments.plan:
        return print_plan(arguments)
    if arguments.preset != "toy" and not (arguments.data and (arguments.model or (arguments.vision and arguments.llm))):
        raise InputError(f"--preset {arguments.preset} needs --data, and --model or both --vision and --llm")
    device = distributed.init_distributed(best_device(arguments.device))
    if arguments.stage == 0:
        if distributed.world_size() > 1:
            raise InputError("--stage 0 runs in one process: start it with `python train.py --stage 0`")
        folder = arguments.out or Path("runs/toy/stage0")
        train_parts(folder, arguments.seed, device, arguments.small_llm)
        print(percent_table(parts_table(folder, device)))
    elif arguments.stage == 1:
        train_stage(1, arguments.model, arguments.out or Path("runs/toy/stage1"), arguments, device)
    elif arguments.stage == 2:
        start = None if parts else arguments.model or Path("runs/toy/stage1")
        train_stage(2, start, arguments.out or Path("runs/toy/stage2"), arguments, device)
    else:
        train_toy(arguments.out or Path("runs/toy"), arguments, device)


def print_plan(arguments) -> None:
    """What the paper's stages need at the size of --preset."""
    if arguments.preset == "toy" or arguments.stage == 0:
        raise InputError("--plan is for stages 1 and 2 of --preset 7b or 13b")
    for stage in (arguments.stage,) if arguments.stage else (1, 2):
        epochs, batch_size, *_ = settings_of(stage, arguments, arguments.gpus)
        print(f"stage {stage} of --preset {arguments.preset}")
        print(plan(SIZES[arguments.preset], stage, arguments.gpus, batch_size, epochs, arguments.micro_batch,
                   arguments.lora_rank, arguments.max_length, not arguments.keep_activations))


def train_toy(run: Path, arguments, device: str) -> None:
    """All of it: what is missing of the toy world, of stage 1 and of stage 2, then the evaluation."""
    data = arguments.data[0] if arguments.data else Path("data/toy")
    if arguments.model or arguments.preset != "toy" or data.is_file():
        raise InputError("without --stage this trains the toy world; say --stage 1 or 2 for your own model or data")
    arguments.resume = True
    for stage in (1, 2):
        train_stage(stage, run / "stage1" if stage == 2 else None, run / f"stage{stage}", arguments, device)
    if distributed.rank() == 0:
        columns, rows, said = toy_table(run, data, device)
        print(percent_table(columns))
        write_toy_report(run, data, columns, rows, said)
        print0(f"look at it in a browser: {run / 'report.html'}")
        print0("ask it something: python sample.py --image cat.jpg")


def train_stage(stage: int, start: Path | None, out: Path, arguments, device: str) -> None:
    """Stage 1 or 2, from the LLaVA in folder `start`, or from a CLIP and a LLaMA where there is none."""
    if arguments.resume and (out / "config.json").is_file():
        distributed.on_rank0(lambda: (make_room(out), shutil.rmtree(out / "resume", ignore_errors=True)))
        return print0(f"{out} is finished and stays as it is")
    if out.is_dir() and any(out.iterdir()) and not arguments.resume:
        raise InputError(f"{out} is not empty: --resume goes on with what is in it; or choose another --out")
    if start and not (start / "config.json").is_file():
        raise InputError(f"no model at {start} to go on from: train it (--stage 1), or name another (--model)")
    if arguments.eval_data and not arguments.eval_data.is_file():
        raise InputError(f"no data at {arguments.eval_data}")
    epochs, batch_size, lr, save_every = settings_of(stage, arguments, distributed.world_size())
    torch.manual_seed(arguments.seed)
    dtype = best_dtype(device, arguments.dtype)
    computed = pick_compute_dtype(dtype, device)

    sources = find_data(stage, arguments)
    if start:
        model, tokenizer = Llava.from_pretrained(start, None), Tokenizer(start)
    else:
        vision, llm = arguments.vision or ASSETS / "toy-clip", arguments.llm or ASSETS / "toy-llama"
        model = Llava.from_parts(vision, llm, arguments.projector, feature_layer=arguments.feature_layer, dtype=None)
        tokenizer = Tokenizer(llm)
    if arguments.template:
        model.config.template = arguments.template
    elif stage == 2 and model.config.template == "plain":  # as LLaVA-1.5: captions in stage 1, then conversations
        model.config.template = "vicuna_v1"
    model.config.stage = stage

    longest = min(arguments.max_length, model.config.text.max_position_embeddings)
    dataset = Conversations(sources, tokenizer, model.config, longest, arguments.skip_bad)
    tell_skipped(dataset)
    steps = max(1, round(epochs * len(dataset) / batch_size))
    order = length_grouped_batches(dataset.lengths, batch_size, steps, arguments.seed)

    freeze(model, stage, arguments.lora_rank)
    model.language_model.checkpointing = arguments.preset != "toy" and not arguments.keep_activations
    distributed.shard_model(model.set_compute_dtype(computed), model.language_model.model.layers, computed, device)
    if arguments.compile:
        model.compile_blocks()

    optimizers = adamw(model, lr)
    begin = [start] if start else [vision, llm]
    run = dict(stage=stage, starting_weights=" ".join(map(safetensors_io.fingerprint, begin)), data=dataset.digest,
               rows=len(dataset), steps=steps, batch_size=batch_size, lr=lr, seed=arguments.seed,
               lora_rank=arguments.lora_rank, template=model.config.template, max_length=longest,
               feature_layer=model.config.feature_layer, dtype=str(dtype))
    distributed.on_rank0(lambda: make_room(out))
    checkpoints = Checkpoints(out / "resume", model, optimizers, run)
    begun = checkpoints.load()
    workers = arguments.workers if arguments.workers is not None else 0 if device == "cpu" else 8
    held_out = None
    if arguments.eval_data:
        images = arguments.eval_images or sources[0][1]
        held_out = Conversations([(arguments.eval_data, images)], tokenizer, model.config, longest, arguments.skip_bad)
        tell_skipped(held_out)

    def validate(best: float) -> float:
        rows = eval_batches(held_out.lengths, batch_size)
        loss = mean_loss(model, load_batches(held_out, rows, arguments.micro_batch, workers), device)
        if loss < best:
            model.save_pretrained(out / "best.part", [tokenizer.path], dtype)
            distributed.on_rank0(lambda: (shutil.rmtree(out / "best", ignore_errors=True),
                                    (out / "best.part").rename(out / "best")))
        return loss

    batches = load_batches(dataset, order[begun:], arguments.micro_batch, workers)
    try:
        fit(f"stage {stage}", learner(model, device), batches, steps, optimizers, log=out / "log.jsonl", start=begun,
            tokens_of=lambda batch: distributed.world_size() * sum(tokens.numel() for tokens, *_ in batch),
            checkpoints=checkpoints, every=save_every, validate=validate if held_out else None,
            rows_of=lambda step: ": " + "; ".join(map(dataset.name, order[step])))
    except torch.OutOfMemoryError as error:
        raise InputError("the GPU's memory is full: take fewer rows at once (--micro-batch), leave out "
                         "--keep-activations, and see --plan") from error
    distributed.on_rank0(lambda: write_report(out / "report.html", str(out), {f"Stage {stage}": read_log(out / "log.jsonl")}))
    model.save_pretrained(out, [tokenizer.path], dtype)
    checkpoints.clear()


def settings_of(stage: int, arguments, processes: int) -> tuple:
    """Epochs, batch size, rate and steps between checkpoints: the preset's, but for what the user says."""
    settings = PRESETS[arguments.preset][stage]
    if stage == 1 and arguments.lora_rank:
        raise InputError("--lora-rank is for --stage 2: stage 1 leaves the language model alone")
    if arguments.lora_rank:
        settings = settings | {"lr": LORA_LR}
    chosen = {key: getattr(arguments, key) or value for key, value in settings.items()}
    if chosen["batch_size"] % processes:
        raise InputError(f"--batch-size {chosen['batch_size']} cannot be shared evenly by {processes} processes")
    return tuple(chosen[key] for key in ("epochs", "batch_size", "lr", "save_every"))


def make_room(out: Path) -> None:
    """The folder, without what a killed run left half written."""
    out.mkdir(parents=True, exist_ok=True)
    best, part = out / "best", out / "best.part"
    if (part / "config.json").is_file() and not best.exists():  # whole, and on the way to take the other's place
        part.rename(best)
    shutil.rmtree(part, ignore_errors=True)
    for path in out.glob(".*.part"):
        path.unlink()


def tell_skipped(dataset: Conversations) -> None:
    if dataset.skipped:
        print0(f"{dataset.skipped} of {dataset.skipped + len(dataset)} rows are left out, for they are broken")


def find_data(stage: int, arguments) -> list[tuple[Path, Path]]:
    """The JSON files of a stage, each with the folder of its pictures; the toy world is drawn where nobody did yet."""
    data, images = arguments.data or [Path("data/toy")], arguments.images or []
    if not arguments.data:
        distributed.on_rank0(lambda: data[0].exists() or write_world(data[0], arguments.seed))
    if len(data) == 1 and data[0].is_dir():
        return [(data[0] / {1: "pretrain.json", 2: "instruct.json"}[stage], data[0] / "images")]
    for path in data:
        if not path.is_file():
            raise InputError(f"{path} is a folder: give LLaVA JSON files, or one toy world" if path.is_dir() else
                             f"no data at {path}")
    if len(images) not in (1, len(data)):
        raise InputError(f"--data {data[0]} needs --images, the folder of its pictures" if not images else
                         f"{len(data)} files of --data, but {len(images)} folders of --images: give one, or one each")
    return list(zip(data, images * len(data) if len(images) == 1 else images))


if __name__ == "__main__":
    with one_line_errors():
        main()
        distributed.shutdown()
