"""Text to tokens and back: SentencePiece, as LLaMA uses it (Kudo and Richardson, 2018)."""

from pathlib import Path

import sentencepiece

from .infra.io import InputError


class Tokenizer:
    """A `tokenizer.model` file, or a folder that contains one.

    Raises InputError if the file does not exist or is not a SentencePiece model.
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
