"""The settings of a training stage: defaults by model and data, flags without effect, checks.

The paper's numbers are from its appendix. A toy model needs a higher learning rate and smaller
batches, and less than an epoch of its toy world. This file does not import torch, so that train.py
reports mistakes without delay.
"""

import os
from dataclasses import dataclass, fields
from pathlib import Path

from .infra.cli import add_device, add_dtype
from .infra.io import InputError, check_writable
from .weights import hf_config

ASSETS = Path(__file__).resolve().parents[1] / "assets"
TOY_RUN, TOY_DATA = Path("runs/toy"), Path("data/toy")
TOY_IMAGE = ASSETS.with_name("cat.jpg")

PAPER = {1: dict(epochs=1, batch_size=128, lr=2e-3), 2: dict(epochs=3, batch_size=32, lr=2e-5)}
TOY = {1: dict(epochs=1, batch_size=8, lr=4e-3), 2: dict(epochs=3, batch_size=8, lr=4e-4)}
TOY_WORLD_EPOCHS = {1: 0.4, 2: 0.5}
MAX_LENGTH = 2048  # tokens of a row, if the LLM reads as many
TOY_WIDTH = 512  # an LLM with a smaller hidden size gets the defaults of TOY
LORA_LR = 2e-4  # LLaVA-1.5's for LoRA; there the projector has its own rate, 2e-5

# Every flag of train.py acts or is refused. {flag: the flags of which it needs one}:
NEEDS = {
    "--small-llm": ("--stage 0",), "--lora-rank": ("--stage 2",),
    "--images": ("--data",), "--eval-images": ("--eval-data",),
    "--no-gradient-checkpointing": ("--stage 1", "--stage 2", "--plan"),
    "--gpus": ("--plan",),
}
# {other: (why flags have no effect beside it, those flags)}
NO_EFFECT = {
    "--stage 0": (
        "the toy CLIP and LLaMA are trained by a fixed recipe",
        "--vision-tower --llm --model --projector --template --feature-layer --data --eval-data "
        "--max-length --workers --epochs --max-steps --batch-size --micro-batch-size --lr --dtype "
        "--compile --save-every --plan --skip-bad"),
    "--stage None": (
        "the toy run trains a new model on a toy world", "--model --images --eval-data"),
    "--plan": (
        "a plan is for the paper's data and trains nothing",
        "--template --data --eval-data --workers --max-steps --lr --seed --dtype --device "
        "--compile --out --save-every --resume --skip-bad"),
    "--plan 7b": ("it names a model", "--vision-tower --llm --model --projector --feature-layer"),
    "--plan 13b": ("it names a model", "--vision-tower --llm --model --projector --feature-layer"),
    "--model": ("a LLaVA has its own", "--llm --projector --feature-layer"),
    f"--model {TOY_RUN / 'stage1'}": (  # the default of stage 2, see train.parse_arguments
        "stage 2 continues with the one of stage 1", "--projector --feature-layer"),
}
CONFLICTS = {(flag, other): reason for other, (reason, flags) in NO_EFFECT.items()
             for flag in flags.split()}


@dataclass(frozen=True)
class Settings:
    """One stage, complete and checked. Fields without a comment are flags of train.py."""

    stage: int
    out: Path
    resume: bool
    model: Path | None  # the LLaVA to continue from; None: join vision_tower and llm
    vision_tower: Path | None  # with a model: for one that does not hold its own
    llm: Path | None  # None with a model
    projector: str
    feature_layer: int
    template: str | None
    lora_rank: int | None
    sources: list[tuple[Path, Path]]  # LLaVA JSON files, each with the folder of its images
    eval_sources: list[tuple[Path, Path]]  # the same for validation: one pair or none
    max_length: int
    skip_bad: bool
    workers: int
    epochs: float
    max_steps: int | None
    batch_size: int
    micro_batch_size: int | None
    lr: float
    save_every: int | None  # None: by time, see run_log.SAVE_SECONDS
    validate_every: int  # steps: save_every, or else 500 (toy: 250)
    seed: int
    device: str
    dtype: str | None  # None: the fastest, see device.best_dtype
    gradient_checkpointing: bool
    compile: bool


SETTINGS = {field.name for field in fields(Settings)}


def resolve_settings(arguments, stage: int, device: str = "cpu", world_size: int = 1) -> Settings:
    """The settings of stage 1 or 2: the arguments, completed by defaults.

    Raises InputError for what would end the run later: a missing file, an --out in use.
    """
    if arguments.dtype == "float16":
        raise InputError("--dtype float16 is for generation: small gradients become 0 in it; train "
                         "with bfloat16 or float32")
    resume = arguments.resume or arguments.stage is None  # the toy run always resumes
    out = arguments.out or TOY_RUN / f"stage{stage}"
    check_out(out, resume)
    sources = data_sources(arguments, stage)
    vision_tower, llm = arguments.vision_tower, arguments.llm
    if not arguments.model:
        vision_tower, llm = vision_tower or ASSETS / "toy-clip", llm or ASSETS / "toy-llama"
    llm_config = read_llm_config(arguments.model, vision_tower, llm)
    is_toy = llm_config["hidden_size"] < TOY_WIDTH
    if not is_toy and not arguments.data:
        raise InputError("--data is missing: only a toy model is trained on the toy world")
    if not is_toy and not arguments.model and not arguments.vision_tower:
        raise InputError("--vision-tower is missing: the toy CLIP sees nothing but the toy world")
    if is_toy and arguments.no_gradient_checkpointing:
        raise InputError("--no-gradient-checkpointing has no effect on a toy model: it is always "
                         "trained without")
    from_flags = {name: value for name, value in vars(arguments).items() if name in SETTINGS}
    return Settings(**from_flags | choose_defaults(arguments, stage, is_toy, world_size) | dict(
        stage=stage, out=out, resume=resume, vision_tower=vision_tower, llm=llm, device=device,
        sources=sources, eval_sources=eval_sources(arguments, sources),
        validate_every=arguments.save_every or (250 if is_toy else 500),
        workers=default_workers(device) if arguments.workers is None else arguments.workers,
        max_length=choose_max_length(arguments.max_length, llm_config["max_position_embeddings"]),
        dtype=arguments.dtype or ("float32" if is_toy else None),  # as fast at this size, and exact
        gradient_checkpointing=not (is_toy or arguments.no_gradient_checkpointing)))


def read_llm_config(model: Path | None, vision_tower: Path | None, llm: Path | None) -> dict:
    """The fields of the language model's config. Raises InputError if a model folder is missing."""
    if model is None:
        hf_config.read_config(vision_tower, hf_config.vision_config)
        return hf_config.read_config(llm, hf_config.text_config)
    if not (model / "config.json").is_file() and not hf_config.without_weights(model.glob("*")):
        raise InputError(f"no model at {model}: train one with --stage 1, or give another --model")
    return hf_config.read_llava_config(model, hf_config.llava_config, vision_tower)["text"]


def choose_defaults(arguments, stage: int, is_toy: bool, world_size: int) -> dict:
    """epochs, batch_size and lr: as typed, or the defaults."""
    defaults = dict((TOY if is_toy else PAPER)[stage])
    if is_toy and is_toy_world(arguments):
        defaults["epochs"] = TOY_WORLD_EPOCHS[stage]
    if arguments.lora_rank:
        defaults["lr"] = LORA_LR
    chosen = {key: getattr(arguments, key) or value for key, value in defaults.items()}
    if chosen["batch_size"] % world_size:
        raise InputError(f"--batch-size {chosen['batch_size']} is not divisible by {world_size}, "
                         "the number of ranks, one for each GPU")
    return chosen


def default_workers(device: str) -> int:
    """Processes that read images for this rank: 0 on a CPU, which has no cores to spare, else up to
    8, as many as its share of the cores."""
    if device.startswith("cpu"):
        return 0
    # not every system has affinities; in a container they are the cores that it may use
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def add_llava_flags(add, **options) -> None:
    """The arguments of `chat.open_llava`. options: of the first one, --model."""
    add("--model", type=Path, **options)
    add_vision_tower(add)
    add_dtype(add)
    add_device(add)
    add_quantize(add)


def add_vision_tower(add) -> None:
    add("--vision-tower", type=Path,
        help="folder of the CLIP, for a LLaVA of the original code that lacks its own")


def add_quantize(add) -> None:
    add("--quantize", choices=("int8",),
        help="quantize the language model: half of bfloat16's bytes, faster tokens on a CPU")


def find_toy_model() -> Path:
    """The model of the toy run. Raises InputError if there is none."""
    for folder in (TOY_RUN / "stage2", TOY_RUN / "stage1"):
        if (folder / "config.json").is_file():
            return folder
    raise InputError(f"no model in {TOY_RUN}: make one with `python train.py`, or name one with "
                     "--model")


def check_out(out: Path, resume: bool) -> None:
    """Raise InputError if a model cannot be written to `out`, or would mix with what is in it."""
    check_writable(out, is_folder=True)
    # hidden files are a lock, and what other ranks write to see whether they can
    if out.exists() and any(path.name[0] != "." for path in out.iterdir()) and not resume:
        raise InputError(f"{out} is not empty: continue with --resume, or choose another --out")


def choose_max_length(typed: int | None, context: int) -> int:
    """Tokens of a row, for an LLM that reads `context` of them."""
    if typed and typed > context:
        raise InputError(f"--max-length {typed}: this model reads at most {context} tokens")
    return typed or min(MAX_LENGTH, context)


def check_max_length(max_length: int, tokens_per_image: int) -> None:
    """Raise InputError if an image alone fills a row."""
    if max_length <= tokens_per_image:
        raise InputError(f"--max-length {max_length}: an image alone has {tokens_per_image} "
                         "tokens; give more")


def is_toy_world(arguments) -> bool:
    """Whether the data is a folder of `prepare_data.py toy`, which has data for both stages."""
    return not arguments.data or len(arguments.data) == 1 and arguments.data[0].is_dir()


def data_sources(arguments, stage: int) -> list[tuple[Path, Path]]:
    """The LLaVA JSON files of a stage, each with the folder of its images."""
    data, images = arguments.data or [TOY_DATA], arguments.images or []
    if is_toy_world(arguments):
        if images:
            raise InputError(f"--images has no effect with the toy world {data[0]}: it has its own")
        path = data[0] / {1: "pretrain.json", 2: "instruct.json"}[stage]
        if arguments.data:
            check_file(path)
        return [(path, data[0] / "images")]
    for path in data:
        check_file(path)
    for folder in images:
        check_folder("--images", folder)
    if arguments.stage is None:
        raise InputError(f"--data {data[0]} needs --stage 1 or --stage 2: the toy run trains on a "
                         "folder of `prepare_data.py toy`")
    if not images:
        raise InputError(f"--data {data[0]} needs --images, the folder of its images")
    if len(images) not in (1, len(data)):
        raise InputError(f"--data has {len(data)} files, but --images has {len(images)} folders: "
                         "give one folder, or one for each file")
    return list(zip(data, images if len(images) == len(data) else images * len(data)))


def eval_sources(arguments, sources: list[tuple[Path, Path]]) -> list[tuple[Path, Path]]:
    """The validation file with the folder of its images, if there is one."""
    if not arguments.eval_data:
        return []
    check_file(arguments.eval_data)
    if arguments.eval_images:
        check_folder("--eval-images", arguments.eval_images)
    return [(arguments.eval_data, arguments.eval_images or sources[0][1])]


def check_file(path: Path) -> None:
    if not path.is_file():
        raise InputError(f"no data at {path}: give LLaVA JSON files, or a folder of "
                         "`prepare_data.py toy`")


def check_folder(flag: str, path: Path) -> None:
    if not path.is_dir():
        raise InputError(f"{flag} {path}: there is no such folder")
