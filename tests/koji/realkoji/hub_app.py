"""What gunicorn runs: the hub's own application, told where its configuration is.

The hub looks for that in the request's environment, where httpd's SetEnv puts it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from kojihub import kojixmlrpc

CONFIGURATION = {
    "koji.hub.ConfigFile": "/etc/koji-hub/hub.conf",
    "koji.hub.ConfigDir": "/nonexistent",  # not the snippets of an installed hub
}


def application(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    environ.update(CONFIGURATION)
    return kojixmlrpc.application(environ, start_response)
