"""The constant-size cache by itself. Tier T0."""

import pytest
import torch

from tnl.models import TnlCache, TnlConfig

CONFIG = TnlConfig.from_preset("tiny", num_hidden_layers=2)


def filled_cache() -> TnlCache:
    cache = TnlCache(CONFIG)
    for i, layer in enumerate(cache.layers):
        layer.store(torch.randn(3, *CONFIG.state_shape(i)), 7)
    return cache


def test_length_counts_tokens() -> None:
    cache = TnlCache(CONFIG)
    assert cache.get_seq_length() == 0
    assert cache.memory_bytes == 0
    cache = filled_cache()
    assert cache.get_seq_length() == 7
    assert cache.get_mask_sizes(2, 0) == (9, 0)
    assert cache.get_max_length() == -1


def test_memory() -> None:
    elements = sum(h * d * e for h, d, e in (CONFIG.state_shape(i) for i in range(2)))
    assert filled_cache().memory_bytes == 3 * 4 * elements


def test_rows_move_with_their_beams() -> None:
    cache = filled_cache()
    before = [layer.state.clone() for layer in cache.layers]
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    for layer, state in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.state, state[[2, 0, 0]])
    cache.batch_select_indices(torch.tensor([1]))
    cache.batch_repeat_interleave(2)
    for layer, state in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.state, state[[0, 0]])
    assert cache.get_seq_length() == 7


def test_reset_forgets() -> None:
    cache = filled_cache()
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.memory_bytes == 0


def test_states_are_cut_from_the_graph() -> None:
    cache = TnlCache(CONFIG)
    cache.layers[0].store(torch.ones(1, requires_grad=True) * 2, 1)
    assert not cache.layers[0].state.requires_grad


def test_tokens_cannot_be_taken_back() -> None:
    with pytest.raises(ValueError, match="cannot forget"):
        filled_cache().crop(-1)


def test_hybrid_stack_keeps_keys_and_values_of_its_softmax_layers() -> None:
    config = TnlConfig.from_preset("tiny", num_hidden_layers=2, layer_types=["linear_attention", "full_attention"])
    cache = TnlCache(config)
    cache.update(torch.randn(3, 2, 5, 64), torch.randn(3, 2, 5, 64), layer_idx=1)
    cache.layers[0].store(torch.randn(3, 2, 64, 64), 5)
    assert cache.memory_bytes == 4 * (2 * 3 * 2 * 5 * 64 + 3 * 2 * 64 * 64)
    assert [cache.get_seq_length(i) for i in range(2)] == [5, 5]
    cache.reorder_cache(torch.tensor([1, 1, 1]))
    assert torch.equal(cache.layers[1].keys[0], cache.layers[1].keys[2])
