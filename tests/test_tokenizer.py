import pytest

from nanollava import Tokenizer
from nanollava.infra.io import InputError


def test_text_goes_to_tokens_and_back(tokenizer):
    text = "Is there a red cat?\nYes, at the top left."
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.bos_id not in tokenizer.encode(text) and tokenizer.eos_id not in tokenizer.encode(text)


def test_a_token_past_the_vocabulary_says_nothing(tokenizer):
    assert tokenizer.decode([*tokenizer.encode("A cat."), len(tokenizer) + 3]) == "A cat."


def test_a_folder_or_the_file_itself(tokenizer):
    assert len(Tokenizer(tokenizer.path)) == len(Tokenizer(tokenizer.path.parent)) == len(tokenizer)


def test_what_is_no_tokenizer_is_told_by_name(tmp_path):
    with pytest.raises(InputError, match="no tokenizer at .*tokenizer.model"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_text("text")
    with pytest.raises(InputError, match="tokenizer.model is not a SentencePiece model"):
        Tokenizer(tmp_path)
