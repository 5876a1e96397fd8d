"""`python -m headwater.dashboard MODEL`: what `headwater dashboard MODEL` does."""

from __future__ import annotations

import argparse
import sys

from headwater.dashboard.launch import run
from headwater.lens.errors import HeadwaterError


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m headwater.dashboard", description=run.__doc__)
    parser.add_argument(
        "model", nargs="*", help="a folder, a hub id, an embedded model, or the file of a record"
    )
    parser.add_argument("--prompt", help="the text to begin with")
    parser.add_argument("--port", type=int, help="first port to try")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; only loopback is private")
    parser.add_argument("--open", action="store_true", help="open it in the browser")
    given = parser.parse_args()
    try:
        run(given.model, given.port, given.host, given.open, given.prompt)
    except HeadwaterError as error:
        print(f"headwater: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
