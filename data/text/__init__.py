"""Running text: from files to token shards and the samples of a step."""
