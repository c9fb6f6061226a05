"""koji-indirection: make an image with the tools that live inside another image."""

from __future__ import annotations

__version__ = "0.1.0"
