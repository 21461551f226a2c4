"""LLaVA: figure 1 of the paper. A vision tower, a projector, a language model.

    picture X_v -> ViT -> Z_v -> projector W -> H_v  \\
                                                      LLaMA -> answer X_a
    instruction X_q -> token embeddings -> H_q       /

H_v = W Z_v (equation 1) takes the place of the picture's tokens among the embeddings of the text.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from .conversation import IGNORE_INDEX
from .infra import distributed
from .layers import Linear
from .llama import KVCache, Llama, LlamaConfig
from .lora import merge_lora
from .vision import VisionConfig, VisionTower
from .weights import hf_format


@dataclass
class LlavaConfig:
    vision: VisionConfig
    text: LlamaConfig
    projector: str = "linear"  # the paper's; "mlp2x_gelu" is LLaVA-1.5's
    feature_layer: int = -2  # which block's output is read, counted from the end
    image_token_id: int = 32000
    template: str = "vicuna_v1"
    stage: int = 0  # the last stage of training that this model went through

    @property
    def image_size(self) -> int:
        return self.vision.image_size

    @property
    def tokens_per_image(self) -> int:
        return self.vision.num_patches


class Projector(nn.Module):
    """Z_v to H_v: one linear layer (the paper), or two with GELU between (LLaVA-1.5)."""

    def __init__(self, config: LlavaConfig):
        super().__init__()
        D = config.text.hidden_size
        self.linear_1 = Linear(config.vision.hidden_size, D)
        self.linear_2 = Linear(D, D) if config.projector == "mlp2x_gelu" else None

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        x = self.linear_1(features)  # (N, P, D_vision) -> (N, P, D)
        return x if self.linear_2 is None else self.linear_2(F.gelu(x))


class Llava(nn.Module):
    def __init__(self, config: LlavaConfig):
        super().__init__()
        self.config = config
        self.vision_tower = VisionTower(config.vision)
        self.multi_modal_projector = Projector(config)
        self.language_model = Llama(config.text)

    def set_compute_dtype(self, dtype: torch.dtype) -> "Llava":
        """Do the arithmetic in `dtype`; the weights stay as they are."""
        self.language_model.dtype = dtype
        return self

    def compile_blocks(self) -> "Llava":
        """Make one graph of every transformer block, for rows of any length. Names of weights stay as they are, and
        what is hooked to a block (`fully_shard`) stays outside."""
        torch._dynamo.config.recompile_limit = 64  # training, evaluation, a prompt, next tokens; the last block; one row
        for block in (*self.vision_tower.encoder.layers, *self.language_model.model.layers):
            block.forward = torch.compile(block.forward, fullgraph=True, dynamic=True)
        return self

    @property
    def device(self) -> torch.device:
        return self.vision_tower.embeddings.class_embedding.device

    def see(self, images: torch.Tensor) -> torch.Tensor:
        """Pictures (N, 3, H, W) to the language model's space, H_v (N, P, D). The class token is dropped."""
        dtype = self.language_model.dtype or self.vision_tower.embeddings.class_embedding.dtype
        images = images.to(self.device, dtype, non_blocking=True)
        return self.multi_modal_projector(self.vision_tower(images, self.config.feature_layer)[:, 1:])

    def merge_image_features(self, tokens: torch.Tensor, pictures: torch.Tensor | None) -> torch.Tensor:
        """Embeddings (B, T, D) of tokens (B, T), the picture tokens replaced in reading order by (N, P, D)."""
        is_image = tokens == self.config.image_token_id
        where = is_image.flatten().nonzero()[:, 0]
        given = 0 if pictures is None else pictures.shape[0] * pictures.shape[1]
        if len(where) != given:
            raise ValueError(f"{len(where)} picture tokens in the text, but pictures for {given}")
        embeds = self.language_model.embed(tokens.masked_fill(is_image, 0).to(self.device, non_blocking=True))
        if given:
            where, pictures = where.to(self.device, non_blocking=True), pictures.to(embeds.dtype)
            embeds = embeds.flatten(0, 1).index_copy(0, where, pictures.flatten(0, 1)).view_as(embeds)
        return embeds

    def forward(self, tokens, images=None, labels=None, pictures=None) -> torch.Tensor:
        """Logits (B, T, V), or with `labels` (B, T) the mean loss over those that are not -100 (equation 3).

        tokens: (B, T) int64, ragged rows filled up on the right with anything. images: (N, 3, H, W), all
        pictures of the batch in reading order; or `pictures`, (N, P, D), what `see` made of them before.
        With labels, logits are computed only where there is something to learn.

        Tokens and labels are best on the CPU: where pictures stand and what is learned is found where they are, and
        nobody waits for a GPU to tell.
        """
        if images is not None:
            pictures = self.see(images)
        embeds = self.merge_image_features(tokens, pictures)  # (B, T, D)
        if pictures is None and labels is not None and self.multi_modal_projector.linear_1.weight.requires_grad:
            # the projector takes part, with nothing, so that all processes have the same gradients to share
            size = self.config.image_size
            embeds = embeds + 0 * self.see(torch.zeros(1, 3, size, size, device=self.device)).sum()
        if labels is None:
            return self.language_model.logits(self.language_model(embeds))
        targets = labels.roll(-1, dims=1)  # what comes next
        targets[:, -1] = IGNORE_INDEX
        learned = (targets != IGNORE_INDEX).flatten().nonzero()[:, 0]
        targets = targets.flatten()[learned].to(self.device, non_blocking=True)
        hidden = self.language_model(embeds, wanted=learned.to(self.device, non_blocking=True))
        logits = self.language_model.logits(hidden)  # (learned tokens, V)
        # a sum, not a mean: where nothing is to be learned the loss is 0, a mean would be no number
        return F.cross_entropy(logits.float(), targets, reduction="sum") / max(1, len(logits))

    @torch.no_grad()
    def generate(self, tokens, images=None, max_new_tokens=512, temperature=0.0, top_p=1.0, eos_id=None,
                 lengths=None, pictures=None):
        """Yield the next token of every row, (B,) int64, step by step.

        tokens (B, T): prompts, shorter ones filled up on the right, with their true `lengths` (B,); None: all T.
        images or pictures: as in `forward`.
        temperature 0 takes the likeliest token; else it is drawn from the likeliest ones that together have
        probability top_p. With eos_id, a row that ended goes on yielding it, and all stops when all rows ended.
        """
        B, T = tokens.shape
        lengths = (torch.full((B,), T) if lengths is None else lengths).to(self.device)
        embeds = self.merge_image_features(tokens, pictures if images is None else self.see(images))
        cache = KVCache(self.config.text, B, T + max_new_tokens, embeds.dtype, embeds.device)
        last = torch.arange(B, device=self.device) * T + lengths - 1
        hidden = self.language_model(embeds, slots=cache.first(T), wanted=last)[:, None]  # (B, 1, D)
        ended = torch.zeros(B, dtype=torch.bool, device=self.device)
        for step in range(max_new_tokens):
            if step > 0:
                positions = (lengths + step - 1)[:, None]  # a padding token's slot is overwritten before it is seen
                embeds = self.language_model.embed(token[:, None])  # (B, 1, D)
                hidden = self.language_model(embeds, positions, cache.first(T + step))
            token = sample_next_token(self.language_model.logits(hidden)[:, 0].float(), temperature, top_p)
            if eos_id is not None:
                token = token.masked_fill(ended, eos_id)
                ended |= token == eos_id
            yield token
            if eos_id is not None and ended.all():
                return

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype=torch.float32, device="cpu") -> "Llava":
        """A LLaVA folder: one of ours, or of the public Hugging Face layout."""
        config = hf_format.read_config(folder, hf_format.llava_config)
        parts = {"vision": VisionConfig(**config["vision"]), "text": LlamaConfig(**config["text"])}
        config = LlavaConfig(**config | parts)
        with torch.device("meta"):
            model = cls(config)
        tensors = hf_format.read_tensors(folder, hf_format.llava_name)
        if config.projector == "linear":
            hf_format.drop_identity(tensors, folder)
        hf_format.drop_image_token(tensors, config.text.vocab_size, config.image_token_id)
        hf_format.load(model, tensors, folder, dtype, device)
        return model

    @classmethod
    def from_parts(cls, vision_folder, llm_folder, projector="linear", template="vicuna_v1", feature_layer=-2,
                   dtype=torch.float32, device="cpu") -> "Llava":
        """A CLIP folder and a LLaMA folder, with a fresh projector between them."""
        vision = VisionConfig(**hf_format.read_config(vision_folder, hf_format.vision_config))
        text = LlamaConfig(**hf_format.read_config(llm_folder, hf_format.text_config))
        config = LlavaConfig(vision, text, projector, feature_layer, image_token_id=text.vocab_size, template=template)
        with torch.device("meta"):
            model = cls(config)
        for module, folder, rename in ((model.vision_tower, vision_folder, hf_format.clip_name),
                                       (model.language_model, llm_folder, hf_format.llama_name)):
            hf_format.load(module, hf_format.read_tensors(folder, rename), folder, dtype, device)
        model.multi_modal_projector = Projector(config).to(device, dtype)
        return model

    def save_pretrained(self, folder: str | Path, files=(), dtype: torch.dtype | None = None) -> None:
        """Write config.json and safetensors in the public layout, and copies of `files` (the tokenizer.model).

        dtype: of the tensors in the file; None: as they are. A model cut over processes is put together tensor by
        tensor; all processes must call this, and the first one writes.
        """
        tensors = {}
        for name, tensor in self.state_dict().items():
            tensor = distributed.full_tensor(tensor)
            if distributed.rank() == 0:
                tensors[name] = tensor.to("cpu", dtype)

        def write() -> None:
            public = hf_format.llava_tensors(merge_lora(tensors), self.config.image_token_id)
            hf_format.write(folder, hf_format.llava_json(asdict(self.config)), public, files)

        distributed.on_rank0(write)


def sample_next_token(logits: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """Logits (B, V) to one token a row, (B,)."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits - logits.amax(dim=-1, keepdim=True)  # however low the temperature, the likeliest stays finite
    probabilities, order = (logits / temperature).softmax(dim=-1).sort(dim=-1, descending=True)
    before = probabilities.cumsum(dim=-1) - probabilities  # what the likelier tokens have already
    probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    probabilities[:, 0].clamp_(min=1e-9)  # top_p 0 still leaves the likeliest
    return order.gather(1, torch.multinomial(probabilities, 1))[:, 0]
