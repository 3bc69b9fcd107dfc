"""Paths in the repository that tests read."""

from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
DOCS: Final = ROOT / "docs"
SAMPLES: Final = ROOT / "k8s" / "samples"
CHART: Final = ROOT / "charts" / "flashsale"
CHART_FILES: Final = CHART / "files"
CRD: Final = CHART_FILES / "crd.yaml"
