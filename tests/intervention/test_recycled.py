"""Recycled attention against the same steps taken one by one in plain Python."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from interp.intervention.base import InterventionError
from interp.intervention.recycled import RecycledAttention
from tests.intervention.roped import FAMILIES, logits_by_hand, roped, turned
from tests.tiny import random_ids, tiny, unchecked, with_answers

TOLERANCE = {"atol": 1e-5, "rtol": 1e-4}
PROMPTS, ANSWERS = random_ids(9, 5, 7, seed=3), random_ids(8, 8, 8, seed=5)
WHOLE = [prompt + answer for prompt, answer in zip(PROMPTS, ANSWERS)]
LENGTHS = [len(prompt) for prompt in PROMPTS]
EDITS = {
    "every third": RecycledAttention(3, stride=3),
    "never again": RecycledAttention(2, stride=99),
    "largest of the group": RecycledAttention(2, stride=4, pool="max"),
    "where the query turns": RecycledAttention(3, threshold=0.5, check_every=2),
    "some heads": RecycledAttention(2, stride=3, heads=["L0H1", "L1H2"]),
}


@torch.no_grad()
def logits(model, *edits, prompts=WHOLE, lengths=LENGTHS):
    """Each row's logits, from one left-padded batch in which the answers are read."""
    batch = model.batch(prompts)
    with model.intervene(*edits), model.spans(None, lengths):
        out = model(batch.input_ids, attention_mask=batch.attention_mask)
    return [out[row, first:] for row, first in enumerate(batch.first.tolist())]


def recycled_by_hand(edit, n_prompt, layer, q, k, v, scale, cap, family, log=None):
    """z of one prompt and what follows it; `log` gets the number of full steps of each kv head."""
    n, heads = q.shape[:2]
    kv_heads = k.shape[1]
    group, z = heads // kv_heads, torch.zeros(n, heads, v.shape[-1])
    recycles = [edit.heads is None or any((h.layer, h.head) == (layer, head) for h in edit.heads)
                for head in range(heads)]  # fmt: skip
    kept, last, n_full = {}, None, 0
    queries = [turned(q[i], i, family) for i in range(n)]
    keys = torch.stack([turned(k[j], j, family) for j in range(n)])
    for i in range(n):
        number = i - (n_prompt - 1)
        rows = []
        for h in range(heads):
            s = scale * (keys[: i + 1, h // group] @ queries[i][h])
            rows.append((s if cap is None else torch.tanh(s / cap) * cap).softmax(0))
        if number <= 0:
            full = True
        elif edit.stride is not None:
            full = number % edit.stride == 0
        else:
            cosine = torch.cosine_similarity(q[i].flatten(), last, dim=0)
            full = number % edit.check_every == 0 and float(cosine) < edit.threshold
        n_full += full and number >= 0
        if full:
            last = q[i].flatten()
        for kv in range(kv_heads):
            own = range(kv * group, (kv + 1) * group)
            readers = set(range(i + 1)) if full else kept[kv] | {i}
            mixed = {}
            for h in own:
                mine = torch.tensor([j in readers for j in range(i + 1)])
                restricted = torch.where(mine, rows[h], 0) / rows[h][mine].sum()
                mixed[h] = restricted
                z[i, h] = (restricted if recycles[h] else rows[h]) @ v[: i + 1, kv]
            stacked = torch.stack([mixed[h] for h in own])
            pooled = stacked.sum(0) if edit.pool == "sum" else stacked.amax(0)
            if full:
                best = pooled.topk(min(edit.k, i + 1)).indices.tolist()
                kept[kv] = set(best)
            else:
                kept[kv] = set(readers)
                if len(kept[kv]) > edit.k:
                    kept[kv].remove(min(kept[kv], key=lambda j: float(pooled[j])))
    if log is not None:
        log.append(n_full)
    return z


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("family", ["gpt2", *FAMILIES])
def test_it_is_taken_step_by_step_by_hand(family, name):
    """Answers of different prompts begin in different columns of the batch."""
    model, edit = roped(family), EDITS[name]
    layers = iter([0, 1] * len(WHOLE))

    def z_of(row, *tensors):
        return recycled_by_hand(edit, LENGTHS[row], next(layers), *tensors, family)

    expected = logits_by_hand(model, family, WHOLE, z_of)
    for row, (ours, plain) in enumerate(zip(logits(model, edit), logits(model))):
        assert_close(ours, expected[row], **TOLERANCE)
        assert_close(ours[: LENGTHS[row]], plain[: LENGTHS[row]], **TOLERANCE)
        assert (ours - plain).abs().max() > 1e-2


@torch.no_grad()
def written(model, edit, prompts=PROMPTS, n=8, **options):
    batch = model.batch(prompts)
    with model.intervene(*([] if edit is None else [edit])):
        found = model.original_model.generate(
            batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=n,
            min_new_tokens=n, do_sample=False, output_scores=True, return_dict_in_generate=True,
            **options,
        )  # fmt: skip
    return found


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_what_is_written_is_what_is_read(family, name):
    """A token at a time with the cache, against all of them in one pass."""
    model, edit = roped(family), EDITS[name]
    found = written(model, edit)
    new = found.sequences[:, -8:].tolist()
    whole = [prompt + tokens[:-1] for prompt, tokens in zip(PROMPTS, new)]
    at_once = logits(model, edit, prompts=whole)
    for row, ours in enumerate(at_once):
        for step, scores in enumerate(found.scores):
            assert_close(scores[row, 3:], ours[LENGTHS[row] - 1 + step, 3:], **TOLERANCE)


@pytest.mark.parametrize("family", ["gpt2", "mistral"])
def test_beams_are_followed(family):
    """What is kept belongs to a row; each finished beam, read at once, has the same likelihood."""
    model, edit = tiny(family), RecycledAttention(2, stride=5)
    found = written(model, edit, PROMPTS[:1], num_beams=4, num_return_sequences=4, n=7)
    plain = written(model, None, PROMPTS[:1], num_beams=4, num_return_sequences=4, n=7)
    assert not torch.equal(found.sequences, plain.sequences)
    assert (found.beam_indices[:, 1:] != found.beam_indices[:, :-1]).any()
    n = LENGTHS[0]
    for tokens, score in zip(found.sequences.tolist(), found.sequences_scores):
        out = logits(model, edit, prompts=[tokens[:-1]], lengths=[n])[0][n - 1 :]
        own = out.log_softmax(-1)[range(7), tokens[n:]]
        assert float(own.sum() / 7) == pytest.approx(float(score), abs=1e-4)


@pytest.mark.parametrize("edit", [RecycledAttention(99, stride=99), RecycledAttention(2, stride=1),
                                  RecycledAttention(2, threshold=1.01, check_every=1)])  # fmt: skip
def test_enough_keys_or_only_full_steps_are_the_plain_model(edit):
    model = roped("llama")
    for ours, plain in zip(logits(model, edit), logits(model)):
        assert_close(ours, plain, **TOLERANCE)


@pytest.mark.parametrize("stride, n_full", [(1, 8), (3, 3), (4, 2), (99, 1)])
def test_how_many_steps_are_full(stride, n_full):
    """1 + floor((m - 1) / stride) of m rows, the prompt's last among them."""
    counts, edit = [], RecycledAttention(2, stride=stride)

    def z_of(row, *tensors):
        return recycled_by_hand(edit, 9, 0, *tensors, "llama", counts)

    logits_by_hand(roped("llama"), "llama", [WHOLE[0][:16]], z_of)
    assert counts == [n_full] * 2 and n_full == 1 + 7 // stride


def test_a_query_never_turns_below_minus_1():
    model = roped("llama")
    never = RecycledAttention(3, threshold=-1.0, check_every=1)
    for ours, expected in zip(logits(model, never), logits(model, RecycledAttention(3, stride=99))):
        assert torch.equal(ours, expected)


# What is measured


def patterns(model, prompts):
    batch, kept = model.batch(prompts), {}
    hooks = [(f"blocks.{n}.attn.hook_pattern", lambda p, hook, n=n: kept.__setitem__(n, p))
             for n in range(2)]  # fmt: skip
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        model(batch.input_ids, attention_mask=batch.attention_mask)
    return kept, batch.first.tolist()


def test_it_measures_what_is_kept_of_a_row():
    model, edit = roped("llama"), RecycledAttention(3, stride=99)
    data = with_answers(PROMPTS, ANSWERS, [(0, 1)] * 3)
    table = edit.measure(model, data, batch_size=2)
    assert len(table) == 3 * 2 * 4 * 8
    kept, first = patterns(model, WHOLE)
    for row, n in enumerate(LENGTHS):
        for layer in (0, 1):
            pattern = kept[layer][row, :, first[row] :, first[row] :]
            at_end = pattern[:, n - 1]
            for kv in (0, 1):
                own = slice(2 * kv, 2 * kv + 2)
                best = set(at_end[own].sum(0).topk(3).indices.tolist())
                next_row = pattern[own, n]
                found = table.query(f"prompt == {row} and layer == {layer} and step == 1")
                for h in (2 * kv, 2 * kv + 1):
                    line = found[found["head"] == h].iloc[0]
                    mass = next_row[h - 2 * kv, [*best, n]].sum()
                    assert line["mass"] == pytest.approx(float(mass), abs=1e-5)
                    own_best = set(next_row.sum(0).topk(3).indices.tolist())
                    shared = len(own_best & (best | {n})) / 3
                    assert line["overlap"] == pytest.approx(shared, abs=1e-5)
    assert table["similarity"].between(-1, 1).all()
    assert table.groupby("step")["mass"].mean().loc[1] <= 1


def test_it_measures_the_model_as_it_is():
    model = roped("llama")
    data = with_answers(PROMPTS, ANSWERS, [(0, 1)] * 3)
    some = RecycledAttention(3, stride=4, heads=["L1H2"]).measure(model, data)
    assert set(some["head"]) == {2} and set(some["layer"]) == {1}
    assert sorted(set(some["step"])) == [1, 2, 3, 5, 6, 7]
    every = RecycledAttention(3, stride=4).measure(model, data)
    same = every.query("layer == 1 and head == 2").reset_index(drop=True)
    assert some.drop(columns="prompt").equals(same.drop(columns="prompt"))


@given(seed=st.integers(0, 99), k=st.integers(1, 5))
@settings(max_examples=10)
def test_what_is_lost_is_bounded_by_the_mass_left_out(seed, k):
    """|z - z'| <= 2 (1 - R) max |v|, in the first layer, where the input is the same."""
    model, edit = roped("llama"), RecycledAttention(k, stride=99)
    tokens = random_ids(12, seed=seed)
    found = {}

    def keep(name):
        return lambda value, hook: found.__setitem__(name, value.detach())

    table = edit.measure(model, with_answers([tokens[0][:9]], [tokens[0][9:]], [(0, 1)]))
    mass = table.query("layer == 0").sort_values(["head", "step"])["mass"].to_numpy().reshape(4, 3)
    for name, edits in (("plain", []), ("edited", [edit])):
        look = [("blocks.0.attn.hook_z", keep(name)), ("blocks.0.attn.hook_v", keep("v"))]
        edited = model.intervene(*edits)
        with torch.no_grad(), edited, model.hooks(fwd_hooks=look), model.spans(None, [9]):
            model(torch.tensor(tokens))
    apart = (found["plain"] - found["edited"])[0, 9:].norm(dim=-1).T
    bound = 2 * (1 - torch.tensor(mass)) * found["v"].norm(dim=-1).max()
    assert (apart <= bound + 1e-5).all()


def test_larger_sets_hold_more():
    data = with_answers(PROMPTS, ANSWERS, [(0, 1)] * 3)
    masses = [RecycledAttention(k, stride=99).measure(roped("llama"), data)["mass"]
              for k in (1, 3, 6, 17)]  # fmt: skip
    first = [mass[::8].mean() for mass in masses]
    assert first == sorted(first) and masses[-1].min() > 1 - 1e-5


# What is said and refused


@pytest.mark.parametrize(
    "args, match",
    [
        ({"k": 0, "stride": 2}, "k=0: a whole number from 1"),
        ({"k": 2}, "stride=None, threshold=None: give one"),
        ({"k": 2, "stride": 2, "threshold": 0.5}, "stride=2, threshold=0.5: give one"),
        ({"k": 2, "stride": 2, "pool": "mean"}, "pool='mean': one of sum, max"),
        ({"k": 2, "threshold": 0.5, "check_every": 0}, "check_every=0"),
    ],
)
def test_what_has_no_meaning_is_refused(args, match):
    with pytest.raises(InterventionError, match=match), unchecked():
        RecycledAttention(**args)


def test_answers_of_one_token_recycle_nothing():
    data = with_answers(PROMPTS, [[5]] * 3, [(0, 1)] * 3)
    with pytest.raises(InterventionError, match="no answer has two tokens"):
        RecycledAttention(2, stride=2).measure(tiny("llama"), data)


def test_it_says_in_words_what_it_does():
    assert "all heads; the 3 keys" in repr(RecycledAttention(3, stride=50))
    assert "all keys every 50 tokens; at generated tokens" in repr(RecycledAttention(3, stride=50))
    turned = repr(RecycledAttention(3, threshold=0.8))
    assert "cosine of 0.8, looked at every 5 tokens" in turned
