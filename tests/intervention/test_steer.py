"""Steered attention against patterns that are edited by hand, row by row."""

from math import exp

import pytest
import torch
from datasets import Dataset
from torch.testing import assert_close

import interp
from interp.analysis.circuits.roles import head_roles
from interp.heads import Head
from interp.intervention.base import InterventionError
from interp.intervention.steer import SteerAttention
from interp.model.edits import EditError
from tests.tiny import random_ids, tiny, unchecked, words

PROMPTS = random_ids(9, 6, 12, seed=4)
SPANS = [
    {"wrong_1": [1, 3], "wrong_2": [4, 5], "right": [0, 1]},
    {"wrong_1": [2, 3], "wrong_2": [2, 4], "right": [5, 6]},
    {"wrong_1": [0, 1], "wrong_2": [7, 11], "right": [3, 6]},
]
HEADS = ["L0H1", "L0H3", "L1H0"]
HOWS = [("force", None), ("suppress", None), ("boost", 1.5), ("boost", -3.0)]
TOLERANCE = {"atol": 1e-5, "rtol": 1e-4}


def left_padded(model):
    batch = model.batch(PROMPTS)
    return batch.input_ids, batch.attention_mask


def right_padded(model):
    ids, mask = torch.zeros(3, 12, dtype=torch.long), torch.zeros(3, 12, dtype=torch.long)
    for row, tokens in enumerate(PROMPTS):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
    return ids, mask


def keys_of(names, mask) -> torch.Tensor:
    """Which columns hold tokens of the spans, in a padded batch."""
    keys = torch.zeros_like(mask, dtype=torch.bool)
    for row, spans in enumerate(SPANS):
        first = int(mask[row].argmax())
        for name in names:
            start, end = spans[name]
            keys[row, first + start : first + end] = True
    return keys


def edit_by_hand(pattern, keys, rows, how, amount) -> torch.Tensor:
    """[batch head query key]; what a head sees is where its weight is above 0."""
    pattern = pattern.clone()
    for b, h, q in torch.cartesian_prod(*map(torch.arange, pattern.shape[:3])).tolist():
        row = pattern[b, h, q]
        on = keys[b] & (row > 0)
        if not rows[b, q] or not on.any():
            continue
        mass = row[on].sum()
        if how == "force":
            row[:] = 0
            row[on] = 1 / on.sum()
        elif how == "boost":
            row[on] *= exp(amount)
            row /= 1 + mass * (exp(amount) - 1)
        elif not on[row > 0].all():
            row[on] = 0
            row /= 1 - mass
    return pattern


@torch.no_grad()
def run(model, ids, mask, *edits, pattern_hooks=()):
    """Logits, and each layer's pattern."""
    seen = {}

    def look(pattern, hook, layer):
        seen[layer] = pattern.clone()

    looking = [
        (f"blocks.{n}.attn.hook_pattern", lambda p, hook, n=n: look(p, hook, n))
        for n in range(len(model.blocks))
    ]
    with model.intervene(*edits), model.spans(SPANS):
        plain = model(ids, attention_mask=mask)
        with model.hooks(fwd_hooks=[*pattern_hooks, *looking]):
            slow = model(ids, attention_mask=mask)
    real = mask.bool()
    return plain[real], slow[real], seen


@pytest.mark.parametrize("query", ["end", "all"])
@pytest.mark.parametrize("how, amount", HOWS)
@pytest.mark.parametrize(
    "family", ["gpt2", "gpt_neox", "llama", "qwen3", "mistral", "gemma2", "gpt_oss"]
)
def test_it_is_the_pattern_edited_by_hand(family, how, amount, query):
    """Grouped queries, a window of five tokens, soft caps, a virtual sink; padded on the left."""
    model = tiny(family)
    ids, mask = left_padded(model)
    keys = keys_of(["wrong_1", "wrong_2"], mask)
    rows = mask.bool().clone()
    if query == "end":
        rows[:, :-1] = False

    def by_hand(heads):
        def hook_fn(pattern, hook):
            edited = edit_by_hand(pattern, keys, rows, how, amount)
            chosen = torch.tensor([h in heads for h in range(4)])[:, None, None]
            return torch.where(chosen, edited, pattern)

        return hook_fn

    hooks = [("blocks.0.attn.hook_pattern", by_hand([1, 3])),
             ("blocks.1.attn.hook_pattern", by_hand([0]))]  # fmt: skip
    edit = SteerAttention(HEADS, ["wrong_1", "wrong_2"], how, query, amount=amount)
    fast, slow, seen = run(model, ids, mask, edit)
    plain, _, unedited = run(model, ids, mask)
    _, expected, _ = run(model, ids, mask, pattern_hooks=hooks)
    assert_close(fast, expected, **TOLERANCE)
    assert_close(slow, expected, **TOLERANCE)
    real = mask.bool()[:, None].expand(-1, 4, -1)
    by = edit_by_hand(unedited[0], keys, rows, how, amount)
    assert_close(seen[0][:, [1, 3]][real[:, :2]], by[:, [1, 3]][real[:, :2]], **TOLERANCE)
    assert torch.equal(seen[0][:, [0, 2]], unedited[0][:, [0, 2]])
    assert (expected - plain).abs().max() > 1e-2


@pytest.mark.parametrize("query", ["end", "all"])
@pytest.mark.parametrize("how, amount", HOWS)
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"])
def test_a_batch_is_one_by_one(family, how, amount, query):
    model = tiny(family)
    edit = SteerAttention(HEADS, "wrong_*", how, query, amount=amount)
    alone = []
    for tokens, spans in zip(PROMPTS, SPANS):
        with torch.no_grad(), model.intervene(edit), model.spans([spans]):
            alone.append(model(torch.tensor([tokens]))[0])
    for padded in (left_padded, right_padded):
        ids, mask = padded(model)
        assert_close(run(model, ids, mask, edit)[0], torch.cat(alone), atol=2e-5, rtol=1e-4)


def test_a_forced_row_is_the_mean_of_the_values_it_is_forced_onto():
    model = tiny("llama")
    z, v = [], []
    edit = SteerAttention("L1H3", "wrong_1", when="prompt")
    with torch.no_grad(), model.intervene(edit), model.spans([SPANS[0]]):
        hooks = [("blocks.1.attn.hook_z", lambda x, hook: z.append(x.clone())),
                 ("blocks.1.attn.hook_v", lambda x, hook: v.append(x.clone()))]  # fmt: skip
        with model.hooks(fwd_hooks=hooks):
            model(torch.tensor([PROMPTS[0]]))
    # query heads 2 and 3 share key-value head 1
    assert_close(z[0][0, -1, 3], v[0][0, 1:3, 1].mean(0), **TOLERANCE)


def test_earlier_tokens_are_left_alone_when_the_end_is_steered():
    model = tiny("llama")
    ids = torch.tensor([PROMPTS[2]])
    with torch.no_grad():
        before = model(ids)
        with model.intervene(SteerAttention(HEADS, "right")), model.spans([SPANS[2]]):
            after = model(ids)
    assert_close(after[:, :-1], before[:, :-1], **TOLERANCE)
    assert (after[:, -1] - before[:, -1]).abs().max() > 1e-2


def test_rows_that_nothing_is_left_to_stay_as_they_are():
    """Forced before the span, suppressed inside it when it begins the prompt."""
    model = tiny("gpt2")
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        before = model(ids)
        with model.intervene(SteerAttention(HEADS, "4:6", "force", "all")):
            forced = model(ids)
        with model.intervene(SteerAttention(HEADS, "0:3", "suppress", "all")):
            suppressed = model(ids)
    assert_close(forced[:, :4], before[:, :4], **TOLERANCE)
    assert_close(suppressed[:, :3], before[:, :3], **TOLERANCE)
    assert (forced[:, 4] - before[:, 4]).abs().max() > 1e-2
    assert (suppressed[:, 3] - before[:, 3]).abs().max() > 1e-2


@pytest.mark.parametrize(
    "text, start, end", [("0:1", 0, 1), ("-3:", 9, 12), (":", 0, 12), ("2:-2", 2, 10)]
)
def test_a_slice_of_the_prompt_needs_no_names(text, start, end):
    model = tiny("llama")
    ids = torch.tensor([PROMPTS[2]])
    logits = []
    for span in (text, "named"):
        told = model.spans([{"named": [start, end]}])
        with torch.no_grad(), model.intervene(SteerAttention(HEADS, span)), told:
            logits.append(model(ids))
    assert torch.equal(*logits)


def last_rows(model, when, query="end", cache=True) -> list[list[bool]]:
    """For each pass of a generation: which rows head 0 of layer 0 was forced in."""
    passes = []

    def look(pattern, hook):
        wanted = torch.zeros(pattern.shape[-1])
        wanted[1:3] = 0.5
        passes.append([bool((row - wanted).abs().max() < 1e-5) for row in pattern[0, 0]])

    edit = SteerAttention("L0H0", "wrong_1", "force", query, when)
    look_at = model.hooks(fwd_hooks=[("blocks.0.attn.hook_pattern", look)])
    with model.intervene(edit), model.spans([SPANS[0]]), look_at:
        model.generate(
            torch.tensor([PROMPTS[0][:4]]), max_new_tokens=3, do_sample=False, verbose=False,
            use_past_kv_cache=cache, stop_at_eos=False, return_type="tokens",
        )  # fmt: skip
    return passes


def test_when_says_which_rows_while_generating():
    model = tiny("llama")
    no, yes = False, True
    assert last_rows(model, "prompt") == [[no, no, no, yes], [no], [no]]
    assert last_rows(model, "generated") == [[no] * 4, [yes], [yes]]
    assert last_rows(model, "both") == [[no, no, no, yes], [yes], [yes]]
    # the second row sees only one of the two tokens
    assert last_rows(model, "prompt", "all") == [[no, no, yes, yes], [no], [no]]
    whole = last_rows(model, "both", cache=False)
    assert whole == [[no] * 3 + [yes], [no] * 3 + [yes] * 2, [no] * 3 + [yes] * 3]


def prompts_with_spans(n_answer: int = 1) -> Dataset:
    answers = random_ids(*[n_answer] * 3, seed=7)
    rows = {
        "text": [words(p) for p in PROMPTS],
        "input_ids": PROMPTS,
        "answer": [" " + words(a) for a in answers],
        "answer_ids": answers,
        "spans": SPANS,
    }
    return Dataset.from_dict(rows)


def test_evaluate_tells_it_where_spans_lie_and_answers_begin():
    """Answers of two tokens are read in one pass; the row before the first is the prompt's last."""
    model = tiny("llama")
    prompts = prompts_with_spans(2)
    edit = SteerAttention(HEADS, "wrong_*")
    with model.intervene(edit):
        together = interp.evaluate(model, prompts, progress=False).table["loss"]
    expected = []
    for tokens, answer, spans in zip(PROMPTS, prompts["answer_ids"], SPANS):
        keys = {i for name in ("wrong_1", "wrong_2") for i in range(*spans[name])}

        def force(pattern, hook, tokens=tokens, keys=keys):
            pattern = pattern.clone()
            heads = [1, 3] if ".0." in hook.name else [0]
            pattern[:, heads, len(tokens) - 1] = 0
            for key in keys:
                pattern[:, heads, len(tokens) - 1, key] = 1 / len(keys)
            return pattern

        hooks = [(f"blocks.{n}.attn.hook_pattern", force) for n in range(2)]
        with torch.no_grad(), model.hooks(fwd_hooks=hooks):
            logits = model(torch.tensor([[*tokens, answer[0]]]))[0, -2:].log_softmax(-1)
        expected.append(-float(logits[[0, 1], answer].mean()))
    assert_close(torch.tensor(together), torch.tensor(expected, dtype=torch.float64), **TOLERANCE)


def test_compare_has_it_beside_its_controls():
    model = tiny("gpt2")
    found = interp.compare(
        model, prompts_with_spans(), {"none": [], "steered": SteerAttention(HEADS, "wrong_*"),
                                      "other tokens": SteerAttention(HEADS, "right")},
        progress=False,
    )  # fmt: skip
    assert found.differences.query("metric == 'loss'")["value"].abs().min() > 1e-3


@pytest.mark.parametrize("span", ["wrong_3", "wrong*_1", "left*"])
def test_a_span_that_a_prompt_lacks_is_named(span):
    model = tiny("llama")
    lacking = [SPANS[0] | {"wrong_3": [1, 2]}, SPANS[1] | {"wrong_3": None}, SPANS[2]]
    ids, mask = left_padded(model)
    words = f"span {span!r}: prompt [01].*wrong_1".replace("*", r"\*", 1 if "*" in span else 0)
    edit = model.intervene(SteerAttention(HEADS, span))
    with pytest.raises(InterventionError, match=words), edit, model.spans(lacking):
        model(ids, attention_mask=mask)


def test_without_spans_it_says_how_to_give_them():
    model = tiny("llama")
    edit = model.intervene(SteerAttention(HEADS, "wrong_1"))
    with pytest.raises(InterventionError, match="'wrong_1'.*evaluate.*model.spans"), edit:
        model(torch.tensor([PROMPTS[0]]))


@pytest.mark.parametrize(
    "args, words",
    [
        (("L0H0", "a", "forced"), "how='forced'.*force, suppress, boost"),
        (("L0H0", "a", "force", "last"), "query='last'"),
        (("L0H0", "a", "force", "end", "always"), "when='always'"),
        (("L0H0", ""), "span=\\(''.*names of spans"),
        (("L0H0", []), "span=\\(\\).*names of spans"),
        (("L0H0", "*"), "span=\\('\\*'.*names of spans"),
        (("L0H0", "a", "boost"), "amount=None.*boost"),
        (("L0H0", "a", "force", "end", "prompt", 2.0), "amount=2.0"),
        (("L0H0", "a", "boost", "end", "prompt", float("inf")), "amount=inf.*suppress"),
    ],
)
def test_what_has_no_meaning_is_refused(args, words):
    with pytest.raises(InterventionError, match=words), unchecked():
        SteerAttention(*args)


def test_after_another_intervention_that_sets_weights_the_order_matters():
    model = tiny("llama")
    hide, even = SteerAttention(["L0H1"], "0:1", "suppress"), interp.Ablate(["L0H2"], "uniform")
    with model.intervene(hide, even):
        model(torch.tensor([PROMPTS[0]]))
    both = model.intervene(even, hide)
    with pytest.raises(EditError, match="edit the logits first"), both:
        model(torch.tensor([PROMPTS[0]]))


def test_saved_with_all_it_says(tmp_path):
    edit = SteerAttention("L1H2 L0H3", ["wrong_*", "0:1"], "boost", "all", "both", -1.5)
    edit.save_pretrained(tmp_path)
    loaded = interp.load_intervention(tmp_path)
    assert loaded == edit and loaded.heads == (Head(0, 3), Head(1, 2))
    assert loaded.span == ("wrong_*", "0:1") and loaded.amount == -1.5
    assert loaded != SteerAttention("L1H2 L0H3", ["wrong_*", "0:1"], "boost", "all", "both", -1.0)


def test_it_says_in_words_what_it_does():
    forced = SteerAttention(HEADS, "wrong_*")
    assert "3 heads: L0H1, L0H3, L1H0; look only at wrong_*" in repr(forced)
    assert "at the prompt's last token)" in repr(forced)
    away = SteerAttention("L0H1", ["a", "b"], "suppress", "all", "both")
    assert "look away from a, b; at all tokens" in repr(away)
    more = SteerAttention("L0H1", "a", "boost", "end", "both", 2.0)
    assert "+2 on the logits of a; at the prompt's last token and generated ones" in repr(more)
    none = SteerAttention((), "a", "boost", "all", "generated", 0.0)
    assert "no heads; +0 on the logits of a; at generated tokens" in repr(none)


@pytest.mark.slow
def test_what_mini_llama_says_follows_from_where_its_negative_movers_look(mini_llama):
    """They look at the repeated name and lower it: made to look at the other one, it is the former
    that is said. (Found on some prompts by `head_roles`, steered on others.)
    """
    model = interp.load(mini_llama, device="cpu")
    roles = head_roles(model, interp.tasks.ioi(model, n=32, seed=0), progress=False)
    heads = roles.of("negative mover")
    layer = {head.layer for head in heads}
    others = [h for h in roles.scores["direct"].heads if h.layer in layer and h not in heads]
    conditions = {
        "none": [],
        "at the other name": SteerAttention(heads, "IO"),
        "at the repeated name": SteerAttention(heads, "S1"),
        "away from it": SteerAttention(heads, "S2", "suppress"),
        "other heads": SteerAttention(others, "IO"),
    }
    prompts = interp.tasks.ioi(model, n=64, seed=1)
    found = interp.compare(model, prompts, conditions, progress=False).evaluations
    right = {name: evaluation.accuracy for name, evaluation in found.items()}
    assert len(heads) >= 2 and right["none"] == 1
    assert right["at the other name"] < 0.1
    assert 0.3 < right["away from it"] < 0.7
    assert right["at the repeated name"] > 0.9 and right["other heads"] > 0.9
