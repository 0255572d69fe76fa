"""inspect_ai on hooked models, against direct calls."""

import json
import subprocess
import sys

import pytest
import torch

pytest.importorskip("inspect_ai", reason="needs the extra `harness`")

import anyio
from inspect_ai import Task
from inspect_ai import eval as run_task
from inspect_ai.dataset import Sample
from inspect_ai.model import (
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageUser,
    ContentImage,
    ContentText,
    GenerateConfig,
    Model,
    ModelOutput,
    get_model,
)
from inspect_ai.scorer import match
from inspect_ai.solver import generate
from inspect_ai.tool import ToolInfo

import interp
from interp.heads import HeadError
from interp.integrations.inspect import InspectError, InterpAPI
from interp.intervention.base import InterventionError
from tests.conftest import ROOT
from tests.integrations.test_lm_eval import CONTEXTS, EDITS, Twice
from tests.tiny import fresh, random_ids, tiny, tokenizer, words

TASKS = ROOT / "data" / "tasks"
TEMPLATE = "{% for m in messages %}{{ m['role'][:1] }}{{ m['content'] }} {% endfor %}w9"


def api(model=None, **options) -> InterpAPI:
    return InterpAPI("tiny", hooked=model or tiny("llama"), **options)


def answer(provider: InterpAPI, *messages, tools=(), **config) -> ModelOutput:
    """What it answers to messages, or to texts of a user."""
    given = [ChatMessageUser(content=m) if isinstance(m, str) else m for m in messages]
    settings = GenerateConfig(**{"max_tokens": 6} | config)
    return anyio.run(provider.generate, given, list(tools), "auto", settings)


def greedily(model, text: str, edits=(), n: int = 6) -> list[int]:
    batch = model.batch([tokenizer()(text).input_ids])
    with model.intervene(edits):
        return model.continue_greedily(batch.input_ids, batch.attention_mask, n)[0].tolist()


def decoded(ids: list[int]) -> str:
    """Up to an end token, which is token 2."""
    ids = ids[: ids.index(2)] if 2 in ids else ids
    return tokenizer().decode(ids, skip_special_tokens=True)


# What it writes


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_it_writes_what_a_direct_call_writes(family, name):
    model, found = tiny(family), []
    provider = api(model, intervention=EDITS[name])
    for context in CONTEXTS:
        output = answer(provider, context)
        expected = greedily(model, context, EDITS[name])
        assert output.completion == decoded(expected)
        assert output.stop_reason == ("stop" if 2 in expected else "max_tokens")
        assert output.usage.input_tokens == len(context.split())
        found.append(output.completion)
    assert not model.applied
    if name not in ("none", "the prompt's last token"):
        assert found != [answer(api(model), context).completion for context in CONTEXTS]


def test_an_output_says_what_was_applied():
    edit = EDITS["everywhere"]
    output = answer(api(intervention=edit), "w5 w6")
    kept = {"type": "Ablate", "digest": edit.digest, "words": repr(edit)}
    assert output.metadata == {"interventions": [kept]} and output.model == "tiny"
    assert answer(api(), "w5 w6").metadata == {"interventions": []}


def test_prompts_are_changed_before_they_go_in():
    context = CONTEXTS[0]
    output = answer(api(intervention=Twice()), context)
    assert output.completion == answer(api(), f"{context} {context}").completion
    assert output.usage.input_tokens == 2 * len(context.split())


def test_messages_are_one_below_the_other_or_in_the_chat_template():
    model = fresh("llama")
    turns = [
        ChatMessageSystem(content="w3"),
        ChatMessageUser(content=[ContentText(text="w5 w6")]),
        ChatMessageAssistant(content="w7"),
        ChatMessageUser(content="w8"),
    ]
    plain = answer(api(model), *turns).completion
    assert plain == answer(api(model), "w3\nw5 w6\nw7\nw8").completion
    with pytest.raises(InspectError, match="chat=true.*no chat template"):
        api(model, chat=True)
    model.tokenizer.chat_template = TEMPLATE
    chat = answer(api(model), *turns)
    rendered = "sw3 uw5 w6 aw7 uw8 w9"
    assert chat.usage.input_tokens == len(rendered.split())
    assert chat.completion == decoded(greedily(model, rendered))
    assert answer(api(model, chat=False), *turns).completion == plain


def test_a_chats_special_tokens_are_not_put_there_twice():
    model = fresh("llama")
    model.tokenizer.chat_template = "<s>w5 w6"
    model.tokenizer.add_bos_token = True
    output = answer(api(model), "w3")
    assert output.usage.input_tokens == 3


# When it stops


def test_it_stops_where_it_is_told():
    whole = answer(api(), CONTEXTS[0]).completion.split()
    stop = whole[2]
    output = answer(api(), CONTEXTS[0], stop_seqs=["w0", stop])
    assert output.completion.split() == whole[: whole.index(stop)]
    assert output.stop_reason == "stop"
    assert answer(api(), CONTEXTS[0], max_tokens=1).completion.split() == whole[:1]


def test_the_window_ends_it_and_a_longer_prompt_is_refused():
    window = tiny("llama").cfg.n_ctx
    text = words(random_ids(window - 3, seed=5)[0])
    output = answer(api(), text, max_tokens=50)
    assert output.stop_reason in ("model_length", "stop") and output.usage.output_tokens <= 3
    with pytest.raises(InspectError, match=f"{window} tokens, and the window .* has {window}"):
        answer(api(), words(random_ids(window)[0]))


# Probabilities, and drawing by them


@pytest.mark.parametrize("name", ["none", "everywhere"])
def test_log_probabilities_are_those_of_a_direct_call(name):
    model, context = tiny("llama"), CONTEXTS[1]
    output = answer(api(intervention=EDITS[name]), context, logprobs=True, top_logprobs=3)
    tokens = greedily(model, context, EDITS[name])
    ids = tokenizer()(context).input_ids
    with torch.no_grad(), model.intervene(EDITS[name]), model.spans(None, [len(ids)]):
        logits = model(torch.tensor([ids + tokens]))[0, len(ids) - 1 :].log_softmax(-1)
    content = output.choices[0].logprobs.content
    tokens = tokens[: len(content)]  # it stops at an end token
    assert [one.token for one in content] == tokenizer().convert_ids_to_tokens(tokens)
    for n, one in enumerate(content):
        assert one.logprob == pytest.approx(float(logits[n, tokens[n]]), abs=1e-4)
        best = logits[n].topk(3)
        assert [top.logprob for top in one.top_logprobs] == pytest.approx(
            best.values.tolist(), abs=1e-4
        )
        assert one.top_logprobs[0].token == one.token  # greedy


def test_drawing_repeats_with_a_seed_and_leaves_others_alone():
    before = torch.get_rng_state()
    drawn = [
        answer(api(), CONTEXTS[0], temperature=2.0, seed=seed).completion for seed in (3, 3, 4)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert torch.equal(torch.get_rng_state(), before)
    greedy = answer(api(), CONTEXTS[0]).completion
    assert answer(api(), CONTEXTS[0], temperature=0.0, top_p=0.3).completion == greedy
    assert answer(api(), CONTEXTS[0], top_k=1).completion == greedy


# What is refused


@pytest.mark.parametrize(
    "config, said",
    [
        ({"num_choices": 2}, "num_choices: not done"),
        ({"frequency_penalty": 0.5}, "frequency_penalty: not done"),
        ({"logit_bias": {3: 1.0}}, "logit_bias: not done"),
    ],
)
def test_what_would_be_ignored_is_refused(config, said):
    with pytest.raises(InspectError, match=said):
        answer(api(), "w5", **config)


def test_tools_and_pictures_are_refused():
    tool = ToolInfo(name="search", description="looks things up")
    with pytest.raises(InspectError, match="'search'.*no tools"):
        answer(api(), "w5", tools=[tool])
    picture = ChatMessageUser(content=[ContentText(text="w5"), ContentImage(image="cat.png")])
    with pytest.raises(InspectError, match="a message with image"):
        answer(api(), picture)


@pytest.mark.parametrize(
    "edit, error, said",
    [
        ("runs/none", InterventionError, "'runs/none': no intervention.json"),
        (interp.Ablate(["L9H0"]), HeadError, "L9H0"),
    ],
)
def test_what_does_not_fit_is_told_before_anything_runs(edit, error, said):
    with pytest.raises(error, match=said):
        api(intervention=edit)


def test_a_model_without_a_tokenizer_is_refused():
    model = fresh("llama")
    model._tokenizer = None
    with pytest.raises(InspectError, match="no tokenizer"):
        api(model)


# Through the harness


def letters_task(n: int) -> Task:
    lines = (TASKS / "letters.jsonl").read_text(encoding="utf-8").splitlines()[:n]
    rows = [json.loads(line) for line in lines]
    samples = [Sample(input=r["text"], target=r["choices"][r["answer"]]) for r in rows]
    return Task(dataset=samples, solver=generate(), scorer=match(location="begin"))


@pytest.fixture(scope="module")
def mini(mini_llama):
    return interp.load(mini_llama, device="cpu")


@pytest.fixture(scope="module")
def letters(mini):
    """Heads that matter for letters, in the model that lies here."""
    return interp.Ablate([(layer, head) for layer in (2, 3) for head in range(8)])


def named(model, edit=None) -> Model:
    """As one gets it in Python, from objects."""
    return get_model("interp/mini-llama", hooked=model, intervention=edit, memoize=False)


def ran(task: Task, model, folder, **options):
    """The log of a run, whose samples are asked for all at once."""
    settings = {"display": "none", "log_dir": str(folder), "max_tokens": 1, "max_samples": 8}
    log = run_task(task, model=model, **settings, **options)[0]
    assert log.status == "success", log.error
    return log


def written(log) -> list[str]:
    return [sample.output.completion for sample in log.samples]


def test_it_is_found_by_its_name():
    found = get_model("interp/mini-llama", memoize=False, device="cpu")
    assert isinstance(found.api, InterpAPI) and str(found) == "interp/mini-llama"
    assert found.api.max_connections() == 1


def test_a_task_differs_as_our_own_evaluation_says(mini, letters, tmp_path):
    n = 16
    rows = [sample.input for sample in letters_task(n).dataset]
    answers = [sample.target for sample in letters_task(n).dataset]
    prompts = interp.tasks.from_examples(
        mini, [{"text": text, "answer": right} for text, right in zip(rows, answers)]
    )
    conditions = {"none": [], "edit": letters}
    ours = interp.compare(mini, prompts, conditions, generate=True, progress=False)
    for name, edit in conditions.items():
        log = ran(letters_task(n), named(mini, edit), tmp_path)
        scores = [sample.scores["match"].value == "C" for sample in log.samples]
        assert scores == ours.evaluations[name].table["correct"].tolist()
        kept = [sample.output.metadata["interventions"] for sample in log.samples]
        assert {len(one) for one in kept} == {1 if name == "edit" else 0}
    accuracy = [ours.evaluations[name].accuracy for name in conditions]
    assert accuracy[0] > accuracy[1] + 0.3


def test_a_folder_is_applied_and_kept_in_the_log(letters, mini, tmp_path):
    folder = letters.save_pretrained(tmp_path / "edit")
    options = {"intervention": str(folder), "device": "cpu"}
    log = ran(letters_task(4), "interp/mini-llama", tmp_path / "logs", model_args=options)
    assert log.eval.model_args["intervention"] == str(folder)
    assert log.samples[0].output.metadata["interventions"][0]["digest"] == letters.digest
    by_object = ran(letters_task(4), named(mini, letters), tmp_path / "logs")
    assert written(log) == written(by_object)


def test_answers_of_another_intervention_are_not_looked_up(mini, letters, tmp_path, monkeypatch):
    monkeypatch.setenv("INSPECT_CACHE_DIR", str(tmp_path / "cache"))
    found = {}
    for name, edit in {"none": [], "edit": letters, "again": letters}.items():
        log = ran(letters_task(6), named(mini, edit), tmp_path, cache=True)
        found[name] = written(log)
    assert found["edit"] == found["again"] != found["none"]
    monkeypatch.setattr(InterpAPI, "_answer", None)  # the cache is read all the same
    assert written(ran(letters_task(6), named(mini), tmp_path, cache=True)) == found["none"]


@pytest.mark.slow
def test_the_command_line_runs_the_needles(tmp_path):
    edit = interp.Ablate(["L0H0"]).save_pretrained(tmp_path / "edit")
    command = [
        sys.executable, "-m", "inspect_ai", "eval", "data/tasks/inspect_needles.py",
        "--model", "interp/mini-llama", "-M", f"intervention={edit}", "-M", "device=cpu",
        "--limit", "2", "--display", "plain", "--log-dir", str(tmp_path), "--log-format", "json",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    log = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert log["status"] == "success" and log["eval"]["model_args"]["intervention"] == str(edit)
