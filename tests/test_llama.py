import torch
from torch.utils.flop_counter import FlopCounterMode

from nanollava import layers
from nanollava.layers import RMSNorm
from nanollava.llama import MLP, KVCache, Llama, LlamaConfig, rope_cos_sin, rotate

TINY = LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                   num_key_value_heads=2)


def test_nobody_sees_what_comes_after():
    llama, embeds = Llama(TINY), torch.randn(1, 6, 32)
    changed = embeds.clone()
    changed[:, 4:] += 1
    torch.testing.assert_close(llama(embeds)[:, :4], llama(changed)[:, :4])


def test_rotary_scores_depend_on_the_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 8)
    config = LlamaConfig(hidden_size=8, num_attention_heads=1)

    def score(query_at, key_at):
        turned = [rotate(x, rope_cos_sin(torch.tensor([[at]]), config)) for x, at in ((q, query_at), (k, key_at))]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(5, 2), score(105, 102), atol=1e-4, rtol=1e-4)
    assert abs(score(5, 2) - score(5, 3)) > 1e-3


def test_rotary_angles_stay_exact_when_the_model_is_bfloat16():
    cos, sin = rope_cos_sin(torch.tensor([[2047]]), TINY)
    torch.testing.assert_close(cos[0, 0, 0, 0].double(), torch.tensor(2047.0).double().cos(), atol=1e-6, rtol=0)
    assert cos.dtype == sin.dtype == torch.float32


def test_rms_norm_divides_by_the_root_mean_square():
    norm = RMSNorm(4, eps=0.0)
    torch.testing.assert_close(norm(torch.tensor([2.0, -2.0, 2.0, -2.0])), torch.tensor([1.0, -1.0, 1.0, -1.0]))


def test_swiglu_keeps_gate_and_feature_and_multiplies_nothing_twice():
    mlp, x = MLP(TINY), torch.randn(2, 3, 32, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda nothing: None):
        mlp(x)
    assert sum(tensor.numel() == 2 * 3 * 48 for tensor in kept) == 2
    with FlopCounterMode(display=False) as forward:
        y = mlp(x)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    assert backward.get_total_flops() == 2 * forward.get_total_flops()  # for what goes in, and for the weights


def test_shared_keys_and_values_equal_repeated_ones():
    shared = Llama(TINY)
    full = Llama(LlamaConfig(**{**vars(TINY), "num_key_value_heads": 4}))
    weights = shared.state_dict()
    for name in list(weights):
        if "k_proj" in name or "v_proj" in name:  # (2 heads * 8, 32) -> each head twice
            weights[name] = weights[name].view(2, 8, 32).repeat_interleave(2, dim=0).reshape(32, 32)
    full.load_state_dict(weights)
    embeds = torch.randn(2, 5, 32)
    torch.testing.assert_close(shared(embeds), full(embeds))


def test_the_cache_changes_nothing_for_rows_of_different_lengths():
    llama, embeds = Llama(TINY), torch.randn(2, 6, 32)
    whole = llama(embeds)
    lengths = torch.tensor([4, 2])  # row 1 has two tokens of padding
    cache = KVCache(TINY, batch=2, length=8, dtype=torch.float32, device="cpu")
    padded = embeds[:, :4].clone()
    padded[1, 2:] = 99.0
    llama(padded, slots=cache.first(4))
    for step in range(2):
        at = lengths + step
        now = llama(embeds[torch.arange(2), at][:, None], at[:, None], cache.first(5 + step))
        torch.testing.assert_close(now[:, 0], whole[torch.arange(2), at])


def test_a_token_is_rounded_to_bfloat16_weights_but_scores_are_not(monkeypatch):
    monkeypatch.setattr(layers, "MANY", 1)
    kept, llama, embeds = Llama(TINY).bfloat16(), Llama(TINY), torch.randn(1, 4, 32)
    llama.load_state_dict(kept.state_dict())
    after = []
    with torch.no_grad():
        for model in (kept, llama):
            cache = KVCache(TINY, batch=1, length=4, dtype=torch.float32, device="cpu")
            prompt = model(embeds[:, :3], slots=cache.first(3))
            after.append((prompt, model(embeds[:, 3:], torch.tensor([[3]]), cache.first(4))))
        (prompt, token), (exact_prompt, exact_token) = after
        torch.testing.assert_close(prompt, exact_prompt)
        torch.testing.assert_close(token, exact_token, atol=0.05, rtol=0.05)
        assert (token - exact_token).abs().max() > 1e-4
        torch.testing.assert_close(kept.logits(token), llama.logits(token))


def test_what_is_wanted_is_what_it_would_be_among_all():
    llama, embeds = Llama(TINY), torch.randn(2, 6, 32)
    wanted = torch.tensor([3, 5, 6, 11])  # of row 0 the tokens 3 and 5, of row 1 the tokens 0 and 5
    torch.testing.assert_close(llama(embeds, wanted=wanted), llama(embeds)[[0, 0, 1, 1], [3, 5, 0, 5]])


def test_tied_embeddings_have_no_head_of_their_own():
    llama = Llama(LlamaConfig(**{**vars(TINY), "tie_word_embeddings": True}))
    hidden = torch.randn(1, 1, 32)
    assert not [name for name in llama.state_dict() if "lm_head" in name]
    torch.testing.assert_close(llama.logits(hidden), hidden @ llama.model.embed_tokens.weight.T)
