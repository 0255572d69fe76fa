"""The command line: what it prints where, and its exit statuses."""

import json

import pytest
import typer

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
