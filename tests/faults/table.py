"""`python -m tests.faults.table`: the sum of all schedules so far, for docs/reliability.md."""

import argparse
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Final, Self

import msgspec

from dev.progress import ending_quietly
from tests.faults.check import Result
from tests.faults.schedule import Kind, Redis, Schedule
from tests.support.paths import ROOT

OUTCOMES: Final = ROOT / ".local" / "faults" / "outcomes.jsonl"
"""One line per schedule of every run of this checkout."""
PUBLISHED: Final = ROOT / "docs" / "faults.jsonl"
"""One line per schedule that the page counts."""
PAGE: Final = ROOT / "docs" / "reliability.md"
_BEGIN, _END = "<!-- schedules -->\n", "<!-- end -->\n"
_PROMISE: Final = 1_000
"""The characters of a failure that are kept."""
_HEAD: Final = (
    "fault",
    "schedules",
    "failed",
    "202s",
    "200s of orders",
    "expired",
    "lost, as allowed",
    "refused, as allowed",
    "slowest recovery",
)


@dataclass
class Outcome:
    """A schedule with its result. `failure` is the broken promise with the journal, or empty."""

    seed: int
    redis: Redis
    tokens: bool
    holds: bool
    kinds: list[Kind]
    commit: str
    at: float
    """The Unix time of its start."""
    seconds: float = 0.0
    result: Result = field(default_factory=Result)
    failure: str = ""

    @classmethod
    def of(cls, made: Schedule) -> Self:
        """Return the outcome of a schedule that begins now."""
        return cls(
            made.seed,
            made.redis,
            made.tokens,
            made.hold_seconds is not None,
            sorted({step.kind for step in made.steps}),
            commit(),
            time.time(),
        )

    @property
    def rows(self) -> list[str]:
        """The rows of the table that count it."""
        return [
            *self.kinds,
            f"Redis: {self.redis}",
            "buyers named by tokens" if self.tokens else "buyers named by the body",
            "with holds and an order service" if self.holds else "without holds",
            "all",
        ]

    @property
    def name(self) -> str:
        """Its kind of Redis, and where the APIs take the buyers from."""
        return f"{self.redis}, {'tokens' if self.tokens else 'userId'}"

    @property
    def command(self) -> str:
        """The command that runs it again."""
        return f"make faults N=1 FIRST={self.seed} REDIS={self.redis}"


_ROWS: Final = (
    *Kind,
    *(f"Redis: {redis}" for redis in Redis),
    "buyers named by tokens",
    "buyers named by the body",
    "with holds and an order service",
    "without holds",
    "all",
)


@cache
def commit() -> str:
    """Return the commit of the checkout, with `-dirty` if a file differs from it."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "unknown"


def keep(outcome: Outcome) -> None:
    """Add an outcome to the file. Of a failure it keeps only the first line of the broken promise.

    Further lines can name the folders of a machine.
    """
    promise = outcome.failure.rpartition("BROKEN: ")[2].partition("\n")[0][:_PROMISE]
    OUTCOMES.parent.mkdir(parents=True, exist_ok=True)
    with OUTCOMES.open("ab") as file:
        file.write(msgspec.json.encode(replace(outcome, failure=promise)) + b"\n")


def kept(path: Path) -> list[Outcome]:
    """Read the outcomes of a file. A missing file has none."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    return [msgspec.json.decode(line, type=Outcome) for line in lines]


def table(outcomes: Sequence[Outcome]) -> str:
    """Return the sum as Markdown: the faults, the answers, the commits and the failures."""
    lines = [f"| {' | '.join(_HEAD)} |", "|---" * len(_HEAD) + "|"]
    for row in _ROWS:
        if counted := [outcome for outcome in outcomes if row in outcome.rows]:
            results = [outcome.result for outcome in counted if not outcome.failure]
            cells = (
                str(len(counted)),
                str(len(counted) - len(results)),
                f"{sum(result.promised for result in results):,}",
                f"{sum(result.acknowledged for result in results):,}",
                f"{sum(result.expired for result in results):,}",
                f"{sum(result.lost for result in results):,}",
                f"{sum(result.refused for result in results):,}",
                f"{max((result.recovery_seconds for result in results), default=0.0):.0f} s",
            )
            lines.append(f"| {row} | {' | '.join(cells)} |")
    answers: Counter[str] = Counter()
    for outcome in outcomes:
        answers.update(outcome.result.outcomes)
    lines += ["", "| answer | count |", "|---|---|"]
    lines += [f"| {kind} | {count:,} |" for kind, count in answers.most_common()]
    lines += [f"| all | {sum(answers.values()):,} |", ""]
    lines += ["| commit | schedules | between the seeds | hours, added up |", "|---|---|---|---|"]
    for name in dict.fromkeys(outcome.commit for outcome in outcomes):
        own = [outcome for outcome in outcomes if outcome.commit == name]
        seeds = [outcome.seed for outcome in own]
        hours = sum(outcome.seconds for outcome in own) / 3600
        lines.append(f"| {name} | {len(own)} | {min(seeds)} and {max(seeds)} | {hours:.2f} |")
    if failed := [outcome for outcome in outcomes if outcome.failure]:
        lines += ["", "| failed at commit | command |", "|---|---|"]
        lines += [f"| {outcome.commit} | `{outcome.command}` |" for outcome in failed]
    return "\n".join(lines)


def publish() -> None:
    """Move the outcomes of this checkout to those of the page, and write their sum into it."""
    with PUBLISHED.open("ab") as file:
        file.write(OUTCOMES.read_bytes() if OUTCOMES.exists() else b"")
    OUTCOMES.unlink(missing_ok=True)
    before, _, rest = PAGE.read_text("utf-8").partition(_BEGIN)
    _, _, after = rest.partition(_END)
    text = table(kept(PUBLISHED))
    PAGE.write_text(f"{before}{_BEGIN}{text}\n{_END}{after}", "utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.table", description=__doc__)
    parser.add_argument("--commit", help="only the schedules at this commit (default: all)")
    parser.add_argument(
        "--write",
        action="store_true",
        help="move the outcomes of this checkout to docs/faults.jsonl, and write their sum into "
        "docs/reliability.md",
    )
    parser.add_argument(
        "files",
        nargs="*",
        type=Path,
        help="files of outcomes (default: docs/faults.jsonl and those of this checkout)",
    )
    options = parser.parse_args()
    if missing := [path for path in options.files if not path.is_file()]:
        parser.error(f"{missing[0]}: no such file")
    if options.write:
        publish()
    files = options.files or [PUBLISHED, OUTCOMES]
    every = [outcome for path in files for outcome in kept(path)]
    found = [each for each in every if options.commit in (None, each.commit)]
    print(table(found))
    return 1 if any(outcome.failure for outcome in found) else 0


if __name__ == "__main__":
    sys.exit(ending_quietly(main))
