"""The command `shadowvol`: global options, the verbs, and how every run ends (DESIGN 12).

Exit codes 0 to 6, never another; an error is one or two lines on stderr that begin with "shadowvol: "; never a
traceback, unless SHADOWVOL_DEBUG is set.

A verb's module is loaded when the verb is used: a command line should take a tenth of a second, not half of one.
"""

import importlib
import os
import sys
import traceback

import click

from shadowvol import __version__
from shadowvol.agent.errors import BAD_INPUT, FAILED, VerbError
from shadowvol.cli.invocation import Invocation

ERROR_LINES_MAX = 2
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
}
_MODULE_OF = {verb: module for module, verbs in _MODULES.items() for verb in verbs}


class _Verbs(click.Group):
    """Finds each verb in its module, by its name there."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_MODULE_OF)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        module = _MODULE_OF.get(cmd_name)
        if module is None:
            return None
        command: click.Command = getattr(importlib.import_module(f"shadowvol.cli.{module}"), cmd_name)
        return command


@click.group(
    cls=_Verbs,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    no_args_is_help=False,
)
@click.option("--home", metavar="DIR", help="Where this host's agent lives (SHADOWVOL_HOME).")
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
        sys.stderr.write(f"shadowvol: {line}\n")


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
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
        complain("interrupted")
        return FAILED
    except BrokenPipeError:  # as in `shadowvol status | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        if os.environ.get("SHADOWVOL_DEBUG"):
            traceback.print_exc()
        complain(f"unexpected {type(error).__name__}: {' '.join(str(error).split())} (SHADOWVOL_DEBUG=1 shows where)")
        return FAILED
