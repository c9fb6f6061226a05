"""A harness that runs a real Koji for tests; start with real.py."""
