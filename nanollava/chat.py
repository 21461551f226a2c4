"""Answer questions about images: what `sample.py` and the benchmarks share (section 5.1).

A prompt is a prefix of a training row, and a reply ends where training put the stop.
"""

import itertools
import math
import operator
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from .conversation import TEMPLATES, tokenize_conversation
from .data import collate
from .infra.device import best_device, best_dtype, pick_compute_dtype
from .infra.io import InputError
from .infra.progress import print0
from .llama import KVCache
from .llava import Llava
from .tokenizer import Tokenizer, open_tokenizer


def open_llava(folder: Path, dtype: str | None, device: str | None) -> tuple[Llava, Tokenizer]:
    """A LLaVA with weights in `dtype` ("bfloat16") on the device, and its tokenizer.

    None is the fastest dtype or device. Raises InputError if there is no such device.
    On a CPU, weights that would fill more than half of the memory stay in their memory-mapped file,
    in the file's dtype; each layer converts its weights when it runs.
    """
    device = best_device(device)
    dtype = best_dtype(device, dtype)
    model = Llava.from_pretrained(folder, dtype=None)
    tokenizer = open_tokenizer(folder, model.config)
    model.compute_dtype = pick_compute_dtype(dtype, device)
    num_bytes = dtype.itemsize * sum(parameter.numel() for parameter in model.parameters())
    if device == "cpu" and num_bytes > physical_memory() / 2:
        print0(f"{folder} would take {num_bytes / 2**30:.0f} GiB in {str(dtype)[6:]}: "
               "its weights stay on disk, memory-mapped")
        return model, tokenizer
    return model.to(device, dtype), tokenizer


def physical_memory() -> float:
    """Bytes of memory of this machine; infinite on Windows, which does not tell Python."""
    if not hasattr(os, "sysconf"):
        return math.inf
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def stop_condition(model: Llava, tokenizer: Tokenizer) -> tuple[int | None, str | None]:
    """(token, text), one of them None: what ends a reply under the model's template.

    A textual stop is matched in the decoded text, because several token sequences spell it:
    `###`, `#|##`, or joined to what comes before.
    """
    stop = TEMPLATES[model.config.template].stop
    return (tokenizer.eos_id, None) if stop is None else (None, stop)


class TooLongError(InputError):
    """A conversation fills the model's context, so that no reply fits."""


def tokenize_prompts(model: Llava, tokenizer: Tokenizer, conversations: list[list[dict]]):
    """Conversations that end with a question to tokens (B, T), padded on the right; the lengths
    (B,) of their rows; and how many tokens each reply may have, (B,).

    Raises TooLongError.
    """
    config, context = model.config, model.config.text.max_position_embeddings
    rows = [tokenize_conversation(turns, tokenizer, config.template, config.tokens_per_image,
                                  config.image_token_id) for turns in conversations]
    lengths = torch.tensor([len(row) for row, _ in rows])
    longest = int(lengths.max())
    if longest >= context:
        raise TooLongError(f"the conversation has {longest} tokens, but the model reads at most "
                           f"{context}: start a new one, or shorten it")
    tokens, _, _ = collate([(*row, []) for row in rows])
    return tokens, lengths, context - lengths


class ChatCache:
    """The keys and values of a conversation so far: its next turn computes only new tokens.

    Any conversation may follow: the tokens at its beginning that equal those in the cache are kept.
    """

    def __init__(self):
        self.kv = None  # a KVCache of one row
        self.tokens, self.images = [], []  # the tokens in kv, and the images of the last prompt

    def reuse(self, model: Llava, tokens: list[int], images: list[torch.Tensor]) -> int:
        """Drop what differs from a new prompt; return how many of its tokens are kept.

        The last token of a prompt is never kept, since its output predicts the reply.
        """
        if self.kv is None:
            self.kv = KVCache(model.config.text, 1, 0, model.dtype, model.device)
        self.tokens = self.tokens[: common_length(self.tokens, tokens[:-1], operator.eq)]
        # equal image tokens may stand for different images: keep what comes before the first one
        same_images = common_length(self.images, images, torch.equal)
        if same_images < self.num_images(model):
            places = [place for place, token in enumerate(self.tokens)
                      if token == model.config.image_token_id]
            self.tokens = self.tokens[: places[same_images * model.config.tokens_per_image]]
        self.images = images
        self.kv.truncate(torch.tensor([len(self.tokens)]))
        return len(self.tokens)

    def num_images(self, model: Llava) -> int:
        """The number of images among the tokens of the cache."""
        return self.tokens.count(model.config.image_token_id) // model.config.tokens_per_image


def common_length(one: list, other: list, equal: Callable) -> int:
    """The number of items at the beginning of two lists that are equal."""
    return sum(1 for _ in itertools.takewhile(lambda pair: equal(*pair), zip(one, other)))


def stream_reply(model: Llava, tokenizer: Tokenizer, turns: list[dict], images: list[torch.Tensor],
                 max_new_tokens=512, temperature=0.0, top_p=1.0,
                 cache: ChatCache | None = None) -> Iterator[str]:
    """Yield the reply to a conversation in pieces of text, as it is generated.

    images: (3, H, W) each, one for every `<image>` in the turns.
    cache: of the turns before; it is brought up to date.
    Raises TooLongError.
    """
    tokens, _, room = tokenize_prompts(model, tokenizer, [turns])  # (1, T)
    max_new_tokens = min(max_new_tokens, room.item())
    eos_id, stop = stop_condition(model, tokenizer)
    cache, prompt = cache or ChatCache(), tokens[0].tolist()
    new_tokens = tokens[:, cache.reuse(model, prompt, images) :]
    new_images = images[cache.num_images(model) :]
    pixels = torch.stack(new_images) if new_images else None  # (N, 3, H, W)
    reply, num_sent = [], 0  # the reply's tokens; how many characters of its text are yielded
    for token in model.generate(new_tokens, pixels, max_new_tokens, temperature, top_p, eos_id,
                                cache=cache.kv):
        cache.tokens = prompt + reply  # the new token itself is computed with the next one
        if token.item() == eos_id:
            break
        reply.append(token.item())
        # a token can change the text before it, so all of the reply is decoded again
        text = tokenizer.decode(reply)
        if stop and stop in text:
            yield text[num_sent : text.index(stop)].rstrip()
            return
        # hold back what may be the start of the stop, or of a character of several tokens
        final = len(text) - (len(stop) if stop else 0)
        if final > num_sent and not text.endswith("\ufffd"):
            yield text[num_sent:final]
            num_sent = final
    yield tokenizer.decode(reply)[num_sent:]


def generate_replies(model: Llava, tokenizer: Tokenizer, conversations: list[list[dict]],
                     images: torch.Tensor | None = None, image_features: torch.Tensor | None = None,
                     max_new_tokens=64) -> list[str]:
    """The replies to a batch of conversations, at temperature 0.

    images: (N, 3, H, W), all images of the batch in reading order; or instead image_features
    (N, P, D), made by `Llava.encode_images`. Raises TooLongError.
    """
    tokens, lengths, room = tokenize_prompts(model, tokenizer, conversations)
    max_new_tokens = min(max_new_tokens, int(room.max()))
    eos_id, stop = stop_condition(model, tokenizer)
    steps = list(model.generate(tokens, images, max_new_tokens, eos_id=eos_id, lengths=lengths,
                                image_features=image_features))
    replies = []
    for row, limit in zip(torch.stack(steps, dim=1).tolist(), room.tolist()):  # (B, new tokens)
        # EOS, which also pads a row that has ended, decodes to ""
        text = tokenizer.decode(row[:limit])
        replies.append((text.split(stop)[0] if stop else text).strip())
    return replies
