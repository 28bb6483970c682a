"""`shadowvol completion bash|zsh`, and what a shell is told while a command line is being written.

click writes the shell's side and finds options, verbs and choices by itself; here are volume names and paths. Whatever
goes wrong in between a person's key and the shell's answer is answered by nothing: a message would land in the line
that is being written.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem, get_completion_class

from shadowvol.agent import client
from shadowvol.agent.errors import VerbError
from shadowvol.cli.invocation import Invocation

F = TypeVar("F", bound=Callable[..., Any])

VARIABLE = "_SHADOWVOL_COMPLETE"  # click's name for it: how the shell's side asks
ANSWER_LIMIT_S = 1.0  # a person is waiting


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print what a shell needs to complete this command.

    For bash, in ~/.bashrc: eval "$(shadowvol completion bash)". For zsh, in ~/.zshrc, after compinit: eval "$(shadowvol
    completion zsh)".
    """
    completer = get_completion_class(shell)
    assert completer is not None  # click has both
    click.echo(completer(context.find_root().command, {}, "shadowvol", VARIABLE).source())


def volume_argument(name: str = "name", **options: Any) -> Callable[[F], F]:
    """The decorator for the argument that is a volume, or several."""
    return click.argument(name, shell_complete=volume_names, **options)


def volume_names(context: click.Context, parameter: click.Parameter, begun: str) -> list[str]:
    """Volumes whose names begin so: from the agent, or else from the record."""
    given = context.find_root().params
    invocation = Invocation(given.get("home"), given.get("state"), given.get("host"))
    already = context.params.get(parameter.name or "") if parameter.nargs == -1 else None
    try:
        return [name for name in _recorded(invocation) if name.startswith(begun) and name not in (already or ())]
    except (VerbError, client.AgentFailed, OSError):
        return []


def _recorded(invocation: Invocation) -> list[str]:
    try:
        answer = client.call(invocation.settings.home, "status", timeout_s=ANSWER_LIMIT_S)
    except client.AgentNotRunning:
        return invocation.recorded_names()
    return [one["name"] for one in answer.data] if answer.code == 0 else []


def paths(context: click.Context, parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    """The shell completes paths by itself."""
    return [CompletionItem(begun, type="file")]


def directories(context: click.Context, parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    return [CompletionItem(begun, type="dir")]
