"""What commands say of the errors of other libraries: one line for a mistake, and a traceback for a defect."""

import errno
from pathlib import Path

import pytest
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from trl_refplug.cli import failures
from trl_refplug.cli.launched import train
from trl_refplug.errors import ConfigurationError, PluginError


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConfigurationError("found 7"), "found 7"),
        (DatasetNotFoundError("Dataset 'a' doesn't exist on the Hub"), "DatasetNotFoundError: Dataset 'a' doesn't"),
        (KeyError("chosen"), "The data have no column 'chosen'"),
        (ValueError("Cannot use chat template functions because tokenizer.chat_template is not set"), "a chat model"),
        (OSError(errno.ENOSPC, "No space left on device", "/out/model"), "The disk is full: [Errno 28] No space left"),
        (PermissionError(errno.EACCES, "Permission denied", "/out"), "PermissionError: [Errno 13] Permission denied"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_mistake_is_one_line(error: Exception, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert failures.report(error) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("Error: ")
    assert message in printed
    assert printed.count("\n") == 1


def test_the_cause_counts_too(capsys: pytest.CaptureFixture[str]) -> None:
    error = RuntimeError("something")
    error.__cause__ = KeyError("rejected")
    assert failures.report(error) == 2
    assert capsys.readouterr().err.startswith("Error: The data have no column 'rejected'")


@pytest.mark.parametrize("error", [KeyError("weights"), ValueError("negative"), TypeError("None")])
def test_a_defect_is_a_traceback(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    assert failures.report(error) == 2
    assert type(error).__name__ in capsys.readouterr().err
    assert failures.in_one_line(error) is None


def test_a_plugin_is_shown_where_it_failed(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        try:
            raise ZeroDivisionError("in the plugin")
        except ZeroDivisionError as cause:
            raise PluginError("the plugin is broken") from cause

    with pytest.raises(PluginError) as caught:
        fail()
    assert failures.report(caught.value) == 2
    printed = capsys.readouterr().err
    assert "ZeroDivisionError: in the plugin" in printed
    assert printed.endswith("Error: the plugin is broken\n")


def test_a_late_row_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the first rows are checked before the launch. If data cannot be read, all of them are."""
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 1500 + "{\n")

    def main(*arguments: object) -> None:
        raise DatasetGenerationError("An error occurred while generating the dataset")

    monkeypatch.setattr("trl_refplug.cli.launched.load", lambda method: type("Script", (), {"main": main}))
    monkeypatch.setattr("trl_refplug.cli.launched.make_parser", _parser)
    with pytest.raises(ConfigurationError, match=r"line 1501: not JSON"):
        train("dpo", [str(data), str(tmp_path / "out")])


def _parser(method: str) -> object:
    from types import SimpleNamespace

    class Parser:
        def parse_args_and_config(self, arguments: list[str], **more: object) -> tuple[object, ...]:
            data, output = arguments
            script = SimpleNamespace(dataset_name=data, dataset_streaming=False)
            return script, SimpleNamespace(output_dir=output), None, SimpleNamespace(datasets=None), []

    return Parser()
