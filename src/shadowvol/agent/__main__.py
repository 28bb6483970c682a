"""`python -m shadowvol.agent --home DIR --state URL --host NAME`: the daemon, as `up` starts it in the background."""

import argparse
import sys

from shadowvol.agent.daemon import run_agent
from shadowvol.agent.paths import SettingsError, resolve
from shadowvol.agent.settings import resolve_agent


def main() -> int:
    parser = argparse.ArgumentParser(prog="shadowvol.agent", description="The agent of one host.")
    parser.add_argument("--home")
    parser.add_argument("--state")
    parser.add_argument("--host")
    options = parser.parse_args()
    try:
        settings = resolve(options.home, options.state, options.host)
        settings.home.check()
        agent_settings = resolve_agent()
        settings.home.prepare()
    except SettingsError as error:
        sys.stderr.write(f"shadowvol: {error}\n")
        return 2
    return run_agent(settings, agent_settings)


if __name__ == "__main__":
    sys.exit(main())
