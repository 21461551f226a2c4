"""Train LLaVA, section 4.2 of the paper: the projector in stage 1, projector and LLM in stage 2.

    python train.py                          # the toy world: data, stage 1, stage 2, evaluation
    python train.py --stage 0 --out assets   # make the toy world's CLIP and LLaMA

The real model starts from CLIP and Vicuna, with the paper's data and settings:

    python train.py --stage 1 --vision-tower clip-vit-large-patch14 --llm vicuna-7b-v1.3 \\
        --data chat.json --images CC3M --out runs/stage1
    python train.py --stage 2 --model runs/stage1 \\
        --data llava_instruct_150k.json --images COCO/train2017 --out runs/stage2

A "toy" is an LLM with a hidden size below 512; its defaults differ.
"""

from nanollava.infra.start import start

if __name__ == "__main__":
    start()  # before other imports, which take long

import contextlib
import hashlib
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

from nanollava.conversation import TEMPLATES
from nanollava.infra.cli import (Parser, add_device, check_flags, in_range, one_line_errors,
                                 out_folder, percent_table, positive, seed)
from nanollava.infra.io import InputError, hash_file, locked_folder
from nanollava.infra.progress import print0
from nanollava.settings import (CONFLICTS, NEEDS, TOY_DATA, TOY_IMAGE, TOY_RUN, TOY_WIDTH, Settings,
                                check_max_length, check_out, choose_defaults, choose_max_length,
                                resolve_settings)


def parse_arguments():
    """The arguments. Ends the program if a flag is wrong, or has no effect beside the others."""
    parser = Parser(__doc__)
    add_model_flags(parser.add_argument_group("what to train").add_argument)
    add_data_flags(parser.add_argument_group("data").add_argument)
    add_training_flags(parser.add_argument_group("how to train").add_argument)
    add_run_flags(parser.add_argument_group("where").add_argument)
    arguments = parser.parse_args()
    folders = arguments.model or arguments.vision_tower or arguments.llm
    if arguments.stage == 2 and not (folders or arguments.plan):
        arguments.model = TOY_RUN / "stage1"
        # so that check_flags refuses --projector beside this default
        arguments.settings.add(f"--model {arguments.model}")
    if arguments.plan:  # without --stage it plans both
        arguments.settings.discard("--stage None")
    check_flags(arguments, NEEDS, CONFLICTS)
    return arguments


def add_model_flags(add) -> None:
    add("--stage", type=int, choices=(0, 1, 2),
        help="0 makes the toy CLIP and LLaMA (default: stages 1 and 2 of the toy run, if missing)")
    add("--small-llm", action="store_true", help="stage 0: a smaller LLaMA, for the ablations")
    add("--vision-tower", type=Path, help="folder of a CLIP (default: assets/toy-clip); with "
        "--model, for a LLaVA of the original code that lacks its own")
    add("--llm", type=Path, help="folder of a LLaMA (default: assets/toy-llama)")
    add("--model", type=Path, help="folder of a LLaVA to continue from, instead of a new one "
        "(default for stage 2: runs/toy/stage1)")
    add("--projector", default="linear", metavar="TYPE",
        help="of a new LLaVA: linear (default, the paper's) or mlp2x_gelu (LLaVA-1.5's)")
    add("--feature-layer", type=int, choices=(-1, -2), default=-2,
        help="of a new LLaVA: the ViT block to read, counted from the end (default: -2)")
    add("--template", choices=TEMPLATES, help="of prompts (default: the model's, or vicuna_v1)")
    add("--lora-rank", type=in_range(1, 4096),
        help="stage 2: train LoRA matrices instead of the LLM's own weights (128 is usual)")


def add_data_flags(add) -> None:
    add("--data", type=Path, nargs="+", metavar="FILE",
        help="LLaVA JSON files, or one folder of `prepare_data.py toy` (default: data/toy)")
    add("--images", type=Path, nargs="+", metavar="FOLDER",
        help="folder of the images: one for all files, or one for each")
    add("--eval-data", type=Path, metavar="FILE", help="LLaVA JSON for validation, see "
        "--save-every: its loss is logged, and the best model kept in OUT/best")
    add("--eval-images", type=Path, metavar="FOLDER", help="(default: the first of --images)")
    add("--max-length", type=positive,
        help="tokens of a row; the rest is cut off (default: 2048, or as many as the LLM reads)")
    add("--skip-bad", action="store_true", help="leave out rows that cannot be trained on")
    add("--workers", type=in_range(0, 64), metavar="N",
        help="processes that read images, for each rank (default: its share of the cores, at most "
        "8; on a CPU 0)")


def add_training_flags(add) -> None:
    add("--epochs", type=in_range(1e-6, 1000.0), help="passes over the data, may be a fraction "
        "(default: 1 in stage 1, 3 in stage 2; 0.4 and 0.5 of the toy world)")
    add("--max-steps", type=positive, metavar="N", help="stop after N steps: a smoke test")
    add("--batch-size", type=in_range(1, 65_536),
        help="rows of a step, on all ranks together (default: 128 and 32; toy: 8)")
    add("--micro-batch-size", type=in_range(1, 65_536),
        help="rows that a rank computes at a time, at most (default: its share of a batch)")
    add("--lr", type=in_range(1e-12, 100.0), help="peak learning rate (default: 2e-3 and 2e-5; "
        "toy: 4e-3 and 4e-4; with --lora-rank 2e-4)")
    add("--seed", type=seed, default=0,
        help="of a new toy world, a new projector, the order of the data (default: 0)")
    add("--dtype", choices=("float32", "bfloat16", "float16"),
        help="of the computation and the result; float16 is refused (default: bfloat16 on GPUs "
        "since the A100 and RTX 30, CPUs with AMX and AMD's since Zen 4; float32 for toy models "
        "and elsewhere)")
    add_device(add)
    add("--no-gradient-checkpointing", action="store_true",
        help="store the activations of all blocks: faster, more memory (toy models always do)")
    add("--compile", action="store_true", help="compile the blocks: faster after some minutes")


def add_run_flags(add) -> None:
    add("--out", type=out_folder,
        help="folder (default: runs/toy/stage…, without --stage runs/toy)")
    add("--save-every", type=positive, metavar="N",
        help="steps from one checkpoint to the next, and from one validation to the next (default: "
        "a checkpoint every 30 minutes, a validation every 500 steps; toy: 250)")
    add("--resume", action="store_true", help="continue from the last checkpoint, if there is one")
    add("--plan", nargs="?", choices=("7b", "13b"), const=True, metavar="SIZE",
        help="only print what training needs, memory, hours and disk, with the paper's data: for "
        "the paper's model, 7b or 13b, or without SIZE for --model, or --vision-tower and --llm")
    add("--gpus", type=in_range(1, 65_536), default=8, help="of the --plan (default: 8)")


if __name__ == "__main__":  # before torch is imported, which takes seconds
    with one_line_errors():
        arguments = parse_arguments()

import torch

from nanollava.benchmarks.report import write_report
from nanollava.data import (Conversations, eval_batches, hash_sources, length_grouped_batches,
                            load_batches)
from nanollava.infra import distributed
from nanollava.infra.device import best_device, best_dtype, compile_blocks, pick_compute_dtype
from nanollava.infra.json_io import write_json
from nanollava.infra.resume import Checkpoints, check_same_settings
from nanollava.infra.run_log import Run, read_log
from nanollava.llava import Llava, LlavaConfig
from nanollava.plan import SIZES, plan
from nanollava.tokenizer import Tokenizer, open_tokenizer
from nanollava.tour import PROMPT, write_tour
from nanollava.toy.dataset import write_world
from nanollava.toy.score import evaluate_run
from nanollava.toy.stage0 import evaluate_parts, train_parts
from nanollava.training import (DivergedError, adamw, apply_gradient_checkpointing,
                                forward_backward, freeze, mean_loss, recompute_swiglu, train)
from nanollava.weights import hf_config, safetensors_io


def main(arguments) -> None:
    if arguments.plan:
        return print_plan(arguments)
    device = distributed.init_distributed(best_device(arguments.device))
    if arguments.stage == 0:
        return make_toy_parts(arguments, device)
    stages = [arguments.stage] if arguments.stage else [1, 2]
    settings = [resolve_settings(arguments, stage, device, distributed.world_size())
                for stage in stages]
    if not arguments.data:
        distributed.on_rank0(draw_toy_world, arguments.seed)
    if arguments.stage:
        run_stage(settings[0])
    else:
        run_toy(arguments, *settings)


def draw_toy_world(seed: int) -> None:
    if not TOY_DATA.exists():
        write_world(TOY_DATA, seed)


def run_toy(arguments, stage1: Settings, stage2: Settings) -> None:
    """The toy run: the stages that are missing, then the evaluation."""
    folder = arguments.out or TOY_RUN
    data = arguments.data[0] if arguments.data else TOY_DATA
    run_stage(replace(stage1, out=folder / "stage1"))
    run_stage(replace(stage2, out=folder / "stage2", model=folder / "stage1", vision_tower=None,
                      llm=None))
    if distributed.rank() == 0:
        write_tour(folder / "stage2", TOY_IMAGE, PROMPT, folder / "tour.html",
                   device=stage2.device)
        print(percent_table(evaluate_run(folder, data, stage2.device)))
        print0(f"look at it in a browser: {folder / 'report.html'}")
        print0("ask it something: python sample.py --image cat.jpg")
        print0("chat with it in a browser: python -m nanollava.serve")


def make_toy_parts(arguments, device: str) -> None:
    """Stage 0: the toy world's CLIP and LLaMA, and how well they know it."""
    if distributed.world_size() > 1:
        raise InputError("--stage 0 runs in one process: start it with `python train.py --stage 0`")
    folder = arguments.out or TOY_RUN / "stage0"
    check_out(folder, resume=True)
    with locked_folder(folder):
        train_parts(folder, arguments.seed, device, arguments.small_llm)
    print(percent_table(evaluate_parts(folder, device)))


def print_plan(arguments) -> None:
    """What the stages need, for a model of the paper or one in folders, with the paper's data."""
    model, vision_tower, llm = arguments.model, arguments.vision_tower, arguments.llm
    if arguments.plan in SIZES:
        config, name = SIZES[arguments.plan], arguments.plan
    elif model:
        config = hf_config.read_llava_config(model, LlavaConfig.from_json, vision_tower)
        name = model
    elif vision_tower and llm:
        config = LlavaConfig.from_parts(vision_tower, llm, arguments.projector,
                                        feature_layer=arguments.feature_layer)
        name = f"{vision_tower} and {llm}"
    else:
        raise InputError("--plan of which model? Name a size, 7b or 13b, or its folders: --model, "
                         "or both --vision-tower and --llm")
    if config.text.hidden_size < TOY_WIDTH:
        raise InputError(f"--plan of {name}: a plan is for models of the paper's kind; a toy model "
                         "trains in minutes")
    max_length = choose_max_length(arguments.max_length, config.text.max_position_embeddings)
    check_max_length(max_length, config.tokens_per_image)
    for stage in [arguments.stage] if arguments.stage else [1, 2]:
        chosen = choose_defaults(arguments, stage, False, arguments.gpus)
        print(f"stage {stage}, {name}")
        print(plan(config, stage, arguments.gpus, chosen["batch_size"], chosen["epochs"],
                   arguments.micro_batch_size, arguments.lora_rank, max_length,
                   not arguments.no_gradient_checkpointing))


def run_stage(settings: Settings) -> None:
    """`train_stage`, unless it is finished. No other run may write to the folder meanwhile."""
    out = settings.out
    with contextlib.ExitStack() as stack:
        distributed.on_rank0(stack.enter_context, locked_folder(out))
        if settings.resume and (out / "config.json").is_file():
            distributed.on_rank0(check_finished, settings)
            distributed.on_rank0(remove_leftovers, out)
            print0(f"{out} is finished")
        else:
            train_stage(settings)


def train_stage(settings: Settings) -> None:
    """Stage 1 or 2: from a LLaVA, or a CLIP and a LLaMA, to a LLaVA in settings.out."""
    out = settings.out
    torch.manual_seed(settings.seed)  # for a new projector and LoRA's matrices

    # 1. the model (still memory-mapped on the CPU) and the data
    model, tokenizer = open_model(settings)
    dataset = open_data("training", settings.sources, tokenizer, model, settings)
    val_set = open_data("validation", settings.eval_sources, tokenizer, model, settings)

    # 2. the rows of each step
    num_steps = max(1, round(settings.epochs * len(dataset) / settings.batch_size))
    num_steps = min(num_steps, settings.max_steps or num_steps)
    rows = length_grouped_batches(dataset.lengths, settings.batch_size, num_steps, settings.seed)
    epochs = num_steps * settings.batch_size / len(dataset)
    print0(f"stage {settings.stage}: {len(dataset)} rows, {epochs:.3g} epochs, {num_steps} steps "
           f"of {settings.batch_size} rows, learning rate {settings.lr:g}")

    with name_diverged_rows(dataset, rows):
        # 3. what is trained, on which device, in which dtype
        prepare_model(model, settings)
        optimizers = adamw(model, settings.lr)

        # 4. train, from the last checkpoint if there is one
        distributed.on_rank0(remove_leftovers, out)
        checkpoints = Checkpoints(out / "resume", model, optimizers,
                                  run_identity(settings, dataset, num_steps))
        run = Run(f"stage {settings.stage}", num_steps, checkpoints, out / "log.jsonl",
                  settings.save_every, settings.validate_every)
        batches = load_batches(dataset, rows[run.start :], settings.micro_batch_size,
                               settings.workers, settings.device)
        validate = partial(validate_stage, model, val_set, tokenizer, settings) if val_set else None
        train(run, model, batches, optimizers, forward_backward, validate)

    # 5. the result
    distributed.on_rank0(write_records, settings)
    save_model(model, out, tokenizer, settings)
    checkpoints.clear()


def open_model(settings: Settings) -> tuple[Llava, Tokenizer]:
    if settings.model:
        model = Llava.from_pretrained(settings.model, dtype=None,
                                      vision_tower=settings.vision_tower)
    else:
        model = Llava.from_parts(settings.vision_tower, settings.llm, settings.projector,
                                 feature_layer=settings.feature_layer, dtype=None)
    if settings.template:
        model.config.template = settings.template
    elif settings.stage == 2 and model.config.template == "plain":  # it is for captions only
        model.config.template = "vicuna_v1"
    model.config.stage = settings.stage
    return model, open_tokenizer(settings.model or settings.llm, model.config)


def open_data(name: str, sources: list, tokenizer: Tokenizer, model: Llava, settings: Settings):
    """The rows of LLaVA JSON files, checked; None for no files."""
    if not sources:
        return None
    check_max_length(settings.max_length, model.config.tokens_per_image)
    dataset = Conversations(sources, tokenizer, model.config, settings.max_length,
                            settings.skip_bad)
    if dataset.skipped:
        print0(f"{dataset.skipped} of {dataset.skipped + len(dataset)} {name} rows are left out: "
               "they are broken, or their images are")
    if dataset.truncated:
        print0(f"{dataset.truncated} of {len(dataset)} {name} rows are longer than "
               f"{settings.max_length} tokens; the end of their answers is cut off")
    return dataset


def prepare_model(model: Llava, settings: Settings) -> None:
    """Make a model ready for training. Each step wraps or converts it; its code stays the same."""
    freeze(model, settings.stage, settings.lora_rank)
    dtype = best_dtype(settings.device, settings.dtype)
    model.compute_dtype = pick_compute_dtype(dtype, settings.device)
    # recomputation is innermost, then compilation, then sharding: each wraps the ones before;
    # the LLM is sharded block by block, and the rest, ViT and projector too, in one unit
    recompute_swiglu(model.language_model)
    if settings.gradient_checkpointing:
        apply_gradient_checkpointing(model.language_model)
    if settings.compile:
        compile_blocks(model)
    distributed.shard_model(model, model.language_model.model.layers, model.compute_dtype,
                            settings.device)


def run_settings(settings: Settings) -> dict:
    """The settings on which the result depends, as JSON values; the content of files as hashes."""
    start = filter(None, (settings.model, settings.vision_tower, settings.llm))
    names = ("stage", "projector", "feature_layer", "template", "lora_rank", "max_length",
             "skip_bad", "epochs", "max_steps", "batch_size", "lr", "seed")
    return {name: getattr(settings, name) for name in names} | dict(
        dtype=str(best_dtype(settings.device, settings.dtype)),
        starting_weights=" ".join(map(safetensors_io.fingerprint, start)),
        data=hash_sources(settings.sources), validation_data=hash_sources(settings.eval_sources))


def run_identity(settings: Settings, dataset: Conversations, num_steps: int) -> dict:
    """What a run must share with its checkpoints, or the result would not be bit-identical."""
    tokenizer = hash_file(hashlib.sha256(), dataset.tokenizer.path).hexdigest()[:12]
    return run_settings(settings) | dict(tokenizer=tokenizer, rows=len(dataset),
                                         num_steps=num_steps)


def validate_stage(model: Llava, val_set: Conversations, tokenizer: Tokenizer, settings: Settings,
                   best_loss: float) -> float:
    """The validation loss. A model with a new lowest loss is saved in OUT/best."""
    rows = eval_batches(val_set.lengths, settings.batch_size)
    batches = load_batches(val_set, rows, settings.micro_batch_size, settings.workers,
                           settings.device)
    loss = mean_loss(model, batches, settings.device)
    if loss < best_loss:
        save_model(model, settings.out / "best.part", tokenizer, settings)
        distributed.on_rank0(replace_best, settings.out)
    return loss


def replace_best(out: Path) -> None:
    shutil.rmtree(out / "best", ignore_errors=True)
    (out / "best.part").rename(out / "best")


def save_model(model: Llava, folder: Path, tokenizer: Tokenizer, settings: Settings) -> None:
    model.save_pretrained(folder, [tokenizer.path], best_dtype(settings.device, settings.dtype))


def remove_leftovers(out: Path) -> None:
    """Make the folder, and remove what a killed run left incomplete in it."""
    out.mkdir(parents=True, exist_ok=True)
    if (out / "best.part" / "config.json").is_file() and not (out / "best").exists():
        replace_best(out)  # it was complete: the run was killed inside replace_best
    shutil.rmtree(out / "best.part", ignore_errors=True)
    for path in out.glob(".*.part"):
        path.unlink()
    if (out / "config.json").is_file():  # the run was killed before it could remove its checkpoints
        shutil.rmtree(out / "resume", ignore_errors=True)


def write_records(settings: Settings) -> None:
    """The settings and the loss curve of a finished run."""
    out = settings.out
    write_json(out / "run.json", run_settings(settings), indent=2)
    log = read_log(out / "log.jsonl")
    write_report(out / "report.html", str(out), {f"Stage {settings.stage}": log})


def check_finished(settings: Settings) -> None:
    """Raise InputError if a finished run had other settings: what was typed would be ignored."""
    path = settings.out / "run.json"
    if path.is_file():  # older versions did not write it
        check_same_settings(path, run_settings(settings))


@contextlib.contextmanager
def name_diverged_rows(dataset: Conversations, rows: list[list[int]]):
    """Name the rows of a step that diverged."""
    try:
        yield
    except DivergedError as error:
        names = "; ".join(map(dataset.name, rows[error.step]))
        raise InputError(f"{error}; train again with a lower --lr in another --out. Its rows: "
                         f"{names}") from error


if __name__ == "__main__":
    with one_line_errors("lower --micro-batch-size, leave out --no-gradient-checkpointing, use "
                         "--lora-rank or more GPUs; train.py --plan counts what a model needs"):
        main(arguments)
        distributed.shutdown()
