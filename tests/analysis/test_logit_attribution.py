"""Direct and total effects: against whole runs with hooks, TransformerLens, and their own sums."""

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.testing import assert_allclose
from transformer_lens.tools.analysis import direct_logit_attribution

from interp.analysis.choices.logit_attribution import (
    NodeEffects,
    direct_and_total,
    direct_effect,
    logit_attribution,
    swap_nodes,
    total_effect,
)
from interp.analysis.choices.nodes import AttributionError, Choices
from interp.heads import Head, HeadError
from interp.intervention.low_rank import LowRank
from tests.lettered import LABELS, gained, lettered, with_gains
from tests.tiny import fresh, tiny

FAMILIES = ["gpt2", "gpt_neox", "llama", "qwen3", "gpt_oss"]
PAIRS = lettered(4)

each_family = pytest.mark.parametrize("family", FAMILIES)


def centred(logits, answer: int, labels=LABELS) -> float:
    """The definition."""
    return float(logits[answer] - sum(logits[label] for label in labels) / len(labels))


def last_logits(model, ids, hooks=()):
    with torch.no_grad(), model.hooks(fwd_hooks=list(hooks)):
        return model(torch.tensor([list(ids)]))[0, -1]


def value_at_end(model, ids, name):
    found = []

    def keep(value, hook):
        found.append(value[0, -1].clone())

    last_logits(model, ids, [(name, keep)])
    return found[0]


def put(value, new, index=()):
    """A hook that replaces the last token's value, or one head's part of it."""

    def hook_fn(old, hook):
        changed = old.clone()
        changed[(0, -1, *index)] = new[index] if index else new
        return changed

    return value, hook_fn


def nodes_of(model):
    """Each node's name, hook and head."""
    for layer in range(2):
        for head in range(4):
            yield f"L{layer}H{head}", f"blocks.{layer}.attn.hook_z", (head,)
        yield f"MLP{layer}", f"blocks.{layer}.hook_mlp_out", ()


def written_by_hand(model, ids, hook, index):
    """What a node adds to the residual stream at the last token: with it minus without it."""
    value = value_at_end(model, ids, hook)
    layer = int(hook.split(".")[1])
    if not index:
        return value
    attn = model.blocks[layer].attn.o.original_component
    only = torch.zeros_like(value)
    only[index] = value[index]
    with torch.no_grad():
        empty = attn(torch.zeros_like(value).flatten()[None, None])
        return (attn(only.flatten()[None, None]) - empty)[0, 0]


@each_family
def test_all_terms_add_up_to_the_model_s_own_metric(family):
    model = gained(family)
    found = logit_attribution(model, PAIRS, batch_size=4, progress=False)
    for row, pair in enumerate(PAIRS):
        expected = centred(last_logits(model, pair["clean_input_ids"]), pair["answers"][0])
        assert_allclose(found.metric[row], expected, atol=2e-4)
        assert_allclose(found.values[row].sum(), expected, atol=2e-3)


@each_family
def test_a_term_is_what_the_frozen_norm_makes_of_the_node(family):
    """By autograd through the real norm with its scale held by hooks."""
    model = gained(family)
    found = logit_attribution(model, PAIRS, progress=False)
    for row, pair in enumerate(PAIRS):
        ids, answer = pair["clean_input_ids"], pair["answers"][0]
        scale = value_at_end(model, ids, "ln_final.hook_scale")

        def logits_without(node, scale=scale, ids=ids):
            hooks = [
                put(
                    "blocks.1.hook_resid_post",
                    value_at_end(model, ids, "blocks.1.hook_resid_post") - node,
                ),
                put("ln_final.hook_scale", scale),
            ]
            return last_logits(model, ids, hooks)

        whole = centred(logits_without(0), answer)
        for name, hook, index in nodes_of(model):
            without = logits_without(written_by_hand(model, ids, hook, index))
            expected = whole - centred(without, answer)
            assert_allclose(found.of(name)[row], expected, atol=5e-4, err_msg=name)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_transformer_lens_says_the_same_of_right_against_wrong(family):
    """Its function wants folded weights; two choices, centred, are half of a difference.

    Without biases: folding counts those of values as the layer's, we as the heads' own.
    """
    pairs = lettered(4, labels=LABELS[:2], longest=1)
    ours, folded = (with_gains(fresh(family), biases=False) for _ in range(2))
    found = logit_attribution(ours, pairs, progress=False)
    folded.enable_compatibility_mode()
    ids = torch.tensor(list(pairs["clean_input_ids"]))
    right, wrong = torch.tensor(list(pairs["answers"])).unbind(1)
    theirs = direct_logit_attribution(folded, ids, right, wrong, unit="head", pos=-1)
    by_label = dict(zip(theirs.labels, theirs.attribution, strict=True))
    for head in [Head(layer, head) for layer in range(2) for head in range(4)]:
        expected = by_label[str(head)].detach().numpy() / 2
        assert_allclose(found.of(str(head)), expected, atol=1e-3)
    layers = direct_logit_attribution(folded, ids, right, wrong, unit="component", pos=-1)
    by_label = dict(zip(layers.labels, layers.attribution, strict=True))
    for layer in range(2):
        expected = by_label[f"{layer}_mlp_out"].detach().numpy() / 2
        assert_allclose(found.of(f"MLP{layer}"), expected, atol=1e-3)


@each_family
def test_direct_effect_is_the_last_residual_with_one_node_of_the_source(family):
    model = gained(family)
    found = direct_effect(model, PAIRS, batch_size=4, progress=False)
    for row, pair in enumerate(PAIRS):
        clean, source, answer = (
            pair["clean_input_ids"],
            pair["corrupted_input_ids"],
            pair["answers"][0],
        )
        resid = value_at_end(model, clean, "blocks.1.hook_resid_post")
        whole = centred(last_logits(model, clean), answer)
        for name, hook, index in nodes_of(model):
            there, here = (written_by_hand(model, ids, hook, index) for ids in (source, clean))
            patched = last_logits(
                model, clean, [put("blocks.1.hook_resid_post", resid + there - here)]
            )
            expected = whole - centred(patched, answer)
            assert_allclose(found.of(name)[row], expected, atol=5e-4, err_msg=name)
        assert abs(found.of("bias")[row]) < 1e-5 and abs(found.of("embed")[row]) < 1e-5


@pytest.mark.parametrize("family", [*FAMILIES, "gemma2"])
def test_total_effect_is_a_whole_run_with_the_node_patched(family):
    model = gained(family)
    found = total_effect(model, PAIRS, progress=False)
    assert found.nodes["node"].tolist() == [name for name, _, _ in nodes_of(model)]
    for row, pair in enumerate(PAIRS):
        clean, source, answer = (
            pair["clean_input_ids"],
            pair["corrupted_input_ids"],
            pair["answers"][0],
        )
        whole = centred(last_logits(model, clean), answer)
        for name, hook, index in nodes_of(model):
            patch = put(hook, value_at_end(model, source, hook), index)
            expected = whole - centred(last_logits(model, clean, [patch]), answer)
            assert_allclose(found.of(name)[row], expected, atol=5e-4, err_msg=name)


@each_family
def test_the_last_layer_s_mlp_has_no_other_effect_than_its_direct_one(family):
    model = gained(family)
    direct = direct_effect(model, PAIRS, progress=False)
    total = total_effect(model, PAIRS, progress=False)
    assert_allclose(total.of("MLP1"), direct.of("MLP1"), atol=5e-4)
    heads = [f"L1H{head}" for head in range(4)]
    same = [np.allclose(total.of(h), direct.of(h), atol=5e-4) for h in heads]
    assert all(same) == (family == "gpt_neox")  # in serial blocks the last MLP has seen the heads


@each_family
def test_all_nodes_at_once_are_the_source_prompt(family):
    model = gained(family)
    names = direct_effect(model, PAIRS, progress=False).nodes["node"].tolist()
    some = ["L0H1", "MLP0", "L1H2"]
    sets = {"all": names, "none": [], "some": some}
    table = swap_nodes(model, PAIRS, sets, batch_size=3, progress=False).set_index("set")
    assert table["nodes"].tolist() == [len(names), 0, 3] and set(table["n"]) == {len(PAIRS)}
    found = {"all": [], "none": [], "some": []}
    for pair in PAIRS:
        clean, source = pair["clean_input_ids"], pair["corrupted_input_ids"]
        resid = value_at_end(model, clean, "blocks.1.hook_resid_post")
        for name, hook, index in nodes_of(model):
            if name in some:
                there, here = (written_by_hand(model, x, hook, index) for x in (source, clean))
                resid = resid + there - here
        found["all"].append(last_logits(model, source))
        found["none"].append(last_logits(model, clean))
        found["some"].append(last_logits(model, clean, [put("blocks.1.hook_resid_post", resid)]))
    metric = {}
    for name, logits in found.items():
        answers = [pair["answers"] for pair in PAIRS]
        best = [max(LABELS, key=lambda label, x=x: x[label]) for x in logits]
        metric[name] = np.mean([centred(x, a[0]) for x, a in zip(logits, answers, strict=True)])
        for side, column in enumerate(["clean_wins", "source_wins"]):
            won = np.mean([b == a[side] for b, a in zip(best, answers, strict=True)])
            assert table.loc[name, column] == pytest.approx(won)
        assert_allclose(table.loc[name, "metric"], metric[name], atol=5e-4)
    moved = (metric["none"] - metric["some"]) / (metric["none"] - metric["all"])
    assert_allclose(table["moved"].to_numpy(float), [1, 0, moved], atol=1e-3)


def test_through_heads_is_what_they_pass_on():
    """Through all heads of layer 0: the second layer's heads as in a run with those patched."""
    model, through = tiny("llama"), ["L0H1", "L0H2"]
    found = direct_effect(model, PAIRS, through=through, progress=False)
    assert found.metadata["through"] == through
    assert np.isnan(found.of("L0H1")).all() and np.isfinite(found.of("L0H0")).all()
    for row, pair in enumerate(PAIRS):
        clean, source, answer = (
            pair["clean_input_ids"],
            pair["corrupted_input_ids"],
            pair["answers"][0],
        )
        name = "blocks.0.attn.hook_z"
        patches = [put(name, value_at_end(model, source, name), (head,)) for head in (1, 2)]
        resid = value_at_end(model, clean, "blocks.1.hook_resid_post")
        whole = centred(last_logits(model, clean), answer)
        for node, hook, index in nodes_of(model):
            if node in through:
                continue
            with model.hooks(fwd_hooks=patches):
                there = written_by_hand(model, clean, hook, index)
            here = written_by_hand(model, clean, hook, index)
            patched = last_logits(
                model, clean, [put("blocks.1.hook_resid_post", resid + there - here)]
            )
            expected = whole - centred(patched, answer)
            assert_allclose(found.of(node)[row], expected, atol=5e-4, err_msg=node)
    assert_allclose(found.of("L0H0"), 0, atol=1e-5)  # beside the patched ones, not behind them


def test_pairs_with_letters_of_their_own_are_measured_on_their_own_letters():
    model = tiny("llama")
    other = (24, 25, 26, 27)
    mixed = [lettered(2, seed=1), lettered(2, seed=2, labels=other), lettered(2, seed=3)]
    from datasets import concatenate_datasets

    together = concatenate_datasets(mixed)
    for effect in (direct_effect, total_effect, logit_attribution):
        found = effect(model, together, progress=False)
        apart = np.concatenate([effect(model, part, progress=False).values for part in mixed])
        assert_allclose(found.values, apart, atol=1e-4)


def test_a_source_that_is_the_same_prompt_has_no_effect():
    model = tiny("qwen3")
    same = lettered(4).remove_columns("corrupted_input_ids")
    same = same.add_column("corrupted_input_ids", list(same["clean_input_ids"]))
    assert_allclose(direct_effect(model, same, progress=False).values, 0, atol=1e-5)
    assert_allclose(total_effect(model, same, progress=False).values, 0, atol=1e-5)


def test_effects_are_those_of_the_model_as_it_is_now():
    """Under an edit that asks where the labels are."""
    model = tiny("llama")
    edit = LowRank.fit(model, lettered(12), ["L1H0", "L1H2"], rank=8)
    before = direct_effect(model, PAIRS, progress=False)
    with model.intervene(edit):
        whole = direct_effect(model, PAIRS, progress=False)
        assert_allclose(whole.values, before.values, atol=1e-4)
    with model.intervene(edit.of_rank(0)):
        none = direct_effect(model, PAIRS, progress=False)
    assert not np.allclose(none.of("L1H0"), before.of("L1H0"), atol=1e-3)
    assert_allclose(none.of("L0H0"), before.of("L0H0"), atol=1e-2)


@pytest.mark.parametrize("family", ["gemma2", "olmo2"])
def test_norms_behind_attention_are_refused_with_the_reason(family):
    for effect in (direct_effect, logit_attribution):
        with pytest.raises(AttributionError, match="a norm or a factor stands between"):
            effect(tiny(family), PAIRS, progress=False)


def test_a_factor_on_the_logits_is_refused(monkeypatch):
    model = fresh("llama")
    head = model.original_model.lm_head
    handle = head.register_forward_hook(lambda module, args, out: 0.5 * out)
    with pytest.raises(AttributionError, match="cap or a factor on the logits"):
        direct_effect(model, PAIRS, progress=False)
    with pytest.raises(AttributionError, match="cap or a factor on the logits"):
        logit_attribution(model, PAIRS, progress=False)
    handle.remove()


def effects(values, names=("L0H0", "L0H1", "MLP0"), kinds=("head", "head", "mlp")) -> NodeEffects:
    heads = [0, 1, None]
    nodes = pd.DataFrame({"node": names, "kind": kinds, "layer": 0, "head": heads})
    nodes = nodes.astype({"layer": "Int64", "head": "Int64"})
    values = np.array(values, float)
    about = {"analysis": "by hand"}
    return NodeEffects(nodes, values, np.full(len(values), 10.0), about)


def test_cover_takes_the_fewest_nodes():
    found = effects([[1, 6, 2], [1, 6, 4]])
    assert found.positive == 10
    assert found.cover(0.6) == ["L0H1"] and found.cover(0.61) == ["L0H1", "MLP0"]
    assert found.cover(1.0) == ["L0H1", "MLP0", "L0H0"]
    assert effects([[-1, -1, -1]]).cover(0.8) == []
    with pytest.raises(AttributionError, match="share=0"):
        found.cover(0)


def test_how_nodes_work_is_read_off_the_two_effects():
    direct, total = effects([[4, 0.5, -3]]), effects([[4.1, 3, -1]])
    table = direct_and_total(direct, total).set_index("node")
    assert table.loc["L0H0", "works"] == "directly"
    assert table.loc["L0H1", "works"] == "through later nodes"
    assert table.loc["MLP0", "works"] == "made up for later"
    assert table.loc["L0H1", "indirect"] == 2.5
    assert table.index.tolist() == ["L0H0", "L0H1", "MLP0"]
    assert set(direct_and_total(effects([[0.1, 0, 0]]), effects([[0, 0.1, 0]]))["works"]) == {
        "hardly"
    }


def test_the_table_has_means_and_spreads_and_the_heads_are_scores():
    found = effects([[1, 6, 2], [3, 6, 4]])
    row = found.table.iloc[0]
    assert row["effect"] == 2 and row["std"] == pytest.approx(2**0.5) and row["n"] == 2
    assert row["low"] == pytest.approx(2 - 1.96) and row["high"] == pytest.approx(2 + 1.96)
    assert found.heads.top(1) == [Head(0, 1)] and found.heads.samples.shape == (2, 2)
    assert "L0H1 +6" in repr(found)
    assert found.plot().data[0].z.tolist() == [[2, 6]]


def test_users_mistakes_are_named():
    model = tiny("llama")
    plain = PAIRS.remove_columns("choices")
    with pytest.raises(AttributionError, match="no column choices.*multiple_choice"):
        direct_effect(model, plain, progress=False)
    wrong = PAIRS.remove_columns("answer").add_column("answer", [" w9"] * len(PAIRS))
    with pytest.raises(AttributionError, match="prompt 0: the answer ' w9' is none"):
        logit_attribution(model, wrong, progress=False)
    double = PAIRS.remove_columns("choices").add_column(
        "choices", [[" w20", " w21", " w22", " w23", " w23"]] * len(PAIRS)
    )
    with pytest.raises(AttributionError, match="a first token of its own"):
        Choices.of(model, double)
    with pytest.raises(AttributionError, match="there is no 'L9H9'"):
        swap_nodes(model, PAIRS, {"one": ["L9H9"]}, progress=False)
    with pytest.raises(HeadError, match="L9H0"):
        direct_effect(model, PAIRS, through=["L9H0"], progress=False)
    with pytest.raises(AttributionError, match="batch_size=0"):
        direct_effect(model, PAIRS, batch_size=0, progress=False)
