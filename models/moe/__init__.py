"""The MoE layer: router, dispatch, experts, and the all-to-all between ranks."""
