"""Images on disk: packing, indexing, decoding, views, the plan, and the reader."""
