"""Attention sinks against plain transformers: whole patterns of `output_attentions=True`, loops."""

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM

import interp
from interp.analysis.sinks import SinkError, SinkRule, massive_activations, uniform_received
from interp.tasks import filler
from interp.tasks.prompts import PromptError
from tests.model.families import build
from tests.tiny import eager, fresh, one_by_one, random_ids, tiny, words

LENGTHS = (12, 20, 5, 16)
FAMILIES = ["gpt2", "gpt_neox", "llama", "mistral", "qwen3", "gemma2", "gpt_oss"]
STORIES = [
    "Once upon a time there was a little girl named Lily. She liked to play outside in the park.",
    "One day, Tom saw a big dog. The dog was sad.",
    "The sun was warm.",
]


def measure(model, texts, **options):
    return interp.attention_sinks(model, texts, progress=False, **options)


def patterns(model, ids) -> torch.Tensor:
    """`[layer head query key]`, float64, without padding."""
    found = one_by_one(model, ids, output_attentions=True).attentions
    return torch.stack([a[0].double() for a in found])


def received_by_loop(pattern: torch.Tensor, window: int | None = None) -> np.ndarray:
    """a_j for each layer and head: the mean of column j over the rows that may see it."""
    n = pattern.shape[-1]
    out = np.zeros((*pattern.shape[:2], n))
    for j in range(n):
        rows = [i for i in range(j, n) if window is None or i - j < window]
        out[:, :, j] = pattern[:, :, rows, j].mean(-1)
    return out


def windows_of(config) -> list[int | None]:
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if kinds is None:
        return [window] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_tokens_receive_is_the_mean_of_the_pattern_s_columns(family):
    """Four lengths in one batch, so three prompts are padded."""
    texts = random_ids(*LENGTHS)
    sinks = measure(tiny(family), [words(ids) for ids in texts])
    for ids, ours in zip(texts, sinks.received, strict=True):
        pattern = patterns(eager(family), ids)
        layers = windows_of(eager(family).config)
        expected = [received_by_loop(pattern[[i]], w)[0] for i, w in enumerate(layers)]
        np.testing.assert_allclose(ours, np.stack(expected), atol=1e-5)


def test_the_same_on_a_real_model(stories260k):
    model = interp.load(stories260k)
    plain = AutoModelForCausalLM.from_pretrained(stories260k, attn_implementation="eager")
    sinks = measure(model, STORIES)
    for text, ours in zip(STORIES, sinks.received, strict=True):
        ids = model.tokenizer(text).input_ids
        np.testing.assert_allclose(ours, received_by_loop(patterns(plain, ids)), atol=1e-4)
    expected = np.mean([values[:, :, 0] for values in sinks.received], axis=0)
    np.testing.assert_allclose(sinks.heads.matrix, expected, atol=1e-6)


def test_the_batch_size_is_no_matter():
    texts = [words(ids) for ids in random_ids(*LENGTHS)]
    together, alone = (measure(tiny("llama"), texts, batch_size=n) for n in (4, 1))
    pd.testing.assert_frame_equal(together.tokens, alone.tokens, atol=1e-5)
    pd.testing.assert_frame_equal(together.massive, alone.massive, atol=1e-4)
    pd.testing.assert_frame_equal(together.heads.table, alone.heads.table, atol=1e-5)


def test_tables_have_a_row_for_each_prompt_layer_and_token():
    texts = random_ids(7, 4)
    sinks = measure(tiny("llama"), [words(ids) for ids in texts])
    tokens = sinks.tokens
    columns = ["prompt", "layer", "position", "token", "received", "queries"]
    assert list(tokens.columns[:6]) == columns
    assert len(tokens) == 2 * (7 + 4)
    for prompt, ids in enumerate(texts):
        for layer in (0, 1):
            rows = tokens[(tokens["prompt"] == prompt) & (tokens["layer"] == layer)]
            assert rows["position"].tolist() == list(range(len(ids)))
            assert rows["token"].tolist() == [f"w{i}" for i in ids]
            assert rows["queries"].tolist() == list(range(len(ids), 0, -1))
            np.testing.assert_allclose(rows["uniform"], uniform_received(len(ids)))


def test_tokens_are_the_mean_over_heads():
    sinks = measure(tiny("llama"), [words(ids) for ids in random_ids(7, 9, 4)], batch_size=2)
    per_head = sinks.per_head()
    assert list(per_head.columns) == [
        "prompt", "layer", "head", "position", "token", "received", "queries",
    ]  # fmt: skip
    assert len(per_head) == 2 * 4 * (7 + 9 + 4)
    key = ["prompt", "layer", "position"]
    mean = per_head.groupby(key)["received"].mean().reset_index()
    merged = sinks.tokens.merge(mean, on=key, suffixes=("", "_mean"))
    assert len(merged) == len(sinks.tokens)
    np.testing.assert_allclose(merged["received"], merged["received_mean"], atol=1e-6)
    names = sinks.tokens.set_index(key)["token"]
    assert (
        per_head["token"].to_numpy() == names.loc[list(per_head[key].itertuples(index=False))]
    ).all()


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"])
def test_what_is_received_is_what_is_given(family):
    """Each row of a pattern sums to 1, so the n_j a_j of a prompt sum to its number of rows."""
    texts = random_ids(*LENGTHS)
    sinks = measure(tiny(family), [words(ids) for ids in texts])
    queries = sinks.tokens[sinks.tokens["layer"] == 0].groupby("prompt")["queries"]
    for prompt, (ids, values) in enumerate(zip(texts, sinks.received, strict=True)):
        given = (values * queries.get_group(prompt).to_numpy()).sum(-1)
        np.testing.assert_allclose(given, len(ids), atol=1e-4)
        assert (values[:, :, 0] >= 1 / len(ids) - 1e-6).all()  # its own row gives all of it


@pytest.mark.parametrize("n", [1, 2, 7])
def test_uniform_attention_by_a_dense_pattern(n):
    pattern = torch.ones(n, n).tril()
    pattern = pattern / pattern.sum(-1, keepdim=True)
    np.testing.assert_allclose(
        uniform_received(n), received_by_loop(pattern[None, None])[0, 0], atol=1e-6
    )


def test_heads_that_look_evenly_follow_the_null():
    model = tiny("llama")
    with model.intervene(interp.Ablate([(0, 1)], how="uniform")):
        sinks = measure(model, [words(ids) for ids in random_ids(9, 5)])
    for values, n in zip(sinks.received, (9, 5), strict=True):
        np.testing.assert_allclose(values[0, 1], uniform_received(n), atol=1e-6)


def test_the_rate_thresholds_each_prompt_and_then_averages():
    texts = random_ids(*LENGTHS)
    sinks = measure(tiny("llama"), [words(ids) for ids in texts])
    for key, epsilon in ((0, 0.3), (0, 0.2), (3, 0.15)):
        per_prompt = []
        for values in sinks.received:
            heads = [values[layer, head, key] > epsilon for layer in (0, 1) for head in range(4)]
            per_prompt.append(sum(heads) / len(heads))
        assert sinks.sink_rate(key, epsilon) == pytest.approx(sum(per_prompt) / len(per_prompt))
    rate = np.mean([values[:, :, 0] > 0.3 for values in sinks.received], axis=0)
    np.testing.assert_allclose(sinks.heads.table["rate"], rate.reshape(-1))
    assert sinks.sink_rate() == pytest.approx(sinks.heads.table["rate"].mean())


def test_the_rate_falls_as_epsilon_rises():
    sinks = measure(tiny("llama"), [words(ids) for ids in random_ids(*LENGTHS)])
    rates = [sinks.sink_rate(epsilon=e) for e in (0.01, 0.1, 0.2, 0.3, 0.5, 0.9, 1.0)]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == 1 and rates[-1] == 0 and 0 < rates[2] < 1
    with pytest.raises(SinkError, match="key=5: prompt 2"):
        sinks.sink_rate(key=5)


def test_the_last_tokens_are_no_later_sinks():
    """The very last one gives all it has to itself among others, and only it is asked."""
    sinks = measure(tiny("llama"), [words(random_ids(30)[0])], rule=SinkRule(theta=1e-3))
    assert sinks.later()["queries"].min() == 8
    assert 0 not in set(sinks.later()["position"])
    everything = SinkRule(theta=1e-3, min_queries=1)
    loose = measure(tiny("llama"), [words(random_ids(30)[0])], rule=everything)
    assert loose.later()["queries"].min() == 1
    assert SinkRule().least_queries(400) == 20
    # too short for any token to be asked often enough
    short = measure(tiny("llama"), [words(random_ids(6)[0])], rule=SinkRule(theta=1e-3))
    assert not len(short.later()) and not short.heads.table["n_later"].any()


def test_later_sinks_by_a_loop_over_tokens():
    texts = random_ids(30, 18)
    rule = SinkRule(alpha=1.5, min_queries=4)
    sinks = measure(tiny("llama"), [words(ids) for ids in texts], rule=rule)
    expected, count, largest = set(), np.zeros((2, 2, 4)), np.zeros((2, 2, 4))
    for prompt, values in enumerate(sinks.received):
        n = values.shape[2]
        for j in range(1, n - 3):
            for layer in (0, 1):
                if values[layer, :, j].mean() > 1.5 / n:
                    expected.add((prompt, layer, j))
            count[prompt] += values[:, :, j] > 1.5 / n
            largest[prompt] = np.maximum(largest[prompt], values[:, :, j])
    later = sinks.later()
    assert (
        set(later[["prompt", "layer", "position"]].itertuples(index=False, name=None)) == expected
    )
    assert expected and later["received"].is_monotonic_decreasing
    np.testing.assert_allclose(sinks.heads.table["n_later"], count.mean(0).reshape(-1))
    np.testing.assert_allclose(sinks.heads.table["later"], largest.mean(0).reshape(-1), atol=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_value_norms_are_those_of_the_kv_heads(family):
    texts = random_ids(*LENGTHS)
    sinks = measure(tiny(family), [words(ids) for ids in texts])
    first = []
    for prompt, ids in enumerate(texts):
        cache = one_by_one(eager(family), ids, use_cache=True).past_key_values
        norms = np.stack([layer.values[0].norm(dim=-1).numpy() for layer in cache.layers])
        norms = norms / np.median(norms, axis=2, keepdims=True)
        ours = sinks.tokens[sinks.tokens["prompt"] == prompt]["value_norm"]
        np.testing.assert_allclose(ours, norms.mean(1).reshape(-1), rtol=1e-4)
        first.append(norms[:, :, 0].repeat(4 // norms.shape[1], axis=1))
    np.testing.assert_allclose(
        sinks.heads.table["value_norm"], np.mean(first, axis=0).reshape(-1), rtol=1e-4
    )


def test_massive_activations_are_the_largest_of_the_residual_stream():
    texts = random_ids(*LENGTHS)
    sinks = measure(tiny("llama"), [words(ids) for ids in texts])
    for prompt, ids in enumerate(texts):
        states = one_by_one(eager("llama"), ids, output_hidden_states=True).hidden_states
        # after block 0; the last of hidden_states has passed the final norm
        size = states[1][0].abs()
        rows = sinks.massive[(sinks.massive["prompt"] == prompt) & (sinks.massive["layer"] == 0)]
        np.testing.assert_allclose(
            rows["value"].abs(), size.flatten().topk(3).values.numpy(), rtol=1e-4
        )
        for row in rows.itertuples():
            assert float(states[1][0, row.position, row.dim]) == pytest.approx(row.value, rel=1e-4)
            assert row.token == f"w{ids[row.position]}"
            assert row.ratio == pytest.approx(abs(row.value) / float(size.median()), rel=1e-4)
        assert not rows["massive"].any()


def test_a_planted_massive_activation_is_found():
    model = fresh("llama")
    texts = random_ids(9, 6)

    def plant(residual, hook):
        planted = residual.clone()
        planted[1, 3 + 2, 7] = -5e4  # token 2 of the second prompt, which has 3 of padding
        return planted

    with model.hooks(fwd_hooks=[("blocks.0.hook_resid_post", plant)]):
        sinks = measure(model, [words(ids) for ids in texts])
    found = sinks.massive[sinks.massive["massive"]]
    first = found[found["layer"] == 0]
    assert first[["prompt", "position", "dim"]].to_numpy().tolist() == [[1, 2, 7]]
    assert first["value"].item() == -5e4


def test_padding_is_no_activation():
    residual = torch.ones(1, 4, 8)
    residual[0, 0] = 1e6
    real = torch.tensor([[False, True, True, True]])
    found = massive_activations(residual, real)
    assert found["value"].abs().max() == 1 and found["median"].item() == 1
    assert (found["position"] > 0).all()


def test_numbers_that_are_none_name_the_layer():
    model = fresh("llama")
    with torch.no_grad():
        model.original_model.model.layers[1].self_attn.q_proj.weight[0, 0] = torch.nan
    with pytest.raises(SinkError, match="layer 1 is not a number.*float32"):
        measure(model, [words(random_ids(5)[0])])


@pytest.mark.parametrize("text", ["", "   ", "a\0b"])
def test_texts_that_are_none_are_refused(text):
    with pytest.raises(PromptError, match="prompt 1"):
        measure(tiny("llama"), ["w5 w6", text])


def test_texts_may_be_cut():
    ids = random_ids(20)[0]
    cut = measure(tiny("llama"), words(ids), max_tokens=8)
    short = measure(tiny("llama"), words(ids[:8]))
    pd.testing.assert_frame_equal(cut.tokens, short.tokens)
    assert cut.heads.metadata["task"]["parameters"] == {"max_tokens": 8}


def test_bf16_is_near_float32():
    texts = [words(ids) for ids in random_ids(10, 7)]
    exact, rough = measure(tiny("llama"), texts), measure(tiny("llama", torch.bfloat16), texts)
    assert rough.received[0].dtype == np.float32
    assert rough.heads.metadata["dtype"] == "bfloat16"
    plain = build("llama", dtype=torch.bfloat16)
    expected = received_by_loop(patterns(plain, random_ids(10, 7)[0]))
    np.testing.assert_allclose(rough.received[0], expected, atol=0.02)
    np.testing.assert_allclose(rough.received[0], exact.received[0], atol=0.1)


@pytest.mark.parametrize(
    "rule, said",
    [
        ({"epsilon": 1.0}, "epsilon=1.0"),
        ({"theta": 0.0}, "theta=0.0"),
        ({"alpha": -1.0}, "alpha=-1.0"),
    ],
)
def test_rules_without_meaning_are_refused(rule, said):
    with pytest.raises(SinkError, match=said):
        SinkRule(**rule)


def test_it_goes_on_where_it_stopped(tmp_path):
    texts = [words(ids) for ids in random_ids(9, 5, 7)]
    whole = measure(tiny("llama"), texts, batch_size=1)
    measure(tiny("llama"), texts, batch_size=1, out=tmp_path)
    next((tmp_path / "shards").glob("*00001-of*")).unlink()
    again = measure(tiny("llama"), texts, batch_size=1, out=tmp_path)
    pd.testing.assert_frame_equal(again.tokens, whole.tokens)
    pd.testing.assert_frame_equal(again.massive, whole.massive)
    loaded = interp.HeadScores.load(tmp_path / "heads.parquet")
    pd.testing.assert_frame_equal(loaded.table, whole.heads.table)
    # another rule asks the same measurements
    other = measure(tiny("llama"), texts, batch_size=1, out=tmp_path, rule=SinkRule(epsilon=0.1))
    assert other.sink_rate() == whole.sink_rate(epsilon=0.1)


def test_it_says_what_it_found():
    sinks = measure(tiny("llama"), [words(random_ids(9)[0])])
    assert f"sink rate {sinks.sink_rate():.0%}" in repr(sinks) and "1 prompts" in repr(sinks)
    assert sinks.heads.metadata["analysis"] == "attention_sinks"
    assert sinks.heads.metadata["rule"]["epsilon"] == 0.3


@pytest.mark.slow
def test_our_trained_model_has_tokens_that_receive_more_than_their_share(mini_llama):
    if not (mini_llama / "model.safetensors").exists():
        pytest.skip("needs the weights of data/models/mini-llama")
    model = interp.load(mini_llama)
    sinks = measure(model, [filler.text(350, seed=900 + i) for i in range(6)])
    later = sinks.later()
    assert len(later) and (later["received"] > 5 / 400).all()
    assert (later["received"] / later["uniform"]).max() > 5
    for values, (_, rows) in zip(sinks.received, sinks.tokens.groupby("prompt"), strict=True):
        queries = rows[rows["layer"] == 0]["queries"].to_numpy()
        np.testing.assert_allclose((values * queries).sum(-1), len(queries), rtol=1e-3)
