"""flashsalectl and the real kubectl read the same YAML. Needs kubectl, which is built with Go."""

import json
import subprocess
from pathlib import Path

from dev.cluster.binaries import Binaries
from tests.support.go_scalars import GO_SCALARS


def test_kubectl_reads_the_scalars_of_the_table(kubernetes: Binaries, tmp_path: Path) -> None:
    file = tmp_path / "sale.yaml"
    fields = "".join(f"  f{n:03}: {text}\n" for n, text in enumerate(GO_SCALARS))
    head = "apiVersion: flashsale.dev/v1alpha1\nkind: FlashSale\nmetadata: {name: a}\nspec:\n"
    file.write_text(head + fields)
    command = [str(kubernetes.kubectl), "annotate", "--local", "-f", str(file), "a=b", "-o", "json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert list(json.loads(done.stdout)["spec"].values()) == list(GO_SCALARS.values())
