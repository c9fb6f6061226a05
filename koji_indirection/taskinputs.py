"""What a task builds from: its template, and both images of each arch, found but not yet fetched.

Whoever may push can fill a checkout: a template's path must never lead out of it. A subtask must
never build from another template than the one that its parent has read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import threading
import urllib.parse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import cache, imagefetch, programs, sources, template
from .address import has_credentials
from .arches import koji_arch
from .config import Settings
from .errors import BuilderFault, BuildFailed, UsageError
from .manifest import KojiRecord, Origin
from .spec import BuildSpec
from .taskrun import Daemon
from .taskspec import TaskSpec
from .template import Template

_NO_IMAGE = "no_image"


@dataclass(frozen=True)
class Inputs:
    """What one arch is built from: found, vetted as far as it is here, nothing large fetched.

    template_source -- the SCM URL with its commit, or where the file was uploaded to.
    tag_repo -- below topurl, without the arch; None unless the build tag's is asked for.
    """

    template: Template
    template_text: bytes
    template_source: str
    input_image: sources.Source
    utility_image: sources.Source
    tag_repo: str | None = None

    def images(self, arch: str) -> list[dict[str, Any]]:
        """Both images as the hub's recordIndirectionInputs() takes them."""
        return [_source_record(one, arch) for one in (self.utility_image, self.input_image)]

    def origin(self) -> Origin:
        """What the manifest says of where all this is from."""
        return Origin(
            template=self.template_source,
            utility_image=_koji_record(self.utility_image),
            input_image=_koji_record(self.input_image),
        )

    def template_record(self) -> dict[str, str]:
        """The same call's extra data."""
        record = {"template_sha256": self.template.sha256}
        if self.template_commit:
            record["template_commit"] = self.template_commit
        return record

    @property
    def template_commit(self) -> str:
        """Empty for an uploaded template."""
        return self.template_source.partition("#")[2]

    def pinned(self) -> dict[str, Any]:
        """What another host needs to build from exactly this; plain data, see pinned_inputs()."""
        return {
            **self._pinned_template(),
            "tag_repo": self.tag_repo,
            "input_image": dataclasses.asdict(self.input_image),
            "utility_image": dataclasses.asdict(self.utility_image),
        }

    def without_image(self, reason: str) -> dict[str, Any]:
        """In place of pinned(), for another arch that can fail, and whose subtask only says why.

        It has the same template, which a replay of that subtask builds with.
        """
        return {_NO_IMAGE: reason, **self._pinned_template()}

    def _pinned_template(self) -> dict[str, str]:
        return {
            "template_source": self.template_source,
            "template_sha256": self.template.sha256,
        }


def _koji_record(source: sources.Source) -> KojiRecord:
    return KojiRecord(
        reference=source.reference,
        role=source.role,
        nvr=source.nvr,
        build_id=source.build_id,
        archive_id=source.archive_id,
        task_id=source.task_id,
        filename=source.filename,
        arch=source.arch,
        checksum=source.checksum,
        checksum_type=source.checksum_name,
    )


def _source_record(source: sources.Source, arch: str) -> dict[str, Any]:
    record = {
        "arch": arch,
        "role": source.role,
        "reference": source.reference,
        "nvr": source.nvr,
        "archive_id": source.archive_id,
        "task_id": source.task_id,
        "filename": source.filename,
        "checksum": source.checksum,
        "checksum_type": source.checksum_type,
    }
    return {name: value for name, value in record.items() if value is not None}


def find_inputs(
    daemon: Daemon, spec: TaskSpec, target: Mapping[str, Any], settings: Settings
) -> tuple[dict[str, Inputs], dict[str, str]]:
    """Get the template, once, and resolve both images for each arch.

    An arch that can fail, and has no image, is in the second dict, with the reason; at least one
    arch is in the first.

    target -- as check_target() gives it.
    Raises what template and sources raise, and BuildFailed where the build tag has no repository.
    """
    tag_repo = tag_repo_of(daemon.session, target) if spec.tag_repo else None
    path, source = _fetch_template(daemon, spec, spec.template_scm, settings)
    parsed = template.load(path)
    parsed.require_network(spec.build.network)
    text = path.read_bytes()

    def resolved(reference: str, arch: str, glob: str | None, role: str) -> sources.Source:
        return sources.resolve(
            daemon.session,
            sources.Reference.parse(reference),
            arch,
            archive_glob=glob,
            role=role,
        )

    found: dict[str, Inputs] = {}
    no_image: dict[str, BuildFailed | UsageError] = {}
    for arch in spec.arches:
        try:
            found[arch] = Inputs(
                template=parsed,
                template_text=text,
                template_source=source,
                input_image=resolved(spec.input_image, arch, spec.input_archive, "input image"),
                utility_image=resolved(
                    spec.utility_image, arch, spec.utility_archive, "utility image"
                ),
                tag_repo=tag_repo,
            )
        except (BuildFailed, UsageError) as error:
            if arch not in spec.can_fail:
                raise
            no_image[arch] = error
    if not found:
        raise next(iter(no_image.values()))
    return found, {arch: str(error) for arch, error in no_image.items()}


def has_image(pinned: Mapping[str, Any]) -> bool:
    """Whether a subtask has been told what to build from; else it can only fail, on any host."""
    return _NO_IMAGE not in pinned


def require_image(pinned: Mapping[str, Any]) -> None:
    """Raise BuildFailed, with the parent task's reason, in a subtask that has no image."""
    if not has_image(pinned):
        raise BuildFailed(pinned[_NO_IMAGE])


def pinned_inputs(
    daemon: Daemon, spec: TaskSpec, pinned: Mapping[str, Any], settings: Settings
) -> Inputs:
    """What the parent task has found, whatever a branch or a tag holds by now."""
    scm = pinned["template_source"] if spec.template_scm is not None else None
    path, source = _fetch_template(daemon, spec, scm, settings)
    parsed = template.load(path)
    if parsed.sha256 != pinned["template_sha256"]:
        raise BuilderFault(
            f"the template {spec.template} is not the one that the parent task has read",
            "submit the build again",
        )
    return Inputs(
        template=parsed,
        template_text=path.read_bytes(),
        template_source=source,
        input_image=sources.Source(**pinned["input_image"]),
        utility_image=sources.Source(**pinned["utility_image"]),
        tag_repo=pinned["tag_repo"],
    )


def tag_repo_of(session: Any, target: Mapping[str, Any]) -> str:
    """Where the build tag's latest repository is, below topurl."""
    tag = target["build_tag_name"]
    repo = session.getRepo(target["build_tag"])
    if not repo:
        raise BuildFailed(
            f"the build tag {tag} has no repository that is ready",
            f"have one made with: koji regen-repo {tag}",
        )
    return f"repos/{tag}/{repo['id']}"


def build_spec(daemon: Daemon, spec: TaskSpec, arch: str, inputs: Inputs) -> BuildSpec:
    """The build spec of one arch; with the build tag's repository, if it is asked for."""
    return with_tag_repo(spec.build_for(arch), inputs, arch, daemon.topurl)


def with_tag_repo(build: BuildSpec, inputs: Inputs, arch: str, topurl: str | None) -> BuildSpec:
    """A build spec that has the build tag's repository too, if the inputs have one."""
    if inputs.tag_repo is None:
        return build
    if not topurl:
        raise BuilderFault(
            "the build tag's repository has no address: there is no topurl here",
            "set topurl in Koji's configuration",
        )
    if has_credentials(topurl):
        raise BuilderFault(
            "the build tag's repository has no address that guests may know: topurl has a user"
            " name or password in it",
            "set topurl in Koji's configuration to one without",
        )
    # As koji.pathinfo and its repositories have it: i386 also for i686.
    path = urllib.parse.quote(f"{inputs.tag_repo}/{koji_arch(arch)}")
    address = f"{topurl.rstrip('/')}/{path}"
    return dataclasses.replace(build, repos=tuple(dict.fromkeys((*build.repos, address))))


def _fetch_template(
    daemon: Daemon, spec: TaskSpec, scm: str | None, settings: Settings
) -> tuple[Path, str]:
    """A local copy, and where exactly it is from."""
    if scm is not None:
        scm_dir = daemon.work_dir / "scm"
        scm_dir.mkdir(parents=True)
        checkout, url = daemon.checkout(scm, scm_dir)
        return file_in_checkout(checkout, spec.template), url
    source = uploaded_template(daemon.session, spec)
    path = daemon.work_dir / "template.tdl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with fetched(daemon, source, settings) as file:
        shutil.copyfile(file, path)
    return path, f"{spec.template_upload}/{spec.template}"


@contextlib.contextmanager
def checkout_deadline(settings: Settings) -> Iterator[None]:
    """Kill the programs that this process has started when the block takes too long.

    koji.daemon.SCM waits for git for ever. Raises BuilderFault in place of what it raises then.
    """
    seconds = settings.download.checkout_timeout_seconds
    over, done = threading.Event(), threading.Event()

    def watch() -> None:
        if done.wait(seconds):
            return
        over.set()
        while not done.wait(0.2):  # after one git comes the next
            programs.kill_descendants()

    thread = threading.Thread(target=watch, name="checkout-deadline", daemon=True)
    thread.start()
    try:
        yield
    except Exception as error:
        if not over.is_set():
            raise
        raise BuilderFault(
            f"the template could not be checked out within {seconds:g} s",
            "see checkout.log, and whether its server is well; checkout_timeout in the"
            " configuration's [download] allows more",
        ) from error
    finally:
        done.set()
        thread.join()


def uploaded_template(session: Any, spec: TaskSpec) -> sources.Source:
    """Where the hub has a template that was uploaded; BuildFailed if it is not there any more."""
    assert spec.template_upload is not None
    uploaded = session.checkUpload(spec.template_upload, spec.template, verify="sha256")
    if not uploaded:
        raise BuildFailed(
            f"the template {spec.template} is not in {spec.template_upload} on the hub",
            "uploads are kept for some days only: submit the build again",
        )
    if uploaded["size"] > template.MAX_BYTES:
        raise BuildFailed(
            f"the template {spec.template} has {uploaded['size']} bytes",
            f"at most {template.MAX_BYTES} are allowed",
        )
    return sources.Source(
        reference=spec.template_upload,
        role="template",
        nvr=spec.template_upload,  # what messages call it
        build_id=None,
        archive_id=None,
        task_id=None,
        filename=spec.template,
        size_bytes=uploaded["size"],
        checksum=uploaded["hexdigest"],
        checksum_type=2,
        arch="noarch",
        relpath=f"work/{spec.template_upload}/{spec.template}",
    )


def file_in_checkout(checkout: Path, name: str) -> Path:
    """The template in a checkout, which whoever may push there has filled: links stay inside."""
    root, path = checkout.resolve(), (checkout / name).resolve()
    if root not in path.parents or ".git" in path.relative_to(root).parts:
        raise BuildFailed(
            f"the template {name} leads out of its checkout", "commit the file itself"
        )
    if not path.is_file():
        raise BuildFailed(f"there is no template {name} in the checkout", "check its path")
    return path


def fetched(
    daemon: Daemon, source: sources.Source, settings: Settings
) -> contextlib.AbstractContextManager[Path]:
    """The file of an image, or of an uploaded template, for as long as the block lasts."""
    return imagefetch.fetch(
        source,
        topurl=daemon.topurl,
        topdir=daemon.topdir,
        cache=cache.Cache.of(settings),
        download=settings.download,
    )
