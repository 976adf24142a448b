# A model that trains a step in milliseconds.
SIZES = ("num_layers=2", "d_model=32", "d_ff=48", "num_heads=2", "vocab_size=64", "max_seq_len=16")
TINY = [word for size in SIZES for word in ("--set", f"magnetar.model.{size}")]
TINY += ["--set", "magnetar.data.seq_len=16", "--rounds", "1", "--steps", "1"]
