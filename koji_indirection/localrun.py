"""A build of Koji's on this machine: `koji indirection-build --local`, `koji indirection-replay`.

The same inputs, the same engine, and no task: a template is tried out, or a failure looked
into. It imports on a plain client; what builds is imported when something is to be built.
It must never read a local file because a hub, a task or an SCM URL names one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import programs
from .config import Settings, require_within_limits
from .errors import BuilderFault, BuildFailed, IndirectionError, UsageError
from .jobdir import job_directory
from .manifest import FILE_NAME as MANIFEST
from .sources import ask
from .spec import BuildSpec
from .taskspec import TaskSpec

if TYPE_CHECKING:
    from .display import Display
    from .pipeline import Order
    from .sources import Source
    from .taskinputs import Inputs

log = logging.getLogger(__name__)

_GIT_TIMEOUT_SECONDS = 600


@dataclass(frozen=True)
class Here:
    """How a build is run on this machine.

    output -- directory for results, logs/ and manifest.json; force -- it may have files in it.
    settings -- ini file as builder/indirection.conf is; work_dir, cache_dir and connect, where
        they are given, count for more.
    verbose -- show the commands' output as it comes.
    """

    output: Path
    force: bool = False
    settings: Path | None = None
    work_dir: Path | None = None
    cache_dir: Path | None = None
    connect: str | None = None
    verbose: bool = False


@dataclass(frozen=True)
class Hub:
    """A koji.ClientSession, logged in or not, and where the client finds Koji's files."""

    session: Any
    topurl: str | None
    topdir: Path | None


@dataclass(frozen=True)
class LocalOrder:
    """One arch of a task spec, to be built here.

    build -- what the guest is like; may be other than spec.build_for(arch).
    find_inputs -- gets template and images; given the settings, and a directory of its own
        that is gone afterwards.
    """

    spec: TaskSpec
    arch: str
    build: BuildSpec
    find_inputs: Callable[[Settings, Path], Inputs]


def run(hub: Hub, here: Here, order: LocalOrder, *, quiet: bool, as_json: bool) -> int:
    """Build, shown as `koji-indirection build` shows it; 0 when it is done.

    Raises what pipeline.build() and whatever finds the inputs raise.
    """
    manifest = here.output / MANIFEST
    with ExitStack() as stack:
        try:
            prepared = _prepare(hub, here, order, quiet, stack)
        except IndirectionError as error:
            if as_json:
                print(json.dumps({"outcome": error.label, "reason": str(error)}), flush=True)
            raise
        try:
            from . import pipeline

            record = pipeline.build(*prepared)
        finally:
            if as_json and manifest.exists():
                print(manifest.read_text(encoding="utf-8"), end="", flush=True)
    if not as_json and not quiet:
        from .command import print_summary

        print_summary(record, here.output)
    return 0


def _prepare(
    hub: Hub, here: Here, order: LocalOrder, quiet: bool, stack: ExitStack
) -> tuple[Order, Settings, Display]:
    """Find and fetch the inputs; what pipeline.build() takes, for as long as the stack holds it."""
    _require_engine(order.arch)
    from . import kojibuild, network, output, pipeline, taskinputs
    from .display import Display, log_shown_on

    settings = _settings(here, order)
    network.require_allowed(order.build.network, settings)
    require_within_limits(order.build, settings)
    enter = stack.enter_context
    display = enter(Display(sys.stderr, verbose=here.verbose, quiet=quiet))
    enter(_from_info_on())
    enter(log_shown_on(display))
    display.phase("find")
    with job_directory(settings.work_dir) as scratch:
        inputs = order.find_inputs(settings, scratch.path)
    inputs.template.require_network(order.build.network)
    made = output.prepare(here.output, force=here.force)
    (made / output.LOGS / kojibuild.TEMPLATE_LOG).write_bytes(inputs.template_text)
    enter(kojibuild.task_log(made / output.LOGS / kojibuild.TASK_LOG))
    log.info("input image: %s; utility image: %s", inputs.input_image, inputs.utility_image)
    log.info("template: %s, sha256 %s", inputs.template_source, inputs.template.sha256)
    display.phase("fetch")
    engine_order = pipeline.Order(
        spec=taskinputs.with_tag_repo(order.build, inputs, order.arch, hub.topurl),
        template=inputs.template,
        template_name=Path(order.spec.template).name,
        input_image=enter(fetched(hub, inputs.input_image, settings)),
        utility_image=enter(fetched(hub, inputs.utility_image, settings)),
        arch=order.arch,
        output=made,
        label="local",
        origin=inputs.origin(),
    )
    return engine_order, settings, display


def _require_engine(arch: str) -> None:
    """Raise a BuilderFault before anything large is fetched, if nothing can be built here."""
    try:
        from . import appliance, display, kojibuild, machine, taskrun  # noqa: F401
    except ImportError as error:
        raise BuilderFault(
            f"this machine cannot build: {error}",
            "`koji-indirection doctor` says what to install",
        ) from error
    machine.libvirt_module()
    appliance.guestfs_module()
    if not taskrun.runs_here(arch, [arch]):
        raise UsageError(
            f"this machine cannot run a guest of arch {arch}",
            "name an arch with --arch that it can run, or use a machine of that arch",
        )


def _settings(here: Here, order: LocalOrder) -> Settings:
    """As `koji-indirection build` has them, with what the options say."""
    from .command import local_settings

    settings = local_settings(here.settings)
    given = {
        name: getattr(here, name)
        for name in ("work_dir", "cache_dir", "connect")
        if getattr(here, name) is not None
    }
    if settings.accel == "auto":
        given["accel"] = order.spec.accel
    return dataclasses.replace(settings, **given)


@contextlib.contextmanager
def _from_info_on() -> Iterator[None]:
    """The library's messages, also those before a log file wants them."""
    logger = logging.getLogger(__package__)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)


# --- inputs -----------------------------------------------------------------------------------


def inputs_of(
    hub: Hub, spec: TaskSpec, text: bytes, source: str, images: Sequence[Source], *, tag_repo: bool
) -> Inputs:
    """What is built from; the template, which source says the origin of, is checked.

    images -- the input image and the utility image.
    tag_repo -- with the repository that the build tag has now.
    """
    from . import taskinputs, template

    parsed = template.parse(text, source=Path(spec.template).name)
    repository = None
    if tag_repo:
        repository = taskinputs.tag_repo_of(hub.session, require_target(hub.session, spec))
    return taskinputs.Inputs(
        template=parsed,
        template_text=text,
        template_source=source,
        input_image=images[0],
        utility_image=images[1],
        tag_repo=repository,
    )


def fetched(hub: Hub, source: Source, settings: Settings) -> AbstractContextManager[Path]:
    """The file of a source, for as long as the block lasts; see imagefetch.fetch()."""
    from . import cache, imagefetch

    return imagefetch.fetch(
        source,
        topurl=hub.topurl,
        topdir=hub.topdir,
        cache=cache.Cache.of(settings),
        download=settings.download,
    )


def require_target(session: Any, spec: TaskSpec) -> Any:
    """The build target of a spec; UsageError if there is none of this name."""
    target = ask(session, "getBuildTarget", spec.target)
    if target is None:
        raise UsageError(
            f"there is no build target {spec.target!r}", "koji list-targets shows them all"
        )
    return target


def read_template(path: Path) -> bytes:
    """The bytes of a template that can be parsed; raises what template.load() does."""
    from . import template

    template.load(path)
    return path.read_bytes()


# --- source control ---------------------------------------------------------------------------

# Koji's schemes for git, as git knows them. Koji's class SCM itself can only be used by a task:
# it uploads its log as it goes.
_SCHEMES = {"git": "git", "git+http": "http", "git+https": "https", "git+ssh": "ssh"}
_SCM = re.compile(r"([a-z+]+)://([^/?#@:]+@)?([^/?#@]+)(/[^?#]+)(?:\?([^#]*))?#(.+)")


def template_in(url: str, name: str, directory: Path) -> tuple[bytes, str]:
    """A template's text from an SCM URL as Koji writes it, and the URL with the commit's id.

    directory -- for the checkout. Raises UsageError for a URL that is not one of git's, and
    BuildFailed when git cannot get it or the template is not in there.
    """
    from . import template
    from .taskinputs import file_in_checkout

    match = _SCM.fullmatch(url)
    if match is None or match.group(1) not in _SCHEMES:
        raise UsageError(
            f"{url} cannot be checked out here",
            "write git+https://HOST/REPOSITORY#REF (or git+http, git+ssh, git), without a password",
        )
    scheme, user, host, path, module, ref = match.groups()
    address = f"://{user or ''}{host}{path}"
    checkout = directory / "checkout"
    _git(["clone", "--quiet", "--no-checkout", "--", _SCHEMES[scheme] + address, checkout], url)
    commit = _commit(checkout, ref, url)
    _git(["-C", checkout, "checkout", "--quiet", "--detach", commit, "--"], url)
    # From its root on: neither a link in the repository nor the URL may lead out of it.
    file = file_in_checkout(checkout, f"{module}/{name}" if module else name)
    template.load(file)  # says what is wrong with its size
    query = f"?{module}" if module else ""
    return file.read_bytes(), f"{scheme}{address}{query}#{commit}"


def _commit(checkout: Path, ref: str, url: str) -> str:
    """The id of the commit that a branch, a tag or an id means."""
    wanted = ref[len("origin/") :] if ref.startswith("origin/") else ref
    try:
        _git(["-C", checkout, "fetch", "--quiet", "--", "origin", wanted], url)
        found = "FETCH_HEAD"
    except BuildFailed:
        found = ref  # a commit's id, which few servers give when asked for it
    return _git(["-C", checkout, "rev-parse", "--verify", f"{found}^{{commit}}"], url)


def _git(arguments: Sequence[str | Path], url: str) -> str:
    try:
        return programs.run(
            ["git", "-c", "core.hooksPath=/dev/null", *map(str, arguments)],
            timeout_seconds=_GIT_TIMEOUT_SECONDS,
            # Also what the repository or its server redirects to; and nobody is there to answer.
            env={"GIT_ALLOW_PROTOCOL": "git:http:https:ssh", "GIT_TERMINAL_PROMPT": "0"},
        ).strip()
    except programs.ProgramFailed as failure:
        said = failure.stderr.splitlines() or [str(failure.returncode)]
        raise BuildFailed(
            f"git cannot check out {url}: {said[-1]}",
            "check the URL and its REF, and that you may read the repository",
        ) from failure
