"""`koji-indirection`: the local command. Reads options, calls the library, says how it went.

Heavy imports happen in the commands that need them, so that --help and usage
errors need neither libvirt nor libguestfs.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Callable

from . import __version__
from .config import Settings, default_cache_dir, default_work_dir, load_settings
from .errors import BuilderFault, IndirectionError, UsageError
from .manifest import FILE_NAME as MANIFEST
from .spec import DEFAULT_RESULT, USER_NETWORK, BuildSpec
from .units import format_duration, format_size, parse_duration, parse_size

if TYPE_CHECKING:
    from .manifest import Manifest
    from .pipeline import Order

EXIT_INTERRUPTED = 130
SETTINGS_FILE = Path("/etc/koji-indirection.conf")

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status, see exit_status_of()."""

    def run() -> int:
        options = _parser().parse_args(argv)
        status: int = options.run(options)
        return status

    return exit_status_of(run)


def exit_status_of(run: Callable[[], int]) -> int:
    """Run what builds on this machine, with our own signals and words; returns an exit status.

    0 done, 1 BuildFailed, 2 usage, 3 BuilderFault, 130 interrupted. The last
    line on standard error is the reason and a hint.
    """
    _catch_signals()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may be no UTF-8
    try:
        status = run()
        sys.stdout.flush()
        return status
    except IndirectionError as error:
        if error.details:
            print(error.details, file=sys.stderr)
        print(error.one_line(), file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("interrupted: everything was stopped, and nothing but logs is left", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone; do not complain about it a second time at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:  # noqa: BLE001 - a fault of ours is one sentence too
        kind = type(error).__name__
        print(
            BuilderFault(f"internal error, {kind}: {error}", "logs/build.log has more").one_line(),
            file=sys.stderr,
        )
        return BuilderFault.exit_status


_interrupted = False


def _catch_signals() -> None:
    for number in _SIGNALS:
        # nohup ignores SIGHUP, and means it. (SIGINT is ignored for every `command &` of a
        # script, where it is still the way to stop a build.)
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    """Turn the first signal into KeyboardInterrupt: cleaning up must not be interrupted."""
    global _interrupted
    if not _interrupted:
        _interrupted = True
        raise KeyboardInterrupt


# Options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="koji-indirection",
        description="Make an image with the tools that live inside another image.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_build(commands)
    _add_shell(commands)
    _add_doctor(commands)
    _add_check(commands)
    return parser


def _add_build(commands: Any) -> None:
    spec, settings = BuildSpec(), Settings()
    parser = commands.add_parser(
        "build",
        help="build from local files, without Koji",
        description="Boot a throw-away copy of the utility image as a VM, hand it the input"
        " image, run the template's commands in it, and collect the results.",
        epilog="Sizes: 512M, 30G (binary units). Durations: 90, 15m, 4h. Exit status: 0 built,"
        " 1 the build failed, 2 usage, 3 a fault of this machine, 130 interrupted.",
    )
    parser.set_defaults(run=_build)

    what = parser.add_argument_group("what to build")
    _add_inputs(what)
    what.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="new directory for results, logs/ and manifest.json",
    )
    what.add_argument(
        "--force",
        action="store_true",
        help="take an output directory that has files in it; what an earlier build"
        " wrote there is removed first",
    )

    collected = parser.add_argument_group("what is collected")
    _add_results(collected)
    collected.add_argument(
        "--collect-log",
        action="append",
        dest="collect_logs",
        metavar="PATH",
        help="a log in the workspace or the guest's root, fetched after failures too; repeatable",
    )

    _add_guest_options(parser)

    times = parser.add_argument_group("deadlines")
    _add_boot_timeout(times)
    times.add_argument(
        "--job-timeout",
        type=_duration,
        dest="job_timeout_seconds",
        metavar="TIME",
        help=f"set-up steps and commands together (default: {spec.job_timeout_seconds // 3600}h)",
    )
    times.add_argument(
        "--command-timeout",
        type=_duration,
        dest="command_timeout_seconds",
        metavar="TIME",
        help="each command (default: as long as the job may take)",
    )
    times.add_argument(
        "--shutdown-timeout",
        type=_duration,
        dest="shutdown_timeout_seconds",
        metavar="TIME",
        help="from the job's end (default: 2m, without KVM 5m)",
    )

    machine = parser.add_argument_group("this machine")
    _add_machine_options(machine, settings)
    _add_image_limit(machine, settings)
    machine.add_argument(
        "--max-results",
        type=_whole_number,
        metavar="N",
        help=f"number of results (default: {settings.max_results})",
    )
    machine.add_argument(
        "--max-result-size",
        type=_size,
        dest="max_result_bytes",
        metavar="SIZE",
        help=f"all results together (default: {format_size(settings.max_result_bytes)})",
    )
    machine.add_argument(
        "--max-log-size",
        type=_size,
        dest="max_log_bytes",
        metavar="SIZE",
        help="each log; of a longer one head and tail are kept"
        f" (default: {format_size(settings.max_log_bytes)})",
    )
    machine.add_argument(
        "--max-silence",
        type=_duration,
        dest="max_silence_seconds",
        metavar="TIME",
        help="without any sign of life of the guest during the job"
        f" (default: {format_duration(settings.max_silence_seconds).replace(' ', '')})",
    )
    machine.add_argument(
        "--max-collect-time",
        type=_duration,
        dest="max_collect_seconds",
        metavar="TIME",
        help="reading results and logs from the guest's disks"
        f" (default: {format_duration(settings.max_collect_seconds).replace(' ', '')})",
    )
    _add_disk_limit(machine, settings)

    shown = parser.add_argument_group("what is shown")
    shown.add_argument(
        "-v", "--verbose", action="store_true", help="show the commands' output as it comes"
    )
    shown.add_argument("-q", "--quiet", action="store_true", help="show errors only")
    shown.add_argument(
        "--json", action="store_true", help="print the manifest to standard output, as JSON"
    )


def _add_inputs(group: Any) -> None:
    group.add_argument(
        "--input-image",
        type=Path,
        required=True,
        metavar="FILE",
        help="the image that is worked on: raw or qcow2, also as .xz .gz .zst",
    )
    group.add_argument(
        "--utility-image",
        type=Path,
        metavar="FILE",
        help="the image that is booted, with the tools (default: the input image)",
    )
    group.add_argument(
        "--template",
        type=Path,
        metavar="FILE",
        help="partial TDL document with the commands; required, but for --parameters",
    )
    group.add_argument(
        "--parameters",
        type=Path,
        metavar="FILE.json",
        help="parameters of Image Factory's IndirectionCloud; options override them",
    )


def _add_results(group: Any) -> None:
    group.add_argument(
        "--results",
        action="append",
        metavar="PATH_OR_GLOB",
        help=f"a result in the workspace; repeatable (default: {DEFAULT_RESULT})",
    )


def _add_boot_timeout(group: Any) -> None:
    group.add_argument(
        "--boot-timeout",
        type=_duration,
        dest="boot_timeout_seconds",
        metavar="TIME",
        help="until the job starts (default: 5m, without KVM 20m)",
    )


def _add_guest_options(parser: Any) -> None:
    spec = BuildSpec()
    guest = parser.add_argument_group("the guest")
    guest.add_argument(
        "--input-filename",
        metavar="PATH",
        help="the input image's file in the workspace (default: /input_image.raw)",
    )
    guest.add_argument(
        "--input-device",
        metavar="DEVICE",
        help="hand over the input image as a read-only disk (vdc), not as a file",
    )
    guest.add_argument(
        "--input-writable",
        action="store_true",
        default=None,
        help="with --input-device: make it a throw-away writable copy",
    )
    guest.add_argument(
        "--workspace-device",
        metavar="DEVICE",
        help=f"the workspace's disk (default: {spec.workspace_device})",
    )
    guest.add_argument(
        "--workspace-size",
        type=_size,
        dest="workspace_size_bytes",
        metavar="SIZE",
        help=f"(default: {format_size(spec.workspace_size_bytes)})",
    )
    guest.add_argument(
        "--workspace-fs", metavar="TYPE", help=f"ext4, ext2 or xfs (default: {spec.workspace_fs})"
    )
    guest.add_argument(
        "--arch",
        metavar="ARCH",
        help="the guest's arch (default: this machine's; any other is emulated, slowly)",
    )
    guest.add_argument(
        "--firmware",
        metavar="KIND",
        help=f"auto, bios or uefi (default: {spec.firmware}: BIOS if the utility image boots by"
        " one, else UEFI)",
    )
    guest.add_argument(
        "--secure-boot",
        action="store_true",
        default=None,
        help="boot by UEFI with Secure Boot enforced",
    )
    guest.add_argument(
        "--disk-bus",
        metavar="BUS",
        help=f"auto, virtio, sata or ide (default: {spec.disk_bus}: virtio if the utility image"
        " has a driver for it)",
    )
    guest.add_argument(
        "--cpus", type=_whole_number, metavar="N", help="(default: all of this machine's, up to 4)"
    )
    guest.add_argument(
        "--memory",
        type=_size,
        dest="memory_bytes",
        metavar="SIZE",
        help=f"(default: {format_size(spec.memory_bytes)})",
    )

    packages = parser.add_argument_group("network and packages")
    packages.add_argument(
        "--network",
        metavar="NAME",
        help="user (NAT) or a libvirt network that the settings allow (default: none)",
    )
    packages.add_argument(
        "--repo",
        action="append",
        dest="repos",
        metavar="URL",
        help="package repository that the guest has for the time of the job; repeatable",
    )
    packages.add_argument(
        "--media",
        type=Path,
        metavar="DIR_OR_ISO",
        help="repository that the guest gets as a read-only disk; needs no network",
    )


def _add_shell(commands: Any) -> None:
    parser = commands.add_parser(
        "shell",
        help="try a template's commands by hand, in the guest that build would boot",
        description="Boot the guest that build would boot, with the template's set-up done and its"
        " commands in place, but run a shell on this terminal in place of the commands. It ends"
        " with exit or Ctrl-], and nothing of it is kept.",
    )
    parser.set_defaults(run=_shell)
    _add_inputs(parser.add_argument_group("what build would be given"))
    guest = parser.add_argument_group("what commands find in their environment")
    _add_results(guest)
    _add_guest_options(parser)
    _add_boot_timeout(parser.add_argument_group("deadlines"))
    machine = parser.add_argument_group("this machine")
    _add_machine_options(machine, Settings())
    _add_image_limit(machine, Settings())
    _add_disk_limit(machine, Settings())


def _add_doctor(commands: Any) -> None:
    parser = commands.add_parser(
        "doctor",
        help="say whether this machine can build",
        description="Check everything a build needs on this machine, line by line.",
    )
    parser.set_defaults(run=_doctor)
    _add_machine_options(parser, Settings())
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def _add_check(commands: Any) -> None:
    parser = commands.add_parser(
        "check",
        help="validate templates, parameters and images without running anything",
        description="Validate templates (XML), parameters of Image Factory (*.json) and images"
        " (raw, qcow2, also compressed).",
    )
    parser.set_defaults(run=_check)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    _add_config(parser)
    _add_image_limit(parser, Settings())
    parser.add_argument(
        "--work-dir",
        type=Path,
        metavar="DIR",
        help=f"where compressed images are unpacked for the check (default: {default_work_dir()})",
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def _add_machine_options(parser: Any, settings: Settings) -> None:
    _add_config(parser)
    parser.add_argument(
        "--connect",
        metavar="URI",
        help="libvirt connection (default: the first that works of qemu:///system,"
        " qemu:///session and the embedded driver)",
    )
    parser.add_argument(
        "--accel",
        choices=("auto", "kvm", "tcg"),
        help=f"(default: {settings.accel}: KVM if a probe shows that it works)",
    )
    parser.add_argument(
        "--work-dir",
        type=Path,
        metavar="DIR",
        help=f"for disks while they are in use (default: {default_work_dir()})",
    )
    parser.add_argument(
        "--cache-dir",
        type=Path,
        metavar="DIR",
        help=f"for what later builds need not find out again (default: {default_cache_dir()})",
    )


def _add_config(parser: Any) -> None:
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help=f"settings of this machine, an ini file (default: {SETTINGS_FILE}, if it is there)",
    )


def _add_image_limit(parser: Any, settings: Settings) -> None:
    parser.add_argument(
        "--max-image-size",
        type=_size,
        dest="max_image_bytes",
        metavar="SIZE",
        help="virtual size above which an image is refused"
        f" (default: {format_size(settings.max_image_bytes)})",
    )


def _add_disk_limit(parser: Any, settings: Settings) -> None:
    parser.add_argument(
        "--max-disk-size",
        type=_size,
        dest="max_disk_bytes",
        metavar="SIZE",
        help="what overlay and workspace may take together on this machine's disk"
        f" (default: {format_size(settings.max_disk_bytes)})",
    )


def _converted(convert: Callable[[str], int]) -> Callable[[str], int]:
    """An argparse type whose errors read like ours."""

    def checked(text: str) -> int:
        try:
            return convert(text)
        except UsageError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return checked


_size = _converted(parse_size)
_duration = _converted(parse_duration)


def _whole_number(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _settings(options: argparse.Namespace) -> Settings:
    return replace(local_settings(options.config), **_given(options, Settings))


def local_settings(file: Path | None) -> Settings:
    """What a settings file says, or SETTINGS_FILE where there is one; UsageError.

    Whoever builds on a machine of their own may use its user-mode network and
    fetch from where they like, unless the file says otherwise.
    """
    if file is not None and not file.exists():
        raise UsageError(f"settings {file} do not exist", "check the path")
    defaults = Settings(networks=(USER_NETWORK,), file_hosts=("*",))
    return load_settings([file or SETTINGS_FILE], defaults=defaults)


def _given(options: argparse.Namespace, kind: type) -> dict[str, Any]:
    """The options that were given and are fields of a dataclass."""
    names = {field.name for field in fields(kind)}
    return {
        name: value for name, value in vars(options).items() if name in names and value is not None
    }


# Commands


def _build(options: argparse.Namespace) -> int:
    from . import pipeline
    from .display import Display, log_shown_on

    try:
        order, settings = _order(options)
    except IndirectionError as error:
        if options.json:
            print(json.dumps({"outcome": error.label, "reason": str(error)}), flush=True)
        raise
    try:
        display = Display(sys.stderr, verbose=options.verbose, quiet=options.quiet)
        with display, log_shown_on(display):
            record = pipeline.build(order, settings, display)
    finally:
        manifest = order.output / MANIFEST
        if options.json and manifest.exists():
            print(manifest.read_text(encoding="utf-8"), end="", flush=True)
    if not options.json and not options.quiet:
        print_summary(record, order.output)
    return 0


def _shell(options: argparse.Namespace) -> int:
    from . import console, pipeline
    from .display import Display, log_shown_on

    ends = console.Descriptors(keyboard=0, screen=1)
    console.require_terminal(ends)
    inputs, settings = _inputs(options)
    # Not entered: its live line and the guest's would be drawn over each other.
    display = Display(sys.stderr, verbose=False, quiet=False)
    with log_shown_on(display):
        pipeline.shell(pipeline.GuestOrder(**inputs), settings, display, ends)
    print("the guest is gone, and nothing of it is left", file=sys.stderr)
    return 0


def _order(options: argparse.Namespace) -> tuple[Order, Settings]:
    """What the options ask for; the output directory is made last, when all else is in order."""
    from . import output
    from .pipeline import Order

    inputs, settings = _inputs(options)
    return Order(**inputs, output=output.prepare(options.output, force=options.force)), settings


def _inputs(options: argparse.Namespace) -> tuple[dict[str, Any], Settings]:
    """What an Order is made of, but for its output; looked at as far as that is quick."""
    from . import arches, filefetch, imagefile, network, parameters, template

    given = parameters.NONE
    if options.parameters is not None:
        given = parameters.load(options.parameters)
    spec = given.build_spec(_given(options, BuildSpec))
    settings = _settings(options)
    if options.arch is not None:
        arches.named(options.arch)
    parsed = template.load(options.template) if options.template else given.template()
    if parsed is None:
        raise UsageError(
            "there is no template",
            "name one with --template, or have utility_customizations in --parameters",
        )
    network.require_allowed(spec.network, settings)
    parsed.require_network(spec.network)
    for file in parsed.url_files:
        filefetch.require_allowed(file.name, file.content, settings)
    utility_image = options.utility_image or given.utility_image()
    if utility_image is not None:
        imagefile.require_file(utility_image, imagefile.UTILITY_IMAGE)
    imagefile.require_file(options.input_image, imagefile.INPUT_IMAGE)
    inputs = {
        "spec": spec,
        "template": parsed,
        "template_name": (options.template or options.parameters).name,
        "input_image": options.input_image,
        "utility_image": utility_image,
        "arch": options.arch,
    }
    return inputs, settings


def print_summary(record: Manifest, output: Path) -> None:
    """What a build has left in its output directory, and where its time went."""
    print()
    for one in record.outputs:
        print(f"result    {output / one.name}")
        print(f"          {format_size(one.size_bytes)} ({one.size_bytes} bytes)")
        print(f"          sha256 {one.sha256}")
    print(f"logs      {output / 'logs'}")
    print(f"manifest  {output / MANIFEST}")
    print()
    total = sum(phase["seconds"] for phase in record.timeline)
    for phase in record.timeline:
        _print_bar(phase["phase"], phase["seconds"], total)
        if phase["phase"] == "job":
            for step in record.setup:
                _print_bar(f"  {step['name']}", step["seconds"], total)
            for command in record.commands:
                _print_bar(f"  {command['name']}", command["seconds"], total)
    print(f"{'total':24}{total:8.1f} s")


def _print_bar(name: str, seconds: float, total: float) -> None:
    bar = "#" * round(40 * seconds / total) if total else ""
    print(f"{name[:23]:24}{seconds:8.1f} s  {bar}".rstrip())


def _doctor(options: argparse.Namespace) -> int:
    from . import doctor

    findings = doctor.examine(_settings(options))
    if options.json:
        print(json.dumps([finding.to_dict() for finding in findings], indent=2))
    else:
        for finding in findings:
            print(finding.line())
    broken = [finding for finding in findings if finding.verdict == doctor.FAILED]
    if broken:
        names = ", ".join(finding.name for finding in broken)
        fault = BuilderFault(f"this machine cannot build: {names}", "see the lines marked FAILED")
        print(fault.one_line(), file=sys.stderr)
        return 3
    return 0


def _check(options: argparse.Namespace) -> int:
    from . import check

    settings = _settings(options)
    findings = [check.examine(path, settings) for path in options.files]
    if options.json:
        print(json.dumps([finding.to_dict() for finding in findings], indent=2))
    else:
        for finding in findings:
            print(finding.line())
    wrong = [finding for finding in findings if finding.exit_status]
    if wrong:
        print(
            f"{len(wrong)} of {len(findings)} files cannot be used (see the lines above)",
            file=sys.stderr,
        )
    return max((finding.exit_status for finding in wrong), default=0)


if __name__ == "__main__":
    sys.exit(main())
