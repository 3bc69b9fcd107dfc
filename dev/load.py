"""`python -m dev.load SCRIPT`: run a k6 script of loadtest/ against a running `make up`.

Each run declares sales of its own with flashsalectl and deletes them afterwards. Every reservation
that the crowd was promised is then checked against the ledger.
"""

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from dev.journal import Attempt, Entry, Journal
from dev.local import running_engine
from dev.paths import LOCAL, ROOT
from dev.progress import ending_quietly
from dev.services import Addresses, flashsalectl
from dev.stack.errors import StackError
from dev.verdict import judge, quiet

SCRIPTS: Final = ROOT / "loadtest"
K6: Final = Path(sys.executable).with_name("k6")

_STOCK: Final = {"smoke.js": "3", "soak.js": "1000000"}
_OTHER_STOCK: Final = "100"
_HOLD: Final = "3s"
_SMOKE: Final[dict[str, dict[str, object]]] = {
    "": {"maxPerUser": 2},
    "-later": {"startsAt": "2999-01-01T00:00:00Z"},
    "-ended": {"endsAt": "2020-01-01T00:00:00Z"},
    "-paused": {"paused": True},
}
"""The sales of the smoke test, by suffix of their name: the fields of each one's spec."""


def load(script: Path) -> int:
    """Run the script. Returns 0 only if k6's thresholds held and the ledger has every promise."""
    addresses, variables = running_engine()
    item = f"load-{int(time.time())}"
    environment = {
        "API_URL": variables["FLASHSALE_API_URL"],
        "ORDERS_URL": variables["FLASHSALE_ORDERS_URL"],
        "ORDER_TOKEN": variables["FLASHSALE_ORDER_TOKENS"],
        **os.environ,
        **sale_settings(script.name, os.environ),
    }
    environment |= {"ITEM_ID": item, "RUN": item}
    _check(script, environment)

    folder = LOCAL / "load"
    folder.mkdir(exist_ok=True)
    sales = sales_of(script.name, environment)
    manifest = folder / "sales.yaml"
    manifest.write_text(
        "\n---\n".join(
            # JSON is YAML.
            json.dumps(
                {
                    "apiVersion": "flashsale.dev/v1alpha1",
                    "kind": "FlashSale",
                    "metadata": {"name": item + suffix},
                    "spec": {"itemId": item + suffix, "stock": int(environment["STOCK"]), **spec},
                }
            )
            for suffix, spec in sales.items()
        )
    )
    journal = folder / "journal"
    journal.unlink(missing_ok=True)
    with ExitStack() as undo:
        for suffix in sales:
            undo.callback(_delete, addresses, item + suffix)
        flashsalectl(addresses, "apply", "-f", str(manifest))
        done = _run(script, environment, journal)
        print("Waiting until every event is in the ledger …", flush=True)
        asyncio.run(quiet(addresses, [item]))
        verdict, _ = asyncio.run(judge(addresses, f"default/{item}", _read(journal)))
        report = folder / "report.html"
        flashsalectl(addresses, "report", item, "--html", str(report), quiet=True)
        print(f"A report of the sale for the browser: {report.relative_to(ROOT)}")
    print(f"{item}: {verdict}")
    return done or int(not verdict.kept)


def sale_settings(script: str, environ: Mapping[str, str]) -> dict[str, str]:
    """Return STOCK and HOLD of a script's sale. As in k6, an empty variable is the default.

    The smoke test has no STOCK, because its answers need three units.
    """
    stock = _STOCK.get(script, _OTHER_STOCK)
    return {
        "STOCK": stock if script == "smoke.js" else environ.get("STOCK") or stock,
        "HOLD": environ.get("HOLD") or _HOLD,
    }


def sales_of(script: str, environment: Mapping[str, str]) -> dict[str, dict[str, object]]:
    """Return the sales of a script, by suffix of their name: the fields of each one's spec."""
    if script == "smoke.js":
        return _SMOKE
    if script != "checkout.js":
        return {"": {}}
    hold = environment["HOLD"]
    return {"": {"holdSeconds": int(hold[:-1]) * {"s": 1, "m": 60, "h": 3600}[hold[-1]]}}


def _delete(addresses: Addresses, item: str) -> None:
    """Close a sale of this run and free its keys. An interrupted run does it too."""
    try:
        flashsalectl(addresses, "delete", item, quiet=True)
    except StackError as error:
        print(error, file=sys.stderr)


def _check(script: Path, environment: Mapping[str, str]) -> None:
    """Raise StackError if k6 refuses the script's settings, before anything is declared."""
    done = subprocess.run(
        [K6, "inspect", "--include-system-env-vars", script],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        found = re.search(r"Error: (.*?)(?:\\n|\n|$)", done.stderr)
        why = found[1] if found else done.stderr.strip()
        raise StackError(f"{script.name}: {why}")


def _run(script: Path, environment: Mapping[str, str], journal: Path) -> int:
    return subprocess.run(
        [
            K6,
            "run",
            "--no-usage-report",
            "--log-format=raw",
            f"--console-output={journal}",
            script,
        ],
        env=environment,
        check=False,
    ).returncode


def _read(journal: Path) -> Journal:
    lines = journal.read_text().splitlines() if journal.exists() else []
    promised = [json.loads(line) for line in lines]
    return Journal(
        [Entry(Attempt(one["userId"], {}, one["key"]), 202, one, 0.0, 0.0) for one in promised]
    )


def main() -> int:
    scripts = sorted(path.stem for path in SCRIPTS.glob("*.js"))
    parser = argparse.ArgumentParser(
        prog="python -m dev.load",
        description=__doc__,
        epilog="The head of each script lists the environment variables that it reads.",
    )
    parser.add_argument(
        "script",
        type=lambda name: name.removesuffix(".js"),
        choices=scripts,
        metavar="SCRIPT",
        help=", ".join(scripts),
    )
    return load(SCRIPTS / f"{parser.parse_args().script}.js")


if __name__ == "__main__":
    sys.exit(ending_quietly(main))
