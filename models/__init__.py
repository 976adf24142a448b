"""The models: blocks, routers and experts as plain torch modules."""
