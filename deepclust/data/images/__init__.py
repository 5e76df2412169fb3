"""From the bytes of an image to the crops that a network sees."""
