"""The report end to end on a tiny model: one whole page, its numbers beside it, resumable."""

import json
import re
from dataclasses import replace

import pandas as pd
import pytest

import interp
from interp import report
from interp.analysis import causality
from interp.analysis.circuits.find import CircuitError
from interp.report import circuits
from interp.report.circuits import Found, find_circuits
from interp.report.plan import PlanError, Texts, heads_to_ablate, lengths_for
from interp.runs import RunError
from interp.tasks.prompts import PromptError

TINY = report.Plan(
    n=6, depths=2, lengths=(160, 192), n_ablation=2, draws=2, n_texts=2, tokens=32, ks=(3,)
)


@pytest.fixture(scope="module")
def model(stories260k):
    return interp.load(stories260k)


@pytest.fixture(scope="module")
def page(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    return report.write(model, out, TINY, progress=False, command="interp report X --out Y")


def markup_of(page) -> str:
    """The page without the scripts in it."""
    return re.sub(r"<script.*?</script>", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_the_page_needs_no_other_file_and_no_network(page):
    text, markup = page.read_text(encoding="utf-8"), markup_of(page)
    assert not re.search(r"""(src|href|url)\s*[=(]\s*["']?(https?:)?//""", markup)
    assert "<link" not in markup and "@import" not in markup
    assert not re.search(r"<script[^>]+src=", text)
    assert text.count("plotly.js v") == 1  # the licence line of the library: inlined once
    assert 4e6 < len(text) < 7e6


def test_every_figure_and_table_has_its_parquet(page):
    named = re.findall(r'<figure id="([\w-]+)">', markup_of(page))
    assert len(named) >= 11 and len(set(named)) == len(named)
    for name in named:
        assert len(pd.read_parquet(page.parent / "figures" / f"{name}.parquet")) > 0
        assert f'href="figures/{name}.parquet"' in markup_of(page)


def test_every_section_is_in_the_contents_and_the_summary(page):
    markup = markup_of(page)
    for name in ("sinks", "needles", "retrieval", "ablation", "circuits", "provenance"):
        assert f'href="#{name}"' in markup and f'<section id="{name}">' in markup
    headlines = json.loads((page.parent / "run.json").read_text())["counts"]["headlines"]
    assert list(headlines) == ["sinks", "needles", "retrieval", "ablation", "circuits"]


def test_the_record_says_how_to_get_it_again(page, model):
    record = json.loads((page.parent / "run.json").read_text())
    assert record["status"] == "complete"
    assert record["settings"]["plan"]["n_ablation"] == 2
    assert record["settings"]["dtype"] == "float32" and record["settings"]["model"] == model.name
    assert len(record["counts"]["ablated"]) == 3
    hashes = {about["sha256"] for about in record["counts"]["prompts"].values()}
    assert len(hashes) == 3, "the heads are chosen and ablated on different prompts"
    assert "interp report X --out Y" in markup_of(page)


def test_a_finished_report_is_written_again_without_running_the_model(page, model, monkeypatch):
    figures = {p.name: pd.read_parquet(p) for p in (page.parent / "figures").iterdir()}

    def ran(*args, **kwargs):
        raise AssertionError("the model ran")

    monkeypatch.setattr(type(model), "last_logits", ran)
    report.write(model, page.parent, TINY, progress=False)
    for name, table in figures.items():
        pd.testing.assert_frame_equal(pd.read_parquet(page.parent / "figures" / name), table)


def test_a_killed_report_goes_on_and_ends_with_the_same_numbers(page, model, tmp_path, monkeypatch):
    evaluate, calls = causality.evaluate, []

    def killed(*args, **kwargs):
        if len(calls) == 5:
            raise KeyboardInterrupt
        calls.append(1)
        return evaluate(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(causality, "evaluate", killed)
        with pytest.raises(KeyboardInterrupt):
            report.write(model, tmp_path, TINY, progress=False)
    assert not (tmp_path / "report.html").exists()
    report.write(model, tmp_path, TINY, progress=False)
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["resumed"]["sessions"] == 2
    ablation = json.loads((tmp_path / "ablation" / "run.json").read_text())
    assert ablation["resumed"]["shards_kept"] == 2
    for whole in (page.parent / "figures").iterdir():
        again = pd.read_parquet(tmp_path / "figures" / whole.name)
        pd.testing.assert_frame_equal(again, pd.read_parquet(whole))


def test_circuits_are_kept_unless_they_are_to_be_found_anew(model, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(circuits, "_find", lambda *args: calls.append(args) or Found(None, None))
    marker = tmp_path / "ioi" / "circuit.json"
    marker.parent.mkdir()
    marker.write_text("{}")
    found = find_circuits(model, TINY, tmp_path, resume=False, progress=False)
    assert len(calls) == len(found) == 2 and not marker.exists()
    marker.parent.mkdir(exist_ok=True)
    marker.write_text("{}")
    with pytest.raises(CircuitError):  # it is read
        find_circuits(model, TINY, tmp_path, resume=True, progress=False)


def test_another_plan_does_not_write_over_a_report(page, model):
    with pytest.raises(RunError, match=r"plan\.seed is 0 there and 1 here.*--overwrite"):
        report.write(model, page.parent, replace(TINY, seed=1), progress=False)


def test_lengths_suit_the_tokens_and_the_window(model):
    lengths = lengths_for(model)
    assert len(lengths) == 3 and 144 <= lengths[0] < lengths[-1] <= model.cfg.n_ctx
    assert report.Plan(tokens=4096).fitted(model).tokens == model.cfg.n_ctx


def test_the_users_own_texts_take_the_place_of_ours(model, tmp_path):
    (tmp_path / "own.txt").write_text("One day a girl found a red ball in the park. " * 40)
    texts = Texts.of(model, replace(TINY, data=str(tmp_path)))
    assert texts.kinds == ["data", "data"] and len(texts.control) == 2
    assert "red ball" in texts.prompts["text"][1]


def test_the_control_is_prose_where_the_tokenizer_has_it(model, mini_llama):
    texts = Texts.of(model, TINY)
    assert texts.kinds == ["prose", "prose", "filler", "filler"] and len(texts.control) == 2
    if (mini_llama / "config.json").exists():
        words = interp.load(mini_llama)
        assert set(Texts.of(words, TINY).kinds) == {"filler"}


@pytest.mark.parametrize(
    "wrong", [{"n": 1}, {"draws": 0}, {"task": "ioi"}, {"batch_size": 0}], ids=str
)
def test_a_plan_that_cannot_be_carried_out(wrong):
    with pytest.raises(PlanError, match=next(iter(wrong))):
        report.Plan(**wrong)


def test_a_needle_that_does_not_fit(model, tmp_path):
    with pytest.raises(PromptError, match="does not fit in 64 tokens"):
        report.write(model, tmp_path, replace(TINY, lengths=(64,)), progress=False)


@pytest.mark.parametrize(("strong", "k"), [(0, 3), (8, 8), (40, 10)])
def test_how_many_heads_are_ablated(strong, k):
    rows = [(i // 20, i % 20, 0.5 if i < strong else 0.01) for i in range(200)]
    scores = interp.HeadScores(pd.DataFrame(rows, columns=["layer", "head", "score"]))
    assert heads_to_ablate(scores, report.Plan()) == (k,)
    assert heads_to_ablate(scores, report.Plan(ks=(5,))) == (5,)
