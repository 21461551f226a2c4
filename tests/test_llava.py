from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nanollava import Llava, llama
from nanollava.conversation import IGNORE_INDEX
from nanollava.infra import cpu
from nanollava.infra.device import compile_blocks
from nanollava.infra.io import InputError
from nanollava.llava import sample_next_token
from nanollava.plan import count_parameters


def prompt(model, *parts):
    """One row (1, T) of token ids; "image" stands for all tokens of an image."""
    row = [model.config.image_token_id] * model.config.tokens_per_image
    tokens = [token for part in parts for token in (row if part == "image" else [part])]
    return torch.tensor([tokens])


def generate(model, tokens, **options) -> list[list[int]]:
    """The new tokens of each row."""
    return torch.stack(list(model.generate(tokens, **options)), dim=1).tolist()


def test_image_features_take_the_places_of_their_tokens(model):
    images = torch.randn(2, 3, 32, 32)
    tokens = prompt(model, 1, "image", 5, "image", 6)
    features = model.encode_images(images)
    embeds = model.merge_image_features(tokens, features)
    torch.testing.assert_close(embeds[0, 1:17], features[0])
    torch.testing.assert_close(embeds[0, 18:34], features[1])
    torch.testing.assert_close(embeds[0, 17], model.language_model.embed(torch.tensor(5)))


def test_row_without_image(model):
    assert model(prompt(model, 1, 5, 6)).shape == (1, 3, model.config.text.vocab_size)


def test_missing_image_features_are_an_error(model):
    with pytest.raises(ValueError, match="32 image tokens in the text, but 16 image features"):
        model(prompt(model, 1, "image", "image"), torch.randn(1, 3, 32, 32))


def test_ragged_batch_matches_single_rows(model):
    images = torch.randn(1, 3, 32, 32)
    long, short = prompt(model, 1, "image", 5, 6, 7), prompt(model, 1, 8, 9)
    tokens = torch.zeros(2, long.shape[1], dtype=torch.long)
    tokens[0], tokens[1, :3] = long, short
    batch = model(tokens, images)
    torch.testing.assert_close(batch[:1], model(long, images))
    torch.testing.assert_close(batch[1:, :3], model(short))


def test_loss_is_the_mean_over_labels(model):
    tokens = prompt(model, 1, 5, 6, 7)
    labels = torch.tensor([[IGNORE_INDEX, IGNORE_INDEX, 6, 7]])
    log_probabilities = model(tokens).log_softmax(dim=-1)
    expected = -(log_probabilities[0, 1, 6] + log_probabilities[0, 2, 7]) / 2
    torch.testing.assert_close(model(tokens, labels=labels), expected)
    torch.testing.assert_close(model(tokens, labels=labels, reduction="sum"), 2 * expected)


def test_first_label_of_a_row_is_never_a_target(model):
    tokens = prompt(model, 1, 5, 6, 7)
    labels, without_first = tokens.clone(), tokens.clone()
    without_first[:, 0] = IGNORE_INDEX  # nothing comes before it that could predict it
    torch.testing.assert_close(model(tokens, labels=labels), model(tokens, labels=without_first))


def test_loss_over_no_targets_is_zero_and_has_gradients(model):
    tokens = prompt(model, 1, "image", 5)
    loss = model(tokens, torch.randn(1, 3, 32, 32), labels=torch.full_like(tokens, IGNORE_INDEX))
    loss.backward()
    assert loss == 0 and model.multi_modal_projector.linear_1.weight.grad.abs().sum() == 0


def test_generation_takes_the_likeliest_token_each_step(model):
    images = torch.randn(1, 3, 32, 32)
    tokens = prompt(model, 1, "image", 5)
    tokens_out = [int(token) for token in model.generate(tokens, images, max_new_tokens=4)]
    for token in tokens_out:
        assert token == int(model(tokens, images)[0, -1].argmax())
        tokens = torch.cat([tokens, torch.tensor([[token]])], dim=1)


def test_ragged_prompts_generate_the_same_as_single_ones(model):
    long, short = prompt(model, 1, 5, 6, 7, 8), prompt(model, 1, 9)
    tokens = torch.zeros(2, 5, dtype=torch.long)
    tokens[0], tokens[1, :2] = long, short
    together = generate(model, tokens, max_new_tokens=4, lengths=torch.tensor([5, 2]))
    for row, alone in enumerate((long, short)):
        assert together[row] == generate(model, alone, max_new_tokens=4)[0]


def test_generation_stops_when_all_rows_have_ended(model):
    tokens = prompt(model, 1, 5)
    first = int(next(model.generate(tokens, max_new_tokens=1)))
    assert generate(model, tokens, max_new_tokens=9, eos_id=first) == [[first]]


def test_ended_row_yields_eos_until_all_have_ended(model):
    one, other = prompt(model, 1, 5), prompt(model, 1, 9)
    tokens_out = [generate(model, row, max_new_tokens=6)[0] for row in (one, other)]
    eos = next(token for token in tokens_out[0] if token not in tokens_out[1])
    end = tokens_out[0].index(eos)
    together = generate(model, torch.cat([one, other]), max_new_tokens=6, eos_id=eos)
    assert together[0] == tokens_out[0][: end + 1] + [eos] * (5 - end)
    assert together[1] == tokens_out[1]


@pytest.mark.parametrize("multiple", [1, 64])  # of the cache's length: on a CPU, on a GPU
def test_compiled_model_is_equal_and_no_length_needs_its_own_graph(model, monkeypatch, multiple):
    monkeypatch.setattr(llama, "slot_multiple", lambda device: multiple)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    # the default backend, inductor, takes minutes
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    monkeypatch.setattr(cpu, "MIN_NUMEL", 1)
    model.config.text.num_hidden_layers = 3  # one in the middle, too
    images = torch.randn(2, 3, 32, 32)

    def work(*texts):
        found = []
        for text in texts:
            for rows in (1, 2):
                tokens = prompt(model, 1, "image", *text).expand(rows, -1)
                labels = tokens.where(tokens < 32, IGNORE_INDEX)
                if multiple == 1:  # training has no cache
                    model.zero_grad()
                    model(tokens, images[:rows], labels).backward()
                    found += [parameter.grad.clone() for parameter in model.parameters()
                              if parameter.grad is not None]
                    with torch.no_grad():
                        found.append(model(tokens, images[:rows], labels))
                found += list(model.generate(tokens, images[:rows], max_new_tokens=5))
        return found

    model, texts = Llava(model.config), ([5, 6], [5, 6, 7, 8], range(5, 25))
    before, names = work(*texts), list(model.state_dict())
    compile_blocks(model)
    work(texts[0])
    enough = len(graphs)
    for plain, compiled in zip(before, work(*texts), strict=True):
        torch.testing.assert_close(plain, compiled)
    assert list(model.state_dict()) == names
    assert len(graphs) == enough > 0


def test_each_target_costs_one_head_and_the_last_mlp(model):
    tokens, images = prompt(model, 1, "image", *range(2, 30)), torch.randn(1, 3, 32, 32)

    def operations(targets: int) -> int:
        labels = tokens.clone()
        labels[:, : tokens.shape[1] - targets] = IGNORE_INDEX
        with FlopCounterMode(display=False) as flops:
            model(tokens, images, labels).backward()
        return flops.get_total_flops()

    costs, text = [operations(targets) for targets in (4, 12, 20)], model.config.text
    last_mlp = model.language_model.model.layers[-1].mlp
    each = text.vocab_size * text.hidden_size + count_parameters(last_mlp)
    assert costs[2] - costs[1] == costs[1] - costs[0] == 8 * 6 * each


def test_low_temperature_sharpens_the_distribution():
    logits = torch.tensor([[2.0, 1.0]]).expand(2000, -1)
    # the share of the first is 1 / (1 + e^(-1 / temperature))
    for temperature, share in ((1.0, 0.731), (0.5, 0.881), (1e-30, 1.0), (0.0, 1.0)):
        drawn = (sample_next_token(logits, temperature, top_p=1.0) == 0).float().mean()
        assert abs(drawn - share) < 0.04


def test_top_p_keeps_the_likeliest():
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    drawn = {int(sample_next_token(logits, temperature=1.0, top_p=0.6)) for _ in range(100)}
    assert drawn == {0, 1}
    assert int(sample_next_token(logits, temperature=1.0, top_p=0.0)) == 0
    halves = torch.tensor([[0.5, 0.25, 0.25]]).log()  # exact in binary: the first alone makes 0.5
    assert {int(sample_next_token(halves, 1.0, top_p=0.5)) for _ in range(50)} == {0}


def test_smallest_temperature_takes_the_likeliest():
    logits = torch.tensor([[1000.0, 999.0, -1000.0]])
    assert int(sample_next_token(logits, temperature=1e-3, top_p=1.0)) == 0
    assert int(sample_next_token(logits - 5000, temperature=1e-30, top_p=1.0)) == 0


@pytest.mark.parametrize("projector", ["linear", "mlp2x_gelu"])
def test_saved_model_opens_unchanged(model, tokenizer, tmp_path, projector):
    model.config.projector = projector
    model = Llava(model.config)
    model.config.stage, model.config.template = 1, "v0"
    model.save_pretrained(tmp_path / "run", [tokenizer.path])
    again = Llava.from_pretrained(tmp_path / "run")
    assert again.config == model.config
    tokens, images = prompt(model, 1, "image", 5), torch.randn(1, 3, 32, 32)
    assert torch.equal(again(tokens, images), model(tokens, images))
    assert (tmp_path / "run" / "tokenizer.model").is_file()


def test_unknown_projector_is_refused(model):
    with pytest.raises(InputError, match="projector 'resampler' is unknown, only linear"):
        type(model.config)(model.config.vision, model.config.text, projector="resampler")


def test_batch_without_images_gives_the_projector_a_zero_gradient(model):
    model.requires_grad_(False)
    model.multi_modal_projector.requires_grad_(True)
    model.vision_tower.forward = None  # is not called
    tokens = prompt(model, 1, 5, 6)
    loss = model(tokens, labels=tokens)
    loss.backward()
    for parameter in model.multi_modal_projector.parameters():
        assert not parameter.grad.any()
