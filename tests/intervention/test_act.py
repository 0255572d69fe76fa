"""ACT against its definition on whole patterns: prompts, padding, every way of decoding."""

from dataclasses import replace
from inspect import signature

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import interp
from interp.analysis.sinks import uniform_received
from interp.intervention.act import ACT, middle_heads
from interp.intervention.base import InterventionError
from interp.intervention.later_sinks import LaterRule, as_much_from_others
from tests.intervention.naive_act import Naive, naive_logits, naive_model
from tests.model.families import DECODERS
from tests.tiny import fresh, random_ids, tiny, unchecked, words

LISTS = random_ids(20, 9, 26, seed=3)
HEADS = {0: [1, 2], 1: [0, 3]}
CLOSE = {"atol": 1e-5, "rtol": 1e-4}
MODES = ["prefill", "frozen", "running"]


def act_of(**settings) -> ACT:
    heads = [(layer, head) for layer, found in HEADS.items() for head in found]
    return ACT(heads, **({"alpha": 1.5} | settings))


def naive_of(lists=LISTS, **settings) -> Naive:
    return Naive(HEADS, [len(tokens) for tokens in lists], **({"alpha": 1.5} | settings))


def logits(model, lists=LISTS, lengths=None) -> list[torch.Tensor]:
    """Each prompt's logits, left-padded; `lengths` tells how many tokens are the prompt's."""
    batch = model.batch(lists)
    with torch.no_grad(), model.spans(None, lengths):
        out = model(batch.input_ids, attention_mask=batch.attention_mask)
    return [out[row, first:] for row, first in enumerate(batch.first.tolist())]


def differs(one, other) -> bool:
    return any((a - b).abs().max() > 1e-3 for a, b in zip(one, other, strict=True))


# Prompts


@pytest.mark.parametrize("family", DECODERS)
def test_it_is_its_definition_in_every_family(family):
    model, naive = tiny(family), naive_of()
    expected = naive_logits(family, naive, LISTS)
    assert max(naive.sizes) > 3
    assert differs(expected, logits(model))
    with model.intervene(act_of()):
        for ours, theirs in zip(logits(model), expected, strict=True):
            assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
@settings(max_examples=12)
@given(
    alpha=st.floats(0.2, 6), theta=st.none() | st.floats(0.02, 0.5), factor=st.floats(0, 1),
    min_queries=st.integers(1, 8), spare=st.sampled_from(["first_over_threshold", "bos"]),
    lengths=st.lists(st.integers(1, 14), min_size=1, max_size=3), seed=st.integers(0, 99),
)  # fmt: skip
def test_it_is_its_definition_for_any_parameters(family, lengths, seed, **settings):
    model, lists = tiny(family), random_ids(*lengths, seed=seed)
    expected = naive_logits(family, naive_of(lists, **settings), lists)
    with model.intervene(act_of(**settings)):
        for ours, theirs in zip(logits(model, lists), expected, strict=True):
            assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("family", ["gptj", "bloom"])
def test_models_that_make_their_own_patterns(family):
    model, naive = tiny(family), naive_of()
    visible = torch.zeros(3, 26, 26, dtype=torch.bool)
    for row, tokens in enumerate(LISTS):
        visible[row, :, 26 - len(tokens) :] = True
    hooks = []
    for layer in HEADS:

        def edit(pattern, hook, layer=layer):
            return naive.edited(pattern, visible.tril(), layer)

        hooks.append((f"blocks.{layer}.attn.hook_pattern", edit))
    with model.hooks(fwd_hooks=hooks):
        expected = logits(model)
    with model.intervene(act_of()):
        for ours, theirs in zip(logits(model), expected, strict=True):
            assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"])
def test_the_pattern_that_it_shows_is_the_one_it_uses(family):
    model = tiny(family)
    hooks = [(f"blocks.{layer}.attn.hook_pattern", lambda p, hook: p.clone()) for layer in HEADS]
    with model.intervene(act_of()):
        short = logits(model)
        with model.hooks(fwd_hooks=hooks):
            assert differs(logits(model), logits(tiny(family))) is False
            for ours, theirs in zip(short, logits(model), strict=True):
                assert_close(ours, theirs, **CLOSE)


def test_right_padding_is_no_token():
    model = tiny("llama")
    width = max(map(len, LISTS))
    ids = torch.tensor([[*tokens, *[0] * (width - len(tokens))] for tokens in LISTS])
    mask = torch.tensor([[1] * len(t) + [0] * (width - len(t)) for t in LISTS])
    with torch.no_grad(), model.intervene(act_of()):
        out = model(ids, attention_mask=mask)
        for row, expected in enumerate(logits(model)):
            assert_close(out[row, : len(expected)], expected, **CLOSE)


def test_later_tokens_change_what_earlier_ones_give():
    """What `causal = False` says."""
    model = tiny("llama")
    with model.intervene(act_of()):
        short, long = logits(model, [LISTS[0]])[0], logits(model, [LISTS[0] + LISTS[1]])[0]
    assert (short - long[: len(short)]).abs().max() > 1e-3
    assert act_of().causal is False


# Answers and generation


def answered() -> tuple[list[list[int]], list[list[int]]]:
    """Prompts, and prompts with answers of several lengths behind them."""
    answers = random_ids(3, 5, 1, seed=6)
    return LISTS, [prompt + answer for prompt, answer in zip(LISTS, answers, strict=True)]


@pytest.mark.parametrize("decode", MODES)
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "mistral", "gpt_oss"])
def test_answers_that_are_read_are_edited_as_if_they_were_written(decode, family):
    model, (prompts, whole) = tiny(family), answered()
    expected = naive_logits(family, naive_of(prompts, decode=decode), whole)
    with model.intervene(act_of(decode=decode)):
        found = logits(model, whole, [len(prompt) for prompt in prompts])
        untold = logits(model, whole)
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs, **CLOSE)
    assert differs(untold, expected)


def test_the_modes_differ():
    prompts, whole = answered()
    found = {}
    for decode in MODES:
        with tiny("llama").intervene(act_of(decode=decode)):
            found[decode] = logits(tiny("llama"), whole, [len(prompt) for prompt in prompts])
    for one, other in (("prefill", "frozen"), ("frozen", "running"), ("prefill", "running")):
        assert differs(found[one], found[other])


def written(model, lists, n_new=6, **options):
    """Hugging Face's generation: all logits, and the tokens."""
    batch = model.batch(lists)
    out = model.original_model.generate(
        batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=n_new,
        min_new_tokens=n_new, do_sample=False, return_dict_in_generate=True, output_logits=True,
        **options,
    )  # fmt: skip
    return torch.stack(out.logits, dim=1), out.sequences[:, batch.input_ids.shape[1] :]


@pytest.mark.parametrize("decode", MODES)
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "mistral", "gemma3", "gpt_neox"])
def test_cached_decoding_is_its_definition(decode, family):
    model = tiny(family)
    with model.intervene(act_of(decode=decode)):
        found, tokens = written(model, LISTS)
    whole = [[*prompt, *new] for prompt, new in zip(LISTS, tokens[:, :-1].tolist(), strict=True)]
    expected = naive_logits(family, naive_of(decode=decode), whole)
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs[-ours.shape[0] :], **CLOSE)


@pytest.mark.parametrize("columns", ["sinks", "random"])
def test_heads_without_sinks_are_left_alone_while_writing(columns):
    """The first head of a layer has none, the second has: a token at a time is as all at once."""
    model, prompt, answer = tiny("llama"), LISTS[0], [7, 9, 5]
    edit = act_of(theta=0.15, decode="frozen", factor=0.1)
    sinks = edit.sinks(model, [words(prompt)])
    assert set(zip(sinks["layer"], sinks["head"])) == {(1, HEADS[1][1])}
    with torch.no_grad(), model.intervene(replace(edit, columns=columns)):
        at_once = logits(model, [prompt + answer], [len(prompt)])[0][-3:]
        cache = go_on(model, torch.tensor([prompt]), None).past_key_values
        for token, expected in zip(answer, at_once, strict=True):
            out = go_on(model, torch.tensor([[token]]), cache)
            assert_close(out.logits[0, -1], expected, **CLOSE)
            cache = out.past_key_values
    assert differs([at_once], [logits(model, [prompt + answer])[0][-3:]])


def test_a_static_cache_is_a_cache():
    model = tiny("llama")
    for decode in MODES:
        with model.intervene(act_of(decode=decode)):
            dynamic, _ = written(model, LISTS[:1])
            static, _ = written(
                model, LISTS[:1], cache_implementation="static", disable_compile=True
            )
        assert_close(static, dynamic, **CLOSE)


@pytest.mark.parametrize("decode", MODES)
def test_transformer_lens_writes_the_same_with_and_without_the_cache(decode):
    model, found = tiny("llama"), []
    with model.intervene(act_of(decode=decode)):
        for cache in (True, False):
            out = model.generate(
                torch.tensor([LISTS[0]]), max_new_tokens=6, do_sample=False, verbose=False,
                use_past_kv_cache=cache, stop_at_eos=False, return_type="tokens",
            )  # fmt: skip
            found.append(out[0, len(LISTS[0]) :].tolist())
        expected = written(model, LISTS[:1])[1][0].tolist()
    assert found[0] == found[1] == expected


@pytest.mark.parametrize("decode", MODES)
def test_beams_are_followed(decode):
    model, lists = tiny("llama"), random_ids(9, 5, seed=4)
    options = {
        "num_beams": 3, "max_new_tokens": 7, "min_new_tokens": 7, "do_sample": False,
        "return_dict_in_generate": True, "output_scores": True, "num_return_sequences": 3,
    }  # fmt: skip
    batch = model.batch(lists)
    given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    with model.intervene(act_of(decode=decode)):
        ours = model.original_model.generate(**given, **options)
    reference = naive_model("llama", naive_of(lists, decode=decode))
    theirs = reference.generate(**given, **options, use_cache=False)
    assert (ours.beam_indices[:, 1:7] != ours.beam_indices[:, :6]).any()
    assert torch.equal(ours.sequences, theirs.sequences)
    assert_close(ours.sequences_scores, theirs.sequences_scores, **CLOSE)


def test_each_prompt_begins_anew():
    model = tiny("llama")
    for decode in MODES:
        alone = []
        for tokens in LISTS[:2]:
            with model.intervene(act_of(decode=decode)):
                alone.append(written(model, [tokens])[0])
        with model.intervene(act_of(decode=decode)):
            for tokens, expected in zip(LISTS[:2], alone, strict=True):
                assert torch.equal(written(model, [tokens])[0], expected)


def go_on(model, ids, cache):
    """transformers 5.24 renamed the argument."""
    known = "cache" if "cache" in signature(model.original_model.forward).parameters else None
    return model.original_model(ids, **{known or "past_key_values": cache}, use_cache=True)


def in_chunks(model, ids, ends):
    cache, parts, start = None, [], 0
    for end in ends:
        out = go_on(model, ids[:, start:end], cache)
        cache, start = out.past_key_values, end
        parts.append(out.logits)
    return torch.cat(parts, dim=1)


def test_a_prompt_in_chunks():
    """Found in all rows so far when running, and refused where all of the prompt is needed."""
    model, ids = tiny("llama"), torch.tensor([LISTS[2]])
    ends = (10, 17, 26)
    expected = naive_logits("llama", naive_of(LISTS[2:], chunks=ends), LISTS[2:])[0]
    with torch.no_grad(), model.intervene(act_of(decode="running")):
        assert_close(in_chunks(model, ids, ends)[0], expected, **CLOSE)
    with (
        torch.no_grad(),
        model.intervene(act_of()),
        pytest.raises(InterventionError, match=r"comes in chunks.*decode='running'"),
    ):
        in_chunks(model, ids, ends)


@pytest.mark.parametrize("decode", ["frozen", "running"])
def test_a_cache_from_outside_the_block_is_refused(decode):
    model, ids = tiny("llama"), torch.tensor([LISTS[0]])
    with torch.no_grad():
        cache = model.original_model(ids, use_cache=True).past_key_values
    with (
        torch.no_grad(),
        pytest.raises(InterventionError, match="no prompt was read in this block"),
        model.intervene(act_of(decode=decode)),
    ):
        go_on(model, ids[:, :1], cache)


@pytest.mark.parametrize("decode", ["frozen", "running"])
def test_other_rows_than_those_of_the_prompt_are_refused(decode):
    model, ids = tiny("llama"), torch.tensor([LISTS[0]] * 2)
    with (
        torch.no_grad(),
        pytest.raises(InterventionError, match="3 rows goes on.*2 rows were read"),
        model.intervene(act_of(decode=decode)),
    ):
        cache = go_on(model, ids, None).past_key_values
        cache.batch_select_indices(torch.tensor([0, 1, 0]))
        go_on(model, ids[[0, 1, 0], :1], cache)


# Degenerate and plain cases


def test_nothing_to_do_is_nothing_done():
    model = tiny("llama")
    before = logits(model)
    for edit in (act_of(factor=1), act_of(theta=0.999), ACT(()), act_of(min_queries=99)):
        with model.intervene(edit):
            after = logits(model)
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def rule(received, **settings) -> list[int]:
    """S of one prompt under causal attention, from the means."""
    n = len(received)
    queries = torch.arange(n, 0, -1)
    sums = torch.tensor(received) * queries
    found = LaterRule(**settings)
    over = found.over(sums[None, None, None], queries[None, None], torch.tensor([[n]]))
    return found.without_spared(over, torch.arange(n)[None])[0, 0, 0].nonzero().flatten().tolist()


def test_uniform_attention_is_over_the_threshold_early_in_long_prompts():
    """M_j = (H_T - H_j) / (T - j), so that T * M_0 = H_T, which is above 5 from T = 83 on."""
    for n, expected in ((64, 0), (82, 0), (83, 1), (300, 2)):
        received = uniform_received(n).tolist()
        found = rule(received, spare="bos")
        assert len(found) == max(0, expected - 1)
        assert (n * received[0] > 5) == (expected > 0)


def test_the_last_columns_pass_by_chance_unless_queries_are_asked_for():
    """A head that looks at the previous token: M_j = 1 / (T - j)."""
    n = 50
    received = [1 / (n - j) for j in range(n)]
    assert rule(received) == list(range(41, 50))  # over 5/50 from 9 queries down, but the first
    assert rule(received, min_queries=8) == [42 - 1, 42]
    assert rule(received, theta=0.3) == [48, 49]


def test_which_one_is_spared():
    received = [0.05, 0.3, 0.0, 0.4, 0.2, 0.0]
    assert rule(received, theta=0.1) == [3, 4]
    assert rule(received, theta=0.1, spare="bos") == [1, 3, 4]
    assert rule([0.5, *received[1:]], theta=0.1) == [1, 3, 4]


@given(seed=st.integers(0, 999), factor=st.floats(0, 1), n_sinks=st.integers(0, 3))
def test_the_control_takes_as_much_from_others(seed, factor, n_sinks):
    generator = torch.Generator().manual_seed(seed)
    received = torch.rand(2, 3, 9, generator=generator, dtype=torch.float64)
    order = torch.rand(2, 3, 9, generator=generator)
    sinks = torch.zeros(2, 3, 9, dtype=torch.bool)
    sinks[..., 2 : 2 + n_sinks] = True
    others = ~sinks
    others[..., 0] = False
    keys, share = as_much_from_others(received, sinks, others, order, factor)
    assert not (keys & ~others).any()
    taken = ((1 - share[..., 0]) * (received * keys).sum(-1)).float()
    wanted = ((1 - factor) * (received * sinks).sum(-1)).float()
    most = (received * others).sum(-1).float()
    assert_close(taken, torch.minimum(wanted, most), atol=1e-5, rtol=1e-5)
    assert ((share >= 0) & (share <= 1)).all()
    # no more columns than are needed: without the last one drawn they would hold less
    last = torch.where(keys, order, -1).argmax(-1, keepdim=True)
    held = (received * keys).sum(-1) - received.gather(-1, last).squeeze(-1)
    assert ((held < (received * sinks).sum(-1)) | ~keys.any(-1)).all()


def test_random_columns_take_the_same_mass_in_a_model_whatever_the_batch():
    model, heads = tiny("llama"), [1, 2]
    edits = {
        name: ACT([(0, head) for head in heads], alpha=2, factor=0.7, columns=name)
        for name in ("sinks", "random")
    }
    batch, found = model.batch(LISTS), {}
    for name, edit in {"none": [], **edits}.items():
        with model.intervene(edit):
            found[name] = model.read_attention(
                batch.input_ids, attended, layers=[0], attention_mask=batch.attention_mask
            )[:, 0, heads]
    lost = {name: (found["none"] - found[name]).clamp_min(0) for name in edits}
    columns = {name: (lost[name] > 1e-6).any(2) for name in edits}
    assert (columns["sinks"].sum(-1) > 0).all()
    assert not (columns["random"] & columns["sinks"]).any()
    real = batch.attention_mask[:, None, :, None].bool()
    totals = {name: (lost[name] * real).sum((2, 3)) for name in edits}
    assert_close(totals["random"], totals["sinks"], atol=1e-4, rtol=1e-4)
    with model.intervene(edits["random"]):
        together, alone = logits(model), [logits(model, [tokens])[0] for tokens in LISTS]
    for ours, theirs in zip(together, alone, strict=True):
        assert_close(ours, theirs, **CLOSE)
    with model.intervene(replace(edits["random"], seed=1)):
        assert differs(logits(model), together)


def attended(attention):
    return attention.pattern()


def test_bf16_is_near_float32():
    batch, found = tiny("llama").batch(LISTS), []
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny("llama", dtype)
        with torch.no_grad(), model.intervene(act_of(theta=0.12)):
            found.append(model(batch.input_ids, attention_mask=batch.attention_mask)[:, -1].float())
    plain = tiny("llama")(batch.input_ids, attention_mask=batch.attention_mask)[:, -1]
    assert (found[1] - found[0]).abs().mean() < 0.3 * (plain - found[0]).abs().mean()


def test_it_comes_between_other_edits_in_their_order():
    model = tiny("llama")
    boost = interp.SteerAttention(["L0H1", "L1H0"], "2:4", "boost", "all", "both", 2)
    even = interp.Ablate(["L0H1"], "uniform")
    found = {}
    for name, edits in {
        "boost, act": [boost, act_of()], "act": [act_of()], "act, even": [act_of(), even],
        "even, act": [even, act_of()],
    }.items():  # fmt: skip
        with model.intervene(*edits):
            found[name] = logits(model)
            hooks = [("blocks.0.attn.hook_pattern", lambda p, hook: p.clone())]
            with model.hooks(fwd_hooks=hooks):
                for ours, theirs in zip(found[name], logits(model), strict=True):
                    assert_close(ours, theirs, **CLOSE)
    assert differs(found["boost, act"], found["act"])
    assert differs(found["act, even"], found["even, act"])


# What it says of itself


def test_it_shows_the_sinks_of_a_prompt():
    model = tiny("llama")
    edit = act_of(min_queries=2)
    table = edit.sinks(model, [words(tokens) for tokens in LISTS])
    assert list(table) == [
        "prompt", "layer", "head", "position", "token", "received", "queries", "at_end", "mass",
        "left_alone",
    ]  # fmt: skip
    batch = model.batch(LISTS)
    with model.intervene(edit):  # the second layer reads what the edited first one has written
        below = logits(model)
    assert differs(below, logits(model))
    first = model.read_attention(
        batch.input_ids, attended, layers=[0], attention_mask=batch.attention_mask
    )
    with model.intervene(ACT([(0, head) for head in HEADS[0]], alpha=1.5, min_queries=2)):
        second = model.read_attention(
            batch.input_ids, attended, layers=[1], attention_mask=batch.attention_mask
        )
    for layer, patterns in ((0, first), (1, second)):
        for prompt, tokens in enumerate(LISTS):
            n = len(tokens)
            for head in HEADS[layer]:
                weights = patterns[prompt, 0, head, -n:, -n:]
                queries = torch.arange(n, 0, -1)
                means = weights.sum(0) / queries
                over = ((means > 1.5 / n) & (queries >= 2)).nonzero().flatten().tolist()[1:]
                place = {"layer": layer, "prompt": prompt, "head": head}
                rows = table[(table[list(place)] == pd.Series(place)).all(axis=1)]
                assert rows["position"].tolist() == over
                assert rows["token"].tolist() == [f"w{tokens[at]}" for at in over]
                assert rows["received"].tolist() == pytest.approx(means[over].tolist(), abs=1e-5)
                assert rows["queries"].tolist() == [n - at for at in over]
                assert rows["at_end"].tolist() == [n - at <= 8 for at in over]
                mass = float(weights[:, over].sum(1).mean())
                assert rows["mass"].tolist() == pytest.approx([mass] * len(rows), abs=1e-5)
    empty = act_of(theta=0.9999).sinks(model, [words(LISTS[0])])
    assert isinstance(empty, pd.DataFrame) and empty.empty and list(empty) == list(table)


def test_rows_with_nothing_else_stay_as_they_are_and_are_counted():
    """From token 3 on every row of the head has all of its weight there."""
    model, lists = tiny("llama"), LISTS[:1]
    full = interp.SteerAttention(["L0H1"], "3:4", "boost", "all", "both", 60)
    edit = ACT(["L0H1"], factor=0.0, spare="bos")
    with model.intervene(full):
        before, table = logits(model, lists), edit.sinks(model, [words(lists[0])])
        with model.intervene(edit):
            after = logits(model, lists)
    assert table["position"].tolist() == [3]
    assert table["left_alone"].tolist() == [len(lists[0]) - 3]
    assert_close(after[0], before[0], **CLOSE)


def test_it_says_in_words_what_it_does():
    assert repr(act_of()) == (
        "ACT(4 heads: L0H1, L0H2, L1H0, L1H3; later sinks (over 1.5/T; not the first such) keep "
        "0.4 of their weight, at all tokens, found in the prompt)"
    )
    others = [
        act_of(decode="prefill"), act_of(decode="running"), act_of(theta=0.1), act_of(spare="bos"),
        act_of(min_queries=8), act_of(columns="random"), act_of(columns="random", seed=1),
        act_of(factor=0), ACT(()),
    ]  # fmt: skip
    assert len({repr(edit) for edit in [act_of(), *others]}) == 10
    assert "prompt's tokens only" in repr(act_of(decode="prefill"))


def test_saving_keeps_its_choices_and_what_was_found(tmp_path):
    effects = {"L0H1": {"score": 0.1, "low": -0.05}, "L1H0": {"score": 0.0, "low": 0.0}}
    edit = act_of(decode="running", theta=0.15, min_queries=8, effects=effects)
    loaded = interp.load_intervention(edit.save_pretrained(tmp_path))
    assert loaded == edit and loaded.decode == "running" and loaded.effects == effects
    assert edit != act_of(decode="running", theta=0.15, min_queries=8)
    assert "running" not in repr(act_of()) and repr(loaded) == repr(edit)


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"factor": 1.5}, "factor=1.5: the share that is kept, from 0 to 1"),
        ({"factor": float("nan")}, "factor=nan"),
        ({"alpha": 0.0}, "alpha=0.0: above 0"),
        ({"theta": 0.0}, "theta=0.0: a share"),
        ({"theta": 1.0}, "theta=1.0: a share"),
        ({"min_queries": 0}, "min_queries=0: a whole number from 1"),
        ({"spare": "first"}, "spare='first': one of first_over_threshold, bos"),
        ({"decode": "cached"}, "decode='cached': one of prefill, frozen, running"),
        ({"columns": "all"}, "columns='all': one of sinks, random"),
        ({"columns": "random", "decode": "running"}, "with decode='prefill' or 'frozen'"),
    ],
)
def test_parameters_that_mean_nothing(wrong, said):
    with unchecked(), pytest.raises(InterventionError, match=said):
        act_of(**wrong)


def test_the_candidates_are_those_of_the_authors():
    assert len(middle_heads(tiny("llama"))) == 8  # two layers: there would be none
    model = fresh("llama")
    model.blocks.extend([model.blocks[0]] * 3)
    assert {head.layer for head in middle_heads(model)} == {2, 3}
