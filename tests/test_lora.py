import torch

from nanollava import Llava
from nanollava.lora import add_lora, merge_lora


def test_lora_starts_as_the_plain_model_and_merges_into_one(model, tmp_path):
    tokens = torch.randint(0, 100, (2, 7))
    before = model(tokens)
    model.requires_grad_(False)
    parameters = add_lora(model.language_model, rank=3)
    assert torch.equal(model(tokens), before)
    assert [p for p in model.parameters() if p.requires_grad] == parameters
    assert len(parameters) == 2 * 7 * 2  # A and B of seven layers in two blocks
    for parameter in parameters:
        torch.nn.init.normal_(parameter, std=0.1)
    after = model(tokens)
    assert (after - before).abs().max() > 0.01
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(Llava.from_pretrained(tmp_path)(tokens), after, rtol=1e-4, atol=1e-5)


def test_merged_weights_keep_their_dtype():
    tensors = {"q.weight": torch.zeros(4, 5, dtype=torch.bfloat16),
               "q.A": torch.ones(2, 5), "q.B": torch.ones(4, 2),
               "norm.weight": torch.ones(5)}
    merged = merge_lora(tensors)
    assert set(merged) == {"q.weight", "norm.weight"} and merged["q.weight"].dtype == torch.bfloat16
    assert (merged["q.weight"] == 4).all()  # 2 * (1 * 1 + 1 * 1)
