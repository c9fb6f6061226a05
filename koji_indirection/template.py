"""The template: a partial TDL document, read into something that can be applied.

It comes from a user and is parsed on a hub, a client or a builder, so nothing
here may fetch, open or expand what the document names: no DTD, no entities,
no XInclude, no `file://`. Needs lxml, and imports it only where it parses.

Where Oz and Image Factory's IndirectionCloud have a rule, it is theirs
(oz/TDL.py, oz/tdl.rng); where this is stricter, the place says so.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import posixpath
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NoReturn

from koji_indirection.address import has_credentials, repository_problem
from koji_indirection.errors import BuilderFault, BuildFailed, UsageError

if TYPE_CHECKING:
    from lxml import etree as _lxml_etree

    _Element = _lxml_etree._Element

MAX_BYTES = 1024 * 1024
MAX_COMMANDS = 1000
MAX_NAME_LENGTH = 200
MAX_FILE_NAME_LENGTH = 1000

# `ignored` goes into a log line; a document can name a hundred thousand things.
_MAX_IGNORED = 50
_MAX_SHOWN = 60

_BLANK = " \t\r\n"  # to XML, and so to template.rng; not the no-break space that web pages have
_OWN_DIRECTORY = "/etc/koji-indirection"
_BLOCKS = ("repositories", "packages", "files", "commands")


@dataclass(frozen=True)
class Command:
    """One command: `text` is run by the guest's shell, or by its own `#!` line.

    arch -- the only arch that it is run on; None for all.
    """

    name: str
    text: str
    arch: str | None = None


@dataclass(frozen=True)
class Repository:
    """A package repository; the defaults are Oz's.

    url -- as address.repository_problem() lets pass.
    """

    name: str
    url: str
    signed: bool = False
    persisted: bool = True
    sslverify: bool = False


@dataclass(frozen=True)
class Package:
    """A package by name; TDL's <repository>, <file> and <arguments> have no effect in Oz either."""

    name: str


@dataclass(frozen=True)
class File:
    """A file for the guest.

    type -- 'raw', 'base64' or 'url'.
    content -- raw: the text, without blank space around it (as in Oz); base64:
    the encoded text without any blank space; url: an http or https address.
    mode -- permission bits; None for those that a new file of root's has.
    owner -- USER or USER:GROUP, names or numbers of the guest's; None for root.
    """

    name: str
    type: str
    content: str
    mode: int | None = None
    owner: str | None = None

    def data(self) -> bytes:
        """The bytes of a raw or base64 file; a url's content is not known here."""
        if self.type == "base64":
            return base64.b64decode(self.content, validate=True)
        if self.type == "raw":
            return self.content.encode("utf-8")
        raise ValueError("the content of a url file has to be fetched first")


@dataclass(frozen=True)
class Template:
    """A parsed template.

    commands -- in the order in which they run, those for other arches included.
    ignored -- what the document says that has no effect: "os", "command@foo",
    "repository/priority"; each once, in document order.
    sha256 -- of the bytes that were parsed.
    """

    commands: tuple[Command, ...]
    repositories: tuple[Repository, ...]
    packages: tuple[Package, ...]
    files: tuple[File, ...]
    ignored: tuple[str, ...]
    sha256: str

    @property
    def mistaken(self) -> tuple[str, ...]:
        """What is ignored and is nothing that a full TDL has either: a mistake, most likely."""
        return tuple(name for name in self.ignored if name not in _TDL_WITHOUT_EFFECT)

    @property
    def url_files(self) -> tuple[File, ...]:
        """The files whose content has to be fetched."""
        return tuple(file for file in self.files if file.type == "url")

    def commands_for(self, arch: str) -> tuple[Command, ...]:
        """The commands that run on an arch, as `uname -m` or Koji calls it.

        Raises BuildFailed when there is none.
        """
        chosen = tuple(
            command
            for command in self.commands
            if command.arch is None or _one_name(command.arch) == _one_name(arch)
        )
        if not chosen:
            raise BuildFailed(
                f"the template has no command for {arch}: each is for another arch",
                "leave the arch of a command out to have it run everywhere",
            )
        return chosen

    def require_network(self, network: str | None) -> None:
        """Raise BuildFailed if it has repositories and the guest has no network to reach them."""
        if self.repositories and network is None:
            raise BuildFailed(
                f"the template has repository {_shown(self.repositories[0].name)},"
                " but the guest has no network to reach it",
                "ask for one with --network user, or hand over packages with --media",
            )


# What Image Factory passes on of a full TDL, and Oz reads or ignores.
_TDL_WITHOUT_EFFECT = (
    "template@version",
    "name",
    "os",
    "description",
    "disk",
    "package/repository",
    "package/file",
    "package/arguments",
)

_ARCH_NAMES = {"amd64": "x86_64", "arm64": "aarch64", "i686": "i386", "i586": "i386"}


def _one_name(arch: str) -> str:
    return _ARCH_NAMES.get(arch, arch)


def load(path: Path) -> Template:
    """Read and parse the template at path.

    Raises UsageError where there is no readable file, BuildFailed where it is no template.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UsageError(f"template {path} is not a regular file", "give the path of a file")
        if status.st_size > MAX_BYTES:
            raise _too_large(path.name, status.st_size)
        with path.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)  # it may have grown since
    except FileNotFoundError as error:
        raise UsageError(f"template {path} does not exist", "check the path") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise UsageError(
            f"template {str(path)!r} cannot be read: {reason}", "check the path and its permissions"
        ) from error
    return parse(data, source=path.name)


def parse(data: bytes, *, source: str) -> Template:
    """Parse a template; source is the name it is called by in messages.

    Raises BuildFailed with the line where lxml knows it, BuilderFault where lxml is missing.
    """
    if len(data) > MAX_BYTES:
        raise _too_large(source, len(data))
    root = _parse_xml(data, source)
    reader = _Reader(source)
    if root.tag != "template":
        reader.fail(
            root,
            f"the root element is {_shown(_tag(root))}, not <template>",
            "a template is <template> with <commands> in it",
        )
    reader.note_attributes(root, known=())
    for child in root:
        if child.tag not in _BLOCKS:
            reader.note(_tag(child))
    template = Template(
        repositories=_repositories(reader, root),
        packages=_packages(reader, root),
        files=_files(reader, root),
        commands=_commands(reader, root),
        ignored=reader.ignored(),
        sha256=hashlib.sha256(data).hexdigest(),
    )
    _require_valid(root, source)
    return template


# --- XML --------------------------------------------------------------------------------------


def _etree() -> Any:
    try:
        from lxml import etree
    except ImportError as error:
        raise BuilderFault(
            "templates cannot be read: the Python module lxml is missing",
            "install python3-lxml",
        ) from error
    return etree


class _DoctypeFound(Exception):
    pass


class _RootFound(Exception):
    pass


class _Prolog:
    """An lxml parser target that looks no further than the DOCTYPE or the root element.

    lxml calls it before it reads the DTD, so that no entity is ever declared:
    entities in attributes are expanded whatever resolve_entities says.
    """

    def doctype(self, *_args: object) -> NoReturn:
        raise _DoctypeFound

    def start(self, *_args: object) -> NoReturn:
        raise _RootFound

    def close(self) -> None:
        return None


def _parse_xml(data: bytes, source: str) -> _Element:
    etree = _etree()
    safe = {
        "resolve_entities": False,
        "load_dtd": False,
        "dtd_validation": False,
        "no_network": True,
        "huge_tree": False,
    }
    if not data.strip():
        raise BuildFailed(f"template {source} is empty", "write <template> with <commands> in it")
    try:
        try:
            etree.fromstring(data, etree.XMLParser(target=_Prolog(), **safe))
        except _RootFound:
            pass
        parser = etree.XMLParser(remove_comments=True, remove_pis=True, **safe)
        root: _Element = etree.fromstring(data, parser)
        if root.getroottree().docinfo.internalDTD is not None:
            raise _DoctypeFound
    except _DoctypeFound:
        before, found, _ = data.partition(b"<!DOCTYPE")
        where = f", line {before.count(10) + 1}," if found else ""  # not found in UTF-16
        raise BuildFailed(
            f"template {source}{where} has a DOCTYPE, which is refused: "
            "it can define entities that expand without end or read files",
            "remove the DOCTYPE and write the text out, in CDATA if it has many & and <",
        ) from None
    except etree.XMLSyntaxError as error:
        # msg repeats the position, and can quote the document at length.
        text = re.sub(r",? line \d+, column \d+$", "", error.msg or "unknown error")
        reason = " ".join(text.split())[:200]
        line, column = error.position
        hint = "a template is an XML document; & and < in commands are written &amp; and &lt;, "
        hint += "or stand in CDATA"
        if "encoding" in reason.lower():
            hint = "save it as UTF-8, or name the encoding that it has in its first line"
        raise BuildFailed(
            f"template {source} is not XML: {reason} at line {line}, column {column}", hint
        ) from error
    return root


@lru_cache(maxsize=1)
def _schema() -> Any:
    etree = _etree()
    text = resources.files("koji_indirection").joinpath("template.rng").read_bytes()
    return etree.RelaxNG(etree.fromstring(text))


def _require_valid(root: _Element, source: str) -> None:
    """Hold the document against template.rng, for whatever the reader has no sentence of its own.

    Raises BuildFailed with the line of the first error.
    """
    schema = _schema()
    if schema.validate(root):
        return
    errors = [error for error in schema.error_log if error.line]
    # libxml2 goes from the cause outwards: what it says first is what is wrong.
    first = errors[0] if errors else None
    line = first.line if first is not None else _line(root)
    reason = _printable(" ".join(first.message.split())) if first is not None else "unknown error"
    raise BuildFailed(
        f"template {source}, line {line}: {reason}",
        "the template's form is template.rng; docs/template.md has an example of each element",
    )


class _Reader:
    """Says where in the document something is wrong, and notes what is ignored."""

    def __init__(self, source: str) -> None:
        self.source = source
        self._ignored: dict[str, None] = {}

    def fail(self, element: _Element, message: str, hint: str) -> NoReturn:
        raise BuildFailed(f"template {self.source}, line {_line(element)}: {message}", hint)

    def note(self, what: str) -> None:
        self._ignored.setdefault(what)

    def ignored(self) -> tuple[str, ...]:
        names = list(self._ignored)
        if len(names) <= _MAX_IGNORED:
            return tuple(names)
        return (*names[:_MAX_IGNORED], f"{len(names) - _MAX_IGNORED} more")

    def note_attributes(self, element: _Element, known: tuple[str, ...]) -> None:
        for attribute in element.attrib:
            if attribute not in known:
                self.note(f"{_tag(element)}@{_printable(str(attribute))}")

    def items(self, root: _Element, block: str, tag: str) -> Iterator[_Element]:
        """Every <tag> of every <block>, in document order: TDL may have a block more than once."""
        for parent in root.iterchildren(block):
            self.note_attributes(parent, known=())
            texts = [parent.text, *(child.tail for child in parent)]
            if any(text and text.strip() for text in texts):
                self.note(f"text in {block}")
            for child in parent:
                if child.tag == tag:
                    yield child
                else:
                    self.note(f"{block}/{_tag(child)}")

    def name(self, element: _Element, max_length: int = MAX_NAME_LENGTH) -> str:
        """The required name attribute: one printable line, without blank space around it."""
        tag = _tag(element)
        name = (element.get("name") or "").strip(_BLANK)
        if not name:
            self.fail(element, f"a {tag} has no name", f"write <{tag} name='...'>")
        if len(name) > max_length:
            self.fail(
                element,
                f"the name of {tag} {_shown(name)} is {len(name)} characters long",
                f"at most {max_length} are allowed",
            )
        if not name.isprintable():
            self.fail(
                element,
                f"the name of {tag} {_shown(name)} has a line break or a control character in it",
                "a name is one line of printable text",
            )
        return name

    def text(self, element: _Element, what: str) -> str:
        """The element's text without blank space around it; an element inside is refused."""
        for child in element:
            self.fail(
                child,
                f"{what} has an element <{_tag(child)}> in it",
                "only text may stand there: write < as &lt;, or use CDATA",
            )
        return (element.text or "").strip(_BLANK)

    def unique(self, element: _Element, name: str, seen: dict[str, int]) -> None:
        """Oz lets the later of two win, or runs both; two of a name are a mistake, so refused."""
        tag = _tag(element)
        if name in seen:
            self.fail(
                element,
                f"there are two {_plural(tag)} named {_shown(name)}, "
                f"the first at line {seen[name]}",
                f"give each {tag} a name of its own",
            )
        seen[name] = _line(element)


# --- the four blocks --------------------------------------------------------------------------


def _commands(reader: _Reader, root: _Element) -> tuple[Command, ...]:
    found: list[tuple[_Element, Command]] = []
    seen: dict[str, int] = {}
    for element in reader.items(root, "commands", "command"):
        if len(found) == MAX_COMMANDS:
            reader.fail(
                element, f"there are more than {MAX_COMMANDS} commands", "join some into scripts"
            )
        reader.note_attributes(element, known=("name", "position", "type", "arch"))
        name = reader.name(element)
        reader.unique(element, name, seen)
        text = _command_text(reader, element, name)
        found.append((element, Command(name, text, _command_arch(reader, element, name))))
    if not found:
        reader.fail(
            root,
            "there is no <command> in <commands>: nothing to run",
            "write <template><commands><command name='...'>...</command></commands></template>",
        )
    return _in_order(reader, found)


def _command_text(reader: _Reader, element: _Element, name: str) -> str:
    what = f"command {_shown(name)}"
    text = reader.text(element, what)
    kind = element.get("type", "raw")
    if kind == "url":
        reader.fail(
            element,
            f"{what} has type 'url', which is refused: nothing is fetched to be run",
            "write the command's text into the template",
        )
    if kind not in ("raw", "base64"):
        reader.fail(
            element, f"{what} has the unknown type {_shown(kind)}", "the types are raw and base64"
        )
    if kind == "base64":
        try:
            # Kept byte for byte: whoever encodes a script wants it as it was.
            text = _decode_base64(text).decode("utf-8")
        except UnicodeDecodeError:
            reader.fail(
                element,
                f"{what} is not UTF-8 text once its base64 is decoded",
                "a command is a shell command or a script, not a binary file",
            )
        except binascii.Error:
            reader.fail(
                element, f"{what} is not valid base64", "encode it with `base64`, or use type raw"
            )
        if "\0" in text:
            reader.fail(
                element,
                f"{what} has a NUL byte in it once its base64 is decoded",
                "a command is a shell command or a script, not a binary file",
            )
    if not text.strip():
        reader.fail(element, f"{what} is empty", "write what it is to run, or remove it")
    return text


def _command_arch(reader: _Reader, element: _Element, name: str) -> str | None:
    arch = element.get("arch")
    if arch is not None and not re.fullmatch("[A-Za-z0-9_]{2,20}", arch):
        reader.fail(
            element,
            f"command {_shown(name)} has {_shown(arch)} for an arch",
            "name one, as x86_64, or leave it out to have the command run everywhere",
        )
    return arch


def _in_order(reader: _Reader, found: list[tuple[_Element, Command]]) -> tuple[Command, ...]:
    """Document order, or that of `position`: on all or none, and then exactly 1, 2, 3, ... (Oz)."""
    if all(element.get("position") is None for element, _ in found):
        return tuple(command for _, command in found)
    count = len(found)
    hint = f"number all {count} commands from 1 to {count}, or none"
    if count == 1:
        hint = "leave the position of the only command out, or make it 1"
    placed: dict[int, Command] = {}
    for element, command in found:
        what = f"command {_shown(command.name)}"
        position = element.get("position")
        if position is None:
            reader.fail(element, f"{what} has no position, but other commands have one", hint)
        if not re.fullmatch(r"\s*[0-9]{1,9}\s*", position, re.ASCII):
            reader.fail(
                element, f"{what} has position {_shown(position)}, which is not a number", hint
            )
        number = int(position)
        if number in placed:
            reader.fail(
                element,
                f"{what} has position {number}, and so has command {_shown(placed[number].name)}",
                hint,
            )
        if not 1 <= number <= count:
            reader.fail(
                element,
                f"{what} has position {number}, but there "
                f"{'is 1 command' if count == 1 else f'are {count} commands'} "
                "and positions count from 1 without a gap",
                hint,
            )
        placed[number] = command
    return tuple(placed[number] for number in sorted(placed))


def _repositories(reader: _Reader, root: _Element) -> tuple[Repository, ...]:
    found: list[Repository] = []
    seen: dict[str, int] = {}
    for element in reader.items(root, "repositories", "repository"):
        reader.note_attributes(element, known=("name",))
        name = reader.name(element)
        reader.unique(element, name, seen)
        values: dict[str, str] = {}
        for child in element:
            tag = _tag(child)
            if tag not in _REPOSITORY_ELEMENTS:
                reader.note(f"repository/{tag}")
                continue
            reader.note_attributes(child, known=())
            if tag in ("clientcert", "clientkey"):
                reader.fail(
                    child,
                    f"repository {_shown(name)} has a <{tag}>, which is refused: "
                    "a template is kept, and everybody can read it",
                    "use a repository that asks for no client certificate, or put the packages "
                    "into the utility image",
                )
            if tag in values:
                reader.fail(
                    child, f"repository {_shown(name)} has more than one <{tag}>", "keep one"
                )
            values[tag] = reader.text(child, f"<{tag}> of repository {_shown(name)}")
        found.append(
            Repository(
                name=name,
                url=_repository_url(reader, element, name, values.get("url", "")),
                signed=_flag(reader, element, name, values, "signed", default=False),
                persisted=_flag(reader, element, name, values, "persisted", default=True),
                sslverify=_flag(reader, element, name, values, "sslverify", default=False),
            )
        )
    return tuple(found)


_REPOSITORY_ELEMENTS = ("url", "signed", "persisted", "sslverify", "clientcert", "clientkey")


def _repository_url(reader: _Reader, element: _Element, name: str, url: str) -> str:
    what = f"repository {_shown(name)}"
    if not url:
        reader.fail(element, f"{what} has no <url>", "write <url>http://...</url> in it")
    problem = repository_problem(url)
    if problem is not None:
        reader.fail(element, f"{what} {problem[0]}", problem[1])
    if has_credentials(url):
        reader.fail(
            element,
            f"{what} has an address with a user name or password in it: "
            "a template is kept, and everybody can read it",
            "use a repository that needs none",
        )
    return url


def _flag(
    reader: _Reader,
    element: _Element,
    name: str,
    values: dict[str, str],
    tag: str,
    *,
    default: bool,
) -> bool:
    if tag not in values:
        return default
    value = values[tag].lower()
    if value not in ("true", "yes", "false", "no"):
        reader.fail(
            element,
            f"repository {_shown(name)} has {_shown(values[tag])} for <{tag}>",
            "write yes, no, true or false",
        )
    return value in ("true", "yes")


def _packages(reader: _Reader, root: _Element) -> tuple[Package, ...]:
    found: list[Package] = []
    for element in reader.items(root, "packages", "package"):
        reader.note_attributes(element, known=("name",))
        for child in element:
            reader.note(f"package/{_tag(child)}")
        name = reader.name(element)
        if name.startswith("-"):
            reader.fail(
                element,
                f"the name of package {_shown(name)} starts with a dash",
                "a package manager would take it for an option",
            )
        found.append(Package(name))
    return tuple(found)


def _files(reader: _Reader, root: _Element) -> tuple[File, ...]:
    found: list[File] = []
    seen: dict[str, int] = {}
    for element in reader.items(root, "files", "file"):
        reader.note_attributes(element, known=("name", "type", "mode", "owner"))
        name = reader.name(element, MAX_FILE_NAME_LENGTH)
        what = f"file {_shown(name)}"
        if not name.startswith("/"):
            reader.fail(element, f"the name of {what} is not an absolute path", "start it with /")
        if ".." in name.split("/"):
            reader.fail(element, f"the name of {what} has '..' in it", "write the path without it")
        if name.endswith(("/", "/.")):
            reader.fail(element, f"the name of {what} is a directory's", "name the file itself")
        plain = posixpath.normpath(f"/{name.lstrip('/')}")
        if PurePosixPath(plain).is_relative_to(_OWN_DIRECTORY):
            reader.fail(
                element,
                f"{what} is in {_OWN_DIRECTORY}, where the job itself is",
                "put it somewhere else",
            )
        reader.unique(element, plain, seen)
        kind = element.get("type", "raw")
        content = _file_content(reader, element, what, kind)
        mode, owner = _file_mode(reader, element, what), _file_owner(reader, element, what)
        found.append(File(name, kind, content, mode, owner))
    return tuple(found)


def _file_content(reader: _Reader, element: _Element, what: str, kind: str) -> str:
    content = reader.text(element, what)
    if kind == "base64":
        content = "".join(content.split())
        try:
            _decode_base64(content)
        except binascii.Error:
            reader.fail(
                element, f"{what} is not valid base64", "encode it with `base64`, or use type raw"
            )
    elif kind == "url":
        _check_file_url(reader, element, what, content)
    elif kind != "raw":
        reader.fail(
            element,
            f"{what} has the unknown type {_shown(kind)}",
            "the types are raw, base64 and url",
        )
    return content


def _file_mode(reader: _Reader, element: _Element, what: str) -> int | None:
    mode = element.get("mode")
    if mode is None:
        return None
    if not re.fullmatch("0?[0-7]{3,4}", mode):
        reader.fail(
            element,
            f"{what} has {_shown(mode)} for a mode, which is not octal",
            "write three or four digits from 0 to 7, as 0644",
        )
    return int(mode, 8)


def _file_owner(reader: _Reader, element: _Element, what: str) -> str | None:
    owner = element.get("owner")
    name = "[A-Za-z0-9_][A-Za-z0-9_.-]*"  # no dash first: chown would take it for an option
    if owner is not None and not (
        re.fullmatch(f"{name}(:{name})?", owner) and len(owner) <= MAX_NAME_LENGTH
    ):
        reader.fail(
            element,
            f"{what} has {_shown(owner)} for an owner",
            "write USER or USER:GROUP, names or numbers of the guest's",
        )
    return owner


def _check_file_url(reader: _Reader, element: _Element, what: str, url: str) -> None:
    """http and https only: Oz reads `file://` from the builder's own disk."""
    is_address = re.fullmatch(r"https?://[^\s/]\S*", url, re.IGNORECASE) and url.isascii()
    if is_address and url.isprintable():
        if has_credentials(url):
            reader.fail(
                element,
                f"{what} has an address with a user name or password in it: "
                "a template is kept, and everybody can read it",
                "give an address that needs none",
            )
        return
    hint = "give an http or https address in ASCII, or the content itself as type raw or base64"
    if url.lower().startswith("file:"):
        reader.fail(
            element,
            f"{what} has the address {_shown(url)}: files of the builder are never read",
            hint,
        )
    reader.fail(element, f"{what} has {_shown(url)} for an address", hint)


# --- small things -----------------------------------------------------------------------------


def _decode_base64(text: str) -> bytes:
    """Decode base64 that may be broken into lines; binascii.Error where anything else is in it."""
    compact = "".join(text.split())
    if not compact.isascii():
        raise binascii.Error("not ASCII")
    return base64.b64decode(compact, validate=True)


def _too_large(source: str, size_bytes: int) -> BuildFailed:
    return BuildFailed(
        f"template {source} is too large: {size_bytes} bytes, at most {MAX_BYTES} are allowed",
        "put large content into the utility image or the input image",
    )


def _tag(element: _Element) -> str:
    """The element's name as it is shown; {namespace}name tells it from TDL's own."""
    return _printable(str(element.tag))


def _line(element: _Element) -> int:
    line: Any = element.sourceline  # the stubs leave its type out
    return line or 0


def _printable(text: str) -> str:
    cut = text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "..."
    return "".join(c if c.isprintable() else "?" for c in cut)


def _shown(text: str) -> str:
    """Text from the document, quoted, short, and harmless to a terminal."""
    return repr(text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "...")


def _plural(tag: str) -> str:
    return "repositories" if tag == "repository" else f"{tag}s"
