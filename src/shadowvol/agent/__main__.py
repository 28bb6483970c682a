"""`python -m shadowvol.agent --home DIR --state URL --host NAME`: the daemon, as `up` starts it in the background.

Where its metrics are is in the environment."""

import argparse
import os
import sys

from shadowvol.agent.daemon import run_agent
from shadowvol.agent.metrics.address import chosen_metrics_address
from shadowvol.agent.paths import SettingsError, resolve


def main() -> int:
    parser = argparse.ArgumentParser(prog="shadowvol.agent", description="The agent of one host.")
    parser.add_argument("--home")
    parser.add_argument("--state")
    parser.add_argument("--host")
    options = parser.parse_args()
    try:
        settings = resolve(options.home, options.state, options.host)
        metrics = chosen_metrics_address(None, os.environ)
        settings.home.check()
        settings.home.prepare()
    except SettingsError as error:
        sys.stderr.write(f"shadowvol: {error}\n")
        return 2
    return run_agent(settings.home, settings.state_url, settings.host, metrics)


if __name__ == "__main__":
    sys.exit(main())
