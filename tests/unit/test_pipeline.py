"""What of the pipeline needs no VM; all else is tests/guest."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from koji_indirection import pipeline
from koji_indirection.imagefile import ImageFile


def test_the_end_of_a_build_does_not_wait_for_an_image_that_cannot_be_read(tmp_path: Path) -> None:
    hanging = tmp_path / "hanging"
    os.mkfifo(hanging)
    image = ImageFile(hanging, "raw", 512, hanging, (0, 0, 0, 0))
    left = threading.Event()

    def build() -> None:
        with pipeline._checksums({image}):
            pass
        left.set()

    threading.Thread(target=build, daemon=True).start()
    assert left.wait(20)
    os.close(os.open(hanging, os.O_WRONLY))  # it has come back
