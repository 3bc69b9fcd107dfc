"""`python -m dev.stack`: get the parts of the servers that no wheel contains."""

import argparse
import sys

from dev.stack.errors import StackError
from dev.stack.jars import LOCK_FILE, kafka_folder, kafka_version, resolve
from dev.stack.kafka import rehearse

_LOCK_HEADER = """\
# Kafka and all that it needs to run: coordinates, bytes, SHA-256.
# Made by `python -m dev.stack lock VERSION`.
"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m dev.stack", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "fetch", help="download Kafka into the cache and start it once, unless that is done"
    )
    lock = commands.add_parser("lock", help="write kafka.lock for another version of Kafka")
    lock.add_argument("version", help="for example 4.1.2")
    chosen = parser.parse_args()
    try:
        if chosen.command == "lock":
            jars = resolve(chosen.version)
            lines = [f"{jar.coordinates} {jar.size} {jar.sha256}\n" for jar in jars]
            LOCK_FILE.write_text(_LOCK_HEADER + "".join(lines))
        else:
            sys.stdout.write(f"Kafka {kafka_version()}: {kafka_folder()}\n")
            rehearse()
    except StackError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
