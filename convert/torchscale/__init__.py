"""Weights of TorchScale become Magnetar's."""
