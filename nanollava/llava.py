r"""LLaVA, figure 1 of the paper: a vision encoder, a projector and a language model.

    image X_v -> ViT -> Z_v -> projector W -> H_v  \
                                                     LLaMA -> answer X_a
    instruction X_q -> token embeddings -> H_q     /

H_v = W Z_v (equation 1) takes the places of the image tokens among the embeddings of the text.

Shapes, for CLIP ViT-L/14 and Vicuna-7B: an image is (1, 3, 224, 224), the ViT makes (1, 257, 1024)
of it, without the class token (1, 256, 1024), and the projector (1, 256, 4096): 256 embeddings for
LLaMA.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

from .conversation import IGNORE_INDEX
from .image import normalize, resize_and_crop
from .infra import distributed
from .infra.device import to_device
from .infra.io import InputError
from .layers import Linear
from .llama import KVCache, Llama, LlamaConfig
from .lora import merge_lora
from .vision import VisionConfig, VisionTower
from .weights import hf_config, hf_format


class LinearProjector(nn.Module):
    """The paper's projector: one linear layer, W of equation 1."""

    def __init__(self, vision: VisionConfig, hidden_size: int):
        super().__init__()
        self.linear_1 = Linear(vision.hidden_size, hidden_size)

    @staticmethod
    def tokens_per_image(vision: VisionConfig) -> int:
        return vision.num_patches

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.linear_1(features)  # (N, P, D_vision) -> (N, P, D)


class MLPProjector(LinearProjector):
    """LLaVA-1.5's projector: two linear layers with GELU between them."""

    def __init__(self, vision: VisionConfig, hidden_size: int):
        super().__init__(vision, hidden_size)
        self.linear_2 = Linear(hidden_size, hidden_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.linear_2(F.gelu(self.linear_1(features)))


# A new type needs an entry here and nothing else (docs/training.md has a worked example).
PROJECTORS = {"linear": LinearProjector, "mlp2x_gelu": MLPProjector}


@dataclass
class LlavaConfig:
    vision: VisionConfig
    text: LlamaConfig
    projector: str = "linear"
    feature_layer: int = -2  # the ViT block that is read, counted from the end
    image_token_id: int = 32000
    template: str = "vicuna_v1"
    image_aspect_ratio: str = "square"  # an image is cropped; "pad": it is padded, as in LLaVA-1.5
    stage: int = 0  # the last stage of training that this model went through

    def __post_init__(self):
        if self.projector not in PROJECTORS:
            raise InputError(
                f"projector {self.projector!r} is unknown, only {', '.join(PROJECTORS)} are known")

    @classmethod
    def from_json(cls, raw: dict, tower: dict | None = None) -> "LlavaConfig":
        """From the content of a config.json; `tower` as in `hf_config.llava_config`."""
        fields = hf_config.llava_config(raw, tower)
        vision, text = VisionConfig(**fields["vision"]), LlamaConfig(**fields["text"])
        return cls(**fields | {"vision": vision, "text": text})

    @classmethod
    def from_parts(cls, vision_folder, llm_folder, projector="linear", template="vicuna_v1",
                   feature_layer=-2) -> "LlavaConfig":
        """Of a LLaVA that joins a CLIP folder and a LLaMA folder."""
        vision = VisionConfig(**hf_config.read_config(vision_folder, hf_config.vision_config))
        text = LlamaConfig(**hf_config.read_config(llm_folder, hf_config.text_config))
        return cls(vision, text, projector, feature_layer, text.vocab_size, template)

    @property
    def image_size(self) -> int:
        return self.vision.image_size

    @property
    def tokens_per_image(self) -> int:
        return PROJECTORS[self.projector].tokens_per_image(self.vision)

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        """The normalized pixels (3, H, W) that the model sees of an image."""
        return normalize(self.resize_and_crop(image))

    def resize_and_crop(self, image: Image.Image) -> torch.Tensor:
        """The same pixels before they are normalized, as uint8."""
        return resize_and_crop(image, self.image_size, pad=self.image_aspect_ratio == "pad")


class Llava(nn.Module):
    """N images, P tokens an image, B rows of T tokens, D the language model's hidden size."""

    def __init__(self, config: LlavaConfig):
        super().__init__()
        self.config = config
        self.compute_dtype = None  # the dtype of activations; None: that of the weights
        self.vision_tower = VisionTower(config.vision)
        projector = PROJECTORS[config.projector]
        self.multi_modal_projector = projector(config.vision, config.text.hidden_size)
        self.language_model = Llama(config.text)

    @property
    def device(self) -> torch.device:
        return self.vision_tower.embeddings.class_embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.compute_dtype or self.vision_tower.embeddings.class_embedding.dtype

    @property
    def blocks(self) -> list[nn.Module]:
        """All transformer blocks."""
        return [*self.vision_tower.encoder.layers, *self.language_model.model.layers]

    def encode_images(self, images: torch.Tensor | None) -> torch.Tensor:
        """Pixels (N, 3, H, W) to image features H_v (N, P, D); None means no images, N = 0."""
        if images is None:  # there is nothing for the ViT to do
            grid = (0, self.config.vision.num_patches, self.config.vision.hidden_size)
            patches = torch.zeros(grid, dtype=self.dtype, device=self.device)
        else:
            pixels = to_device(images, self.device).to(self.dtype)
            features = self.vision_tower(pixels, self.config.feature_layer)  # (N, 1 + P, D_vision)
            patches = features[:, 1:]  # without the class token
        # Run the projector even without images: its gradient then exists (as zeros) on every rank,
        # and gradients can be averaged over ranks.
        return self.multi_modal_projector(patches)

    def merge_image_features(self, tokens: torch.Tensor, image_features: torch.Tensor,
                             image_positions: torch.Tensor | None = None) -> torch.Tensor:
        """Embed tokens (B, T), and put features (N, P, D) in place of image tokens: (B, T, D).

            tokens    BOS  "USER:"  IMG  IMG  IMG  "What"  "color"  ...
            embeds     e      e     h_1  h_2  h_3     e       e     ...

        The i-th image token in reading order gets the i-th of the N * P features.
        image_positions: as in `forward`.
        Raises ValueError if their numbers differ.
        """
        if image_positions is None:
            image_positions = find_image_tokens(tokens, self.config.image_token_id)
        features = image_features.flatten(0, 1)  # (N * P, D)
        if len(image_positions) != len(features):
            raise ValueError(f"{len(image_positions)} image tokens in the text, but "
                             f"{len(features)} image features")
        tokens, positions = (to_device(x, self.device) for x in (tokens, image_positions))
        # the image token lies past the vocabulary: token 0 stands in for it until it is replaced
        text_tokens = tokens.masked_fill(tokens == self.config.image_token_id, 0)
        embeds = self.language_model.embed(text_tokens).to(self.dtype)  # (B, T, D)
        merged = embeds.flatten(0, 1).index_copy(0, positions, features.to(self.dtype))
        return merged.view_as(embeds)

    def forward(self, tokens: torch.Tensor, images: torch.Tensor | None = None,
                labels: torch.Tensor | None = None, image_features: torch.Tensor | None = None,
                reduction: str = "mean", image_positions: torch.Tensor | None = None,
                target_positions: torch.Tensor | None = None) -> torch.Tensor:
        """Logits (B, T, V), or with labels (B, T) the loss of equation 3 over the targets.

        tokens: (B, T) int64. Shorter rows are padded on the right with any token: attention is
            causal, so no real token sees the padding. (transformers pads on the left.)
        images: (N, 3, H, W), all images of the batch in reading order; or instead image_features
            (N, P, D), made by `encode_images`.
        reduction: "mean" or "sum" over the targets, which are the labels other than -100. Logits
            are computed only there. A mean over no targets is 0.
        image_positions (N * P,), target_positions (n,): what `find_image_tokens(tokens)` and
            `find_targets(labels)` return, if that is known. Training calls those on the CPU, ahead
            of the step; here, tokens on a GPU would make the CPU wait for it.
        """
        # 1. the image becomes features in the language model's space
        if image_features is None:
            image_features = self.encode_images(images)
        # 2. the features take the places of the image tokens
        embeds = self.merge_image_features(tokens, image_features, image_positions)  # (B, T, D)
        if labels is None:
            return self.language_model.logits(self.language_model(embeds))
        # 3. only answers are predicted
        if target_positions is None:
            target_positions = find_targets(labels)
        labels, positions = (to_device(x, self.device) for x in (labels, target_positions))
        targets = labels.flatten()[positions]  # (n,)
        # 4. position t predicts token t + 1: hidden states and logits before each target
        hidden = self.language_model(embeds, keep=positions - 1)  # (n, D)
        logits = self.language_model.logits(hidden)  # (n, V)
        loss = F.cross_entropy(logits.float(), targets, reduction="sum")
        return loss if reduction == "sum" else loss / max(1, len(targets))

    @torch.no_grad()
    def generate(self, tokens: torch.Tensor, images: torch.Tensor | None = None, max_new_tokens=512,
                 temperature=0.0, top_p=1.0, eos_id: int | None = None,
                 lengths: torch.Tensor | None = None, image_features: torch.Tensor | None = None,
                 cache: KVCache | None = None):
        """Yield the next token of every row, (B,) int64 on the CPU, step by step.

        tokens: (B, T) prompts, shorter ones padded on the right.
        images, image_features: as in `forward`.
        temperature, top_p: as in `sample_next_token`.
        eos_id: a row that has ended keeps yielding it, and generation stops when all rows have
            ended; without it, generation runs for max_new_tokens.
        lengths: (B,) tokens of each prompt without its padding, on the CPU; None means T.
        cache: holds what comes before `tokens`; it is extended.
        """
        B, T = tokens.shape
        lengths = torch.full((B,), T) if lengths is None else lengths
        if image_features is None:
            image_features = self.encode_images(images)
        embeds = self.merge_image_features(tokens, image_features)  # (B, T, D)
        if cache is None:
            cache = KVCache(self.config.text, B, 0, self.dtype, self.device)
        # tokens of each row (B,); an empty cache is known without a GPU sync
        before = cache.lengths.cpu() if cache.num_slots else 0
        cache.grow(cache.num_slots + T + max_new_tokens)
        ended = torch.zeros(B, dtype=torch.bool)
        # the prompts: only the last token of each row predicts
        last = to_device(torch.arange(B) * T + lengths - 1, self.device)  # (B,)
        hidden = self.language_model(embeds, cache, keep=last)[:, None]  # (B, 1, D)
        cache.truncate(before + lengths)  # drop the padding; new tokens take its slots
        for step in range(max_new_tokens):
            logits = self.language_model.logits(hidden)[:, 0].float()  # (B, V)
            # the only GPU sync of a step: the caller and the end of a row need the tokens
            next_token = sample_next_token(logits, temperature, top_p).cpu()  # (B,)
            if eos_id is not None:
                next_token = next_token.masked_fill(ended, eos_id)
                ended |= next_token == eos_id
            yield next_token
            if step + 1 == max_new_tokens or (eos_id is not None and ended.all()):
                return
            # feed one token a row back; it attends to everything in the cache
            next_token = to_device(next_token[:, None], self.device)  # (B, 1)
            embeds = self.language_model.embed(next_token).to(self.dtype)  # (B, 1, D)
            hidden = self.language_model(embeds, cache)

    # Loading and saving: the layouts themselves are in weights/

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype=torch.float32, device="cpu",
                        vision_tower: str | Path | None = None) -> "Llava":
        """Open a LLaVA folder: one of ours, of llava-hf, or of the original LLaVA code.

        dtype: None keeps the dtype of the files.
        vision_tower: a CLIP folder, for a LLaVA of the original code that does not hold its own.
        Raises InputError, naming the folder.
        """
        config = hf_config.read_llava_config(folder, LlavaConfig.from_json, vision_tower)
        with torch.device("meta"):  # shapes without memory; the file's tensors take their places
            model = cls(config)
        hf_format.load_llava(model, folder, dtype, device, vision_tower)
        return model

    @classmethod
    def from_parts(cls, vision_folder, llm_folder, projector="linear", template="vicuna_v1",
                   feature_layer=-2, dtype=torch.float32, device="cpu") -> "Llava":
        """Join a CLIP folder and a LLaMA folder with a fresh projector."""
        config = LlavaConfig.from_parts(vision_folder, llm_folder, projector, template,
                                        feature_layer)
        with torch.device("meta"):
            model = cls(config)
        hf_format.load_vision_tower(model.vision_tower, vision_folder, dtype, device)
        hf_format.load_llama(model.language_model, llm_folder, dtype, device)
        fresh = PROJECTORS[projector](config.vision, config.text.hidden_size)
        model.multi_modal_projector = fresh.to(device, dtype)
        return model

    def save_pretrained(self, folder: str | Path, files=(),
                        dtype: torch.dtype | None = None) -> None:
        """Write config.json and safetensors in the public layout, and copies of `files`.

        dtype: of the tensors in the file; None keeps theirs. All ranks must call this: a sharded
        model is gathered tensor by tensor, and rank 0 writes.
        """
        tensors = {}
        for name, tensor in self.state_dict().items():
            tensor = distributed.full_tensor(tensor)
            if distributed.rank() == 0:
                tensors[name] = tensor.to("cpu", dtype)
        distributed.on_rank0(
            hf_format.save_llava, folder, asdict(self.config), merge_lora(tensors), files)


def find_image_tokens(tokens: torch.Tensor, image_token_id: int) -> torch.Tensor:
    """Positions (N * P,) of the image tokens among tokens (B, T), in reading order."""
    return (tokens == image_token_id).flatten().nonzero()[:, 0]


def find_targets(labels: torch.Tensor) -> torch.Tensor:
    """Positions (n,) of the targets among labels (B, T), in reading order.

    The first token of a row is never a target: no position comes before it that could predict it.
    """
    is_target = labels != IGNORE_INDEX
    is_target[:, 0] = False
    return is_target.flatten().nonzero()[:, 0]


def sample_next_token(logits: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """Logits (B, V) to one token a row, (B,).

    Temperature 0 takes the likeliest token. Otherwise it is drawn from the smallest set of likely
    tokens whose probabilities add up to top_p (nucleus sampling).
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits - logits.amax(dim=-1, keepdim=True)  # at most 0: no overflow below
    probabilities, order = (logits / temperature).softmax(dim=-1).sort(dim=-1, descending=True)
    before = probabilities.cumsum(dim=-1) - probabilities  # of all likelier tokens together
    probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    probabilities[:, 0].clamp_(min=1e-9)  # top_p = 0 keeps the likeliest token
    # The largest of p / Exp(1) is a draw from p: of clocks with rates p, the first to ring.
    # torch.multinomial draws in the same way, but it checks p first, which is a GPU sync.
    noise = torch.empty_like(probabilities).exponential_()
    return order.gather(1, (probabilities / noise).argmax(dim=-1, keepdim=True))[:, 0]
