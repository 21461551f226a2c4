import pytest
import sentencepiece

from nanollava import Tokenizer
from nanollava.infra.io import InputError
from nanollava.tokenizer import open_tokenizer


def test_decode_inverts_encode(tokenizer):
    text = "Is there a red cat?\nYes, at the top left."
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert tokenizer.bos_id not in tokens and tokenizer.eos_id not in tokens


def test_ids_past_the_vocabulary_decode_to_nothing(tokenizer):
    assert tokenizer.decode([*tokenizer.encode("A cat."), len(tokenizer) + 3]) == "A cat."


def test_lone_surrogate_becomes_a_question_mark(tokenizer):
    assert tokenizer.encode("A \ud83d cat.") == tokenizer.encode("A ? cat.")


def test_path_is_a_folder_or_the_file_itself(tokenizer):
    file, folder = Tokenizer(tokenizer.path), Tokenizer(tokenizer.path.parent)
    assert len(file) == len(folder) == len(tokenizer)


def test_missing_or_invalid_file_is_named_in_the_error(tmp_path):
    with pytest.raises(InputError, match="no tokenizer at .*tokenizer.model"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_text("text")
    with pytest.raises(InputError, match="tokenizer.model is not a SentencePiece model"):
        Tokenizer(tmp_path)


def test_tokenizer_without_bos_is_refused(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c"] * 9), model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=7, bos_id=-1, minloglevel=2)
    with pytest.raises(InputError, match="tokenizer.model has no BOS or no EOS token"):
        Tokenizer(tmp_path)


def test_tokenizer_of_another_model_is_refused(tokenizer, config):
    assert len(open_tokenizer(tokenizer.path, config)) == len(tokenizer)
    config.image_token_id = 7
    with pytest.raises(InputError, match="has the token 7, which is the model's image token"):
        open_tokenizer(tokenizer.path, config)
    config.text.vocab_size = 400
    with pytest.raises(InputError, match="tokens, but the model embeds only 400"):
        open_tokenizer(tokenizer.path, config)
