"""Layouts against the dense masks that transformers makes for the same request."""

import pytest
import torch
from transformers import LlamaConfig, masking_utils

import fastpt.fusion  # noqa: F401  # registers the name
from fastpt.fusion.attention import attend
from fastpt.fusion.layout import Layout

PADDING = {
    "none": [[1] * 9, [1] * 9],
    "right": [[1] * 9, [1] * 5 + [0] * 4],
    "left": [[0] * 3 + [1] * 6, [1] * 9],
    "gaps": [[1, 1, 0, 0, 1, 1, 1, 1, 1], [1] * 8 + [0]],
}
MAKERS = {
    "causal": masking_utils.create_causal_mask,
    "window": masking_utils.create_sliding_window_causal_mask,
    "both ways": masking_utils.create_bidirectional_mask,
    "window both ways": masking_utils.create_bidirectional_sliding_window_mask,
}


def masks(maker, **request):
    """Our answer and the dense boolean mask [B, 1, S, S] of "sdpa"."""
    found = []
    for name in ("fastpt", "sdpa"):
        config = LlamaConfig(attn_implementation=name)
        config.sliding_window = 4
        embeds = torch.zeros(2, 9, 1)
        mask = MAKERS[maker](config=config, inputs_embeds=embeds, past_key_values=None, **request)
        if mask is None:
            mask = torch.ones(2, 1, 9, 9, dtype=torch.bool)
            mask = mask.tril() if maker == "causal" else mask
        found.append(mask)
    return found


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("padding", PADDING)
def test_padding_and_windows(maker, padding):
    ours, dense = masks(maker, attention_mask=torch.tensor(PADDING[padding]))
    check(ours, dense, torch.tensor(PADDING[padding]).bool())


@pytest.mark.parametrize("maker", ["causal", "window"])
def test_packed_documents(maker):
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5], [0, 0, 1, 2, 3, 4, 5, 6, 0]])
    ours, dense = masks(maker, attention_mask=None, position_ids=positions)
    assert ours.spans.cu_seqlens_q.tolist() == [0, 3, 9, 10, 17, 18]
    check(ours, dense, torch.ones(2, 9, dtype=torch.bool))


def check(ours, dense, real):
    """The layout's own dense mask, and attention by its spans, say what transformers' mask says at real queries."""
    assert isinstance(ours, Layout)
    assert torch.equal(ours.dense[:, 0][real], dense.expand(2, 1, 9, 9)[:, 0][real])
    if not ours.has_spans:
        assert ours.padding is not None
        assert ours.window is not None
        return
    q, k, v = torch.randn(18, 4, 8), torch.randn(18, 2, 8), torch.randn(18, 2, 8)
    got = attend(q, k, v, ours, scale=0.3, softcap=None)
    heads = [x.unflatten(0, (2, 9)).transpose(1, 2) for x in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=dense, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(got.unflatten(0, (2, 9))[real], expected.transpose(1, 2)[real], rtol=1e-5, atol=1e-5)


def test_what_lengths_cannot_say_gets_a_dense_mask():
    for request in (
        {"or_mask_function": lambda *_: torch.tensor(True)},
        {"block_sequence_ids": torch.tensor([[0, 0, 1, 1, -1, -1, -1, 2, 2]] * 2)},
    ):
        ours, dense = masks("causal", attention_mask=None, **request)
        assert torch.equal(ours, dense)


def test_documents_are_looked_for_once_per_forward():
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5]] * 2)
    ours, _ = masks("causal", attention_mask=None, position_ids=positions)
    assert ours.spans is ours.spans
    given = torch.tensor([0, 9, 18], dtype=torch.int32)
    lengths = {"cu_seq_lens_q": given, "cu_seq_lens_k": given}
    assert ours.given(lengths) is ours.given(lengths)
    assert ours.given(lengths).spans.cu_seqlens_q.tolist() == [0, 9, 18]
    assert torch.equal(ours.given(lengths).dense[0, 0], torch.ones(9, 9).tril().bool())
