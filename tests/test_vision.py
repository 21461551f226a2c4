import torch

from nanollava.vision import VisionConfig, VisionTower, quick_gelu

TINY = VisionConfig(image_size=32, patch_size=8, hidden_size=16, intermediate_size=32,
                    num_hidden_layers=3, num_attention_heads=2)


def test_image_becomes_a_class_token_and_patches():
    assert VisionTower(TINY)(torch.randn(2, 3, 32, 32)).shape == (2, 1 + 16, 16)


def test_feature_layer_counts_from_the_end_and_later_blocks_do_not_run():
    tower, images = VisionTower(TINY), torch.randn(1, 3, 32, 32)
    before_last = tower(images, feature_layer=-2)
    assert torch.equal(tower.encoder.layers[-1](before_last), tower(images, feature_layer=-1))
    tower.encoder.layers[-1].forward = None  # a call would fail
    assert torch.equal(tower(images, feature_layer=-2), before_last)


def test_patches_are_in_reading_order():
    tower = VisionTower(TINY)
    image = torch.zeros(1, 3, 32, 32)
    image[:, :, 8:16, 24:32] = 1  # second row, fourth column
    plain, marked = (tower.embeddings(pixels)[0] for pixels in (torch.zeros_like(image), image))
    changed = (plain != marked).any(dim=1).nonzero().flatten().tolist()
    assert changed == [1 + 1 * 4 + 3]


def test_block_matches_torch_encoder_layer():
    ours = VisionTower(TINY).encoder.layers[0]
    theirs = torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0, activation=quick_gelu,
                                              batch_first=True, norm_first=True)
    attention = ours.self_attn
    three = (attention.q_proj, attention.k_proj, attention.v_proj)
    names = {
        "self_attn.in_proj_weight": torch.cat([part.weight for part in three]),
        "self_attn.in_proj_bias": torch.cat([part.bias for part in three]),
        "self_attn.out_proj.weight": attention.out_proj.weight,
        "self_attn.out_proj.bias": attention.out_proj.bias,
        "linear1.weight": ours.mlp.fc1.weight, "linear1.bias": ours.mlp.fc1.bias,
        "linear2.weight": ours.mlp.fc2.weight, "linear2.bias": ours.mlp.fc2.bias,
        "norm1.weight": ours.layer_norm1.weight, "norm1.bias": ours.layer_norm1.bias,
        "norm2.weight": ours.layer_norm2.weight, "norm2.bias": ours.layer_norm2.bias,
    }
    theirs.load_state_dict(names)
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(ours(x), theirs(x))
