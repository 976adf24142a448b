"""The configs of ds_configs/ and the minimal one on its page."""

import json
from typing import Any

from tests.ranks import ROOT

CONFIGS = ROOT / "ds_configs"
SHIPPED = sorted({path.name for path in CONFIGS.glob("*.json")} - {"schema.json"})


def example_config() -> dict[str, Any]:
    """The page's minimal config."""
    page = (CONFIGS / "README.md").read_text()
    return json.loads(page.split("```json\n")[1].split("```")[0])
