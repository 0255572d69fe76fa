"""The command line: what it prints where, and its exit statuses."""

import json
import shutil

import pandas as pd
import pytest
import torch
import typer
from safetensors.torch import load_file, save_file

import interp
from interp import cli, zoo
from interp.errors import UserError


def fail_with(monkeypatch, error):
    """Make `interp models` raise `error`."""

    def models():
        raise error

    monkeypatch.setattr(zoo, "models", models)


def one_line(capsys) -> str:
    """The one line on stderr of a command that failed."""
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1 and err.startswith("error: ")
    return err


def test_models_lists_names_and_licences(capsys):
    assert cli.main(["models"]) == 0
    out = capsys.readouterr().out
    assert "smollm2-135m" in out and "Apache-2.0" in out and "mini-llama" in out


def test_models_as_json(capsys):
    assert cli.main(["models", "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)
    assert [e["name"] for e in entries][:1] == ["smollm2-135m"]
    assert {"installed", "folder", "source", "size", "licence", "description"} <= set(entries[0])


def test_models_get_prints_the_folder(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(zoo, "get", lambda name: tmp_path / name)
    assert cli.main(["models", "get", "mini-llama"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "mini-llama")


def test_an_unknown_model_is_one_line_with_the_nearest_name(capsys):
    assert cli.main(["models", "get", "mini-lama"]) == 2
    error = one_line(capsys)
    assert "'mini-lama'" in error and "Did you mean mini-llama" in error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["modles"], ["'modles'", "'models'"]),
        (["models", "get"], ["Missing argument", "interp models get --help"]),
        (["models", "--jsn"], ["--jsn", "--json"]),
    ],
    ids=["command", "argument", "option"],
)
def test_a_usage_error_is_one_line_and_status_2(capsys, arguments, words):
    assert cli.main(arguments) == 2
    error = one_line(capsys)
    assert all(word in error for word in words)


def test_a_users_mistake_is_one_line_even_if_its_message_is_not(capsys, monkeypatch):
    fail_with(monkeypatch, UserError("threshold=3:\n  between 0 and 1"))
    assert cli.main(["models"]) == 2
    assert one_line(capsys) == "error: threshold=3: between 0 and 1\n"


def test_a_file_that_cannot_be_written_is_named(capsys, monkeypatch):
    fail_with(monkeypatch, PermissionError(13, "Permission denied", "/some/where"))
    assert cli.main(["models"]) == 2
    assert "/some/where: Permission denied" in one_line(capsys)


def test_our_own_mistake_is_status_1_and_points_to_debug(capsys, monkeypatch):
    fail_with(monkeypatch, KeyError("pattern"))
    assert cli.main(["models"]) == 1
    assert "KeyError: 'pattern' (add --debug" in one_line(capsys)


@pytest.mark.parametrize("arguments", [["--debug", "models"], ["models", "--debug"]])
def test_debug_raises_wherever_it_stands(monkeypatch, arguments):
    fail_with(monkeypatch, UserError("no"))
    with pytest.raises(UserError):
        cli.main(arguments)


def test_an_interrupt_is_status_130(monkeypatch):
    fail_with(monkeypatch, KeyboardInterrupt())
    assert cli.main(["models"]) == 130


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("interp ")


def commands(command, path=("interp",)):
    """Every command of the tree, groups included, with the words that call it."""
    yield path
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, (*path, name))


@pytest.mark.parametrize("path", list(commands(typer.main.get_command(cli.app))), ids=" ".join)
def test_every_help_shows_an_example(capsys, path):
    assert cli.main([*path[1:], "--help"]) == 0
    assert f"Example: {path[0]}" in " ".join(capsys.readouterr().out.split())


def refused(capsys, *arguments) -> str:
    """The one line of a command that ends with status 2 and prints no data."""
    assert cli.main([str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert out == "" and len(lines) == 1 and "Traceback" not in err
    return lines[0]


def succeeded(capsys, *arguments) -> str:
    """What a command that did its work prints on stdout."""
    assert cli.main([str(argument) for argument in arguments]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def scored(stories260k, tmp_path_factory):
    """The folder of a scoring run."""
    out = tmp_path_factory.mktemp("scored")
    words = ["score", "sinks", str(stories260k), "--n", "3", "--lengths", "32", "--out", str(out)]
    assert cli.main(words) == 0
    return out


def test_score_leaves_heads_record_and_shards(scored):
    heads = interp.HeadScores.load(scored / "heads.parquet")
    assert len(heads) == 40 and {"rate", "later", "value_norm"} <= set(heads.table)
    record = json.loads((scored / "run.json").read_text())
    assert record["status"] == "complete" and record["counts"]["prompts"] == 3
    assert list((scored / "shards").glob("shard-*.parquet"))
    assert {"position", "token", "received"} <= set(pd.read_parquet(scored / "tokens.parquet"))


def test_score_prints_the_best_heads(capsys, stories260k, tmp_path):
    words = ["score", "retrieval", stories260k, "--n", 2, "--lengths", 160, "--every-prompt"]
    out = succeeded(capsys, *words, "--out", tmp_path, "--top", 3)
    assert out.split()[:4] == ["name", "score", "std", "n"] and out.count("\n") == 4
    again = json.loads(succeeded(capsys, *words, "--out", tmp_path, "--json"))
    assert len(again["heads"]) == 40 and again["metadata"]["counts"]["attempted"] == 2


def test_score_of_ones_own_texts(capsys, stories260k, tmp_path):
    (tmp_path / "own.txt").write_text("Lily saw a big dog in the park. " * 30)
    words = ["--data", tmp_path / "own.txt", "--n", 2, "--lengths", 32, "--out", tmp_path / "run"]
    assert "L0H" in succeeded(capsys, "score", "sinks", stories260k, *words, "--top", 40)


@pytest.mark.parametrize("task", ["text", "repeats", "ioi", "colored_objects"])
def test_eval_of_each_task(capsys, stories260k, task):
    words = ["--task", task, "--n", 2, "--lengths", 20, "--json"]
    found = json.loads(succeeded(capsys, "eval", stories260k, *words))
    metrics = {row["metric"] for row in found["conditions"]}
    assert metrics >= ({"loss"} if task == "text" else {"accuracy", "loss"})
    assert found["metadata"]["task"]["task"] == task


def test_eval_with_an_intervention_is_beside_the_model_without(capsys, stories260k, tmp_path):
    interp.Ablate(["L0H0", "L1H3"]).save_pretrained(tmp_path / "edit")
    words = ["--task", "repeats", "--n", 3, "--lengths", 12, "--intervention", tmp_path / "edit"]
    out = succeeded(capsys, "eval", stories260k, *words, "--out", tmp_path / "run")
    assert "none" in out and "intervention" in out and "paired by prompt" in out
    table = pd.read_parquet(tmp_path / "run" / "prompts.parquet")
    assert table.groupby("condition").size().to_dict() == {"intervention": 3, "none": 3}
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "complete"


def test_report_prints_where_the_page_is(capsys, stories260k, tmp_path):
    words = ["--quick", "--n", 4, "--draws", 1, "--lengths", 160, "--out", tmp_path]
    page = succeeded(capsys, "report", stories260k, *words).strip()
    assert page == str(tmp_path / "report.html")
    command = f"interp report {stories260k} --out {tmp_path} --quick"
    assert command in (tmp_path / "report.html").read_text()


def test_an_unknown_model_has_near_names(capsys, tmp_path):
    said = refused(capsys, "score", "sinks", "smollm2-135", "--out", tmp_path)
    assert "'smollm2-135'" in said and "smollm2-135m" in said


def test_a_folder_without_weights(capsys, stories260k, tmp_path):
    shutil.copy(stories260k / "config.json", tmp_path / "config.json")
    assert str(tmp_path) in refused(capsys, "eval", tmp_path, "--task", "text")


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "empty"), (b"\x00\x01\x02", "binary"), (b"caf\xe9", "UTF-8")],
    ids=["empty", "binary", "latin-1"],
)
def test_text_that_is_none(capsys, stories260k, tmp_path, content, words):
    (tmp_path / "own.txt").write_bytes(content)
    data = ["--data", tmp_path / "own.txt", "--out", tmp_path / "run"]
    said = refused(capsys, "score", "sinks", stories260k, *data)
    assert "own.txt" in said and words in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--task", "text", "--lengths", "600"], "512"),
        (["--task", "needle", "--lengths", "600"], "512"),
        (["--task", "needle", "--lengths", "64"], "does not fit in 64 tokens"),
        (["--task", "repeats", "--lengths", "300"], "512"),
        (["--task", "neddle"], "Did you mean needle?"),
        (["--task", "text", "--lengths", "many"], "'many'"),
        (["--task", "ioi", "--data", "."], "takes no texts"),
        (["--task", "text", "--data", "nowhere.txt"], "nowhere.txt"),
        (["--task", "text", "--intervention", "nowhere"], "no intervention.json"),
        (["--task", "text", "--dtype", "float12"], "float12"),
        (["--task", "text", "--device", "abacus"], "abacus"),
        (["--task", "text", "--generate"], "no answers"),
    ],
    ids=" ".join,
)
def test_what_cannot_be_evaluated(capsys, stories260k, arguments, words):
    assert words in refused(capsys, "eval", stories260k, *arguments)


@pytest.mark.parametrize("head", ["L5H0", "L0H8"])
def test_a_head_that_the_model_does_not_have(capsys, stories260k, tmp_path, head):
    interp.Ablate([head]).save_pretrained(tmp_path)
    words = ["--task", "repeats", "--n", 1, "--lengths", 4, "--intervention", tmp_path]
    said = refused(capsys, "eval", stories260k, *words)
    assert head in said and "layers 0-4 and heads 0-7" in said


def test_a_folder_that_cannot_be_written(capsys, stories260k, tmp_path):
    (tmp_path / "file").write_text("")
    for command in (["score", "sinks"], ["report"]):
        said = refused(capsys, *command, stories260k, "--out", tmp_path / "file")
        assert "file" in said and "--out" in said


def test_another_runs_folder_is_not_written_over(capsys, stories260k, scored):
    words = ["score", "sinks", stories260k, "--n", 2, "--lengths", 32, "--out", scored]
    assert "--overwrite" in refused(capsys, *words)
    assert "--overwrite" in refused(capsys, "report", stories260k, "--out", scored)


def test_overwrite_starts_anew(capsys, stories260k, scored, tmp_path):
    shutil.copytree(scored, tmp_path / "run")
    words = ["score", "sinks", stories260k, "--n", 2, "--lengths", 32, "--out", tmp_path / "run"]
    succeeded(capsys, *words, "--overwrite")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["counts"]["prompts"] == 2


def test_weights_that_are_no_numbers(capsys, stories260k, tmp_path):
    shutil.copytree(stories260k, tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    name = next(name for name in weights if "layers.2" in name and "q_proj" in name)
    weights[name] = torch.full_like(weights[name], torch.nan)
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    words = ["--n", 1, "--lengths", 16, "--out", tmp_path / "run"]
    said = refused(capsys, "score", "sinks", tmp_path / "model", *words)
    assert "layer 2" in said and "not a number" in said


def test_quick_and_full_together(capsys, stories260k, tmp_path):
    said = refused(capsys, "report", stories260k, "--quick", "--full", "--out", tmp_path)
    assert "--quick, --full" in said


def test_the_report_is_on_needles(capsys, stories260k, tmp_path):
    assert "needle" in refused(capsys, "report", stories260k, "--task", "ioi", "--out", tmp_path)
