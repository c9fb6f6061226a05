"""What a hub plugin gets when it imports kojihub; server.py gives it that name."""

from __future__ import annotations

import sys

from .builds import get_archive, get_build, list_archives, next_release
from .policies import assert_policy, check_policy
from .processors import BulkInsertProcessor, InsertProcessor, QueryProcessor, UpdateProcessor
from .records import convert_value, get_build_target, get_channel, get_host, get_tag, get_user
from .tasks import Host, Task, make_task

__all__ = [
    "BulkInsertProcessor",
    "Host",
    "InsertProcessor",
    "QueryProcessor",
    "Task",
    "UpdateProcessor",
    "assert_policy",
    "check_policy",
    "convert_value",
    "get_archive",
    "get_build",
    "get_build_target",
    "get_channel",
    "get_host",
    "get_tag",
    "get_user",
    "kojihub",
    "list_archives",
    "make_task",
    "next_release",
]

kojihub = sys.modules[__name__]  # a package with a module of its own name, there
