"""Train LLaVA in its two stages, section 4.2 of the paper: the projector alone, then projector and LLM.

    python train.py                          # the toy world: data, stage 1, stage 2, evaluation, on a laptop
    python train.py --stage 0 --out assets   # makes the toy world's CLIP and LLaMA, once

The real thing starts from a CLIP and a Vicuna, with the paper's data and numbers:

    python train.py --preset 7b --stage 1 --vision clip-vit-large-patch14 --llm vicuna-7b-v1.3 \\
        --data chat.json --images CC3M --out runs/stage1
    python train.py --preset 7b --stage 2 --model runs/stage1 \\
        --data llava_instruct_150k.json --images COCO/train2017 --out runs/stage2
"""

from pathlib import Path

import torch

from nanollava.conversation import TEMPLATES
from nanollava.data import Conversations, loader
from nanollava.evaluate import table, toy_table
from nanollava.files import InputError, Parser, one_line_errors, positive, say
from nanollava.llava import Llava
from nanollava.pretrain import parts_table, train_parts
from nanollava.tokenizer import Tokenizer
from nanollava.toy import write_world
from nanollava.training import adamw, best_device, best_dtype, fit, muon

OPTIMIZERS = {"adamw": adamw, "muon": muon}
ASSETS = Path(__file__).resolve().parent / "assets"
PAPER = {1: dict(epochs=1, batch_size=128, lr=2e-3, optimizer="adamw"),
         2: dict(epochs=3, batch_size=32, lr=2e-5, optimizer="adamw")}  # its appendix
PRESETS = {
    "toy": {1: dict(epochs=1, batch_size=8, lr=4e-3, optimizer="adamw"),
            2: dict(epochs=1.3, batch_size=16, lr=9e-4, optimizer="muon")},
    "7b": PAPER,
    "13b": PAPER,
}


def parse_arguments():
    parser = Parser(__doc__)
    add = parser.add_argument_group("what to train").add_argument
    add("--stage", type=int, choices=(0, 1, 2), help="0 makes the toy CLIP and LLaMA; default: 1, then 2, if missing")
    add("--preset", choices=PRESETS, default="toy", help="steps and rates: the toy world's (default) or the paper's")
    add("--vision", type=Path, help="folder of a CLIP (default: assets/toy-clip)")
    add("--llm", type=Path, help="folder of a LLaMA (default: assets/toy-llama)")
    add("--model", type=Path, help="folder of a LLaVA to go on from, instead of --vision and --llm")
    add("--projector", choices=("linear", "mlp2x_gelu"), default="linear", help="the paper's (default), or LLaVA-1.5's")
    add("--template", choices=TEMPLATES, help="words around the turns (default: the model's, or vicuna_v1)")
    add("--feature-layer", type=int, choices=(-1, -2), default=-2, help="which block of the CLIP is read (default: -2)")
    add = parser.add_argument_group("data").add_argument
    add("--data", type=Path, help="LLaVA JSON, or a folder of `prepare_data.py toy` (default: data/toy)")
    add("--images", type=Path, help="folder of the pictures of a LLaVA JSON")
    add("--out", type=Path, help="folder to write (default: runs/toy/stage1, say; without --stage: runs/toy)")
    add("--max-length", type=positive(int), default=2048, help="cut off what is beyond so many tokens (default: 2048)")
    add = parser.add_argument_group("how").add_argument
    add("--epochs", type=positive(float), help="times through the data; may be a fraction")
    add("--batch-size", type=positive(int), help="conversations a step")
    add("--lr", type=positive(float), help="highest learning rate")
    add("--optimizer", choices=OPTIMIZERS, help="adamw, the paper's, or muon (default: muon for the toy's stage 2)")
    add("--seed", type=int, default=0, help="of a new toy world, a new projector, the order of the data (default: 0)")
    add("--dtype", choices=("float32", "bfloat16"), help="of the arithmetic (default: bfloat16 where it is fast)")
    add("--device", help="cuda, mps or cpu (default: the first that is there)")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    parts = arguments.vision or arguments.llm
    if parts and arguments.model:
        raise InputError("--model goes on from a LLaVA, --vision and --llm begin one: give one or the other")
    if arguments.preset != "toy" and not (arguments.data and (arguments.model or (arguments.vision and arguments.llm))):
        raise InputError(f"--preset {arguments.preset} needs --data, and --model or both --vision and --llm")
    if arguments.stage == 0:
        folder, device = arguments.out or Path("runs/toy/stage0"), best_device(arguments.device)
        train_parts(folder, arguments.seed, device)
        print(table(parts_table(folder, device)))
    elif arguments.stage == 1:
        train_stage(1, arguments.model, arguments.out or Path("runs/toy/stage1"), arguments)
    elif arguments.stage == 2:
        start = None if parts else arguments.model or Path("runs/toy/stage1")
        train_stage(2, start, arguments.out or Path("runs/toy/stage2"), arguments)
    else:
        train_toy(arguments.out or Path("runs/toy"), arguments)


def train_toy(run: Path, arguments) -> None:
    """All of it: what is missing of the toy world, of stage 1 and of stage 2, then the evaluation."""
    if arguments.model or arguments.preset != "toy" or (arguments.data and arguments.data.is_file()):
        raise InputError("without --stage this trains the toy world; say --stage 1 or 2 for your own model or data")
    for stage in (1, 2):
        if (run / f"stage{stage}" / "config.json").is_file():
            say(f"{run}/stage{stage} is there and stays as it is")
        else:
            train_stage(stage, run / "stage1" if stage == 2 else None, run / f"stage{stage}", arguments)
    columns, *_ = toy_table(run, arguments.data or Path("data/toy"), best_device(arguments.device))
    print(table(columns))
    say("ask it something: python sample.py --image cat.jpg")


def train_stage(stage: int, start: Path | None, out: Path, arguments) -> None:
    """Stage 1 or 2, from the LLaVA in folder `start`, or from a CLIP and a LLaMA where there is none."""
    if (out / "config.json").is_file():
        raise InputError(f"{out} holds a trained model; remove it or choose another --out")
    if start and not (start / "config.json").is_file():
        raise InputError(f"no model at {start} to go on from: train it (--stage 1), or name another (--model)")
    torch.manual_seed(arguments.seed)
    device = best_device(arguments.device)
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else best_dtype(device)
    settings = PRESETS[arguments.preset][stage]
    epochs, batch_size, lr, optimizer = (getattr(arguments, key) or settings[key]
                                         for key in ("epochs", "batch_size", "lr", "optimizer"))

    data, images = find_data(stage, arguments)
    if start:
        model, tokenizer = Llava.from_pretrained(start, dtype, device), Tokenizer(start)
    else:
        vision, llm = arguments.vision or ASSETS / "toy-clip", arguments.llm or ASSETS / "toy-llama"
        model = Llava.from_parts(vision, llm, arguments.projector, feature_layer=arguments.feature_layer,
                                 dtype=dtype, device=device)
        tokenizer = Tokenizer(llm)
    if arguments.template:
        model.config.template = arguments.template
    elif stage == 2 and model.config.template == "plain":  # as LLaVA-1.5: captions in stage 1, then conversations
        model.config.template = "vicuna_v1"
    longest = min(arguments.max_length, model.config.text.max_position_embeddings)
    dataset = Conversations(data, images, tokenizer, model.config, longest)
    steps = max(1, round(epochs * len(dataset) / batch_size))

    model.requires_grad_(False)
    trained = torch.nn.ModuleList([model.multi_modal_projector] + ([model.language_model] if stage == 2 else []))
    trained.float().requires_grad_(True)  # what learns is kept in float32, whatever the arithmetic

    def loss_of(batch):
        tokens, labels, pixels = batch
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            return model(tokens.to(device), None if pixels is None else pixels.to(device), labels.to(device))

    out.mkdir(parents=True, exist_ok=True)
    workers = 0 if device == "cpu" else 8  # processes that open pictures; a CPU has better things to do
    batches = loader(dataset, batch_size, steps, arguments.seed, workers)
    fit(f"stage {stage}", loss_of, batches, steps, OPTIMIZERS[optimizer](trained, lr), out / "log.jsonl",
        lambda batch: batch[0].numel())
    model.config.stage = stage
    model.save_pretrained(out, [tokenizer.path])


def find_data(stage: int, arguments) -> tuple[Path, Path]:
    """The JSON and the pictures of a stage; the toy world is drawn where nobody did it before."""
    data = arguments.data or Path("data/toy")
    if data.is_file():
        if arguments.images is None:
            raise InputError(f"--data {data} needs --images, the folder of its pictures")
        return data, arguments.images
    if not data.exists() and arguments.data is None:
        write_world(data, arguments.seed)
    if not data.is_dir():
        raise InputError(f"no data at {data}")
    return data / {1: "pretrain.json", 2: "instruct.json"}[stage], data / "images"


if __name__ == "__main__":
    with one_line_errors():
        main()
