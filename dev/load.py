"""`python -m dev.load SCRIPT`: run a k6 script of loadtest/ against a running `make up`.

Each run declares sales of its own with flashsalectl and closes them afterwards. Every reservation
that the crowd was promised is then checked against the ledger.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

from dev.journal import Attempt, Entry, Journal
from dev.local import API_PORT, running_engine
from dev.paths import LOCAL, ROOT
from dev.services import flashsalectl
from dev.stack.errors import StackError
from dev.verdict import judge, quiet

SCRIPTS: Final = ROOT / "loadtest"

_STOCK: Final = {"smoke.js": 3, "soak.js": 1_000_000}
_OTHER_STOCK: Final = 100
_ONE: Final[dict[str, dict[str, object]]] = {"": {}}
_SMOKE: Final[dict[str, dict[str, object]]] = {
    "": {"maxPerUser": 2},
    "-later": {"startsAt": "2999-01-01T00:00:00Z"},
    "-ended": {"endsAt": "2020-01-01T00:00:00Z"},
    "-paused": {"paused": True},
}
"""The sales of each script, by suffix of their name: the fields of each one's spec."""


def load(script: Path) -> int:
    """Run the script. Returns 0 only if k6's thresholds held and the ledger has every promise."""
    addresses = running_engine()
    item = f"load-{int(time.time())}"
    stock = int(os.environ.get("STOCK") or _STOCK.get(script.name, _OTHER_STOCK))
    folder = LOCAL / "load"
    folder.mkdir(exist_ok=True)
    sales = _SMOKE if script.name == "smoke.js" else _ONE
    manifest = folder / "sales.yaml"
    manifest.write_text(
        "\n---\n".join(
            # JSON is YAML.
            json.dumps(
                {
                    "apiVersion": "flashsale.dev/v1alpha1",
                    "kind": "FlashSale",
                    "metadata": {"name": item + suffix},
                    "spec": {"itemId": item + suffix, "stock": stock, **spec},
                }
            )
            for suffix, spec in sales.items()
        )
    )
    flashsalectl(addresses, "apply", "-f", str(manifest))
    journal = folder / "journal"
    journal.unlink(missing_ok=True)
    done = subprocess.run(
        [
            Path(sys.executable).with_name("k6"),
            "run",
            "--no-usage-report",
            "--log-format=raw",
            f"--console-output={journal}",
            script,
        ],
        env={
            "API_URL": f"http://localhost:{API_PORT}",
            **os.environ,
            "ITEM_ID": item,
            "STOCK": str(stock),
            "RUN": item,
        },
        check=False,
    )
    print("Waiting until every event is in the ledger …", flush=True)
    asyncio.run(quiet(addresses, [item]))
    verdict, _ = asyncio.run(judge(addresses, f"default/{item}", _read(journal)))
    for suffix in sales:
        flashsalectl(addresses, "close", item + suffix)
    print(f"{item}: {verdict}")
    return done.returncode or int(not verdict.kept)


def _read(journal: Path) -> Journal:
    lines = journal.read_text().splitlines() if journal.exists() else []
    promised = [json.loads(line) for line in lines]
    return Journal(
        [Entry(Attempt(one["userId"], {}, one["key"]), 202, one, 0.0, 0.0) for one in promised]
    )


def main() -> int:
    scripts = sorted(path.name for path in SCRIPTS.glob("*.js"))
    parser = argparse.ArgumentParser(
        prog="python -m dev.load",
        description=__doc__,
        epilog="The head of each script lists the environment variables that it reads.",
    )
    parser.add_argument("script", choices=scripts, metavar="SCRIPT", help=", ".join(scripts))
    try:
        return load(SCRIPTS / parser.parse_args().script)
    except StackError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
