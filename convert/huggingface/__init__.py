"""Models of the transformers package, as Magnetar's."""
