import torch

import nanollava.llama as llama_module
from nanollava.llama import KVCache, Llama, LlamaConfig, apply_rotary_emb, rope_cos_sin

TINY = LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                   num_attention_heads=4, num_key_value_heads=2)


def empty_cache(batch_size, max_length=8):
    return KVCache(TINY, batch_size, max_length, torch.float32, "cpu")


def test_later_tokens_do_not_change_earlier_ones():
    llama, embeds = Llama(TINY), torch.randn(1, 6, 32)
    changed = embeds.clone()
    changed[:, 4:] += 1
    torch.testing.assert_close(llama(embeds)[:, :4], llama(changed)[:, :4])


def test_rotary_scores_depend_on_the_distance_only():
    q, k = torch.randn(2, 1, 1, 1, 8)
    config = LlamaConfig(hidden_size=8, num_attention_heads=1)

    def score(query_position, key_position):
        rotated = [apply_rotary_emb(x, *rope_cos_sin(torch.tensor([[position]]), config))
                   for x, position in ((q, query_position), (k, key_position))]
        return (rotated[0] * rotated[1]).sum()

    torch.testing.assert_close(score(5, 2), score(105, 102), atol=1e-4, rtol=1e-4)
    assert abs(score(5, 2) - score(5, 3)) > 1e-3


def test_rotary_embedding_turns_each_pair_of_the_two_halves():
    x, config = torch.tensor([1.0, 0, 0, 1]), LlamaConfig(hidden_size=4, num_attention_heads=1)
    y = apply_rotary_emb(x.view(1, 1, 1, 4), *rope_cos_sin(torch.tensor([[1]]), config)).flatten()
    # the angles at position 1: 10000^0 and 10000^-(2/4)
    fast, slow = torch.tensor(1.0), torch.tensor(0.01)
    expected = torch.stack([fast.cos(), -slow.sin(), fast.sin(), slow.cos()])
    torch.testing.assert_close(y, expected)


def test_rotary_angles_are_float32_whatever_the_model_is():
    cos, sin = rope_cos_sin(torch.tensor([[2047]]), TINY)
    exact = torch.tensor(2047.0).double().cos()
    torch.testing.assert_close(cos[0, 0, 0, 0].double(), exact, atol=1e-6, rtol=0)
    assert cos.dtype == sin.dtype == torch.float32


def test_cosines_are_cast_once_for_all_layers(monkeypatch):
    dtypes = []
    monkeypatch.setattr(llama_module, "apply_rotary_emb",
                        lambda x, *rope: dtypes.append([y.dtype for y in (x, *rope)]) or x)
    Llama(TINY).bfloat16()(torch.randn(1, 3, 32).bfloat16())
    assert dtypes == 2 * TINY.num_hidden_layers * [3 * [torch.bfloat16]]


def test_grouped_heads_equal_repeated_keys_and_values():
    grouped = Llama(TINY)
    full = Llama(LlamaConfig(**{**vars(TINY), "num_key_value_heads": 4}))
    weights = grouped.state_dict()
    for name in list(weights):
        if "k_proj" in name or "v_proj" in name:  # (2 heads * 8, 32) -> each head twice
            repeated = weights[name].view(2, 8, 32).repeat_interleave(2, dim=0)
            weights[name] = repeated.reshape(32, 32)
    full.load_state_dict(weights)
    embeds = torch.randn(2, 5, 32)
    torch.testing.assert_close(grouped(embeds), full(embeds))


def test_cache_gives_the_same_output_for_ragged_rows():
    llama, embeds = Llama(TINY), torch.randn(2, 6, 32)
    expected = llama(embeds)
    lengths = torch.tensor([4, 2])
    padded = embeds[:, :4].clone()
    padded[1, 2:] = 99.0
    cache = empty_cache(batch_size=2)
    llama(padded, cache)
    cache.truncate(lengths)
    for step in range(2):
        rows, position = torch.arange(2), lengths + step
        output = llama(embeds[rows, position][:, None], cache)
        torch.testing.assert_close(output[:, 0], expected[rows, position])


def test_several_tokens_can_follow_a_cached_prompt():
    llama, embeds = Llama(TINY), torch.randn(1, 6, 32)
    cache = empty_cache(batch_size=1)
    output = torch.cat([llama(embeds[:, :2], cache), llama(embeds[:, 2:], cache)], dim=1)
    torch.testing.assert_close(output, llama(embeds))
    assert cache.lengths.tolist() == [6]


def test_truncated_tokens_are_forgotten():
    llama, embeds = Llama(TINY), torch.randn(1, 4, 32)
    cache = empty_cache(batch_size=1)
    llama(torch.cat([embeds[:, :2], torch.full((1, 3, 32), 99.0)], dim=1), cache)
    cache.truncate(torch.tensor([2]))
    torch.testing.assert_close(llama(embeds[:, 2:], cache), llama(embeds)[:, 2:])


def test_kept_tokens_equal_those_of_a_full_pass():
    llama, embeds = Llama(TINY), torch.randn(2, 6, 32)
    keep = torch.tensor([3, 5, 6, 11])  # tokens 3 and 5 of row 0, tokens 0 and 5 of row 1
    expected = llama(embeds)[[0, 0, 1, 1], [3, 5, 0, 5]]
    torch.testing.assert_close(llama(embeds, keep=keep), expected)


def test_tied_embeddings_serve_as_the_head():
    llama = Llama(LlamaConfig(**{**vars(TINY), "tie_word_embeddings": True}))
    hidden = torch.randn(1, 1, 32)
    assert not [name for name in llama.state_dict() if "lm_head" in name]
    torch.testing.assert_close(llama.logits(hidden), hidden @ llama.model.embed_tokens.weight.T)
