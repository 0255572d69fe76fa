"""Path patching against its three passes, done by hand: whole models, one sender at a time."""

import warnings
from functools import partial

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.testing import assert_close
from transformer_lens.patching import get_act_patch_direct_path

from interp.analysis.paired import PairError, pair_batch
from interp.analysis.patching.paths import path_patching
from interp.heads import Head, HeadError
from tests.tiny import fresh, random_ids, tiny, unchecked, words

FAMILIES = ["gpt2", "llama", "gpt_neox", "qwen3", "gemma2"]
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


def pairs_of(*lengths: int, seed: int = 0) -> Dataset:
    """Pairs of random tokens that differ from the second on; answers 5 and 7."""
    rows = []
    for clean, corrupted in zip(random_ids(*lengths, seed=seed), random_ids(*lengths, seed=99)):
        corrupted[0] = clean[0]
        last = len(clean) - 1
        rows.append(
            {
                "text": words(clean),
                "clean_input_ids": clean,
                "corrupted_input_ids": corrupted,
                "answers": [5, 7],
                "positions": {"early": 2, "middle": last // 2, "end": last},
            }
        )
    return Dataset.from_list(rows)


MIXED = pairs_of(9, 7, 8)


def own_columns(batch, position) -> torch.Tensor:
    where = torch.zeros_like(batch.attention_mask, dtype=torch.bool)
    for row, named in enumerate(batch.positions):
        if position is None:
            where[row] = batch.attention_mask[row] == 1
        else:
            where[row, named[position] if isinstance(position, str) else position] = True
    return where


@torch.no_grad()
def by_hand(
    model, pairs, receivers, component, senders, sent_at=None, read_at=None, freeze_mlps=False
) -> torch.Tensor:
    """[sender pair]: the three passes with hooks on the whole model, from their description."""
    batch = pair_batch(model, pairs)
    layers, mask = range(len(model.blocks)), batch.attention_mask
    sent, read = own_columns(batch, sent_at), own_columns(batch, read_at)

    def logits_with(ids, hooks):
        with model.hooks(fwd_hooks=hooks):
            return model(ids, attention_mask=mask)[:, -1].float()

    def look(value, hook, place, kept):
        kept[place] = value.clone()

    def values(ids, site):
        kept = {}
        logits_with(
            ids, [(f"blocks.{n}.{site}", partial(look, place=n, kept=kept)) for n in layers]
        )
        return kept

    clean, corrupted = (
        values(ids.input_ids, "attn.hook_z") for ids in (batch.clean, batch.corrupted)
    )
    mlps = values(batch.clean.input_ids, "hook_mlp_out") if freeze_mlps else {}
    group = model.cfg.n_heads // (model.cfg.n_key_value_heads or model.cfg.n_heads)

    def one(sender):
        frozen = {layer: z.clone() for layer, z in clean.items()}
        from_corrupted = corrupted[sender.layer][sent][:, sender.head]
        frozen[sender.layer][:, :, sender.head][sent] = from_corrupted
        hooks, kept = [], {}
        for head in receivers:
            name = f"blocks.{head.layer}.attn.hook_{component}"
            hooks.append((name, partial(look, place=head.layer, kept=kept)))
        for layer in layers:
            hooks.append((f"blocks.{layer}.attn.hook_z", lambda z, hook, n=layer: frozen[n]))
            if freeze_mlps:
                hooks.append((f"blocks.{layer}.hook_mlp_out", lambda m, hook, n=layer: mlps[n]))
        logits = logits_with(batch.clean.input_ids, hooks)
        if not receivers:
            return logits

        def write(value, hook, head):
            index = head.head // group if component in ("k", "v") else head.head
            value = value.clone()
            value[:, :, index][read] = kept[head.layer][:, :, index][read]
            return value

        names = [(f"blocks.{h.layer}.attn.hook_{component}", h) for h in receivers]
        hooks = [(name, partial(write, head=head)) for name, head in names]
        return logits_with(batch.clean.input_ids, hooks)

    logits = torch.stack([one(sender) for sender in senders])
    return logits[..., 5] - logits[..., 7]


def all_heads(model) -> list[Head]:
    return [Head(n, h) for n in range(len(model.blocks)) for h in range(model.cfg.n_heads)]


def ours(model, pairs, *args, **options) -> torch.Tensor:
    found = path_patching(model, pairs, *args, progress=False, **options)
    return torch.tensor(found.values.T)


def moves(found: torch.Tensor, model, pairs) -> torch.Tensor:
    """Which senders change the metric at all."""
    base = ours(model, pairs, senders=["L0H0"])
    batch = pair_batch(model, pairs)
    with torch.no_grad():
        logits = model(batch.clean.input_ids, attention_mask=batch.attention_mask)[:, -1]
    assert base.shape[1] == len(pairs)
    return (found - (logits[:, 5] - logits[:, 7])).abs().amax(1) > 1e-3


@pytest.mark.parametrize("freeze_mlps", [False, True])
@pytest.mark.parametrize("component", ["logits", "q", "k", "v", "z"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_three_passes(family, component, freeze_mlps):
    """Batch of three lengths, left-padded; two receivers."""
    model = tiny(family)
    receivers = [] if component == "logits" else [Head(1, 0), Head(1, 2)]
    senders = [head for head in all_heads(model) if head not in receivers]
    expected = by_hand(model, MIXED, receivers, component, senders, freeze_mlps=freeze_mlps)
    options = {"senders": senders, "freeze_mlps": freeze_mlps}
    if component == "logits":
        found = ours(model, MIXED, **options)
    else:
        found = ours(model, MIXED, receivers, component, **options)
    assert_close(found.float(), expected, **TOLERANCE)
    reached = [head.layer < (1 if receivers else 2) for head in senders]
    assert moves(found, model, MIXED).tolist() == reached


@pytest.fixture(scope="module")
def deep():
    """Four layers, so that receivers lie in several of them and senders between."""
    import transformers as hf

    from interp.model.hooked import load
    from tests.model.families import GROUPED
    from tests.tiny import tokenizer

    torch.manual_seed(3)
    bare = hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED | {"num_hidden_layers": 4})).eval()
    with torch.no_grad():
        for weight in bare.parameters():
            if weight.dim() == 2:
                weight.mul_(6)
    bare.config.architectures = ["LlamaForCausalLM"]
    return load(bare, tokenizer=tokenizer())


@pytest.mark.parametrize("component", ["q", "k", "v", "z"])
def test_receivers_in_several_layers(deep, component):
    receivers = [Head(1, 3), Head(3, 0), Head(3, 1)]
    senders = [head for head in all_heads(deep) if head not in receivers]
    expected = by_hand(deep, MIXED, receivers, component, senders)
    found = ours(deep, MIXED, receivers, component, senders=senders)
    assert_close(found.float(), expected, **TOLERANCE)
    assert moves(found, deep, MIXED).tolist() == [head.layer < 3 for head in senders]


@pytest.mark.parametrize("sent_at, read_at", [("end", None), ("middle", None), (None, "middle"),
                                              ("early", "end"), (-2, -2)])  # fmt: skip
@pytest.mark.parametrize("component", ["logits", "q", "v", "z"])
def test_at_positions(deep, component, sent_at, read_at):
    receivers = [] if component == "logits" else [Head(2, 1), Head(3, 2)]
    senders = [head for head in all_heads(deep) if head not in receivers]
    expected = by_hand(deep, MIXED, receivers, component, senders, sent_at, read_at)
    options = {"senders": senders, "sender_position": sent_at, "receiver_position": read_at}
    args = () if component == "logits" else (receivers, component)
    found = ours(deep, MIXED, *args, **options)
    assert_close(found.float(), expected, **TOLERANCE)
    apart = {sent_at, read_at} == {"early", "end"} and component in "qv"
    at_the_end = sent_at in (None, "end")
    nothing = apart or (component == "logits" and not at_the_end)
    assert bool(moves(found, deep, MIXED).any()) is not nothing


def test_end_is_the_last_token_with_and_without_a_name(deep):
    nameless = MIXED.remove_columns("positions")
    named = ours(deep, MIXED, ["L3H1"], "q", sender_position="end")
    assert_close(ours(deep, nameless, ["L3H1"], "q", sender_position="end"), named, equal_nan=True)
    assert_close(ours(deep, nameless, ["L3H1"], "q", sender_position=-1), named, equal_nan=True)


@pytest.mark.parametrize("batch_size", [1, 5, None])
def test_how_many_at_once_is_no_matter(deep, batch_size):
    together = ours(deep, MIXED, ["L3H1", "L2H0"], "k", batch_size=batch_size)
    singly = torch.cat(
        [ours(deep, MIXED.select([n]), ["L3H1", "L2H0"], "k") for n in range(3)], dim=1
    )
    assert_close(together, singly, equal_nan=True, atol=2e-5, rtol=1e-5)


def test_a_sender_at_or_above_every_receiver_is_exactly_unmoved(deep):
    found = path_patching(deep, MIXED, ["L1H2"], "v", progress=False)
    above = (found.cells["layer"] >= 1).to_numpy() & ~np.isnan(found.values[0])
    assert above.sum() == 11
    assert (found.values[:, above] == found.clean[:, None]).all()
    assert (found.table["moved"][above].abs() < 1e-12).all()


def test_a_sender_among_the_receivers_is_nan(deep):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # intervals of nothing
        found = path_patching(deep, MIXED, ["L1H2", "L3H0"], "q", progress=False).heads
    assert {h for h, s in zip(found.heads, found.table["score"]) if np.isnan(s)} == {
        Head(1, 2), Head(3, 0),
    }  # fmt: skip
    assert np.isfinite(found["L1H1"]["score"])


def test_patching_with_itself_moves_nothing(deep):
    itself = MIXED.remove_columns("corrupted_input_ids").add_column(
        "corrupted_input_ids", MIXED["clean_input_ids"]
    )
    found = path_patching(deep, itself, ["L3H1"], "z", senders="L0H0", progress=False)
    assert (found.values == found.clean[:, None]).all()


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "qwen3"])
def test_all_paths_to_the_logits_add_up_before_the_last_norm(family):
    """MLPs frozen: what the heads write at the last token is a sum (but for norms after them)."""
    model = tiny(family)
    batch = pair_batch(model, MIXED)
    sites = [f"blocks.{n}.{site}" for n in range(2) for site in ("attn.hook_z", "hook_mlp_out")]
    streams = []

    def keep(value, hook):
        streams.append(value[:, -1].clone())

    watched = partial(model.hooks, fwd_hooks=[("blocks.1.hook_resid_post", keep)])

    def values(side):
        kept = {}
        hooks = [(n, lambda x, hook, n=n: kept.update({n: x.clone()})) for n in sites]
        with model.hooks(fwd_hooks=hooks):
            model.run(side.input_ids, side.attention_mask)
        return kept

    corrupted, clean = values(batch.corrupted), values(batch.clean)
    mixed = {name: (corrupted if name.endswith("z") else clean)[name] for name in sites}
    with watched():
        model.run(batch.clean.input_ids, batch.attention_mask)
    with model.hooks(fwd_hooks=[(n, lambda x, hook, n=n: mixed[n]) for n in sites]), watched():
        model.run(batch.clean.input_ids, batch.attention_mask)
    alone, together = streams
    streams.clear()
    with watched():
        path_patching(model, MIXED, freeze_mlps=True, progress=False)
    # beside two layers of four senders: both prompts' runs, and one that tries the replay
    parts = [s.unflatten(0, (4, len(MIXED))) - alone for s in streams if len(s) == 4 * len(MIXED)]
    assert len(parts) == 2
    assert_close(torch.stack(parts).sum((0, 1)), together - alone, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("component", ["q", "k", "v"])
def test_a_direct_path_is_that_of_transformer_lens(component):
    """One receiver, MLPs frozen, no grouped queries: the two definitions coincide.

    TransformerLens adds the difference of what the sender writes to the receiver's own copy of the
    residual stream, for each receiver apart; its `clean` run is where values come from.
    """
    model = fresh("gpt2")
    pairs = pairs_of(8, 8, 8)
    batch = pair_batch(model, pairs)
    caches = [
        model.run_with_cache(ids.input_ids, return_type=None)[1]
        for ids in (batch.corrupted, batch.clean)
    ]

    def metric(logits):
        return (logits[:, -1, 5] - logits[:, -1, 7]).mean()

    with torch.no_grad():
        expected = get_act_patch_direct_path(
            model, batch.clean.input_ids, *caches, metric, 0, 2, component, verbose=False
        )
    for head in range(4):
        found = ours(model, pairs, [Head(1, head)], component, senders=["L0H2"], freeze_mlps=True)
        assert_close(found.mean().float(), expected[1, head], atol=1e-4, rtol=1e-4)
    assert expected[1].std() > 1e-3


def test_an_intervention_acts_in_all_passes():
    import interp

    model = tiny("llama")
    receivers, senders = [Head(1, 0)], [Head(0, 0), Head(0, 3)]
    with model.intervene(interp.Ablate(["L0H1"])):
        expected = by_hand(model, MIXED, receivers, "q", senders)
        found = ours(model, MIXED, receivers, "q", senders=senders)
    assert_close(found.float(), expected, **TOLERANCE)
    assert not np.allclose(found, ours(model, MIXED, receivers, "q", senders=senders), atol=1e-3)


def test_the_model_is_as_it_was_after_a_pass_that_stops_early(deep):
    batch = pair_batch(deep, MIXED)

    def logits():
        with torch.no_grad():
            return deep(batch.clean.input_ids, attention_mask=batch.attention_mask)

    before = logits()
    path_patching(deep, MIXED, ["L1H0"], "k", progress=False)
    assert torch.equal(logits(), before)
    assert not any(point.has_hooks() for point in deep.hook_dict.values())


def test_a_killed_run_goes_on(deep, tmp_path):
    many = pairs_of(*[6, 7] * 10)
    whole = ours(deep, many, ["L3H0"], "q", layers=[0])
    options = {"layers": [0], "out": tmp_path}
    ours(deep, many, ["L3H0"], "q", **options)
    shards = sorted((tmp_path / "shards").iterdir())
    assert len(shards) == 2
    shards[0].unlink()
    assert_close(ours(deep, many, ["L3H0"], "q", **options), whole)


def test_layers_and_senders_choose_the_cells(deep):
    found = path_patching(deep, MIXED, senders="L0H1 L1H0 L2H2", layers=[0, 2], progress=False)
    assert found.cells.to_numpy().tolist() == [[0, 1], [2, 2]]
    assert found.metadata["analysis"] == "path_patching"
    assert found.metadata["receivers"] == "logits"


@pytest.mark.parametrize(
    "args, options, words",
    [
        ((["L1H0"],), {}, "component=None.*q, k, v, z"),
        ((["L1H0"], "pattern"), {}, "component='pattern'"),
        (("logits", "q"), {}, "logits have none"),
        (([], "q"), {}, "receivers: no heads"),
        ((), {"sender_position": "S9"}, "'S9'.*early, end, middle"),
        ((), {"sender_position": 3}, "position 3.*from the end"),
        ((), {"sender_position": -8}, "position -8.*only 7 tokens"),
        ((), {"batch_size": 0}, "batch_size=0"),
        ((), {"senders": ["L1H0"], "layers": [0]}, "senders"),
    ],
)
def test_what_cannot_be_is_said(args, options, words):
    with pytest.raises(PairError, match=words), unchecked():
        path_patching(tiny("llama"), MIXED, *args, progress=False, **options)


def test_heads_that_the_model_lacks_are_named():
    for options in ({"receivers": ["L9H0"], "component": "q"}, {"senders": ["L0H9"]}):
        with pytest.raises(HeadError, match="L9H0|L0H9"):
            path_patching(tiny("llama"), MIXED, progress=False, **options)
    with pytest.raises(HeadError, match="layers: 7"):
        path_patching(tiny("llama"), MIXED, layers=[7], progress=False)
