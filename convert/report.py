"""Lines that conversions end with."""

from pathlib import Path


def how_to_load(out: Path, architecture: str) -> list[str]:
    """Python that loads a folder of weights."""
    tokens = "source, target" if architecture == "encoder_decoder" else "tokens"
    return [
        "from models.weights import load_model",
        f"model = load_model({str(out)!r})",
        f"logits = model({tokens}).logits  # tokens: (batch, length) int64",
    ]
