"""Workers, broker and upstreams that fail at random, and the question whether any promise broke."""
