"""`interp.attention`: the patterns of one prompt, as plain transformers has them."""

import numpy as np
import pytest

import interp
from interp.heads import Head, HeadError
from interp.tasks.prompts import PromptError
from tests.tiny import eager, one_by_one, random_ids, tiny, words

IDS = random_ids(11)[0]


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "mistral", "gemma2", "gpt_oss"])
def test_patterns_are_those_of_plain_transformers(family):
    found = interp.attention(tiny(family), words(IDS), layers=[1, 0])
    assert found.heads == [Head(layer, head) for layer in (1, 0) for head in range(4)]
    attentions = one_by_one(eager(family), IDS, output_attentions=True).attentions
    for head, pattern in zip(found.heads, found.patterns, strict=True):
        expected = attentions[head.layer][0, head.head].numpy()
        np.testing.assert_allclose(pattern, expected, atol=1e-5)


def test_tokens_are_the_prompt_s():
    found = interp.attention(tiny("llama"), words(IDS))
    assert found.tokens == [f"w{i}" for i in IDS]
    assert found.heads == [Head(0, head) for head in range(4)]
    assert "4 heads, 11 tokens" in repr(found)


@pytest.mark.parametrize(
    "heads", ["L1H2, 0.3", ["L1H2", (0, 3)], [Head(1, 2), "0-3"], [(1, 2), (0, 3)]]
)
def test_heads_are_written_in_any_form(heads):
    found = interp.attention(tiny("llama"), words(IDS), heads=heads)
    assert found.heads == [Head(1, 2), Head(0, 3)]
    whole = interp.attention(tiny("llama"), words(IDS), layers=[0, 1])
    np.testing.assert_allclose(found.patterns, whole.patterns[[6, 3]], atol=1e-6)


def test_numbers_are_heads_of_each_layer():
    found = interp.attention(tiny("llama"), words(IDS), layers=np.int64(1), heads=[0, np.int64(3)])
    assert found.heads == [Head(1, 0), Head(1, 3)]
    assert interp.attention(tiny("llama"), words(IDS), heads=Head(1, 2)).heads == [Head(1, 2)]


def test_the_table_has_a_row_for_each_weight():
    found = interp.attention(tiny("llama"), words(IDS), heads=["L1H2", "L0H3"])
    table = found.table
    assert list(table.columns) == ["layer", "head", "query", "key", "weight"]
    assert len(table) == 2 * 11 * 11
    row = table[(table["layer"] == 0) & (table["query"] == 7) & (table["key"] == 5)]
    assert row["head"].item() == 3 and row["weight"].item() == found.patterns[1, 7, 5]


def test_they_show_what_an_intervention_does():
    model = tiny("llama")
    with model.intervene(interp.Ablate(["L0H3"], how="uniform")):
        found = interp.attention(model, words(IDS), heads=["L0H3"])
    expected = np.tril(np.ones((11, 11))) / np.arange(1, 12)[:, None]
    np.testing.assert_allclose(found.patterns[0], expected, atol=1e-6)


def test_they_can_be_drawn():
    assert interp.attention(tiny("llama"), words(IDS), heads=["L0H3"]).plot() is not None


@pytest.mark.parametrize(
    "options, said",
    [
        ({"layers": [7]}, "layers: 7 .* layers 0-1"),
        ({"layers": [0], "heads": [4]}, "L0H4.*heads 0-3"),
        ({"heads": ["L2H0"]}, "L2H0.*layers 0-1"),
        ({"layers": [0], "heads": ["L0H1"]}, "not together with heads that name their layer"),
        ({"heads": ["first"]}, "head 'first'"),
        ({"heads": []}, "heads: none"),
    ],
)
def test_heads_that_are_not_there_are_named(options, said):
    with pytest.raises(HeadError, match=said):
        interp.attention(tiny("llama"), words(IDS), **options)


def test_one_prompt_at_a_time():
    with pytest.raises(PromptError, match="2 prompts"):
        interp.attention(tiny("llama"), ["w5 w6", "w7"])
