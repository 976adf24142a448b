"""Text from a trained model: sampling and beam search."""
