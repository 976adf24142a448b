"""The MoE layer: router, dispatch, experts and their exchange between ranks."""
