"""The residual graph, runs with ablated edges, and gradients at readers, against a slow forward."""

import itertools

import pytest
import torch
import transformers as hf

from interp.heads import Head
from interp.intervention.ablate import Ablate
from interp.model.gradients import GradientError, input_gradients, reader_hooks, trace
from interp.model.graph import Graph, GraphError
from interp.model.hooked import load
from interp.model.replay import ReplayError
from interp.model.rewire import Rewiring, writes_of
from tests.model.families import COMMON, GROUPED
from tests.model.rebuilt import FAMILIES, Rebuilt, everything, with_ablated
from tests.tiny import fresh, random_ids, tiny, tokenizer

REFUSED = ["gemma2", "gemma3", "olmo2", "bert", "vit"]


def two_runs(family, dtype=torch.float32):
    """A model, and two prompts of two lengths on each side; they differ from column 4 on."""
    model = tiny(family, dtype)
    clean = random_ids(9, 6)
    corrupted = [list(ids) for ids in clean]
    for ids, (place, token) in zip(corrupted, [(4, 7), (2, 11)]):
        ids[place], ids[-1] = token, 13
    return model, model.batch(clean), model.batch(corrupted)


def random_masks(graph, *shares, seed=0):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(len(shares), *graph.possible.shape, generator=generator)
    return (drawn < torch.tensor(shares)[:, None, None]) & graph.possible


def rewiring(family, start=0, dtype=torch.float32):
    model, clean, corrupted = two_runs(family, dtype)
    graph = Graph.of(model)
    source, _ = writes_of(model, graph, corrupted.input_ids, corrupted.attention_mask)
    return Rewiring.of(model, graph, clean.input_ids, clean.attention_mask, source, start)


# The graph itself.


def test_gpt2_small_has_the_edges_that_the_literature_counts():
    assert Graph(12, 12, 12).n_edges == 32_491


@pytest.mark.parametrize("parallel", [False, True])
def test_the_number_of_edges_is_that_of_the_formula(parallel):
    n_layers, heads, groups = 3, 4, 2
    own = 0 if parallel else heads
    expected = sum(
        (heads + 2 * groups) * (1 + k * (heads + 1)) + (1 + k * (heads + 1) + own)
        for k in range(n_layers)
    )
    graph = Graph(n_layers, heads, groups, parallel)
    assert graph.n_edges == expected + 1 + n_layers * (heads + 1)
    assert graph.n_edges == int(graph.possible.sum()) == len(set(graph.edges))


@pytest.mark.parametrize("parallel", [False, True])
def test_edges_lead_from_earlier_to_later_only(parallel):
    def time(name, reads):
        if name in ("embed", "logits"):
            return -1 if name == "embed" else 1e9
        number = int(name.removeprefix("MLP").split("H")[0].removeprefix("L"))
        if "MLP" not in name:
            return 4 * number + (0 if reads else 1)
        return 4 * number + ((0 if parallel else 2) if reads else 3)

    graph = Graph(2, 2, 1, parallel)
    for writer, reader in itertools.product(graph.writers, graph.readers):
        there = (writer, reader) in set(graph.edges)
        assert there == (time(writer, False) < time(reader, True)), (writer, reader)


def test_a_mask_and_its_edges_are_the_same():
    graph = Graph(2, 4, 2)
    mask = random_masks(graph, 0.4)[0]
    assert torch.equal(graph.mask(graph.edges_of(mask)), mask)


def test_unknown_and_impossible_edges_are_named():
    graph = Graph(2, 4, 2)
    with pytest.raises(GraphError, match=r"no reader is called 'L1H3\.k'.*L1H1\.k"):
        graph.mask([("embed", "L1H3.k")])  # there are two key-value heads
    with pytest.raises(GraphError, match="no writer is called 'MLP7'"):
        graph.mask([("MLP7", "logits")])
    with pytest.raises(GraphError, match=r"L0H1\.q comes before MLP0"):
        graph.mask([("MLP0", "L0H1.q")])


@pytest.mark.parametrize("parallel", [False, True])
def test_live_edges_are_those_on_a_path_from_the_embedding_to_the_logits(parallel):
    graph = Graph(2, 4, 2, parallel)
    group = {f"L{k}H{h}": f"L{k}H{h // 2}" for k in range(2) for h in range(4)}

    def enters(writer):  # the readers that feed a writer
        if writer.startswith("MLP"):
            return [writer]
        return [f"{writer}.q", f"{group[writer]}.k", f"{group[writer]}.v"]

    found, pruned = set(), 0
    for kept in random_masks(graph, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, seed=2):
        edges, paths = graph.edges_of(kept), []

        def walk(path, at, edges=edges, paths=paths):
            for writer, reader in edges:
                if reader not in at:
                    continue
                if writer == "embed":
                    paths.append([*path, (writer, reader)])
                else:
                    walk([*path, (writer, reader)], enters(writer))

        walk([], ["logits"])
        on_paths = {edge for path in paths for edge in path}
        assert set(graph.edges_of(graph.live(kept))) == on_paths
        pruned += len(edges) - len(on_paths)
        found |= on_paths
    assert {reader for _, reader in found} >= {"MLP0", "MLP1", "L1H0.q", "L0H1.v", "L1H0.k"}
    assert pruned > 20


# Which models are such graphs.


@pytest.mark.parametrize("family", [*FAMILIES, "phi3", "opt", "gpt_oss"])
def test_a_decoder_with_norms_before_its_halves_is_a_graph(family):
    config = tiny(family).original_model.config
    graph = Graph.of(tiny(family))
    kv = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    assert (graph.n_layers, graph.n_heads, graph.n_kv_heads) == (2, 4, kv)
    assert graph.parallel == (family in ("gpt_neox", "gptj"))


@pytest.mark.parametrize("family", REFUSED)
def test_other_architectures_are_refused_by_name(family):
    model = tiny(family)
    with pytest.raises(GraphError, match=f"{model.name}.* has no graph of edges"):
        Graph.of(model)


def hooked(kind, config):
    torch.manual_seed(0)
    model = kind(config).eval()
    model.config.architectures = [kind.__name__]
    return load(model, tokenizer=tokenizer())


def test_a_factor_on_what_blocks_write_is_found_out():
    config = hf.GraniteConfig(**GROUPED, residual_multiplier=0.3)
    with pytest.raises(GraphError, match="layer 0 is off by"):
        Graph.of(hooked(hf.GraniteForCausalLM, config))


def test_a_norm_after_the_mlp_only_is_found_out():
    config = {key: COMMON[key] for key in COMMON if key != "intermediate_size"}
    config |= {"ffn_dim": 48, "word_embed_proj_dim": 32, "do_layer_norm_before": False}
    with pytest.raises(GraphError, match="no graph of edges"):
        Graph.of(hooked(hf.OPTForCausalLM, hf.OPTConfig(**config)))


class Push:
    """Adds something that no head or MLP wrote."""

    def hooks(self, model):
        yield "blocks.0.hook_resid_mid", lambda value, hook: value + 1


def test_an_intervention_on_the_stream_is_found_out():
    model = tiny("llama")
    with model.intervene(Push()), pytest.raises(GraphError, match=r"layer 0 is off.*intervention"):
        Graph.of(model)


# Runs with ablated edges.


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_is_the_model(family):
    model, clean, _ = two_runs(family)
    slow = Rebuilt(family, clean.input_ids, clean.attention_mask)
    with torch.no_grad():
        logits, written = slow.run(everything)
    torch.testing.assert_close(logits, slow.plain, atol=1e-5, rtol=1e-5)
    graph = Graph.of(model)
    writes, ours = writes_of(model, graph, clean.input_ids, clean.attention_mask)
    torch.testing.assert_close(ours, slow.plain, atol=1e-5, rtol=1e-5)
    real = clean.attention_mask.bool()
    for name, value in zip(graph.writers, writes):
        torch.testing.assert_close(value[real], written[name][real], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_any_edges_ablated_equals_rebuilding_every_input_by_hand(family):
    _, clean, corrupted = two_runs(family)
    ours = rewiring(family)
    masks = random_masks(ours.graph, 0.03, 0.3, 0.7, 0.97)
    slow = Rebuilt(family, clean.input_ids, clean.attention_mask)
    with torch.no_grad():
        other = Rebuilt(family, corrupted.input_ids, corrupted.attention_mask)
        _, source = other.run(everything)
        expected = [
            slow.run(with_ablated(set(ours.graph.edges_of(mask)), source))[0] for mask in masks
        ]
    apart = (expected[0] - slow.plain).abs().max()
    assert apart > 1e-3  # the edges matter
    torch.testing.assert_close(ours.run(masks), torch.stack(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_single_edge_of_each_kind_equals_the_slow_run(family):
    _, clean, corrupted = two_runs(family)
    ours = rewiring(family, start=4)
    graph = ours.graph
    edges = [("embed", "L0H1.k"), ("embed", "MLP0"), ("L0H2", "L1H0.v"), ("L0H0", "L1H3.q")]
    edges += [("MLP0", "MLP1"), ("MLP1", "logits"), ("L1H1", "logits"), ("embed", "logits")]
    if not graph.parallel:
        edges.append(("L1H2", "MLP1"))
    slow = Rebuilt(family, clean.input_ids, clean.attention_mask)
    with torch.no_grad():
        _, source = Rebuilt(family, corrupted.input_ids, corrupted.attention_mask).run(everything)
        for edge in edges:
            expected, _ = slow.run(with_ablated({edge}, source))
            found = ours.run(graph.mask([edge])[None])[0]
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", [*FAMILIES, "phi3", "opt", "gpt_oss"])
def test_no_edge_ablated_is_the_one_run_and_every_edge_the_other(family):
    model, clean, corrupted = two_runs(family)
    ends = [model.last_logits(x.input_ids, x.attention_mask, 1)[:, -1] for x in (clean, corrupted)]
    assert (ends[0] - ends[1]).abs().max() > 0.1
    for start in (0, 2):
        ours = rewiring(family, start)
        none = torch.zeros_like(ours.graph.possible)
        found = ours.run(torch.stack([none, ours.graph.possible]))
        torch.testing.assert_close(found, torch.stack(ends), atol=1e-5, rtol=1e-5)
        # without a pass at all
        torch.testing.assert_close(ours.run(none[None])[0], ends[0], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "gpt_neox"])
def test_leaving_out_what_both_runs_share_changes_nothing(family):
    # the prompts differ from column 4 on
    early, late = rewiring(family, 0), rewiring(family, 4)
    masks = random_masks(early.graph, 0.1, 0.6)
    masks[:, : early.graph.n_layer_readers] = False  # the first layer is passed over
    torch.testing.assert_close(late.run(masks), early.run(masks), atol=1e-5, rtol=1e-5)


def test_stacked_edge_sets_are_those_run_one_by_one():
    ours = rewiring("llama")
    masks = random_masks(ours.graph, 0.0, 0.1, 0.5, 1.0)
    single = torch.cat([ours.run(mask[None]) for mask in masks])
    torch.testing.assert_close(ours.run(masks), single, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_one_source_for_all_prompts_and_positions(family):
    model, clean, _ = two_runs(family)
    graph = Graph.of(model)
    ids, mask = clean.input_ids, clean.attention_mask
    constant = torch.randn(len(graph.writers), 1, 1, model.cfg.d_model)
    ours = Rewiring.of(model, graph, ids, mask, constant)
    chosen = random_masks(graph, 0.4)
    slow = Rebuilt(family, ids, mask)
    with torch.no_grad():
        plain = slow.run(everything)[1]
        # padding is left as it is
        source = {
            name: torch.where(mask.bool()[..., None], value, plain[name])
            for name, value in zip(graph.writers, constant)
        }
        expected, _ = slow.run(with_ablated(set(graph.edges_of(chosen[0])), source))
    torch.testing.assert_close(ours.run(chosen)[0], expected, atol=1e-5, rtol=1e-5)


def test_edges_are_ablated_in_the_model_as_interventions_leave_it():
    model, clean, corrupted = two_runs("llama")
    with model.intervene(Ablate([Head(0, 1), Head(1, 2)])):
        graph = Graph.of(model)
        source, logits = writes_of(model, graph, corrupted.input_ids, corrupted.attention_mask)
        ours = Rewiring.of(model, graph, clean.input_ids, clean.attention_mask, source, 2)
        found = ours.run(graph.possible[None])[0]
        assert ours.start == 0
    assert float(source[graph.writers.index("L1H2")].abs().max()) == 0
    torch.testing.assert_close(found, logits, atol=1e-5, rtol=1e-5)
    outside = model.last_logits(corrupted.input_ids, corrupted.attention_mask, 1)[:, -1]
    assert (outside - logits).abs().max() > 1e-3


def test_edges_that_are_not_there_and_models_in_training_are_errors():
    ours = rewiring("gpt2")
    with pytest.raises(GraphError, match="not in the graph"):
        ours.run(torch.ones_like(ours.graph.possible)[None])
    model = fresh("gpt2")
    graph = Graph.of(model)
    model.original_model.train()
    ids = model.batch(random_ids(5)).input_ids
    with pytest.raises(ReplayError, match=r"model\.eval"):
        Rewiring.of(
            model, graph, ids, torch.ones_like(ids), torch.zeros(len(graph.writers), 1, 1, 1)
        )


# Gradients at readers.


def answer(logits):
    return logits[:, 5] - logits[:, 9]


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_at_readers_are_autograds_with_split_inputs(family):
    model, clean, _ = two_runs(family)
    graph = Graph.of(model)
    slow = Rebuilt(family, clean.input_ids, clean.attention_mask)
    nothing = {name: torch.zeros_like(slow.embedded).requires_grad_() for name in graph.readers}
    logits, _ = slow.run(lambda reader, written: everything(reader, written) + nothing[reader])
    expected = torch.autograd.grad(answer(logits).sum(), list(nothing.values()))
    names, looks = reader_hooks(graph, model)
    traced = trace(model, clean.input_ids, clean.attention_mask, names, answer, looks=looks)
    found = {
        name: value
        for readers, values in input_gradients(graph, model, traced)
        for name, value in zip(graph.readers[readers], values)
    }
    assert list(found) == graph.readers
    for name, value in zip(graph.readers, expected):
        scale = float(value.abs().max())
        assert scale > 1e-4
        torch.testing.assert_close(found[name], value, atol=1e-4 * scale, rtol=1e-3)


def test_gradients_need_no_trainable_weights_and_no_grad_mode():
    model, clean, _ = two_runs("llama")
    args = (clean.input_ids, clean.attention_mask, ["blocks.1.attn.hook_z"], answer)
    expected = trace(model, *args).gradients
    frozen = fresh("llama")
    for parameter in frozen.original_model.parameters():
        parameter.requires_grad_(False)
    with torch.no_grad():
        found = trace(frozen, *args)
    torch.testing.assert_close(found.gradients, expected)
    assert not found.logits.requires_grad
    assert all(parameter.grad is None for parameter in model.original_model.parameters())


def test_gradients_that_cannot_be_had_are_errors_that_say_why():
    model, clean, _ = two_runs("llama")
    args = (clean.input_ids, clean.attention_mask, ["blocks.1.attn.hook_z"])
    with torch.inference_mode(), pytest.raises(GradientError, match="inference_mode"):
        trace(model, *args, answer)
    with pytest.raises(GradientError, match="no gradient"):
        trace(model, *args, lambda logits: (logits[:, 5] > logits[:, 9]).float())
    training = fresh("llama")
    training.original_model.train()
    with pytest.raises(GradientError, match=r"model\.eval"):
        trace(training, *args, answer)
