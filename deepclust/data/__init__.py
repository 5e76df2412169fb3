"""Images on disk: packing, indexing, decoding, crops, the epoch plan, and the loader."""
