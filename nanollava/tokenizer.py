"""Text to tokens and back: SentencePiece, as LLaMA uses it (Kudo and Richardson, 2018)."""

from pathlib import Path

import sentencepiece

from .infra.io import InputError


class Tokenizer:
    """A `tokenizer.model` file, or a folder that contains one.

    Raises InputError if the file does not exist or is not a SentencePiece model with BOS and EOS.
    """

    def __init__(self, path: str | Path):
        path = Path(path)
        path = path / "tokenizer.model" if path.is_dir() else path
        if not path.is_file():
            raise InputError(f"no tokenizer at {path}")
        try:
            self.sentencepiece = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise InputError(f"{path} is not a SentencePiece model") from error
        self.path = path
        self.bos_id, self.eos_id = self.sentencepiece.bos_id(), self.sentencepiece.eos_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise InputError(f"{path} has no BOS or no EOS token, which LLaVA needs")

    def __len__(self) -> int:
        return self.sentencepiece.vocab_size()

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without BOS and EOS."""
        # a lone surrogate, from a broken file or terminal, cannot be encoded: it becomes "?"
        return self.sentencepiece.encode(text.encode(errors="replace").decode())

    def decode(self, tokens: list[int]) -> str:
        """The text of tokens. Ids past the vocabulary are skipped: the public LLaVA-1.5 has more
        embeddings than its tokenizer has pieces."""
        return self.sentencepiece.decode([int(token) for token in tokens if token < len(self)])

    def piece(self, token: int) -> str:
        """A token as it stands in the vocabulary, with ▁ for a space."""
        return self.sentencepiece.id_to_piece(int(token))


def open_tokenizer(path: str | Path, config) -> Tokenizer:
    """The tokenizer of a LLaVA with this LlavaConfig.

    Raises InputError if the model lacks embeddings for it, or takes a word for its image token.
    """
    tokenizer = Tokenizer(path)
    if len(tokenizer) > config.text.vocab_size:
        raise InputError(f"{tokenizer.path} has {len(tokenizer)} tokens, but the model embeds only "
                         f"{config.text.vocab_size}: it is the tokenizer of another model")
    if config.image_token_id < len(tokenizer):
        raise InputError(f"{tokenizer.path} has the token {config.image_token_id}, which is the "
                         "model's image token: it is the tokenizer of another model")
    return tokenizer
