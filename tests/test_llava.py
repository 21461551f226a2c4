from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nanollava import Llava, layers
from nanollava.conversation import IGNORE_INDEX
from nanollava.llava import sample_next_token
from nanollava.plan import count


def prompt(model, *parts):
    """Token rows from numbers, with "image" for all tokens of a picture."""
    row = [model.config.image_token_id] * model.config.tokens_per_image
    return torch.tensor([[token for part in parts for token in (row if part == "image" else [part])]])


def test_each_picture_stands_where_its_tokens_are(model):
    images = torch.randn(2, 3, 32, 32)
    tokens = prompt(model, 1, "image", 5, "image", 6)
    embeds, seen = model.merge_image_features(tokens, model.see(images)), model.see(images)
    torch.testing.assert_close(embeds[0, 1:17], seen[0])
    torch.testing.assert_close(embeds[0, 18:34], seen[1])
    torch.testing.assert_close(embeds[0, 17], model.language_model.embed(torch.tensor(5)))


def test_a_sequence_needs_no_picture(model):
    assert model(prompt(model, 1, 5, 6)).shape == (1, 3, model.config.text.vocab_size)


def test_pictures_that_do_not_fit_the_text_are_refused(model):
    with pytest.raises(ValueError, match="32 picture tokens in the text, but pictures for 16"):
        model(prompt(model, 1, "image", "image"), torch.randn(1, 3, 32, 32))


def test_a_batch_of_ragged_rows_equals_its_rows_alone(model):
    images = torch.randn(1, 3, 32, 32)
    long, short = prompt(model, 1, "image", 5, 6, 7), prompt(model, 1, 8, 9)
    tokens = torch.zeros(2, long.shape[1], dtype=torch.long)
    tokens[0], tokens[1, :3] = long, short
    together = model(tokens, images)
    torch.testing.assert_close(together[:1], model(long, images))
    torch.testing.assert_close(together[1:, :3], model(short))


def test_the_loss_is_the_mean_over_labels(model):
    tokens = prompt(model, 1, 5, 6, 7)
    labels = torch.tensor([[IGNORE_INDEX, IGNORE_INDEX, 6, 7]])
    log_probabilities = model(tokens).log_softmax(dim=-1)
    expected = -(log_probabilities[0, 1, 6] + log_probabilities[0, 2, 7]) / 2
    torch.testing.assert_close(model(tokens, labels=labels), expected)


def test_generating_is_taking_the_likeliest_token_again_and_again(model):
    images = torch.randn(1, 3, 32, 32)
    tokens = prompt(model, 1, "image", 5)
    said = [int(token) for token in model.generate(tokens, images, max_new_tokens=4)]
    for token in said:
        assert token == int(model(tokens, images)[0, -1].argmax())
        tokens = torch.cat([tokens, torch.tensor([[token]])], dim=1)


def test_ragged_prompts_generate_what_they_would_alone(model):
    long, short = prompt(model, 1, 5, 6, 7, 8), prompt(model, 1, 9)
    tokens = torch.zeros(2, 5, dtype=torch.long)
    tokens[0], tokens[1, :2] = long, short
    together = torch.stack(list(model.generate(tokens, max_new_tokens=4, lengths=torch.tensor([5, 2]))), dim=1)
    for row, alone in enumerate((long, short)):
        assert together[row].tolist() == [int(token) for token in model.generate(alone, max_new_tokens=4)]


def test_a_row_that_ended_goes_on_with_eos_until_all_ended(model):
    tokens = prompt(model, 1, 5)
    first = int(next(model.generate(tokens, max_new_tokens=1)))
    assert [int(token) for token in model.generate(tokens, max_new_tokens=9, eos_id=first)] == [first]


def test_each_row_ends_at_its_own_eos(model):
    one, other = prompt(model, 1, 5), prompt(model, 1, 9)
    said = [[int(token) for token in model.generate(row, max_new_tokens=6)] for row in (one, other)]
    eos = next(token for token in said[0] if token not in said[1])
    end = said[0].index(eos)
    together = torch.stack(list(model.generate(torch.cat([one, other]), max_new_tokens=6, eos_id=eos)), dim=1)
    assert together[0].tolist() == said[0][: end + 1] + [eos] * (5 - end)
    assert together[1].tolist() == said[1]


def test_a_compiled_model_says_and_learns_the_same_and_no_length_has_a_graph_of_its_own(model, monkeypatch):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))  # inductor takes minutes
    monkeypatch.setattr(layers, "MANY", 1)
    model.config.text.num_hidden_layers = 3  # one in the middle, too
    images = torch.randn(2, 3, 32, 32)

    def work(*texts):
        found = []
        for text in texts:
            for rows in (1, 2):
                tokens = prompt(model, 1, "image", *text).expand(rows, -1)
                labels = tokens.where(tokens < 32, IGNORE_INDEX)
                model.zero_grad()
                model(tokens, images[:rows], labels).backward()
                found += [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
                with torch.no_grad():
                    found.append(model(tokens, images[:rows], labels))
                found += list(model.generate(tokens, images[:rows], max_new_tokens=5))
        return found

    model, texts = Llava(model.config), ([5, 6], [5, 6, 7, 8], range(5, 25))
    before, names = work(*texts), list(model.state_dict())
    model.compile_blocks()
    work(texts[0])
    enough = len(graphs)
    for plain, compiled in zip(before, work(*texts), strict=True):
        torch.testing.assert_close(plain, compiled)
    assert list(model.state_dict()) == names
    assert len(graphs) == enough > 0


def test_a_step_costs_a_head_for_each_token_that_is_learned_and_no_more(model):
    tokens, images = prompt(model, 1, "image", *range(2, 30)), torch.randn(1, 3, 32, 32)

    def operations(learned: int) -> int:
        labels = tokens.clone()
        labels[:, : tokens.shape[1] - learned] = IGNORE_INDEX
        with FlopCounterMode(display=False) as flops:
            model(tokens, images, labels).backward()
        return flops.get_total_flops()

    costs, text = [operations(learned) for learned in (4, 12, 20)], model.config.text
    last = model.language_model.model.layers[-1]  # what it does for one token, but for keys, values and a query
    each = text.vocab_size * text.hidden_size + count(last.mlp) + count(last.self_attn.o_proj)
    assert costs[2] - costs[1] == costs[1] - costs[0] == 8 * 6 * each


def test_temperature_makes_the_likely_likelier():
    logits = torch.tensor([[2.0, 1.0]]).expand(2000, -1)
    for temperature, share in ((1.0, 0.731), (0.5, 0.881), (1e-30, 1.0), (0.0, 1.0)):  # 1 / (1 + e^(-1 / temperature))
        drawn = (sample_next_token(logits, temperature, top_p=1.0) == 0).float().mean()
        assert abs(drawn - share) < 0.04


def test_top_p_leaves_only_the_likeliest():
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    drawn = {int(sample_next_token(logits, temperature=1.0, top_p=0.6)) for _ in range(100)}
    assert drawn == {0, 1}
    assert int(sample_next_token(logits, temperature=1.0, top_p=0.0)) == 0


@pytest.mark.parametrize("projector", ["linear", "mlp2x_gelu"])
def test_a_saved_model_comes_back_as_it_was(model, tokenizer, tmp_path, projector):
    model.config.projector = projector
    model = Llava(model.config)
    model.config.stage, model.config.template = 1, "v0"
    model.save_pretrained(tmp_path / "run", [tokenizer.path])
    again = Llava.from_pretrained(tmp_path / "run")
    assert again.config == model.config
    tokens, images = prompt(model, 1, "image", 5), torch.randn(1, 3, 32, 32)
    assert torch.equal(again(tokens, images), model(tokens, images))
    assert (tmp_path / "run" / "tokenizer.model").is_file()
