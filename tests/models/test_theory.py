"""What DeepNorm and Sub-LN promise: at any depth one step changes the model alike.

arXiv 2203.00555, sec. 4 and arXiv 2210.06423, sec. 3 bound the change of a model's output after
one SGD step on its sublayers by a constant, where Post-LN's grows with the depth.
"""

import pytest
import torch
import torch.nn.functional as F

from magnetar.models.config import ModelConfig
from magnetar.models.transformer import EncoderDecoder, build_model

# The theory is one of averages over width, tokens and draws: at width 32 single ones scatter by 3.
WIDTH, VOCAB, LENGTH, BATCH, SEEDS = 128, 64, 64, 8, (1, 2, 3)
LEARNING_RATE = 1e-3


def mean_update(norm: str, architecture: str, num_layers: int) -> float:
    """The change of the output, averaged over initial weights and data."""
    updates = [model_update(norm, architecture, num_layers, seed) for seed in SEEDS]
    return sum(updates) / len(updates)


def model_update(norm: str, architecture: str, num_layers: int, seed: int) -> float:
    """Root mean square of the change of the logits after one SGD step on the blocks."""
    config = ModelConfig(
        architecture=architecture,
        vocab_size=VOCAB,
        num_layers=num_layers,
        d_model=WIDTH,
        d_ff=4 * WIDTH,
        num_heads=4,
        max_seq_len=LENGTH,
        norm=norm,
    )
    model = build_model(config, seed)
    generator = torch.Generator().manual_seed(seed)
    shape = (BATCH, LENGTH)
    tokens, targets = (torch.randint(0, VOCAB, shape, generator=generator) for _ in range(2))
    inputs = (tokens, tokens) if isinstance(model, EncoderDecoder) else (tokens,)
    before = model(*inputs).logits
    F.cross_entropy(before.flatten(0, 1), targets.flatten()).backward()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "blocks." in name:
                parameter -= LEARNING_RATE * parameter.grad
        change = model(*inputs).logits - before
    return change.square().mean().sqrt().item()


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["decoder", "encoder", "encoder_decoder"])
@pytest.mark.parametrize("norm", ["deepnorm", "subln"])
def test_one_step_changes_a_model_of_96_layers_like_one_of_6(norm: str, architecture: str) -> None:
    updates = [mean_update(norm, architecture, num_layers) for num_layers in (6, 24, 96)]
    assert max(updates) < 2 * min(updates), updates


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["decoder", "encoder", "encoder_decoder"])
def test_one_step_changes_a_deep_post_ln_model_far_more(architecture: str) -> None:
    shallow, deep = (mean_update("post", architecture, num_layers) for num_layers in (6, 96))
    assert deep > 4 * shallow
