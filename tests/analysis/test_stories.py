"""A natural pair of prompts on weights that nobody trained for us: where "girl" becomes "she"."""

import pytest

import interp
from interp.heads import Head

STORY = "Once upon a time, there was a little {}. One day,"


@pytest.fixture(scope="module")
def model(stories260k):
    return interp.load(stories260k)


@pytest.fixture(scope="module")
def pairs(model):
    clean, corrupted = ([STORY.format(word)] for word in ("girl", "boy"))
    return interp.tasks.pairs(model, clean, corrupted, answers=(" she", " he"))


def test_the_word_is_put_together_and_read_at_the_end(model, pairs):
    assert interp.evaluate(model, pairs, progress=False).accuracy == 1
    found = interp.activation_patching(
        model, pairs, "resid_pre", ("layer", "position"), progress=False
    )
    effect = found.table.pivot(index="layer", columns="position", values="effect")
    tokens = [model.tokenizer.decode([token]) for token in pairs[0]["clean_input_ids"]]
    assert tokens[10:13] == ["g", "ir", "l"]
    assert (effect[list(range(10))] == 0).all(axis=None)  # before the word both are the same
    assert (effect.loc[:1, [11, 12]] > 0.4).all(axis=None)  # spread over its pieces at first,
    assert (effect.loc[2:, 12] > 0.9).all() and (effect.loc[2:, 11] < 0.1).all()  # then at its end
    assert (effect[16] < 0.1).all()  # and nowhere else until the last layer reads it:
    heads = interp.activation_patching(model, pairs, "z", progress=False).table
    best = heads.loc[heads["effect"].idxmax()]
    assert Head(int(best["layer"]), int(best["head"])) == Head(4, 2) and best["effect"] > 0.6


def test_the_map_names_the_tokens(model, pairs):
    found = interp.activation_patching(
        model, pairs, "resid_pre", ("layer", "position"), progress=False
    )
    tokens = [model.tokenizer.decode([token]) for token in pairs[0]["clean_input_ids"]]
    figure = found.plot(tokens=tokens)
    assert [label for label in figure.layout.xaxis.ticktext if "girl" in label or label == "ir"]


def test_previous_token_heads_by_behaviour(model):
    roles = interp.head_roles(model, n_repeats=8, progress=False)
    assert Head(3, 6) in roles.of("previous token")
    assert not roles.of("induction")  # it has none, as far as repeats of random tokens show
