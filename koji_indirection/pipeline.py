"""build(): the one way through, top to bottom.

    vet -> prepare -> inject -> boot -> job -> shutdown -> collect

shell() goes the same way until the VM boots, and then hands it to a person.

Every resource is entered on one ExitStack, so that it is gone afterwards
whichever way the build ends. Used by the local command and by the Koji builder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import os
import platform
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Event, Thread
from typing import Protocol

from . import (
    __version__,
    accel,
    appliance,
    arches,
    bootpath,
    console,
    filefetch,
    firmware,
    guest,
    imagefile,
    machine,
    media,
    network,
    programs,
    results,
    workspace,
)
from .appliance import Appliance, Drive, OutOfTime, TimeLimit
from .config import Settings, require_within_limits
from .domain import NAME_PREFIX, Disk, Domain, disk_bus, serial_reports, tcg_cpu_model
from .errors import BuilderFault, BuildFailed, IndirectionError, UsageError, without_passwords
from .guest import GuestSystem
from .guestjob import GuestFile, GuestJob, Terminal, results_directory, spec_repositories
from .guestlog import BoundedLog, printable
from .imagefile import ImageFile
from .jobdir import job_directory
from .manifest import ImageRecord, KojiRecord, Manifest, Origin, OutputRecord, Timeline
from .output import LOGS
from .spec import BuildSpec
from .template import Template
from .units import format_size
from .watch import Deadlines, DiskLimit, JobReport, Watch

log = logging.getLogger(__name__)

# In seconds, when the spec names none. Under TCG a guest runs about ten times
# slower, but most of a boot is waiting: a Debian takes 28 s there.
BOOT_TIMEOUT_SECONDS = {"kvm": 300, "tcg": 1200}
# systemd waits 90 s for what a command left behind.
SHUTDOWN_TIMEOUT_SECONDS = {"kvm": 120, "tcg": 300}
DEFAULT_CPUS_MAX = 4
# 20 s are usual without KVM.
_INJECT_TIME_LIMIT = TimeLimit(
    1800,
    "looking into the utility image, and putting the job into it,",
    "it holds too many file systems, or this machine has too much to do",
)
_OUTPUT_LINES_IN_ERRORS = 15
_WORKSPACE_PARTITION = "/dev/sdb1"  # in the appliance that collects, behind the overlay


class Progress(Protocol):
    """Whoever watches a build; called from the thread that builds."""

    def phase(self, name: str) -> None:
        """A phase begins."""

    def guest_output(self, data: bytes) -> None:
        """The commands in the guest wrote this; untrusted bytes."""


@dataclass(frozen=True)
class GuestOrder:
    """Which guest to boot, and what is to be in it.

    utility_image -- None: the input image is its own utility.
    arch -- what the guest is of; None: this machine's. Another one is emulated.
    """

    spec: BuildSpec
    template: Template
    template_name: str
    input_image: Path
    utility_image: Path | None
    arch: str | None


@dataclass(frozen=True)
class Order(GuestOrder):
    """What to build, from what, and where it goes.

    output -- an existing directory, as output.prepare() makes it.
    label -- part of the VM's name, e.g. "task-123"; may be empty.
    origin -- where template and images come from, for the manifest.
    """

    output: Path
    label: str = ""
    origin: Origin = field(default_factory=Origin)


def build(order: Order, settings: Settings, progress: Progress) -> Manifest:
    """Do one indirection build; its results, logs and manifest are in order.output afterwards.

    Raises BuildFailed or BuilderFault; logs and manifest are there then too.
    Whatever is raised, no VM, process or temporary file of the build remains.
    """
    timeline = Timeline(on_phase=progress.phase)
    record = _new_record(order, timeline, order.origin.template)
    with _build_log(order.output / LOGS / "build.log"):
        try:
            _Build(order, settings, progress, timeline, record).run()
            record.outcome = "built"
        except IndirectionError as error:
            record.outcome, record.reason = error.label, str(error)
            if error.details:
                log.error("%s", error.details)
            log.error("%s", error.one_line())
            raise
        except OSError as error:
            fault = _fault_of(error, order.output)
            record.reason = str(fault)
            log.error("%s", fault.one_line())
            raise fault from error
        except (KeyboardInterrupt, SystemExit):
            record.outcome, record.reason = "interrupted", "the build was interrupted"
            log.error("%s", record.reason)
            raise
        except Exception as error:
            record.reason = f"internal error, {type(error).__name__}: {error}"
            log.exception("internal error")
            raise
        finally:
            timeline.end()
            record.logs = sorted(path.name for path in (order.output / LOGS).iterdir())
            with contextlib.suppress(OSError) if record.reason else contextlib.nullcontext():
                record.write(order.output)
    return record


def shell(
    order: GuestOrder, settings: Settings, progress: Progress, terminal: console.Descriptors
) -> None:
    """Boot the guest that build() would boot, for a person at a terminal; keeps nothing.

    The template's set-up is done and its commands lie in place, but no command is run.
    Returns when the guest is off or the person leaves. Raises UsageError where there is
    no terminal, BuildFailed or BuilderFault otherwise.
    """
    size = console.require_terminal(terminal)
    timeline = Timeline(on_phase=progress.phase)
    try:
        _Shell(order, settings, timeline, _new_record(order, timeline), size).run(terminal)
    except OSError as error:
        raise _fault_of(error, settings.work_dir, "nothing is left of the shell") from error


def _new_record(
    order: GuestOrder, timeline: Timeline, template_source: str | None = None
) -> Manifest:
    return Manifest(
        spec=order.spec.to_dict(),
        template={
            "name": order.template_name,
            "sha256": order.template.sha256,
            "source": template_source,
            "ignored": list(order.template.ignored),
        },
        timeline=timeline.phases,
    )


@dataclass(frozen=True)
class _Overlay:
    """A throw-away qcow2 and the only file below it, with its format."""

    path: Path
    format: str
    backing: tuple[Path, str]


class _Guest:
    """A guest up to the moment in which it can boot, and what its making has found.

    Everything that the phases hand to each other; resources are entered on the caller's stack.
    """

    label = ""
    origin = Origin()

    def __init__(
        self,
        order: GuestOrder,
        settings: Settings,
        timeline: Timeline,
        record: Manifest,
        terminal: Terminal | None = None,
    ) -> None:
        self.order = order
        self.arch = arches.named(order.arch or arches.of_host())
        self.spec = order.spec
        self.settings = settings
        self.timeline = timeline
        self.record = record
        self.terminal = terminal

    def vet(self, stack: ExitStack, *, also_removed: Sequence[Path] = ()) -> None:
        self.timeline.enter("vet")
        require_within_limits(self.spec, self.settings)
        self._check_order()
        self.job = stack.enter_context(
            job_directory(self.settings.work_dir, also_removed=also_removed)
        )
        self.accel = self._accelerator()
        self._note_host()
        self.utility, self.input = self._vet()

    def make(self, stack: ExitStack) -> Domain:
        """Prepare and inject; returns the VM that can be started then."""
        settings = self.settings
        self.timeline.enter("prepare")
        self.hypervisor = stack.enter_context(
            machine.connect(
                settings.connect,
                run_dir=self.job.run,
                cache_dir=settings.cache_dir,
                disk_dir=self.job.path,
            )
        )
        self._note_hypervisor()
        self.overlay = self._overlay(self.utility, "utility")
        self.workspace_disk = self._make_workspace()
        media_disk = self._make_media()
        self.guest_job = self._guest_job(media_disk)

        self.timeline.enter("inject")
        self.system, boots_by = self._inject(self.overlay, self.guest_job)
        hardware = self._hardware(self.system, boots_by)
        disks = self._disks(self.overlay, self.workspace_disk)
        if media_disk is not None:
            disks.append(media_disk.disk)
        if hardware.disk_bus != "virtio":
            disks = [self._writable(one) for one in disks]
        return dataclasses.replace(hardware, disks=disks)

    @property
    def boot_timeout_seconds(self) -> int:
        return self.spec.boot_timeout_seconds or BOOT_TIMEOUT_SECONDS[self.accel.kind]

    def disk_limit(self, domain: Domain) -> DiskLimit:
        written = [disk.path for disk in domain.disks if not disk.readonly]
        # And the sockets' directory: the embedded driver keeps qemu's log there.
        return DiskLimit([self.job.run, *written], self.settings.max_disk_bytes)

    def _check_order(self) -> None:
        template = self.order.template
        if template.ignored:
            log.info("template: these have no effect: %s", ", ".join(template.ignored))
        if template.mistaken:
            log.warning("template: unknown, and without effect: %s", ", ".join(template.mistaken))
        network.require_allowed(self.spec.network, self.settings)
        template.require_network(self.spec.network)
        for file in template.url_files:
            filefetch.require_allowed(file.name, file.content, self.settings)

    def _accelerator(self) -> accel.Accel:
        """What the guest runs on: one of another arch can only be emulated."""
        wanted = self.settings.accel
        host = arches.of_host()
        if self.arch.name != host:
            if wanted == "kvm":
                raise UsageError(
                    f"a guest of the arch {self.arch.name} cannot run on KVM, because this machine"
                    f" is of the arch {host}",
                    "use --accel auto or tcg, which emulate it slowly",
                )
            wanted = "tcg"
        return accel.choose(wanted, cache_dir=self.settings.cache_dir)

    def _note_host(self) -> None:
        self.record.accelerator = {"kind": self.accel.kind, "reason": self.accel.reason}
        self.record.versions = {
            "koji-indirection": __version__,
            "python": platform.python_version(),
            "kernel": platform.release(),
        }
        self.record.host = {
            "arch": platform.machine(),
            "cpus": os.cpu_count() or 1,
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        }
        if self.spec.memory_bytes > self.record.host["memory_bytes"]:
            raise BuilderFault(
                f"the guest is to have {format_size(self.spec.memory_bytes)} of memory,"
                f" this machine has {format_size(self.record.host['memory_bytes'])}",
                "give it less with --memory",
            )
        if self.accel.kind == "tcg" and not self.accel.forced:
            log.warning("no KVM, the guest runs about ten times slower: %s", self.accel.reason)

    def _vet(self) -> tuple[ImageFile, ImageFile]:
        """The vetted utility and input image; the same object when there is only one."""

        def vetted(path: Path, role: str) -> ImageFile:
            image = imagefile.vet(
                path,
                max_virtual_size_bytes=self.settings.max_image_bytes,
                work_dir=self.job.path,
                role=role,
            )
            log.info("%s: %s, %s, %d bytes", role, path, image.format, image.virtual_size_bytes)
            return image

        given = self.order.utility_image
        utility = vetted(given, imagefile.UTILITY_IMAGE) if given is not None else None
        if given is None or given.resolve() == self.order.input_image.resolve():
            # One image in both parts must be able to boot.
            image = utility or vetted(self.order.input_image, imagefile.UTILITY_IMAGE)
            utility, input_image = image, image
            if self.spec.input_device is not None:
                raise UsageError(
                    f"{image.source} is the utility image and cannot be the input device too: the"
                    " guest would see two disks with the same UUIDs, and mount either as its root",
                    "hand it over as a file, or use another utility image",
                )
        else:
            assert utility is not None
            input_image = vetted(self.order.input_image, imagefile.INPUT_IMAGE)
        origin = self.origin
        self.record.utility_image = _image_record(utility, origin.utility_image)
        self.record.input_image = _image_record(input_image, origin.input_image)
        return utility, input_image

    def _note_hypervisor(self) -> None:
        self.record.versions.update(self.hypervisor.versions)
        self.record.host["libvirt_uri"] = self.hypervisor.uri.partition("?")[0]
        log.info("libvirt: %s; accelerator: %s", self.hypervisor.uri, self.accel.kind)

    def _overlay(self, image: ImageFile, name: str) -> _Overlay:
        base = self._reachable(image, name)
        overlay = imagefile.create_overlay(base, self.job.path / f"{name}-overlay.qcow2")
        return _Overlay(overlay.path, overlay.format, (base.path, base.format))

    def _reachable(self, image: ImageFile, name: str) -> ImageFile:
        """The image, or a copy of it where qemu runs as a user who may not read the image."""
        if self.hypervisor.shares_our_files or _everybody_reads(image.path):
            return image
        log.info("qemu runs as another user, who cannot read %s: copying it", image.path)
        copy = self.job.path / f"{name}.{image.format}"
        seconds = 600 + image.path.stat().st_size / 10_000_000
        programs.run(
            ["cp", "--reflink=auto", "--sparse=always", "--", str(image.path), str(copy)],
            timeout_seconds=seconds,
        )
        copy.chmod(0o644)
        return dataclasses.replace(image, path=copy)

    def _make_workspace(self) -> Path:
        spec, image = self.spec, self.input
        disk = self.job.path / "workspace.raw"
        workspace.create(
            disk,
            size_bytes=spec.workspace_size_bytes,
            filesystem=spec.workspace_fs,
            input_path=image.path if spec.input_filename is not None else None,
            input_format=image.format,
            input_size_bytes=image.virtual_size_bytes,
            input_filename=spec.input_filename or "",
        )
        return disk

    def _make_media(self) -> media.Media | None:
        """The disk with packages, if there is to be one; named after all others."""
        if self.settings.media is None:
            return None
        last = self.spec.guest_disks()[-1].device
        made = media.prepare(
            self.settings.media,
            device=f"{last[:-1]}{chr(ord(last[-1]) + 1)}",
            work_dir=self.job.path,
            max_size_bytes=self.settings.max_image_bytes,
        )
        if made.image is None:
            return made
        image = self._reachable(made.image, "media")
        return dataclasses.replace(made, disk=dataclasses.replace(made.disk, path=image.path))

    def _guest_job(self, media_disk: media.Media | None) -> GuestJob:
        spec, template = self.spec, self.order.template
        commands = template.commands_for(self.order.arch or platform.machine())
        skipped = [command for command in template.commands if command not in commands]
        for command in skipped:
            log.info("command %s is for %s only: not run", command.name, command.arch)
        return GuestJob(
            commands=commands,
            skipped=skipped,
            network=spec.network,
            media=(media_disk.disk.device, media_disk.file_system) if media_disk else None,
            repositories=(*template.repositories, *spec_repositories(spec.repos)),
            packages=template.packages,
            files=self._guest_files(),
            environment=network.proxy_environment(spec.network, self.settings),
            workspace=spec.workspace_partition,
            input=f"/dev/{spec.input_device}" if spec.input_device else spec.input_filename or "",
            results_dir=results_directory(spec),
            terminal=self.terminal,
            shell_tty=self.arch.virtio_console,
        )

    def _guest_files(self) -> list[GuestFile]:
        files = []
        fetcher = filefetch.Fetcher(self.settings)
        for number, file in enumerate(self.order.template.files, start=1):
            data: bytes | Path
            if file.type == "url":
                data = self.job.path / f"file-{number}"
                fetcher.fetch(file.name, file.content, data)
            else:
                data = file.data()
            files.append(GuestFile(file.name, data, file.mode, file.owner))
        return files

    def _inject(self, overlay: _Overlay, job: GuestJob) -> tuple[GuestSystem, str]:
        """Put the job into the overlay; what was found in it, and the firmware it boots by."""
        drive = Drive(str(overlay.path), overlay.format, readonly=False)
        with appliance.appliance(
            [drive],
            _INJECT_TIME_LIMIT,
            accel_kind=self.accel.kind,
            job_dir=self.job.path,
            run_dir=self.job.run,
        ) as running:
            self.record.versions["libguestfs"] = running.version()
            boot_paths = bootpath.examine(running)
            system = guest.inject(running, job, tmp_dir=self.job.path)
        if system.arch and arches.canonical(system.arch) != self.arch.name:
            raise BuildFailed(
                f"the utility image is a system for {system.arch}, but the guest is to be one for"
                f" {self.arch.name}",
                "use a utility image of that arch, or name the image's own with --arch",
            )
        boots_by = bootpath.choose(
            boot_paths, self.arch, asked=self.spec.firmware, secure_boot=self.spec.secure_boot
        )
        self.record.guest = {
            "os_id": system.os_id,
            "version_id": system.version_id,
            "init": system.init,
            "selinux_made_permissive": system.selinux,
            "arch": self.arch.name,
            "firmware": boots_by,
        }
        return system, boots_by

    def _hardware(self, system: GuestSystem, boots_by: str) -> Domain:
        """The utility VM as far as the utility image decides it: without disks."""
        spec, arch, kind = self.spec, self.arch, self.accel.kind
        without = Domain(
            name="-".join(filter(None, (NAME_PREFIX, self.label, uuid.uuid4().hex[:12]))),
            accel_kind=kind,
            memory_bytes=spec.memory_bytes,
            cpus=spec.cpus or min(os.cpu_count() or 1, DEFAULT_CPUS_MAX, self.settings.max_cpus),
            cpu_model=tcg_cpu_model(system.os_id, system.version_id, arch),
            disks=(),
            socket_dir=self.job.run,
            network=spec.network,
            arch=arch,
            disk_bus=disk_bus(spec.disk_bus, system.missing_drivers, arch),
            serial_reports=serial_reports(system.missing_drivers, arch),
            log_is_terminal=self.terminal is not None,
            virtio_1=system.knows_virtio_1,
        )
        self.record.guest["disk_bus"] = without.disk_bus
        if boots_by != "uefi":
            return without
        if spec.secure_boot and without.machine != arch.machine:
            raise BuildFailed(
                f"Secure Boot needs the machine {arch.machine}, and this guest gets"
                f" {without.machine} for its disks: IDE, or virtio from before version 1.0",
                "leave --secure-boot out, or use another utility image or --disk-bus",
            )
        uefi = firmware.find(arch.name, without.machine, secure_boot=spec.secure_boot)
        log.info("firmware: %s%s", uefi.code, ", Secure Boot" if uefi.secure_boot else "")
        return dataclasses.replace(without, firmware=uefi.for_one_vm(self.job.path))

    def _writable(self, disk: Disk) -> Disk:
        """The disk with an overlay, if it is read-only: disks on SATA and IDE cannot be."""
        if not disk.readonly:
            return disk
        path = self.job.path / f"{disk.serial}-overlay.qcow2"
        # The input's size is known; the media is raw, and as long as its file.
        is_input = disk.serial == "input"
        size = self.input.virtual_size_bytes if is_input else disk.path.stat().st_size
        imagefile.write_overlay(disk.path, disk.format, size, path)
        return dataclasses.replace(
            disk, path=path, format="qcow2", backing=(disk.path, disk.format), readonly=False
        )

    def _disks(self, overlay: _Overlay, workspace_disk: Path) -> list[Disk]:
        """The guest's disks, in the order that gives them their names."""
        disks = []
        for device, role in self.spec.guest_disks():
            if role == "utility":
                disks.append(_overlay_disk(device, role, overlay))
            elif role == "workspace":
                disks.append(Disk(device, role, workspace_disk, "raw"))
            elif self.spec.input_writable:
                disks.append(_overlay_disk(device, role, self._overlay(self.input, "input")))
            else:
                image = self._reachable(self.input, "input")
                disks.append(Disk(device, role, image.path, image.format, readonly=True))
        return disks


class _Shell(_Guest):
    """A guest for a person at a terminal."""

    def run(self, ends: console.Descriptors) -> None:
        with ExitStack() as stack:
            self.vet(stack)
            domain = self.make(stack)
            self.timeline.enter("boot")
            running = stack.enter_context(machine.start(self.hypervisor, domain))
            console.relay(
                running,
                ends,
                boot_seconds=self.boot_timeout_seconds,
                disk_limit=self.disk_limit(domain),
            )


class _Build(_Guest):
    """A guest whose job is watched, and whose results are collected."""

    def __init__(
        self,
        order: Order,
        settings: Settings,
        progress: Progress,
        timeline: Timeline,
        record: Manifest,
    ) -> None:
        super().__init__(order, settings, timeline, record)
        self.progress = progress
        self.label, self.origin = order.label, order.origin
        self.output = order.output
        self.logs = order.output / LOGS

    def run(self) -> None:
        with ExitStack() as stack:
            self.vet(stack, also_removed=[self.output / results.PARTIAL])
            checksums = stack.enter_context(_checksums({self.utility, self.input}))
            domain = self.make(stack)

            self.timeline.enter("boot")
            failure = self._run_machine(domain, self.guest_job)

            self.timeline.enter("collect")
            self._note_checksums(checksums)
            self._collect(failure or self._changed_input())

    def _run_machine(self, domain: Domain, job: GuestJob) -> IndirectionError | None:
        """Run the VM to its end; returns why the job failed, None when it ended well."""
        spec, kind = self.spec, self.accel.kind
        deadlines = Deadlines(
            boot=self.boot_timeout_seconds,
            job=spec.job_timeout_seconds,
            command=spec.command_timeout_seconds,
            shutdown=spec.shutdown_timeout_seconds or SHUTDOWN_TIMEOUT_SECONDS[kind],
            silence=self.settings.max_silence_seconds,
        )
        limit = self.settings.max_log_bytes
        failure: IndirectionError | None
        with ExitStack() as stack:
            enter = stack.enter_context
            job_log = enter(BoundedLog(self.logs / "job.log", limit_bytes=limit))
            console_log = enter(BoundedLog(self.logs / "console.log", limit_bytes=limit))
            running = enter(machine.start(self.hypervisor, domain))
            watch = Watch(
                running,
                command_names=[command.name for command in job.commands],
                setup_steps=job.steps,
                deadlines=deadlines,
                job_log=job_log,
                console_log=console_log,
                disk_limit=self.disk_limit(domain),
                on_output=self.progress.guest_output,
                on_stage=self.timeline.enter,
            )
            try:
                watch.follow(self.logs / "screenshot.png")
                failure = _job_failure(watch.report, job_log, spec)
            except IndirectionError as error:
                failure = error
        report = watch.report
        self.record.setup = [asdict(step) for step in report.setup]
        self.record.commands = [asdict(command) for command in report.commands]
        self.record.guest.update(
            report.guest,
            cpus=domain.cpus,
            memory_bytes=domain.memory_bytes,
            cpu_model="host" if kind == "kvm" else domain.cpu_model,
            peaks=report.peaks,
        )
        return failure

    def _collect(self, failure: IndirectionError | None) -> None:
        """Fetch logs and, when the job ended well, results; raises what went wrong first."""
        if failure is not None and not self.spec.collect_logs:
            raise failure
        drives = [
            Drive(str(self.overlay.path), self.overlay.format, readonly=True),
            Drive(str(self.workspace_disk), "raw", readonly=True),
        ]
        limit = TimeLimit(
            self.settings.max_collect_seconds,
            "collecting results and logs from the guest's disks",
            "leave fewer, smaller or simpler files, or --max-collect-time (max_collect_time on a"
            " builder) allows more",
        )
        try:
            with appliance.appliance(
                drives,
                limit,
                accel_kind=self.accel.kind,
                job_dir=self.job.path,
                run_dir=self.job.run,
            ) as running:
                self._collect_logs(running)
                if failure is None:
                    self._collect_results(running)
        except (IndirectionError, OSError) as error:
            if failure is None:
                raise
            log.warning("logs could not be collected: %s", error)
        if failure is not None:
            raise failure

    def _collect_logs(self, running: Appliance) -> None:
        """Fetch the logs asked for, from the workspace or else from the guest's root."""
        missing = set(self.spec.collect_logs)
        for where, device in (
            ("workspace", _WORKSPACE_PARTITION),
            ("root file system", self.system.root_device),
        ):
            if not missing:
                return
            try:
                with results.mounted(running, device, what=where):
                    missing -= results.collect_logs(
                        running,
                        sorted(missing),
                        where=where,
                        output=self.logs,
                        limit_bytes=self.settings.max_log_bytes,
                    )
            except OutOfTime:
                raise
            except BuildFailed as error:
                log.warning("no logs from the %s: %s", where, error.message)
        for pattern in sorted(missing):
            log.warning(
                "log %s: there is no such file in the workspace or on the root file system",
                pattern,
            )

    def _collect_results(self, running: Appliance) -> None:
        limits = results.ResultLimits(self.settings.max_results, self.settings.max_result_bytes)
        with results.mounted(running, _WORKSPACE_PARTITION, what="workspace"):
            collected = results.collect(
                running, self.spec.results, output=self.output, limits=limits
            )
        self.record.outputs = [
            OutputRecord(one.path.name, one.guest_path, one.size_bytes, one.sha256)
            for one in collected
        ]

    def _note_checksums(self, checksums: dict[ImageFile, Future[str]]) -> None:
        for image, future in checksums.items():
            for entry in (self.record.utility_image, self.record.input_image):
                if entry is not None and entry.path == str(image.source):
                    entry.sha256 = _checksum(image, future)

    def _changed_input(self) -> BuilderFault | None:
        """Why the results cannot be trusted: somebody wrote to an image while it was used."""
        for image in (self.utility, self.input):
            if not imagefile.unchanged(image):
                return BuilderFault(
                    f"{image.source} changed while it was used",
                    "build from a file that nobody writes to",
                )
        return None


def _checksum(image: ImageFile, future: Future[str]) -> str:
    """The build took longer than reading a file does: this waits for a slow disk at most."""
    seconds = 600 + image.source.stat().st_size / 10_000_000
    try:
        return future.result(seconds)
    except FutureTimeout:
        raise BuilderFault(
            f"{image.source} could not be read to its end within {seconds:.0f} s",
            "see what is wrong with the disk or the server that it is on",
        ) from None


@contextlib.contextmanager
def _checksums(images: set[ImageFile]) -> Iterator[dict[ImageFile, Future[str]]]:
    """Checksums of the files that the user named, computed beside the build.

    In a thread that the end of the build does not wait for: a server that a file is on may hang.
    """
    cancelled = Event()
    futures: dict[ImageFile, Future[str]] = {image: Future() for image in images}

    def compute() -> None:
        for image, future in futures.items():
            try:
                future.set_result(imagefile.sha256(image.source, cancelled=cancelled.is_set))
            except Exception as error:  # noqa: BLE001 - raised where the result is asked for
                future.set_exception(error)

    Thread(target=compute, name="checksum", daemon=True).start()
    try:
        yield futures
    finally:
        cancelled.set()


class LogFormatter(logging.Formatter):
    """Lines of a log file, in which no password of a URL stands, and nothing for a terminal."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        text = without_passwords(super().format(record))
        return printable(text, len(text))


class _QuietFileHandler(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """Drop a line that cannot be written: the full disk itself ends the build soon after."""


@contextlib.contextmanager
def _build_log(path: Path) -> Iterator[None]:
    """Write what the library logs, debug messages included, into a file."""
    logger = logging.getLogger(__package__)
    handler = _QuietFileHandler(path, mode="w", encoding="utf-8")
    handler.setFormatter(LogFormatter())
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
        with contextlib.suppress(OSError):
            handler.close()


def _job_failure(report: JobReport, job_log: BoundedLog, spec: BuildSpec) -> BuildFailed | None:
    if report.status == 0:
        return None
    lines = job_log.last_lines(_OUTPUT_LINES_IN_ERRORS)
    details = "\n".join(["the last lines of logs/job.log:", *(f"  {line}" for line in lines)])
    hint = "; ".join(["see logs/job.log", *_used_up(report, spec)])
    step = report.setup[-1] if report.setup else None
    if step is not None and step.status:
        reason = step.reason or f"it exited with status {step.status}"
        return BuildFailed(f"set-up step {step.name!r} failed: {reason}", hint, details=details)
    failed = report.commands[-1] if report.commands else None
    what = f"command {failed.name!r}" if failed is not None else "the job"
    return BuildFailed(f"{what} exited with status {report.status}", hint, details=details)


def _used_up(report: JobReport, spec: BuildSpec) -> Iterator[str]:
    """Which limits of the guest's a job that failed had run into, as far as the guest tells."""
    if report.oom_kills:
        yield (
            f"the guest's {format_size(spec.memory_bytes)} of memory were used up, --memory gives"
            " it more"
        )
    if report.workspace_was_full:
        yield (
            f"the workspace of {format_size(spec.workspace_size_bytes)} was full, --workspace-size"
            " makes it larger"
        )


def _overlay_disk(device: str, role: str, overlay: _Overlay) -> Disk:
    return Disk(device, role, overlay.path, overlay.format, backing=overlay.backing)


def _everybody_reads(path: Path) -> bool:
    """Whether any user can read the file: by its own mode and those of all directories above."""
    directories = path.resolve().parents
    return bool(path.stat().st_mode & 0o004) and all(
        directory.stat().st_mode & 0o001 for directory in directories
    )


def _image_record(image: ImageFile, koji: KojiRecord | None) -> ImageRecord:
    return ImageRecord(
        path=str(image.source),
        format=image.format,
        size_bytes=image.source.stat().st_size,
        virtual_size_bytes=image.virtual_size_bytes,
        koji=koji,
    )


def _fault_of(error: OSError, place: Path, hint: str = "see logs/build.log") -> BuilderFault:
    if error.errno == errno.ENOSPC:
        return BuilderFault(
            f"no space left on the file system of {error.filename or place}",
            "free some space; --output and --work-dir name other places",
        )
    return BuilderFault(f"{error.filename or 'a file'}: {error.strerror or error}", hint)
