"""Letter heads: weights against whole patterns, rules on made-up numbers, planted heads."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

import interp
from interp.analysis.causality import ablation_control
from interp.analysis.choices.letter_classes import LetterError, LetterRule, Profile, classes_of
from interp.analysis.choices.letters import letter_attention, letter_heads
from interp.analysis.choices.logit_attribution import direct_effect, swap_nodes
from interp.analysis.choices.nodes import AttributionError, Readout
from interp.heads import Head
from interp.intervention.low_rank import LowRank
from interp.intervention.subspaces import ENDS, LABELS
from tests.lettered import LABELS as LETTERS
from tests.lettered import gained, lettered
from tests.tiny import tiny

FAMILIES = ["gpt2", "gpt_neox", "llama", "mistral", "qwen3", "gemma2", "gpt_oss"]
PAIRS = lettered(8)


# Weights


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_the_entries_of_the_whole_pattern(family):
    """One prompt at a time, without padding."""
    model = tiny(family)
    found = letter_attention(model, PAIRS, window=2, batch_size=5, progress=False)
    for row, pair in enumerate(PAIRS):
        ids = torch.tensor([pair["input_ids"]])
        pattern = model.read_attention(ids, lambda a: a.pattern())[0, :, :, -1]
        places = pair["positions"]
        for site, name in (("label", "label"), ("end", "option")):
            columns = [places[f"{name}_{n}"] for n in (1, 2, 3, 4)]
            assert_allclose(found.weights[site][row], pattern[..., columns], atol=1e-6)
        assert_allclose(found.near[row], pattern[..., -2:].sum(-1), atol=1e-6)
        assert found.right[row] == pair["choices"].index(pair["answer"])


def test_what_is_on_the_right_option_becomes_scores():
    found = letter_attention(tiny("llama"), PAIRS, progress=False)
    scores = found.on_right("end")
    expected = [found.weights["end"][row, 1, 2, found.right[row]] for row in range(len(PAIRS))]
    row = scores.heads.index(Head(1, 2))
    assert_allclose(scores.samples[:, row], expected, atol=1e-6)
    assert scores.metadata["site"] == "end"
    with pytest.raises(LetterError, match="site='text'"):
        found.on_right("text")


def test_an_intervention_shows_in_the_weights():
    """Keys of all options alike (before rotation; GPT-2 has none): so are their weights."""
    model = tiny("gpt2")
    edit = LowRank.fit(model, PAIRS, ["L1H2"], rank=0, parts="k", at=LABELS)
    before = letter_attention(model, PAIRS, progress=False).weights["label"][:, 1]
    with model.intervene(edit):
        after = letter_attention(model, PAIRS, progress=False).weights["label"][:, 1]
    assert np.ptp(before[:, 2], axis=-1).min() > 1e-3
    assert_allclose(after[:, 2], after[:, 2].mean(-1, keepdims=True).repeat(4, -1), atol=1e-6)
    assert_allclose(after[:, [0, 1, 3]], before[:, [0, 1, 3]], atol=1e-6)


# The rules, on numbers made up for one head

RIGHT = np.arange(8) % 4
FACES = np.eye(4)[RIGHT]


def profile(label=0.0, end=0.0, near=0.0, effect=1.0, passed_on=np.nan) -> Profile:
    """Arguments broadcast to [prompt option], [prompt]."""
    weights = {
        site: np.broadcast_to(np.asarray(w, float), (8, 4))[:, None].copy()
        for site, w in (("label", label), ("end", end))
    }
    nears, effects = (np.broadcast_to(np.asarray(x, float), 8)[:, None] for x in (near, effect))
    return replace(Profile.of(weights, nears, effects, RIGHT), passed_on=np.array([passed_on]))


def class_of(positive: float = 10.0, rule: LetterRule = LetterRule(), **numbers) -> tuple:
    (name,), (reader,) = classes_of(profile(**numbers), positive, rule)
    return name, reader


def test_a_head_on_the_right_label_is_a_correct_letter_head():
    assert class_of(label=0.6 * FACES + 0.05) == ("correct letter", "label")


def test_a_head_on_the_right_option_s_end_is_one_of_another_kind():
    assert class_of(end=0.6 * FACES) == ("correct letter", "option end")
    both = {"label": 0.2 * FACES, "end": 0.7 * FACES}
    assert class_of(**both) == ("correct letter", "option end")
    both = {"label": 0.7 * FACES, "end": 0.2 * FACES}
    assert class_of(**both) == ("correct letter", "label")


def test_it_must_find_every_option_and_speak_for_each():
    misses_one = 0.6 * FACES * (RIGHT != 3)[:, None] + 0.05
    assert class_of(label=misses_one) == ("none", "")
    speaks_for_three = np.where(RIGHT == 2, -0.1, 1.0)
    assert class_of(label=0.6 * FACES, effect=speaks_for_three) == ("none", "")
    assert class_of(label=0.6 * FACES, effect=0.09) == ("none", "")  # of 10: below 1 %
    assert class_of(label=0.6 * FACES, effect=0.11) == ("correct letter", "label")


def test_looking_at_options_faintly_is_not_looking_at_them():
    assert class_of(label=0.09 * FACES) == ("none", "")
    assert class_of(label=0.11 * FACES) == ("correct letter", "label")


def test_half_of_the_options_mass_must_be_on_the_right_one():
    assert class_of(label=0.3 * FACES + 0.09)[0] == "correct letter"  # 0.39 of 0.66
    assert class_of(label=0.3 * FACES + 0.16) == ("none", "")  # 0.46 of 0.94
    assert class_of(label=0.3 * FACES + 0.16, rule=LetterRule(share=0.4))[0] == "correct letter"


def test_a_head_on_one_label_when_it_is_right_is_a_single_letter_head():
    second = (RIGHT == 1)[:, None]
    on_second = np.where(second, [0, 0.8, 0, 0], [0, 0.1, 0, 0])
    speaks = np.where(RIGHT == 1, 4.0, 0.1)
    assert class_of(label=on_second, effect=speaks) == ("single letter", "label")
    assert class_of(label=on_second, effect=1.0) == ("none", "")  # speaks for all alike
    always = np.broadcast_to([0, 0.8, 0, 0], (8, 4))
    assert class_of(label=always, effect=speaks) == ("none", "")
    two = on_second + np.where((RIGHT == 2)[:, None], [0, 0, 0.8, 0], 0)
    assert class_of(label=two, effect=speaks) == ("none", "")


def test_a_head_on_all_labels_alike_that_favours_none_is_uniform():
    assert class_of(label=0.2, effect=0.01) == ("uniform", "")
    assert class_of(label=0.2, effect=1.0) == ("none", "")
    assert class_of(label=0.1, effect=0.01) == ("none", "")  # 0.4 in all: not much
    # alike on average only: on each prompt it looks at one
    assert class_of(label=0.8 * np.eye(4)[(RIGHT + 1) % 4], effect=0.01) == ("none", "")


def test_a_head_on_the_last_tokens_that_passes_on_is_an_amplifier():
    assert class_of(near=0.7, passed_on=0.8) == ("amplification", "")
    assert class_of(near=0.7, passed_on=0.2) == ("none", "")
    assert class_of(near=0.7) == ("none", "")  # no head whose word it could pass on
    assert class_of(near=0.7, passed_on=0.8, end=0.05) == ("none", "")  # 0.2 on ends
    assert class_of(near=0.7, passed_on=0.8, effect=-1.0) == ("none", "")


def test_where_a_head_looks_is_told_for_each_right_option():
    table = profile(label=0.5 * FACES * (RIGHT < 2)[:, None], end=0.3 * np.eye(4)[0]).table()
    assert table.loc[0, "looks_at"] == "p1 p2 e1 e1"
    assert profile(label=0.01).table().loc[0, "looks_at"] == "- - - -"


def test_means_count_every_right_option_alike():
    """Six prompts with option 1, one each with 2 and 3: means go by option."""
    right = np.array([0, 0, 0, 0, 0, 0, 1, 2])
    weights = np.zeros((8, 1, 3))
    weights[np.arange(8), 0, right] = [0.1] * 6 + [0.7, 0.7]
    found = Profile.of({"label": weights}, np.zeros((8, 1)), np.ones((8, 1)), right)
    assert found.table().loc[0, "label_mass"] == pytest.approx(0.5)
    assert_allclose(found.own("label"), [[0.1, 0.7, 0.7]])
    assert_allclose(found.other("label"), 0)
    with pytest.raises(LetterError, match="option 4 is never the right one"):
        Profile.of({"label": np.zeros((8, 1, 4))}, np.zeros((8, 1)), np.ones((8, 1)), right)


def test_thresholds_are_checked_and_move_together():
    rule = LetterRule().scaled(1.1)
    assert rule.share == pytest.approx(0.55) and rule.times == pytest.approx(3.3)
    assert rule.even == pytest.approx(1 - 0.1 / 1.1) and rule.window == 3
    for name, value in (("share", 0), ("mass", 1.5), ("times", -1), ("window", 0)):
        with pytest.raises(LetterError, match=f"{name}={value}"):
            LetterRule(**{name: value})


# Heads planted by hooks: where they look is forced, and what they copy

CORRECT, SINGLE, UNIFORM, AMPLIFIER = Head(0, 0), Head(0, 1), Head(0, 2), Head(1, 3)


def right_option(ids: list[int]) -> int:
    first = ids.index(LETTERS[0])
    colors = ids[first + 1 : first + 8 : 2]
    return next(n for n, color in enumerate(colors) if color in ids[:first])


def planted(model, site: str) -> list:
    """Hooks that make four heads of GPT-2 what they are called; they look at labels or at ends."""
    readout = Readout.of(model)
    letters = readout.weight.detach()[list(LETTERS)] * readout.gain.detach()
    letters = readout.centred(letters - letters.mean(0))
    speak = {
        head: 2 * letters @ model.blocks[head.layer].attn.W_O[head.head].detach().T
        for head in (CORRECT, SINGLE, UNIFORM, AMPLIFIER)
    }
    shift = {"label": 0, "end": 1}[site]
    held = {}

    def columns() -> torch.Tensor:
        ids = model.call.input_ids
        first = (ids == LETTERS[0]).int().argmax(1)
        return first[:, None] + 2 * torch.arange(4) + shift

    def look(attention, hook):
        ids, places = model.call.input_ids, columns()
        weights = torch.zeros(*attention.q.shape[:3], ids.shape[1])
        for row, real in enumerate(model.call.real.tolist()):
            right = right_option([t for t, r in zip(ids[row].tolist(), real, strict=True) if r])
            weights[row, 0, -1, places[row, right]] = 1
            weights[row, 1, -1, places[row, 1] if right == 1 else -1] = 1
            weights[row, 2, -1, places[row]] = 0.25
        last = torch.zeros(1, 1, attention.n_queries, dtype=torch.bool)
        last[..., -1] = True
        return attention.set_rows(weights, heads=[0, 1, 2], rows=last)

    def values(v, hook):
        v, rows = v.clone(), torch.arange(len(v))[:, None]
        for head in (CORRECT, SINGLE, UNIFORM):
            v[:, :, head.head] = 0
            v[rows, columns(), head.head] = speak[head]
        return v

    def remember(resid, hook):
        held["said"] = torch.einsum("bm,nm->bn", resid[:, -1], letters)

    def look_at_itself(attention, hook):
        weights = torch.zeros(*attention.q.shape[:3], attention.n_keys)
        weights[..., -1, -1] = 1
        last = torch.zeros(1, 1, attention.n_queries, dtype=torch.bool)
        last[..., -1] = True
        return attention.set_rows(weights, heads=[AMPLIFIER.head], rows=last)

    def repeat(v, hook):
        v, said = v.clone(), held["said"]
        v[:, -1, AMPLIFIER.head] = 10 * (said - said.mean(1, keepdim=True)) @ speak[AMPLIFIER]
        return v

    return [
        ("blocks.0.attn.hook_v", values),
        ("blocks.0.attn.hook_attention", look),
        ("blocks.1.hook_resid_pre", remember),
        ("blocks.1.attn.hook_v", repeat),
        ("blocks.1.attn.hook_attention", look_at_itself),
    ]


@pytest.mark.parametrize("site", ["label", "end"])
def test_planted_heads_are_recognised(site):
    model = tiny("gpt2")
    with model.hooks(fwd_hooks=planted(model, site)):
        found = letter_heads(model, lettered(24), batch_size=7, progress=False)
    table = found.table.set_index(["layer", "head"])
    assert found.of("correct letter") == [CORRECT]
    assert found.of("single letter") == [SINGLE]
    assert found.of("amplification") == [AMPLIFIER]
    # all labels alike counts at labels; at ends it is no class of the paper's
    assert found.of("uniform") == ([UNIFORM] if site == "label" else [])
    assert table.loc[(0, 0), "reader"] == {"label": "label", "end": "option end"}[site]
    letter = {"label": "p", "end": "e"}[site]
    assert table.loc[(0, 0), "looks_at"] == " ".join(f"{letter}{n}" for n in (1, 2, 3, 4))
    for head in (CORRECT, SINGLE, UNIFORM):
        assert table.loc[(0, head.head), f"{site}_copies"] == 1
    assert_allclose(table.loc[(0, 0), f"{site}_share"], 1, atol=1e-5)
    assert table.loc[(1, 3), "passed_on"] > 0.5 and np.isnan(table.loc[(0, 0), "passed_on"])
    members = found.members("correct letter")
    assert members.top(1) == [CORRECT] and members.metadata["class"] == "correct letter"
    assert CORRECT not in members.random(3, seed=0)
    assert "correct letter: L0H0" in repr(found)
    assert found.plot(site).data[0].z[0][0] == pytest.approx(1)


def test_copying_is_read_off_the_values_by_hand():
    """Value through W_O, the final norm's gain and the unembedding, one label after the other."""
    model, pairs = gained("llama"), lettered(4)
    found = letter_heads(model, pairs, progress=False).table.set_index(["layer", "head"])
    gain = model.ln_final.weight
    for layer in range(2):
        for head in range(4):
            hits = []
            for pair in pairs:
                held = []
                with (
                    torch.no_grad(),
                    model.hooks(
                        fwd_hooks=[
                            (f"blocks.{layer}.attn.hook_v", lambda v, hook, h=held: h.append(v))
                        ]
                    ),
                ):
                    model(torch.tensor([pair["input_ids"]]))
                for n in range(4):
                    value = held[0][0, pair["positions"][f"label_{n + 1}"], head // 2]
                    written = value @ model.blocks[layer].attn.W_O[head] * gain
                    logits = [written @ model.original_model.lm_head.weight[t] for t in LETTERS]
                    hits.append(int(torch.stack(logits).argmax()) == n)
            assert found.loc[(layer, head), "label_copies"] == pytest.approx(np.mean(hits))


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "qwen3"])
def test_heads_of_random_models_are_none_of_it(family):
    found = letter_heads(tiny(family), lettered(40), progress=False)
    assert set(found.table["class"]) == {"none"}


def test_borderline_heads_change_class_when_thresholds_move():
    model, pairs = tiny("gpt2"), lettered(24)
    with model.hooks(fwd_hooks=planted(model, "label")):
        found = letter_heads(model, pairs, progress=False)
        effect = found.table.set_index(["layer", "head"]).loc[(0, 0), "effect"]
        edge = LetterRule(small=float(effect / found.effects.positive) * 0.95)
        at_edge = letter_heads(model, pairs, edge, progress=False)
    borderline = found.table.set_index(["layer", "head"])["borderline"]
    assert not borderline[(0, 0)]
    assert at_edge.of("correct letter") == [CORRECT]
    assert at_edge.table.set_index(["layer", "head"]).loc[(0, 0), "borderline"]


def test_models_whose_heads_have_no_direct_effect_are_refused():
    with pytest.raises(AttributionError, match="a norm or a factor"):
        letter_heads(tiny("gemma2"), PAIRS, progress=False)


def test_prompts_without_options_are_named():
    model = tiny("llama")
    bare = PAIRS.remove_columns("spans").add_column("spans", [{"text": [0, 3]}] * len(PAIRS))
    with pytest.raises(LetterError, match="prompt 0: no spans label_1.*it has text"):
        letter_attention(model, bare, progress=False)
    with pytest.raises(LetterError, match="prompt 0: no spans label_1.*it has none"):
        letter_attention(model, PAIRS.remove_columns("spans"), progress=False)
    rows = PAIRS.to_list()
    rows[3]["spans"]["option_4"] = None
    from datasets import Dataset

    with pytest.raises(LetterError, match="prompt 3: 3 options, and those before it 4"):
        letter_attention(model, Dataset.from_list(rows), progress=False)
    with pytest.raises(LetterError, match="option 4 is never"):
        letter_heads(model, PAIRS.select([0, 1, 2]), progress=False)
    with pytest.raises(LetterError, match="class 'letters'"):
        letter_heads(model, PAIRS, progress=False).of("letters")


# The embedded model


@pytest.fixture(scope="module")
def mini(mini_llama):
    return interp.load(mini_llama)


@pytest.fixture(scope="module")
def fit_pairs(mini):
    return interp.tasks.multiple_choice(mini, n=128, seed=10)


@pytest.fixture(scope="module")
def test_pairs(mini):
    return interp.tasks.multiple_choice(mini, n=128, seed=11)


@pytest.fixture(scope="module")
def output_heads(mini, fit_pairs):
    """mini-llama has no correct letter heads; these say most of the answer."""
    effects = direct_effect(mini, fit_pairs, progress=False)
    return [Head.parse(node) for node in effects.cover(0.8) if "H" in node]


@pytest.mark.slow
def test_mini_llama_has_no_head_that_looks_at_the_right_option(mini, fit_pairs):
    """It reads the ends of wrong options: heads that watch one option each, and MLPs."""
    found = letter_heads(mini, fit_pairs, progress=False)
    assert found.of("correct letter") == []
    loudest = found.table.sort_values("effect", ascending=False).iloc[0]
    assert loudest["end_mass"] > 0.9 and loudest["end_share"] < 0.1


@pytest.mark.slow
def test_mini_llama_s_output_nodes_carry_the_answer(mini, fit_pairs):
    effects = direct_effect(mini, fit_pairs, progress=False)
    output = effects.cover(0.8)
    rest = [node for node in effects.nodes["node"] if node not in output]
    table = swap_nodes(mini, fit_pairs, {"output": output, "rest": rest}, progress=False)
    output, rest = table.itertuples()
    assert output.source_wins > 0.9 and rest.clean_wins > 0.9
    assert output.moved > 3 * rest.moved


@pytest.mark.slow
def test_mini_llama_needs_its_output_heads_more_than_others(
    mini, fit_pairs, test_pairs, output_heads
):
    scores = direct_effect(mini, fit_pairs, progress=False).heads
    control = ablation_control(
        mini, scores, test_pairs, ks=[len(output_heads)], draws=10, batch_size=64, progress=False
    )
    rank = control.rank(len(output_heads), "accuracy")
    assert rank["top"] < -0.25 and rank["gap_high"] < 0
    assert rank["as_bad"] == 0


@pytest.mark.slow
def test_three_dimensions_at_the_ends_keep_mini_llama_s_answers(
    mini, fit_pairs, test_pairs, output_heads
):
    fitted = LowRank.fit(mini, fit_pairs, output_heads, rank=3, at=ENDS)
    conditions = {"clean": [], "rank 3": fitted, "complement": fitted.others()}
    conditions |= {f"random {seed}": fitted.random(seed) for seed in range(3)}
    conditions |= {"labels": LowRank.fit(mini, fit_pairs, output_heads, rank=0, at=LABELS)}
    found = interp.compare(mini, test_pairs, conditions, batch_size=64, progress=False)
    accuracy = {name: one.accuracy for name, one in found.evaluations.items()}
    assert accuracy["rank 3"] >= 0.95 * accuracy["clean"]
    for name in ("complement", "random 0", "random 1", "random 2"):
        assert accuracy[name] < 0.95 * accuracy["clean"], name
    assert accuracy["labels"] >= 0.95 * accuracy["clean"]  # nothing of it stands at the labels
