"""The command `shadowvol`: global options, the verbs, and how every run ends (DESIGN 12).

Exit codes 0 to 6, never another; an error is one or two lines on stderr that begin with "shadowvol: "; never a
traceback, unless SHADOWVOL_DEBUG is set.

A verb's module is loaded when the verb is used: a command line should take a tenth of a second, not half of one.
"""

import errno
import importlib
import os
import sys
import traceback

import click

from shadowvol import __version__
from shadowvol.agent.errors import BAD_INPUT, FAILED, VerbError
from shadowvol.cli.completion import directories
from shadowvol.cli.invocation import Invocation
from shadowvol.link import journal

ERROR_LINES_MAX = 2
ERROR_LINE_CHARACTERS_MAX = 800  # a path may have 4095
INTERRUPTED = "interrupted; a verb that the agent has begun goes on, shadowvol status shows it"
_STREAM_ERRORS = (errno.ENOSPC, errno.EIO, errno.EBADF, errno.EFBIG, errno.EDQUOT)
_MODULES = {
    "lifecycle": ("create", "up", "down", "agent", "delete"),
    "transitions": (
        "start",
        "pause",
        "resume",
        "cutover",
        "undo",
        "commit",
        "abort",
        "retarget",
        "throttle",
        "wait",
    ),
    "attach": ("attach", "detach"),
    "status": ("status",),
    "doctor": ("doctor",),
    "completion": ("completion",),
}
_MODULE_OF = {verb: module for module, verbs in _MODULES.items() for verb in verbs}


class _Verbs(click.Group):
    """Finds each verb in its module, by its name there."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not ctx.resilient_parsing:  # as while a shell completes: what is not whole yet cannot be judged
            _refuse_repeated_options(self, ctx, args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # before click writes an empty line, for which only a terminal has a use
            if sys.stderr.isatty():
                sys.stderr.write("\n")
            raise VerbError(FAILED, INTERRUPTED) from None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        if command is not None and not ctx.resilient_parsing:
            _refuse_repeated_options(command, click.Context(command, info_name=name, parent=ctx), rest)
        return name, command, rest

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_MODULE_OF)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        module = _MODULE_OF.get(cmd_name)
        if module is None:
            return None
        command: click.Command = getattr(importlib.import_module(f"shadowvol.cli.{module}"), cmd_name)
        return command


def _refuse_repeated_options(command: click.Command, ctx: click.Context, args: list[str]) -> None:
    """Of two values for one option click takes the last: no way to choose between two legs."""
    _, _, given = command.make_parser(ctx).parse_args(list(args))
    for option in given:
        if isinstance(option, click.Option) and not option.is_flag and given.count(option) > 1:
            raise click.UsageError(f"{option.opts[0]} is given more than once", ctx)


@click.group(
    cls=_Verbs,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    no_args_is_help=False,
)
@click.option(
    "--home", metavar="DIR", shell_complete=directories, help="Where this host's agent lives (SHADOWVOL_HOME)."
)
@click.option("--state", metavar="URL", help="The record of truth: sqlite:PATH (SHADOWVOL_STATE).")
@click.option("--host", metavar="NAME", help="The name of this host (SHADOWVOL_HOST).")
@click.version_option(__version__, prog_name="shadowvol")
@click.pass_context
def cli(context: click.Context, home: str | None, state: str | None, host: str | None) -> None:
    """Moves a volume to new storage while applications use it.

    create, up, start; wait --for synced; cutover; then commit, or undo.
    """
    context.obj = Invocation(home, state, host)


def complain(text: str) -> None:
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()] or ["failed"]
    for line in lines[:ERROR_LINES_MAX]:
        half = ERROR_LINE_CHARACTERS_MAX // 2
        shown = line if len(line) <= ERROR_LINE_CHARACTERS_MAX else f"{line[:half]} … {line[-half:]}"
        try:
            sys.stderr.write(f"{journal.prefix(journal.ERROR)}shadowvol: {shown}\n")
            sys.stderr.flush()
        except OSError:  # nobody can be told; the exit code still tells, unless Python tries again when it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
            return


def _have_streams() -> None:
    """A shell may have closed them (`>&-`): Python then has None there, and the next file opened gets the number."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, so this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))


def _stdout_failed(error: OSError) -> int:
    """The verb is done; what it says cannot be written. Python must not try again when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    complain(f"standard output cannot be written: {error.strerror}; shadowvol status shows what was done")
    return FAILED


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    _have_streams()
    try:
        code = cli.main(args=arguments, prog_name="shadowvol", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except VerbError as error:
        complain(error.text)
        return error.code
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx is not None else "shadowvol"
        complain(f"{error.format_message()}\ntry: {path} --help")
        return BAD_INPUT
    except click.ClickException as error:
        complain(error.format_message())
        return BAD_INPUT
    except (click.Abort, KeyboardInterrupt):
        complain(INTERRUPTED)
        return FAILED
    except BrokenPipeError:  # as in `shadowvol status | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as error:
        if error.filename is None and error.errno in _STREAM_ERRORS:
            return _stdout_failed(error)
        return _unexpected(error)
    except Exception as error:
        return _unexpected(error)


def _unexpected(error: Exception) -> int:
    if os.environ.get("SHADOWVOL_DEBUG"):
        traceback.print_exception(error)
    complain(f"unexpected {type(error).__name__}: {' '.join(str(error).split())} (SHADOWVOL_DEBUG=1 shows where)")
    return FAILED
