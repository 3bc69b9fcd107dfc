"""The file of variables that `make up` writes."""

import os
import subprocess
from pathlib import Path

from dev.local import read_variables, write_variables
from flashsale_operator.ctl.local_env import environment

VARIABLES = {
    "FLASHSALE_REDIS_URL": "redis://user:it's$HOME;`id`@127.0.0.1:6379/0",
    "FLASHSALE_KAFKA_BOOTSTRAP": "127.0.0.1:9092",
    "FLASHSALE_DATABASE_URL": "postgresql://user@127.0.0.1/db?sslmode=disable&application_name=a",
    "FLASHSALE_ORDER_TOKENS": "",
}


def test_a_shell_and_flashsalectl_read_any_address(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / ".local").mkdir()
    file = tmp_path / ".local" / "env"
    write_variables(file, VARIABLES)
    assert read_variables(file) == VARIABLES
    assert environment({}, tmp_path)[0] == VARIABLES
    shell = subprocess.run(
        ["sh", "-c", "set -a; . .local/env; set +a; env -0"],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (
        VARIABLES.items()
        <= dict(line.split("=", 1) for line in shell.stdout.split("\0") if line).items()
    )
