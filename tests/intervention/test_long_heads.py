"""LongHeads against chunks chosen, packed and read one by one in plain Python."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from transformers import DynamicCache

from interp.intervention.base import InterventionError
from interp.intervention.long_heads import LongHeads, representations
from tests.intervention.roped import FAMILIES, logits_by_hand, roped, turned
from tests.tiny import random_ids, tiny, unchecked, with_answers

TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}
# no token twice, nor written twice: in the first layer, chunks that say the same would tie
PROMPTS = [(torch.randperm(57, generator=torch.Generator().manual_seed(n)) + 3)[:n].tolist()
           for n in (19, 12, 16)]  # fmt: skip
EDITS = {
    "four chunks of three": LongHeads(12, 3),
    "three of two, from the start": LongHeads(6, 2, begin=0),
    "four of two, some heads": LongHeads(8, 2, heads=["L0H1", "L1H2"]),
    "five of one": LongHeads(5, 1, begin=7),
}


@torch.no_grad()
def logits(model, *edits, prompts=PROMPTS):
    batch = model.batch(prompts)
    with model.intervene(*edits):
        out = model(batch.input_ids, attention_mask=batch.attention_mask)
    return [out[row, first:] for row, first in enumerate(batch.first.tolist())]


def softmax_of(query, keys, scale, cap=None):
    s = scale * (keys @ query)
    return (s if cap is None else torch.tanh(s / cap) * cap).softmax(0)


def representation_by_hand(q, k, v, scale, family):
    """c of one chunk and head, from its q, k, v before rotation, `[token d]`."""
    w = len(q)
    query = [turned(q[i], i, family) for i in range(w)]
    keys = torch.stack([turned(k[j], j, family) for j in range(w)])
    outputs = torch.stack([softmax_of(query[i], keys, scale) @ v for i in range(w)])
    return softmax_of(outputs.mean(0), keys, scale) @ keys


def chosen_by_hand(edit, q, k, v, h, i, scale, family) -> list[int]:
    """The chunks that query i of head h reads."""
    w, n_chosen, kv = edit.chunk, edit.window // edit.chunk, h // (q.shape[1] // k.shape[1])
    own = i // w
    if own + 1 <= n_chosen:
        return list(range(own + 1))
    scores = {}
    for g in range(1, own - 1):
        at = slice(g * w, (g + 1) * w)
        c = representation_by_hand(q[at, h], k[at, kv], v[at, kv], scale, family)
        scores[g] = float(q[i, h] @ c)
    best = sorted(scores, key=lambda g: -scores[g])[: n_chosen - 3]
    return sorted({0, own - 1, own, *best})


def long_heads_by_hand(edit, layer, q, k, v, scale, cap, family):
    n, heads = q.shape[:2]
    group, w = heads // k.shape[1], edit.chunk
    begin = edit.window if edit.begin is None else edit.begin
    z = torch.zeros(n, heads, v.shape[-1])
    for h in range(heads):
        chooses = edit.heads is None or any((x.layer, x.head) == (layer, h) for x in edit.heads)
        for i in range(n):
            places = {j: j for j in range(i + 1)}
            if chooses and i >= begin:
                chunks = chosen_by_hand(edit, q, k, v, h, i, scale, family)
                tokens = [j for g in chunks for j in range(g * w, (g + 1) * w) if j <= i]
                places = {j: place for place, j in enumerate(tokens)}
                assert max(places.values()) < edit.window
            keys = torch.stack([turned(k[j, h // group], at, family) for j, at in places.items()])
            query = turned(q[i, h], places[i], family)
            z[i, h] = softmax_of(query, keys, scale, cap) @ v[list(places), h // group]
    return z


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_attention_by_hand(family, name):
    """Padded on the left, with chunks that begin at each prompt's own first token."""
    model, edit, prompts = roped(family), EDITS[name], PROMPTS[:2]
    layers = iter([0, 1] * len(prompts))

    def z_of(row, *tensors):
        return long_heads_by_hand(edit, next(layers), *tensors, family)

    expected = logits_by_hand(model, family, prompts, z_of)
    plain = logits(model, prompts=prompts)
    for row, ours in enumerate(logits(model, edit, prompts=prompts)):
        assert_close(ours, expected[row], **TOLERANCE)
        start = edit.window
        assert_close(ours[:start], plain[row][:start], **TOLERANCE)
        if len(prompts[row]) > edit.window:
            assert (ours[start:] - plain[row][start:]).abs().max() > 1e-3


@torch.no_grad()
def written(model, edit, prompts=PROMPTS, n=9, **options):
    batch = model.batch(prompts)
    with model.intervene(edit):
        return model.original_model.generate(
            batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=n,
            min_new_tokens=n, do_sample=False, output_scores=True, return_dict_in_generate=True,
            no_repeat_ngram_size=1, suppress_tokens=[0], **options,
        )  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cached_step_is_the_last_row_of_the_whole(family, name):
    """Chunks that are complete only while writing get their representation from kept queries."""
    model, edit = roped(family), EDITS[name]
    cached, whole = (written(model, edit, use_cache=cache) for cache in (True, False))
    assert torch.equal(cached.sequences, whole.sequences)
    for one, other in zip(cached.scores, whole.scores):
        assert_close(one[:, 3:], other[:, 3:], **TOLERANCE)
    for row, prompt in enumerate(PROMPTS):
        alone = written(model, edit, [prompt]).sequences[0, -9:]
        assert torch.equal(cached.sequences[row, -9:], alone)


def test_beams_are_followed():
    model, edit = roped("llama"), LongHeads(6, 2)
    cached, whole = (
        written(model, edit, num_beams=4, num_return_sequences=4, use_cache=cache)
        for cache in (True, False)
    )
    assert (cached.beam_indices[:, 1:] != cached.beam_indices[:, :-1]).any()
    assert torch.equal(cached.sequences, whole.sequences)
    assert_close(cached.sequences_scores, whole.sequences_scores, **TOLERANCE)


@pytest.mark.parametrize("edit", [LongHeads(24, 3), LongHeads(24, 4, begin=0), LongHeads(20, 1, 3)])
def test_a_text_within_the_window_is_read_as_it_is(edit):
    """Packed places are the text's own then, also where queries choose from early on."""
    model = roped("qwen3")
    for ours, plain in zip(logits(model, edit), logits(model)):
        assert_close(ours, plain, **TOLERANCE)


def test_later_tokens_change_nothing_before_them():
    model, edit = roped("llama"), LongHeads(6, 2)
    changed = [[*PROMPTS[0][:15], *[(t + 5) % 50 + 3 for t in PROMPTS[0][15:]]]]
    one, other = (logits(model, edit, prompts=p)[0] for p in (PROMPTS[:1], changed))
    assert_close(one[:15], other[:15], **TOLERANCE)
    assert (one[15:] - other[15:]).abs().max() > 1e-2


def attention_of(model, prompts, *edits):
    kept, batch = [], model.batch(prompts)
    look = model.hooks(fwd_hooks=[("blocks.0.attn.hook_attention", lambda a, hook: kept.append(a))])
    with torch.no_grad(), model.intervene(*edits), look:
        model(batch.input_ids, attention_mask=batch.attention_mask)
    return kept[0]


@given(chunk=st.integers(1, 4), n_chunks=st.integers(3, 6), seed=st.integers(0, 99))
@settings(max_examples=20)
def test_no_distance_is_above_the_window(chunk, n_chunks, seed):
    """Every query finds its keys at 0, 1, 2, ... up to its own place, in the order of the text."""
    prompts = random_ids(23, 9, seed=seed)
    edit = LongHeads(chunk * n_chunks, chunk, begin=seed % 20)
    plain, placed = (attention_of(roped("llama"), prompts, *e) for e in ([], [edit]))
    if placed.places is None:
        assert edit.first > 22
        return
    at, seen = placed.places.at, placed.places.seen
    for row, n in enumerate((23, 9)):
        for i in range(23 - n, 23):
            for h in range(4):
                found = []
                for j in range(23 - n, i + 1):
                    g = (j - 23 + n) // chunk
                    if seen[row, h, i, g]:
                        # a key moved by s is a query moved by -s
                        moved = at[row, h, i, g] - at[row, h, i, (i - 23 + n) // chunk]
                        found.append(int(plain.key_positions[row, j] - moved))
                # its own key has not moved; the others follow each other up to it
                assert found == list(range(i - 23 + n - len(found) + 1, i - 23 + n + 1))
                assert i - 23 + n < edit.first or len(found) <= edit.window


def test_a_chunk_like_the_query_is_chosen():
    """Keys of one chunk that all point along the query: its representation does, too."""
    model = roped("llama")
    attention = attention_of(model, [PROMPTS[0]])
    direction = torch.nn.functional.normalize(torch.randn(8), dim=0)
    q = torch.randn(1, 1, 6, 3, 8) * 0.1
    k, v = torch.randn(1, 1, 6, 3, 8) * 0.1, torch.randn(1, 1, 6, 3, 8) * 0.1
    k[:, :, 4] = 5 * attention.rotary.undo(
        direction.expand(1, 1, 3, 8), torch.arange(3)[None]
    )  # along the query wherever it stands in the chunk
    c = representations(attention, q, k, v)
    assert int((c[0, 0] @ direction).argmax()) == 4
    expected = torch.stack([
        representation_by_hand(*(x[0, 0, g] for x in (q, k, v)), attention.scale, "llama")
        for g in range(6)
    ])  # fmt: skip
    assert_close(c[0, 0], expected, **TOLERANCE)


def test_what_a_chunk_that_nobody_chose_holds_does_not_matter():
    """In the first layer: the values of such a chunk can be anything."""
    model, edit = roped("llama"), LongHeads(6, 2)
    placed = attention_of(model, [PROMPTS[0]], edit)
    pattern = placed.pattern()
    seen = placed.places.seen[0, :, -1]
    for h in range(4):
        for g in range(seen.shape[-1]):
            mass = pattern[0, h, -1, 2 * g : 2 * g + 2].sum()
            assert (mass > 0) == bool(seen[h, g])
        assert int(seen[h].sum()) == 3 and seen[h, [0, -2, -1]].all()
    assert_close(pattern[0, :, -1].sum(-1), torch.ones(4))


# What is measured


def test_it_measures_what_the_last_token_chooses():
    model, edit = roped("qwen3"), LongHeads(12, 3)
    data = with_answers(PROMPTS, [[5]] * 3, [(4, 7), (0, 2), (9, 10)])
    table = edit.measure(model, data, "answer", batch_size=2)
    assert set(table["prompt"]) == {0, 2}  # the other one is within the window
    attention = attention_of(model, [PROMPTS[0]])
    pattern = attention.pattern(queries=[-1])[0, :, 0]
    tensors = attention.q_unrotated, attention.k_unrotated, attention.v
    q, k, v = (x[0].transpose(0, 1) for x in tensors)
    found = table.query("prompt == 0 and layer == 0")
    assert len(found) == 4 * 7
    for h in range(4):
        rows = found[found["head"] == h]
        wanted = chosen_by_hand(edit, q, k, v, h, 18, attention.scale, "qwen3")
        assert rows[rows["chosen"]]["chunk"].tolist() == wanted
        mass = [float(pattern[h, 3 * g : 3 * g + 3].sum()) for g in range(7)]
        assert rows["mass"].tolist() == pytest.approx(mass, abs=1e-5)
        assert rows["holds"].tolist() == [False, True, True, False, False, False, False]
        c = representation_by_hand(*(x[6:9, h // g] for x, g in ((q, 1), (k, 2), (v, 2))),
                                   attention.scale, "qwen3")  # fmt: skip
        assert rows["score"].iloc[2] == pytest.approx(float(q[18, h] @ c), abs=1e-4)
    some = LongHeads(12, 3, heads=["L1H3"]).measure(model, data)
    assert set(zip(some["layer"], some["head"])) == {(1, 3)} and "holds" not in some
    assert LongHeads(30, 3).measure(model, data).empty


# What is refused


@pytest.mark.parametrize(
    "args, match",
    [
        ((10, 3), "window=10, chunk=3: the window holds whole chunks"),
        ((4, 2), "window=4, chunk=2.*three"),
        ((6, 0), "chunk=0"),
        ((6, 2, -1), "begin=-1"),
        ((6, 2, None, None, "now"), "when='now'"),
    ],
)
def test_what_has_no_meaning_is_refused(args, match):
    with pytest.raises(InterventionError, match=match), unchecked():
        LongHeads(*args)


@pytest.mark.parametrize(
    "family, match",
    [("gpt2", "not known to turn.*learned positions"), ("mistral", "window shorter")],
)
def test_other_models_are_refused(family, match):
    with pytest.raises(InterventionError, match=match):
        logits(tiny(family), LongHeads(6, 2))


def test_a_prompt_read_before_the_block_is_refused():
    model, cache = roped("llama"), DynamicCache()
    with torch.no_grad():
        model.original_model(torch.tensor([PROMPTS[0][:10]]), cache=cache)
        with (
            pytest.raises(InterventionError, match="read outside of the block"),
            model.intervene(LongHeads(6, 2)),
        ):
            model.original_model(torch.tensor([PROMPTS[0][10:]]), cache=cache)


def test_a_prompt_in_chunks_is_the_whole():
    model, cache, edit = roped("llama"), DynamicCache(), LongHeads(6, 2)
    expected = logits(model, edit, prompts=PROMPTS[:1])[0]
    with torch.no_grad(), model.intervene(edit):
        parts = [
            model.original_model(torch.tensor([PROMPTS[0][a:b]]), cache=cache).logits[0]
            for a, b in ((0, 7), (7, 12), (12, 19))
        ]
    assert_close(torch.cat(parts), expected, **TOLERANCE)


def test_a_span_that_a_prompt_lacks_is_named():
    data = with_answers(PROMPTS, [[5]] * 3, [(4, 7)] * 3)
    with pytest.raises(InterventionError, match="span='needle': prompt 0"):
        LongHeads(6, 2).measure(roped("llama"), data, "needle")


def test_it_says_in_words_what_it_does():
    said = repr(LongHeads(1024, 256))
    assert "4 chunks of 256 tokens each, the first, the last two and the 1 most alike" in said
    assert "from position 1024 on; at all tokens" in said
