"""
`trl-refplug dpo|kto|grpo|rloo`: runs TRL's own training scripts, with the reference from a provider.

The commands check the flags, and then launch `launched.py` in every process as `accelerate launch` does.
"""

from __future__ import annotations

import sys
import warnings
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import fields
from subprocess import CalledProcessError
from typing import Any

import typer

from trl_refplug.arguments import ReferenceArguments
from trl_refplug.cli import launched
from trl_refplug.cli.checks import check_run
from trl_refplug.cli.failures import CANNOT_BE_DONE, DIFFERS, INTERRUPTED, LAUNCHED_DIFFERS
from trl_refplug.cli.given_flags import GivenFlags, read_flags, refuse
from trl_refplug.cli.tasks import Precompute, Task
from trl_refplug.cli.trl_scripts import PREFIXES, make_parser
from trl_refplug.errors import ConfigurationError, RefPlugError, did_you_mean
from trl_refplug.plugins import check_reference_flags


# Everything on the command line goes to TRL's parser unchanged. Its `--help` has a thousand lines and takes seconds to
# import, so our `--help` shows only the reference flags, and `--help-all` shows TRL's.
COMMAND_SETTINGS: dict[str, Any] = {
    "add_help_option": False,
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False},
}
PRECOMPUTE_SETTINGS: dict[str, Any] = {"context_settings": COMMAND_SETTINGS["context_settings"]}

ONLINE = ("grpo", "rloo")
STORED = tuple(name for name in PREFIXES if name not in ONLINE)  # methods whose rows are known before training


def dpo(context: typer.Context) -> None:
    """Train with DPO. This takes all flags of `trl dpo`, and the reference flags."""
    _launch("dpo", context.args)


def kto(context: typer.Context) -> None:
    """Train with KTO. This takes all flags of `trl kto`, and the reference flags."""
    _launch("kto", context.args)


def grpo(context: typer.Context) -> None:
    """Train with GRPO. This takes all flags of `trl grpo`, and the reference flags."""
    _launch("grpo", context.args)


def rloo(context: typer.Context) -> None:
    """Train with RLOO. This takes all flags of `trl rloo`, and the reference flags."""
    _launch("rloo", context.args)


def precompute(context: typer.Context) -> None:
    """
    Score the rows of a training run into its log-prob store, and do not train.

    It takes a method and the arguments of the training command, so that the tokens are the same as in training:
    `trl-refplug precompute dpo --model_name_or_path ...`. Rows that are in the store already are not scored again.
    """
    launch_task(Precompute(), context.args, usage="trl-refplug precompute")


def launch_task(task: Task, command: Sequence[str], *, usage: str) -> None:
    """
    Run a training command that does a task instead of training.

    Args:
        task (`Task`): What to do.
        command (`Sequence[str]`): A method and its arguments.
        usage (`str`): What a user writes before the method on the command line. Error messages show it.
    """
    method = command[0] if command else None
    if method in ONLINE:
        raise ConfigurationError(
            f"`{usage} {method}` cannot work: {method} generates its completions while it trains, so there are no "
            f"rows to score before. Methods: {', '.join(STORED)}."
        )
    if method not in STORED:
        raise ConfigurationError(
            f"Found {method or 'nothing'}; expected a method and its arguments, as in `{usage} dpo "
            f"--model_name_or_path ...`. Methods: {', '.join(STORED)}.{did_you_mean(str(method), STORED)}"
        )
    _launch(method, command[1:], task)


def _launch(method: str, arguments: Sequence[str], task: Task | None = None) -> None:
    """Check what can be checked without loading a model or data, then launch."""
    if arguments[:1] in (["--help"], ["-h"]):
        print(_help(method))
        return
    arguments = ["--help" if argument == "--help-all" else argument for argument in arguments]
    given = None
    if "--help" not in arguments:
        given = read_flags(arguments)
        if task is not None:
            task.configure(given.reference)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the launched processes show the warnings
            check_reference_flags(given.reference, policy_is_peft=given.use_peft)
            check_run(method, given)

    from accelerate.commands.launch import launch_command, launch_command_parser
    from trl.cli.accelerate_config import resolve_accelerate_config_argument

    parser = make_parser(method)
    parser.error = refuse
    *parsed, from_config, from_cli = _parse(parser, arguments)
    if task is not None:
        task.configure(parsed[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _check(method, given, *parsed)

    # Flags that TRL's parser does not know are meant for `accelerate launch`, or are mistakes.
    launch_parser = launch_command_parser()
    launch_parser.error = refuse
    _check_launch_flags([*from_config, *from_cli], launch_parser, parser)
    try:
        launch_flags = resolve_accelerate_config_argument([*from_config, *from_cli])
    except ValueError as error:
        raise ConfigurationError(str(error)) from None
    script_args = [method] if task is None else [task.encode(), method]
    script_args += _without(arguments, from_cli)
    launch_args = launch_parser.parse_args([*launch_flags, launched.__file__, *script_args])
    if launch_args.training_script != launched.__file__:
        raise ConfigurationError(
            f"Unexpected argument {launch_args.training_script!r}: it does not belong to any flag."
        )
    _run(launch_command, launch_args)


def _help(method: str) -> str:
    """The text of `--help`: the reference flags, and where to find all others."""
    command = f"trl-refplug {method}"
    parser = ArgumentParser(
        prog=command,
        usage=f"{command} [--config FILE.yaml] [TRL's flags] [reference flags] [flags of `accelerate launch`]",
        description=f"Trains as `trl {method}` does, with the reference's log-probs from the selected provider.",
        epilog=f"TRL's own flags with their defaults: {command} --help-all. Providers and their options: "
        "trl-refplug plugins.",
        add_help=False,
    )
    group = parser.add_argument_group("reference flags")
    for flag in fields(ReferenceArguments):
        default = "" if flag.default is None else f" (default: {flag.default})"
        group.add_argument(f"--{flag.name}", help=flag.metadata["help"].replace("%", "%%") + default)
    return parser.format_help().rstrip()


def _parse(parser: Any, arguments: list[str]) -> tuple[Any, ...]:
    """
    Parse the arguments with TRL's parser.

    Returns what TRL's parser returns: one object for each of its dataclasses, then the flags that it does not know
    from the `--config` file, then those from the command line.
    """
    from yaml import YAMLError  # type: ignore[import-untyped]

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the launched processes parse again and show the warnings
            return parser.parse_args_and_config(  # type: ignore[no-any-return]
                arguments, return_remaining_strings=True, separate_remaining_strings=True
            )
    except RefPlugError:
        raise
    except (OSError, ValueError, YAMLError) as error:  # TRL's configurations and `--config` files raise these
        raise ConfigurationError(str(error)) from error


def _run(launch_command: Any, launch_args: Any) -> None:
    """Launch the processes. A process that fails reports its error itself, so only the exit code is passed on."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        launch_command(launch_args)
    except CalledProcessError as error:
        raise typer.Exit(_status(error.returncode)) from None
    except ChildFailedError as error:
        if not all(failure.exitcode in _STATUSES for failure in error.failures.values()):
            print(error, file=sys.stderr)  # a process was killed, and this says which and how
        raise typer.Exit(_status(error.get_first_failure()[1].exitcode)) from None


_STATUSES = {LAUNCHED_DIFFERS: DIFFERS, CANNOT_BE_DONE: CANNOT_BE_DONE, INTERRUPTED: INTERRUPTED}


def _status(code: int) -> int:
    """The exit status of a command whose process ended so. A process that was killed could not do its work."""
    return _STATUSES.get(code, CANNOT_BE_DONE)


def _check(
    method: str, checked: GivenFlags | None, script_args: Any, training_args: Any, model_args: Any, mixture: Any
) -> None:
    """
    Check what would otherwise fail after the launch, or after a model and data are loaded.

    Most of it was checked before TRL was imported. Abbreviated flags, and what TRL's flags mean, are known only now.

    Raises:
        RefPlugError: The reference flags cannot work, or something that is named is missing or does not fit.
    """
    from trl_refplug.trainers.selection import check_reference

    check_reference(training_args, policy_is_peft=model_args.use_peft, online=method in ONLINE)
    given = GivenFlags(
        reference=checked.reference if checked else training_args,
        model=model_args.model_name_or_path,
        dataset=script_args.dataset_name,
        output_dir=training_args.output_dir,
        checkpoint=training_args.resume_from_checkpoint,
        mixture=bool(mixture.datasets),
        reward=bool(
            getattr(script_args, "reward_funcs", None) or getattr(script_args, "reward_model_name_or_path", None)
        ),
        use_peft=model_args.use_peft,
        evaluates=training_args.eval_strategy != "no",
    )
    if given != checked:
        check_reference_flags(training_args, policy_is_peft=given.use_peft)
        check_run(method, given)


def _check_launch_flags(arguments: list[str], launch_parser: Any, parser: Any) -> None:
    """Refuse flags that neither TRL's parser nor `accelerate launch` knows."""
    known = {*launch_parser._option_string_actions, "--accelerate_config"}
    for argument in arguments:
        flag = argument.partition("=")[0]
        if flag.startswith("--") and flag not in known:
            raise ConfigurationError(
                f"Unknown flag {flag}.{did_you_mean(flag, known | set(parser._option_string_actions))}"
            )


def _without(arguments: list[str], removed: list[str]) -> list[str]:
    """Leave `removed` out of `arguments`. It must be a subsequence of `arguments`, in the same order."""
    kept, pending = [], list(removed)
    for argument in arguments:
        if pending and argument == pending[0]:
            pending.pop(0)
        else:
            kept.append(argument)
    return kept
