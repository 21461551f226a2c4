"""What the server computes: replies of a LLaVA, and the words that are nearest to an image."""

import io
import math
import time
from collections.abc import Iterator

import torch

from ..chat import ChatCache, TooLongError, Usage, stream_reply
from ..image import decode_image
from ..llava import Llava
from ..patch_words import near_cosine, nearest_words
from ..tokenizer import Tokenizer
from .openai import Request, RequestError


class Replies:
    """All of it runs in one thread, the Engine's."""

    def __init__(self, model: Llava, tokenizer: Tokenizer, name: str, cache_bytes: int):
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.created = int(time.time())
        self.cache = ChatCache(model, cache_bytes)
        longest = max(len(tokenizer.piece(token)) for token in range(len(tokenizer)))
        self.max_characters = longest * model.config.text.max_position_embeddings

    def reply(self, request: Request) -> Iterator[str | Usage]:
        """Yield the reply in pieces, then its Usage. Raises TooLongError, or InputError for a file
        that is no image."""
        config, num_images = self.model.config, len(request.images)
        if num_images * config.tokens_per_image >= config.text.max_position_embeddings:
            raise TooLongError(f"{num_images} images are too many: each has "
                               f"{config.tokens_per_image} tokens, and the model reads at most "
                               f"{config.text.max_position_embeddings}")
        num_characters = sum(len(turn["value"]) for turn in request.turns)
        if num_characters > self.max_characters:  # to tokenize them would take long
            raise TooLongError(f"the conversation has {num_characters:,} characters: more than the "
                               "model can read")
        images = [self.read_image(file, number) for number, file in enumerate(request.images, 1)]
        if request.seed is None:
            torch.seed()
        else:
            torch.manual_seed(request.seed)
        yield (yield from stream_reply(
            self.model, self.tokenizer, request.turns, images, request.max_new_tokens,
            request.temperature, request.top_p, self.cache, request.stops))

    @torch.no_grad()
    def patch_words(self, file: bytes) -> Iterator[dict]:
        """Yield one object: the grid's side, the words with their cosines of each patch, row by
        row, the cosine above which a word is near, and whether the image was padded."""
        side = math.isqrt(self.model.config.tokens_per_image)
        if side * side != self.model.config.tokens_per_image:
            raise RequestError(400, "this model's image tokens are not a square grid of patches")
        pixels = self.read_image(file, 1)[None]  # (1, 3, H, W)
        features = self.model.encode_images(pixels)[0]  # (P, D)
        words = nearest_words(self.model, self.tokenizer, features)
        yield {"side": side, "near": near_cosine(self.model, self.tokenizer, pixels),
               "padded": self.model.config.image_aspect_ratio == "pad",
               "words": [[[word, round(cosine, 3)] for word, cosine in row] for row in words]}

    def read_image(self, file: bytes, number: int) -> torch.Tensor:
        """Pixels (3, H, W)."""
        image = decode_image(io.BytesIO(file), f"image {number}")
        return self.model.config.preprocess(image)
