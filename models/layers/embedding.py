"""The token embedding."""

from torch import Tensor, nn

from magnetar.models import kernels


class Embedding(nn.Embedding):
    """nn.Embedding whose backward pass on a GPU does not wait for the device."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Int64 of any shape -> (..., D)."""
        if not (kernels.usable(self.weight) and self.weight.requires_grad):
            return super().forward(tokens)
        # Imported here, since Triton is not installed everywhere.
        from magnetar.models.kernels.embedding import EmbedTokens

        embedded: Tensor = EmbedTokens.apply(self.weight, tokens)
        return embedded
