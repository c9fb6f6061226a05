"""Many builds with faults injected at random, and what they leave: see __main__.py."""
