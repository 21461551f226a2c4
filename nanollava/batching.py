"""Replies to many prompts, in a batch whose rows are refilled: continuous batching.

Replies differ in length. If a batch started and ended as one, each row would be computed until the
longest reply ends. Here replies leave when they have ended, and the next prompts take their rows
(Yu et al., 2022, Orca):

    step      1   2   3   4   5   6   7
    row 0     a   a   a   a   a   e   e
    row 1     b   b   b   b   b   b   b
    row 2     c   c   d   d   d   d   d      reply c ends at step 2, and d begins in its row
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch

from .chat import stop_condition, tokenize_prompts
from .llama import KVCache
from .llava import Llava
from .tokenizer import Tokenizer

ENDED_SHARE = 0.125  # of the rows, before they are refilled: prompts are faster several at a time
MAX_STEPS = 16  # before a refill, however few have ended: the cache grows by as many tokens


@torch.no_grad()
def generate_replies(model: Llava, tokenizer: Tokenizer,
                     prompts: Iterable[tuple[list[dict], torch.Tensor]], batch_size: int = 64,
                     max_new_tokens: int = 64) -> Iterator[tuple[int, str]]:
    """Yield (number of the prompt, reply) at temperature 0, in the order in which replies end.

    prompts: (conversation, its image features (N, P, D), made by `Llava.encode_images`). They are
        read when there is a free row. Neighbors should be about equally long.
    Raises TooLongError.
    """
    prompts, batch = iter(prompts), ReplyBatch(model, tokenizer, max_new_tokens)
    while True:
        free = batch_size - sum(not reply.ended for reply in batch.replies)
        batch.refill(list(islice(prompts, free)))
        if not batch.replies:
            return
        batch.generate()
        for reply in batch.replies:
            if reply.ended:
                yield reply.number, batch.text(reply)


@dataclass
class Reply:
    number: int  # of the prompt
    max_tokens: int
    tokens: list[int]
    ended: bool = False


class ReplyBatch:
    """The replies in the rows, and the keys and values of all their tokens except the last."""

    def __init__(self, model: Llava, tokenizer: Tokenizer, max_new_tokens: int):
        self.model, self.tokenizer, self.max_new_tokens = model, tokenizer, max_new_tokens
        self.eos_id, self.stop = stop_condition(model, tokenizer)
        self.replies, self.cache, self.num_prompts = [], self.make_cache(0), 0

    def make_cache(self, batch_size: int) -> KVCache:
        return KVCache(self.model.config.text, batch_size, 0, self.model.dtype, self.model.device)

    def refill(self, prompts: list[tuple[list[dict], torch.Tensor]]) -> None:
        """Put prompts, and the first tokens of their replies, in the rows of ended replies."""
        keep = [row for row, reply in enumerate(self.replies) if not reply.ended]
        self.replies, cache = [self.replies[row] for row in keep], self.make_cache(len(prompts))
        if prompts:
            conversations, features = zip(*prompts)
            tokens, lengths, room = tokenize_prompts(self.model, self.tokenizer, conversations)
            first, = self.model.generate(tokens, max_new_tokens=1, lengths=lengths, cache=cache,
                                         image_features=torch.cat(features))  # (B,)
            for token, limit in zip(first.tolist(), room.clamp(max=self.max_new_tokens).tolist()):
                self.replies.append(Reply(self.num_prompts, limit, []))
                self.add_token(self.replies[-1], token)
                self.num_prompts += 1
        self.cache.replace_rows(keep, cache)

    def generate(self) -> None:
        """Generate tokens for all rows until enough replies have ended."""
        last = torch.tensor([reply.tokens[-1:] for reply in self.replies])  # (B, 1)
        for next_token in self.model.generate(last, max_new_tokens=MAX_STEPS, cache=self.cache):
            for reply, token in zip(self.replies, next_token.tolist()):
                if not reply.ended:
                    self.add_token(reply, token)
            if sum(reply.ended for reply in self.replies) >= ENDED_SHARE * len(self.replies):
                return

    def add_token(self, reply: Reply, token: int) -> None:
        reply.tokens.append(token)
        is_last = token == self.eos_id or len(reply.tokens) == reply.max_tokens
        reply.ended = is_last or self.stop is not None and self.stop in self.decode(reply)

    def decode(self, reply: Reply) -> str:
        return self.tokenizer.decode(reply.tokens)  # EOS decodes to ""

    def text(self, reply: Reply) -> str:
        """The reply without its stop."""
        text = self.decode(reply)
        return (text.split(self.stop)[0] if self.stop else text).strip()
