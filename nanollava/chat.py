"""Answer questions about images: what `sample.py` and the benchmarks share (section 5.1).

A prompt is a prefix of a training row, and a reply ends where training put the stop.
"""

import itertools
import operator
import os
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .conversation import TEMPLATES, tokenize_conversation
from .data import pad_right
from .infra.device import best_device, best_dtype, pick_compute_dtype
from .infra.io import InputError
from .infra.progress import print0
from .llama import KVCache
from .llava import Llava
from .quantize import quantize_int8
from .tokenizer import Tokenizer, open_tokenizer


def open_llava(folder: Path, dtype: str | None, device: str | None,
               vision_tower: Path | None = None,
               quantize: str | None = None) -> tuple[Llava, Tokenizer]:
    """A LLaVA with weights in `dtype` ("bfloat16") on the device, and its tokenizer.

    None is the fastest dtype or device. vision_tower: as in `Llava.from_pretrained`.
    quantize: "int8" quantizes the blocks of the language model while the file is read.
    Raises InputError if there is no such device.
    On a CPU, weights that would fill more than half of the memory stay in their memory-mapped file,
    in the file's dtype; each layer converts its weights when it runs.
    """
    device = best_device(device)
    dtype = best_dtype(device, dtype, generating=True)
    model = Llava.from_pretrained(folder, dtype=None, vision_tower=vision_tower)
    tokenizer = open_tokenizer(folder, model.config)
    model.compute_dtype = pick_compute_dtype(dtype, device)
    if quantize == "int8":
        quantize_int8(model.language_model)
    num_bytes = sum(weight.numel() * (dtype.itemsize if weight.is_floating_point() else 1)
                    for weight in model.state_dict().values())
    if device == "cpu" and num_bytes > physical_memory() / 2:
        print0(f"{folder} would take {num_bytes / 2**30:.0f} GiB in {str(dtype)[6:]}: "
               f"its {'other ' if quantize else ''}weights stay on disk, memory-mapped")
        return model, tokenizer
    return model.to(device, dtype), tokenizer


def physical_memory() -> int:
    """Bytes of memory of this machine."""
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
    tokens, _ = pad_right(rows)
    return tokens, lengths, context - lengths


class ChatCache:
    """Keys and values of the conversations so far: the next turn computes only its new tokens.

    max_bytes: beyond it, the least recently used conversation is dropped first. The conversation in
    use may be larger.
    """

    def __init__(self, model: Llava, max_bytes: int = 2**31):
        self.model, self.max_bytes = model, max_bytes
        self.chats = []  # CachedChats, the last used one last

    def max_tokens(self) -> int:
        """How many tokens fit."""
        return self.max_bytes // CachedChat(self.model).kv.num_bytes(1)

    def find(self, tokens: list[int], images: list[torch.Tensor],
             max_new_tokens: int) -> "CachedChat":
        """The chat that shares most with a prompt, cut to what it shares, with room for a reply."""
        # 1. the longest common beginning
        lengths = [chat.num_shared(tokens, images) for chat in self.chats]
        length = max(lengths, default=0)
        chat = self.chats[lengths.index(length)] if length else CachedChat(self.model)
        # 2. a prompt that differs before the chat's last question ends is another branch: it gets a
        # copy, because either branch may continue
        if length + 1 < chat.prompt_length:
            chat = chat.copy(length)
        # 3. make room: the least recently used chats go first
        others = [other for other in self.chats if other is not chat]
        num_slots = max(len(tokens) + max_new_tokens, chat.kv.max_length)
        room = self.max_bytes - chat.kv.num_bytes(num_slots)
        while others and sum(other.kv.num_bytes() for other in others) > room:
            others = others[1:]
        # 4. what is left is the beginning of the prompt
        chat.cut(length)
        chat.kv.grow(num_slots)
        chat.prompt_length, chat.images = len(tokens), images
        self.chats = [*others, chat]
        return chat


class CachedChat:
    """One conversation: its keys and values, the tokens they belong to, its images."""

    def __init__(self, model: Llava):
        self.model = model
        self.kv = KVCache(model.config.text, 1, 0, model.dtype, model.device)
        self.tokens, self.images = [], []
        self.prompt_length = 0  # tokens of the last prompt; behind it is the reply

    def num_shared(self, tokens: list[int], images: list[torch.Tensor]) -> int:
        """How many tokens at the beginning of a prompt are in this chat.

        The last token of the prompt never counts: its output predicts the reply, so it is computed.
        """
        shared = common_length(self.tokens, tokens[:-1], operator.eq)
        # Equal image tokens may stand for different images. An image is kept as a whole.
        config = self.model.config
        places = [place for place, token in enumerate(tokens[:shared])
                  if token == config.image_token_id]
        num_images = min(common_length(self.images, images, torch.equal),
                         len(places) // config.tokens_per_image)
        return (places + [shared])[num_images * config.tokens_per_image]

    def num_images(self) -> int:
        """The number of images among the tokens."""
        config = self.model.config
        return self.tokens.count(config.image_token_id) // config.tokens_per_image

    def cut(self, length: int) -> None:
        """Keep the first `length` tokens."""
        self.tokens = self.tokens[:length]
        self.kv.truncate(torch.tensor([length]))

    def copy(self, length: int) -> "CachedChat":
        """Another chat with the first `length` tokens of this one."""
        other = CachedChat(self.model)
        other.tokens, other.images = self.tokens[:length], self.images
        other.kv.grow(length)
        for copy, original in zip(other.kv.keys + other.kv.values, self.kv.keys + self.kv.values):
            copy[:, :, :length].copy_(original[:, :, :length])
        return other


def common_length(one: list, other: list, equal: Callable) -> int:
    """The number of items at the beginning of two lists that are equal."""
    return sum(1 for _ in itertools.takewhile(lambda pair: equal(*pair), zip(one, other)))


@dataclass
class Usage:
    """What a reply took."""

    prompt_tokens: int
    cached_tokens: int  # of the prompt: they were not computed again
    completion_tokens: int = 0
    finish_reason: str = "length"  # or "stop"


def stream_reply(model: Llava, tokenizer: Tokenizer, turns: list[dict], images: list[torch.Tensor],
                 max_new_tokens=512, temperature=0.0, top_p=1.0, cache: ChatCache | None = None,
                 stops: Sequence[str] = ()) -> Generator[str, None, Usage]:
    """Yield a piece of the reply to a conversation after each token; it may be empty.

    images: (3, H, W) each, one for every `<image>` in the turns.
    cache: of the turns before; it is brought up to date.
    stops: texts that end the reply and are not part of it, beside the stop of the template.
    Returns the Usage. Raises TooLongError.
    """
    tokens, _, room = tokenize_prompts(model, tokenizer, [turns])  # (1, T)
    max_new_tokens = min(max_new_tokens, room.item())
    eos_id, stop = stop_condition(model, tokenizer)
    stops = [*stops, stop] if stop else stops
    prompt = tokens[0].tolist()
    chat = (cache or ChatCache(model)).find(prompt, images, max_new_tokens)
    num_cached, new_images = len(chat.tokens), images[chat.num_images() :]
    pixels = torch.stack(new_images) if new_images else None  # (N, 3, H, W)
    usage = Usage(len(prompt), num_cached)
    reply, num_sent = [], 0  # the reply's tokens; how many characters of its text are yielded
    text, max_stop = "", max(map(len, stops), default=0)
    for token in model.generate(tokens[:, num_cached:], pixels, max_new_tokens, temperature, top_p,
                                eos_id, cache=chat.kv):
        chat.tokens = prompt + reply  # the new token itself is computed with the next one
        if token.item() == eos_id:
            usage.finish_reason = "stop"
            break
        reply.append(token.item())
        usage.completion_tokens += 1
        # a token can change the text before it, so all of the reply is decoded again
        text = tokenizer.decode(reply)
        found = [text.index(stop) for stop in stops if stop in text]
        if found:
            usage.finish_reason = "stop"
            text = text[: min(found)].rstrip()
            break
        # hold back what may be the start of a stop, or of a character of several tokens
        is_whole = not text.endswith("\ufffd")
        final = max(num_sent, len(text) - max_stop) if is_whole else num_sent
        yield text[num_sent:final]
        num_sent = final
    yield text[num_sent:]
    return usage
