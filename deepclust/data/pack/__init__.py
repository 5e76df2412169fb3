"""Images of any source to shuffled tar shards."""
