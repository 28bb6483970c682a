"""`attach` and `detach`: a volume as a block device of this host's kernel. The agent does both, as root."""

import click

from shadowvol.agent.errors import FAILED, VerbError
from shadowvol.cli.completion import volume_argument
from shadowvol.cli.invocation import Invocation, pass_invocation


@click.command()
@volume_argument()
@click.option(
    "--device", metavar="DEVICE", help="/dev/nbdN, or /dev/loopN without the nbd driver.  [default: a free one]"
)
@pass_invocation
def attach(invocation: Invocation, name: str, device: str | None) -> None:
    """Make a volume a block device that survives restarts of its member. Prints the device."""
    result = invocation.call("attach", name, {"device": device})
    told = result.data.get("device") if isinstance(result.data, dict) else None
    if not told:
        raise VerbError(FAILED, f"the agent attached volume {name}, but named no device; see shadowvol status")
    click.echo(told)


@click.command()
@volume_argument()
@pass_invocation
def detach(invocation: Invocation, name: str) -> None:
    """Take the block device down again, once nobody uses it."""
    invocation.call("detach", name)
