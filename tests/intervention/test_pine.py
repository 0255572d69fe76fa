"""PINE against the same attention written key by key, and its promise: order does not matter."""

from dataclasses import replace
from itertools import permutations

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from transformers import DynamicCache

import interp
from interp.intervention.base import InterventionError
from interp.intervention.pine import PINE, importance, places, shifts
from interp.intervention.segments import Layout
from interp.model import attention as attention_module
from interp.model.call import Call, Prompts
from interp.zoo import SMOLLM2
from tests.intervention.roped import FAMILIES, logits_by_hand, roped, row_by_hand
from tests.tiny import random_ids, tiny, unchecked, words

TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}
PREFIX, SEGMENTS, SUFFIX = random_ids(2, 1, seed=1)[0], random_ids(3, 2, 4, seed=2), [7, 31, 12]


def prompt(segments=SEGMENTS, prefix=PREFIX, suffix=SUFFIX) -> tuple[list[int], dict]:
    """Token ids and spans; names follow the places in the text."""
    ids, spans = list(prefix), {}
    for number, segment in enumerate(segments, 1):
        spans[f"segment_{number}"] = [len(ids), len(ids) + len(segment)]
        ids += segment
    return ids + list(suffix), spans


def batch_of(model, prompts):
    batch = model.batch([ids for ids, _ in prompts])
    return batch.input_ids, batch.attention_mask, [spans for _, spans in prompts]


@torch.no_grad()
def logits(model, prompts, *edits, **kwargs) -> list[torch.Tensor]:
    """Each prompt's own rows, from one left-padded batch."""
    ids, mask, spans = batch_of(model, prompts)
    with model.intervene(*edits), model.spans(spans):
        out = model(ids, attention_mask=mask, **kwargs)
    return [out[row, -len(tokens) :] for row, (tokens, _) in enumerate(prompts)]


# The definition


def importance_by_hand(q, k, h, rows, segments, scale, cap) -> list[float]:
    """How much rows of head h look at each segment without positions; each row within `segments`.

    Mean over a segment's keys, sum over rows.
    """
    kv = h // (q.shape[1] // k.shape[1])
    total = [0.0] * len(segments)
    for i in rows:
        logits = [[scale * (q[i, h] @ k[j, kv]) for j in range(*s)] for s in segments]
        if cap is not None:
            logits = [[torch.tanh(x / cap) * cap for x in s] for s in logits]
        mass = sum(x.exp() for s in logits for x in s)
        for b, s in enumerate(logits):
            total[b] += float(sum(x.exp() for x in s) / mass / len(s))
    return total


def where_keys_stand(ranges, importance, end, first=None) -> dict[int, int]:
    """Token -> position, with the most important segment last, or `first` of all of them last."""
    ranking = sorted(range(len(ranges)), key=lambda b: (b != first, -importance[b]))
    places, stop = {}, end
    for b in ranking:
        start, end_b = ranges[b]
        for j in range(start, end_b):
            places[j] = stop - (end_b - j)
        stop -= end_b - start
    return places


def pine_by_hand(q, k, v, ranges, scale, cap, family):
    """z of one prompt, from q, k, v before rotation: `[token head d]`."""
    n, heads = q.shape[:2]
    group = heads // k.shape[1]
    begin, end = ranges[0][0], ranges[-1][1]
    of = {j: b for b, r in enumerate(ranges) for j in range(*r)}
    z = torch.zeros(n, heads, v.shape[-1])
    for h in range(heads):
        for i in range(n):
            own = of.get(i)
            places = {j: j for j in range(n)}
            if own is not None:
                others = [b for b in range(len(ranges)) if b != own]
                found = importance_by_hand(
                    q, k, h, range(*ranges[own]), [ranges[b] for b in others], scale, cap
                )
                importance = [0.0] * len(ranges)
                for b, value in zip(others, found):
                    importance[b] = value
                places |= where_keys_stand(ranges, importance, end, own)
            elif i >= end:
                importance = importance_by_hand(q, k, h, [i], ranges, scale, cap)
                places |= where_keys_stand(ranges, importance, end)
            seen = [j for j in range(n) if j <= i]
            if own is not None:
                seen += [j for j in of if of[j] != own and j > i]
                assert sorted(places[j] for j in of) == list(range(begin, end))
            at = [places[j] for j in seen]
            keys, values = k[seen, h // group], v[seen, h // group]
            z[i, h] = row_by_hand(q[i, h], keys, at, places[i], scale, cap, family) @ values
    return z


def expected(model, family, prompts, edit=pine_by_hand) -> list[torch.Tensor]:
    """Logits with every layer's z computed by hand."""

    def z_of(row, q, k, v, scale, cap):
        return edit(q, k, v, [tuple(r) for r in prompts[row][1].values()], scale, cap, family)

    return logits_by_hand(model, family, [ids for ids, _ in prompts], z_of)


PROMPTS = [
    prompt(),
    prompt(random_ids(2, 3, seed=3), prefix=[5], suffix=[9, 8]),
    prompt(random_ids(1, 2, 1, 2, seed=4), prefix=[]),
]


@pytest.mark.parametrize("one_row_a_block", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_attention_by_hand(family, one_row_a_block, monkeypatch):
    """A batch padded on the left, with two to four segments; one row a block, or all at once."""
    if one_row_a_block:
        monkeypatch.setattr(attention_module, "BLOCK_ELEMENTS", 1)
    model = roped(family)
    by_hand = expected(model, family, PROMPTS)
    plain = logits(model, PROMPTS)
    for ours, theirs, without in zip(logits(model, PROMPTS, PINE()), by_hand, plain):
        assert_close(ours, theirs, **TOLERANCE)
        assert (ours - without).abs().max() > 1e-2


def mask_only_by_hand(q, k, v, ranges, scale, cap, family):
    """Segments see each other, and everything stays at its place."""
    n, heads = q.shape[:2]
    group = heads // k.shape[1]
    of = {j: b for b, r in enumerate(ranges) for j in range(*r)}
    z = torch.zeros(n, heads, v.shape[-1])
    for h in range(heads):
        for i in range(n):
            seen = [j for j in range(n) if j <= i or (i in of and of.get(j, of[i]) != of[i])]
            keys, values = k[seen, h // group], v[seen, h // group]
            z[i, h] = row_by_hand(q[i, h], keys, seen, i, scale, cap, family) @ values
    return z


def test_without_new_positions_only_what_is_seen_has_changed():
    model = roped("llama")
    by_hand = expected(model, "llama", PROMPTS, mask_only_by_hand)
    for ours, theirs in zip(logits(model, PROMPTS, PINE(order="input")), by_hand):
        assert_close(ours, theirs, **TOLERANCE)


# What it promises


def orders(segments=SEGMENTS):
    return [prompt([segments[i] for i in order]) for order in permutations(range(len(segments)))]


def spread_over_orders(model, *edits) -> float:
    """The largest difference of a next token's probability between two orders."""
    after = torch.stack([x[-1] for x in logits(model, orders(), *edits)]).softmax(-1)
    return float((after - after[0]).abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_order_makes_no_difference(family):
    model = roped(family)
    assert spread_over_orders(model) > 1e-2
    assert spread_over_orders(model, PINE()) < 1e-5
    assert spread_over_orders(model, PINE(order="reversed")) < 1e-5


@pytest.mark.slow
def test_order_makes_no_difference_to_a_trained_model():
    if not SMOLLM2.installed:
        pytest.skip("needs `interp models get smollm2-135m`")
    model = interp.load("smollm2-135m")
    data = interp.tasks.documents(model, n=2, lines=5)
    plain = interp.position_bias(model, data, places=[0, 2, 4], progress=False)
    with model.intervene(PINE()):
        found = interp.position_bias(model, data, places=[0, 2, 4], progress=False)
    apart = [
        x.values("probability").max(1) - x.values("probability").min(1) for x in (plain, found)
    ]
    assert apart[0].min() > 1e-2 and apart[1].max() < 1e-4


@pytest.mark.parametrize(
    "half", [PINE(order="input"), PINE(when="prompt", heads=["L0H0", "L1H2"])], ids=repr
)
def test_half_of_it_is_not_enough(half):
    assert spread_over_orders(roped("llama"), half) > 1e-3


def test_what_stands_in_segments_moves_with_them():
    model = roped("qwen3")
    one, other = prompt(), prompt(SEGMENTS[::-1])
    before, after = logits(model, [one, other], PINE())
    for number in (1, 2, 3):
        start, end = one[1][f"segment_{number}"]
        first, last = other[1][f"segment_{4 - number}"]
        assert_close(before[start:end], after[first:last], atol=1e-4, rtol=1e-4)
    assert_close(before[:2], after[:2], **TOLERANCE)  # the prefix sees none of them
    assert_close(before[-3:], after[-3:], atol=1e-4, rtol=1e-4)


def test_two_segments_with_the_same_tokens():
    model = roped("llama")
    same = [SEGMENTS[0], SEGMENTS[2], SEGMENTS[0]]
    found = logits(model, [prompt([same[i] for i in o]) for o in permutations(range(3))], PINE())
    for other in found[1:]:
        assert_close(other[-1], found[0][-1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_segment_is_the_plain_model(family):
    model = roped(family)
    prompts = [prompt([SEGMENTS[2]]), prompt([SEGMENTS[0]], prefix=[])]
    for ours, plain in zip(logits(model, prompts, PINE()), logits(model, prompts)):
        assert_close(ours, plain, **TOLERANCE)


def test_later_tokens_of_the_suffix_change_nothing_before_them():
    model = roped("llama")
    one, other = logits(model, [prompt(), prompt(suffix=[7, 31, 40])], PINE())
    assert_close(one[:-1], other[:-1], **TOLERANCE)
    assert (one[-1] - other[-1]).abs().max() > 1e-2


# Positions


def layout_of(attention, ranges) -> Layout:
    spans = [{f"segment_{n}": list(r) for n, r in enumerate(row)} for row in ranges]
    call = Call(None, attention.real_keys, attention.n_queries, attention.n_keys, Prompts(spans))
    return Layout.of(("segment_*",), call, attention)


def attention_of(model, prompts):
    kept = []
    ids, mask, _ = batch_of(model, prompts)
    hooks = [("blocks.1.attn.hook_attention", lambda a, hook: kept.append(a))]
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        model(ids, attention_mask=mask)
    return kept[0]


@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    before=st.integers(0, 3),
    seed=st.integers(0, 99),
)
@settings(max_examples=25)
def test_every_query_finds_its_keys_side_by_side(sizes, before, seed):
    """Prefix, segments and suffix fill the places from 0 to the query's own, each once."""
    model = roped("llama")
    one = prompt(random_ids(*sizes, seed=seed), prefix=[9] * before)
    two = prompt(random_ids(2, 3, seed=seed))
    attention = attention_of(model, [one, two])
    layout = layout_of(attention, [p[1].values() for p in (one, two)])
    at, base = places(attention, layout)
    for row, (ids, spans) in enumerate((one, two)):
        first = attention.n_keys - len(ids)
        ranges = list(spans.values())
        end = ranges[-1][1]
        for i in range(len(ids)):
            own = next((b for b, r in enumerate(ranges) if i in range(*r)), None)
            if own is None and i < end:
                continue
            for h in range(4):
                stands = int(base[row, 0, first + i])
                found = {}
                for b, r in enumerate(ranges):
                    moved = stands - int(at[row, h, first + i, b])
                    found |= {j: j + moved for j in range(*r) if b != own or j <= i}
                others = [j for j in range(i + 1) if not any(j in range(*r) for r in ranges)]
                seen = sorted([*found.values(), *others])
                top = end if own is not None else i + 1
                missing = set(range(top)) - set(seen)
                # of its own segment, which stands last, a query does not see what follows it
                assert len(set(seen)) == len(seen) and len(missing) == (
                    0 if own is None else ranges[own][1] - 1 - i
                )
                assert all(place > stands for place in missing)


def test_shifts_are_what_stands_nearer():
    scores = torch.tensor([[[[0.1, 0.7, 0.2, -torch.inf]]]])
    lengths = torch.tensor([[3, 5, 2, 0]])
    assert shifts(scores, lengths).tolist() == [[[[7, 0, 5, 10]]]]


def test_longer_segments_are_no_more_important():
    """Keys that stand twice leave the mean over keys as it is."""
    model = roped("llama")
    attention = attention_of(model, [prompt()])
    layout = layout_of(attention, [prompt()[1].values()])
    once = importance(attention, layout)[:, :, -1]
    doubled = torch.tensor([*range(2), 2, 2, 3, 3, 4, 4, *range(5, 14)])
    k = attention.rotary.rotate(attention.k_unrotated[:, :, doubled], torch.arange(17)[None])
    twice = replace(
        attention, q=attention.q[:, :, -1:], k=k, v=k, positions=torch.tensor([[16]]),
        key_positions=torch.arange(17)[None], real_keys=torch.ones(1, 17, dtype=torch.bool),
        real_queries=torch.ones(1, 1, dtype=torch.bool),
    )  # fmt: skip
    twice = replace(twice, q=attention.rotate(attention.q_unrotated[:, :, -1:], twice.positions))
    ranges = [[[2, 8], [8, 10], [10, 14]]]
    assert_close(importance(twice, layout_of(twice, ranges))[:, :, -1], once, **TOLERANCE)


# Running it


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_is_one_by_one(family):
    model = roped(family)
    alone = [logits(model, [p], PINE())[0] for p in PROMPTS]
    width = max(len(ids) for ids, _ in PROMPTS)
    ids = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids, _ in PROMPTS])
    mask = torch.tensor([[1] * len(p) + [0] * (width - len(p)) for p, _ in PROMPTS])
    with torch.no_grad(), model.intervene(PINE()), model.spans([spans for _, spans in PROMPTS]):
        right = model(ids, attention_mask=mask)
    for row, one in enumerate(alone):
        assert_close(logits(model, PROMPTS, PINE())[row], one, **TOLERANCE)
        assert_close(right[row, : len(one)], one, **TOLERANCE)


@torch.no_grad()
def written(model, prompts, edit, **kwargs) -> torch.Tensor:
    ids, mask, spans = batch_of(model, prompts)
    with model.intervene(edit), model.spans(spans):
        return model.original_model.generate(
            ids, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False,
            output_scores=True, return_dict_in_generate=True, **kwargs,
        )  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cached_step_is_the_last_row_of_the_whole(family):
    model = roped(family)
    cached, whole = (written(model, PROMPTS, PINE(), use_cache=cache) for cache in (True, False))
    assert torch.equal(cached.sequences, whole.sequences)
    for step, (one, other) in enumerate(zip(cached.scores, whole.scores)):
        assert_close(one[:, 3:], other[:, 3:], **TOLERANCE, msg=f"step {step}")
    for row, p in enumerate(PROMPTS):
        alone = written(model, [p], PINE()).sequences[0, len(p[0]) :]
        assert torch.equal(cached.sequences[row, -6:], alone)


def test_beams_are_followed():
    model = roped("llama")
    cached, whole = (
        written(model, PROMPTS, PINE(), use_cache=cache, num_beams=3).sequences
        for cache in (True, False)
    )
    assert torch.equal(cached, whole)


def test_transformer_lens_writes_the_same():
    model = roped("llama")
    ids, spans = PROMPTS[0]
    by_transformers = written(model, [PROMPTS[0]], PINE()).sequences
    for cache in (True, False):
        with model.intervene(PINE()), model.spans([spans]):
            out = model.generate(
                torch.tensor([ids]), max_new_tokens=6, do_sample=False, verbose=False,
                use_past_kv_cache=cache, stop_at_eos=False, return_type="tokens",
            )  # fmt: skip
        assert torch.equal(out, by_transformers)


def test_other_heads_are_left_alone():
    model = roped("llama")
    ids, mask, spans = batch_of(model, PROMPTS)

    def first_z(*edits):
        kept = []
        look = model.hooks(fwd_hooks=[("blocks.0.attn.hook_z", lambda z, hook: kept.append(z))])
        with torch.no_grad(), model.intervene(*edits), model.spans(spans), look:
            model(ids, attention_mask=mask)
        return kept[0][mask.bool()]

    plain, whole, some = first_z(), first_z(PINE()), first_z(PINE(heads=["L0H1", "L0H2"]))
    assert_close(some[:, [1, 2]], whole[:, [1, 2]], **TOLERANCE)
    assert_close(some[:, [0, 3]], plain[:, [0, 3]], **TOLERANCE)
    assert (whole - plain)[:, [0, 3]].abs().max() > 1e-2


def test_generated_tokens_only():
    model = roped("llama")
    plain, late = (logits(model, PROMPTS, *edits) for edits in ([], [PINE(when="generated")]))
    for one, other in zip(plain, late):
        assert torch.equal(one, other)
    found = [written(model, PROMPTS, PINE(when=when)).scores for when in ("generated", "prompt")]
    both = written(model, PROMPTS, PINE()).scores
    assert_close(found[1][0], both[0], **TOLERANCE)
    assert (found[0][1] - both[1])[:, 3:].abs().max() > 1e-3
    assert (found[1][1] - both[1])[:, 3:].abs().max() > 1e-3


def test_whoever_looks_sees_its_pattern():
    model = roped("llama")
    ids, mask, spans = batch_of(model, PROMPTS)
    kept = []
    look = [("blocks.0.attn.hook_attention", lambda a, hook: kept.append(a)),
            ("blocks.0.attn.hook_pattern", lambda p, hook: kept.append(p))]  # fmt: skip
    with torch.no_grad(), model.intervene(PINE()), model.spans(spans), model.hooks(fwd_hooks=look):
        model(ids, attention_mask=mask)
    attention, pattern = kept
    real = mask.bool()[:, None].expand(-1, 4, -1)
    assert_close(attention.pattern()[real], pattern[real])
    assert_close(pattern[real].sum(-1), torch.ones(int(real.sum())))
    start, end = PROMPTS[0][1]["segment_1"]
    first = ids.shape[1] - len(PROMPTS[0][0])
    assert pattern[0, :, first + start, first + end].min() > 0  # the next segment is seen


def test_it_runs_in_bf16():
    """Near ties may fall the other way there: only what orders nothing is as near as rounding."""
    half = roped("llama", torch.bfloat16)
    exact = logits(roped("llama"), PROMPTS, PINE(order="input"))
    for ours, wanted in zip(logits(half, PROMPTS, PINE(order="input")), exact):
        assert (ours.float() - wanted).abs().mean() < 0.05 * wanted.abs().mean()
    for ours, plain in zip(logits(half, PROMPTS, PINE()), logits(half, PROMPTS)):
        assert ours.dtype == torch.bfloat16 and ours.isfinite().all()
        assert (ours - plain).abs().max() > 1e-2


def test_evaluation_tells_it_where_segments_lie():
    model = roped("llama")
    answers = random_ids(2, 2, 2, seed=9)
    rows = Dataset.from_dict({
        "text": [words(ids) for ids, _ in orders()[:3]],
        "input_ids": [ids for ids, _ in orders()[:3]],
        "answer": [" " + words(answers[0])] * 3,
        "answer_ids": [answers[0]] * 3,
        "spans": [spans for _, spans in orders()[:3]],
    })  # fmt: skip
    found = interp.compare(model, rows, {"none": [], "PINE": PINE()}, progress=False)
    losses = {name: e.table["loss"] for name, e in found.evaluations.items()}
    assert losses["none"].max() - losses["none"].min() > 1e-2
    assert losses["PINE"].max() - losses["PINE"].min() < 1e-4


# What is refused


def refused(model, spans, match, ids=None, edit=None, **kwargs):
    ids = torch.tensor([prompt()[0]]) if ids is None else ids
    run = model.intervene(PINE() if edit is None else edit)
    with pytest.raises(InterventionError, match=match), run, model.spans([spans]), torch.no_grad():
        model(ids, **kwargs)


@pytest.mark.parametrize(
    "spans, match",
    [
        ({"segment_1": [2, 5], "segment_2": [4, 7]}, "begins at 4 before.*ends at 5.*overlap"),
        ({"segment_1": [2, 4], "segment_2": [5, 7]}, r"tokens \[4, 5\).*in none"),
        ({"segment_1": [2, 4], "segment_2": [4, 40]}, r"has 14 tokens.*\[4, 40\)"),
        ({"segment_1": [4, 4]}, r"\[4, 4\).*one token at least"),
        ({"answer": [1, 2]}, r"'segment_\*'.*none such.*answer"),
    ],
)
def test_segments_that_make_no_sense(spans, match):
    refused(roped("llama"), spans, match)


def test_without_spans_it_says_how_to_give_them():
    with pytest.raises(InterventionError, match="model.spans"), roped("llama").intervene(PINE()):
        roped("llama")(torch.tensor([prompt()[0]]))
    sliced = logits(roped("llama"), [prompt()], PINE(["2:5", "5:7", "7:11"]))[0]
    assert torch.equal(sliced, logits(roped("llama"), [prompt()], PINE())[0])


def test_models_without_rotation_are_refused():
    refused(tiny("gpt2"), prompt()[1], "not known to turn.*learned positions")


def test_windows_shorter_than_the_text_are_refused():
    refused(tiny("mistral"), prompt()[1], "not plainly causal.*window")
    short = prompt([[5], [6]], prefix=[4], suffix=[3])
    assert len(logits(tiny("mistral"), [short], PINE())[0]) == 4


def test_a_prompt_in_chunks_is_refused():
    model, (ids, spans) = roped("llama"), prompt()
    cache = DynamicCache()
    with torch.no_grad(), model.spans([spans], [len(ids)]):
        model.original_model(torch.tensor([ids[:6]]), cache=cache)
        with (
            pytest.raises(InterventionError, match="5 of the 9 tokens.*not in chunks"),
            model.intervene(PINE()),
        ):
            model.original_model(torch.tensor([ids[6:]]), cache=cache)


@pytest.mark.parametrize(
    "args, match",
    [
        ({"segments": ""}, r"segments=\(''"),
        ({"segments": []}, r"segments=\(\)"),
        ({"order": "nearest"}, "order='nearest'.*importance, reversed, input"),
        ({"when": "always"}, "when='always'"),
    ],
)
def test_what_has_no_meaning_is_refused(args, match):
    with pytest.raises(InterventionError, match=match), unchecked():
        PINE(**args)


def test_it_says_in_words_what_it_does():
    assert "all heads; segments segment_*" in repr(PINE())
    assert "most important nearest; at all tokens" in repr(PINE())
    some = PINE("doc_*", ["L1H0"], "reversed", "prompt")
    assert "1 heads: L1H0; segments doc_*" in repr(some) and "least important" in repr(some)
    assert not PINE.causal
