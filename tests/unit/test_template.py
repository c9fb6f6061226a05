"""The template: what a partial TDL document means, and how a bad one is refused."""

from __future__ import annotations

import base64
import hashlib
import os
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from koji_indirection import template
from koji_indirection.errors import BuilderFault, BuildFailed, IndirectionError, UsageError
from koji_indirection.template import Command, File, Package, Repository, Template


def parse(text: str) -> Template:
    return template.parse(text.encode(), source="live.tdl")


def commands(inside: str) -> Template:
    return parse(f"<template><commands>{inside}</commands></template>")


def with_block(block: str) -> Template:
    run = "<commands><command name='run'>true</command></commands>"
    return parse(f"<template>{run}{block}</template>")


def refused(text: str) -> str:
    with pytest.raises(BuildFailed) as caught:
        parse(text)
    assert caught.value.hint
    return str(caught.value)


# --- commands ---------------------------------------------------------------------------------


def test_the_readme_example_of_indirection_cloud_is_understood() -> None:
    text = """<template>
<commands>
   <command name='mount'>mount /dev/vdb1 /mnt</command>
   <command name='livecd'>livemedia-creator --make-iso
--disk-image /mnt/input_image.raw --resultdir /mnt/results</command>
</commands>
</template>"""
    found = parse(text)
    assert found.commands == (
        Command("mount", "mount /dev/vdb1 /mnt"),
        Command(
            "livecd",
            "livemedia-creator --make-iso\n"
            "--disk-image /mnt/input_image.raw --resultdir /mnt/results",
        ),
    )
    assert found.ignored == ()
    assert found.sha256 == hashlib.sha256(text.encode()).hexdigest()


def test_blank_space_around_a_script_goes_and_inside_it_stays() -> None:
    found = commands("<command name='s'>\n\n   #!/bin/bash\n\n  if x;\n\ty\n  </command>")
    assert found.commands[0].text == "#!/bin/bash\n\n  if x;\n\ty"


def test_cdata_and_comments_and_escapes_make_one_text() -> None:
    found = commands(
        "<command name='s'>a &amp;&amp; <!-- why --><![CDATA[b < c]]><?pi x?> &gt; d</command>"
    )
    assert found.commands[0].text == "a && b < c > d"


def test_several_blocks_are_one_list() -> None:
    found = parse(
        "<template><commands><command name='a' position='2'>a</command></commands>"
        "<commands><command name='b' position='1'>b</command></commands></template>"
    )
    assert [command.name for command in found.commands] == ["b", "a"]


def test_positions_sort_the_commands() -> None:
    found = commands(
        "<command name='a' position='1'>a</command>"
        "<command name='c' position='3'>c</command>"
        "<command name='b' position='2'>b</command>"
    )
    assert [command.name for command in found.commands] == ["a", "b", "c"]


def test_a_base64_command_is_decoded_and_kept_as_it_was() -> None:
    script = "#!/bin/sh\necho héllo > /tmp/foo\n"
    encoded = base64.encodebytes(script.encode()).decode()
    found = commands(f"<command name='s' type='base64'>\n{encoded}\n</command>")
    assert found.commands[0].text == script


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "iso-8859-1"])
def test_the_encoding_that_the_document_declares_is_used(encoding: str) -> None:
    text = (
        f"<?xml version='1.0' encoding='{encoding}'?>"
        "<template><commands><command name='é'>echo é</command></commands></template>"
    )
    found = template.parse(text.encode(encoding), source="x")
    assert found.commands == (Command("é", "echo é"),)


def test_what_has_no_effect_is_listed_once() -> None:
    found = parse(
        "<template version='1.0'><name>x</name><os><name>Fedora</name></os><description/>"
        "<precommands><command name='p'>p</command></precommands><disk><size>10</size></disk>"
        "<commands foo='1'>stray<command name='a' arch='x86_64' foo='1'>a</command>"
        "<comand name='b'>b</comand><command name='c' foo='2'>c</command></commands>"
        "<xi:include xmlns:xi='http://www.w3.org/2001/XInclude' href='file:///etc/passwd'/>"
        "</template>"
    )
    assert [command.name for command in found.commands] == ["a", "c"]
    assert found.ignored == (
        "template@version",
        "name",
        "os",
        "description",
        "precommands",
        "disk",
        "{http://www.w3.org/2001/XInclude}include",
        "commands@foo",
        "text in commands",
        "command@foo",
        "commands/comand",
    )
    assert found.mistaken == (
        "precommands",
        "{http://www.w3.org/2001/XInclude}include",
        "commands@foo",
        "text in commands",
        "command@foo",
        "commands/comand",
    )


def test_a_command_may_be_for_one_arch() -> None:
    found = commands(
        "<command name='a' arch='x86_64'>a</command><command name='b' arch='arm64'>b</command>"
        "<command name='c'>c</command>"
    )
    assert [command.name for command in found.commands_for("x86_64")] == ["a", "c"]
    assert [command.name for command in found.commands_for("amd64")] == ["a", "c"]
    assert [command.name for command in found.commands_for("aarch64")] == ["b", "c"]
    lonely = commands("<command name='a' arch='s390x'>a</command>")
    with pytest.raises(BuildFailed, match="no command for x86_64: each is for another arch"):
        lonely.commands_for("x86_64")


def test_the_list_of_what_is_ignored_stays_short() -> None:
    found = with_block("".join(f"<x{n}/>" for n in range(1000)))
    assert len(found.ignored) == 51
    assert found.ignored[-1] == "950 more"


BAD_COMMANDS = [
    ("", "there is no <command> in <commands>: nothing to run"),
    ("<!-- <command name='a'>a</command> -->", "nothing to run"),
    ("<command>true</command>", "live.tdl, line 1: a command has no name"),
    ("<command name='  '>true</command>", "a command has no name"),
    ("<command name='a&#10;b'>true</command>", "'a\\nb' has a line break or a control"),
    ("<command name='a&#x202e;b'>true</command>", "a line break or a control character"),
    (f"<command name='{'n' * 201}'>true</command>", "is 201 characters long (at most 200"),
    (
        "<command name='a'>x</command>\n<command name='a'>y</command>",
        "line 2: there are two commands named 'a', the first at line 1",
    ),
    ("<command name='a'/>", "command 'a' is empty"),
    ("<command name='a'> \n <!-- later --> </command>", "command 'a' is empty"),
    ("<command name='a'>x <b>y</b></command>", "command 'a' has an element <b> in it"),
    ("<command name='a' type='url'>file:///etc/passwd</command>", "'a' has type 'url', which is"),
    ("<command name='a' type='mytype'>x</command>", "'a' has the unknown type 'mytype'"),
    ("<command name='a' type=''>x</command>", "'a' has the unknown type ''"),
    ("<command name='a' type='base64'>ZWNobyAi!28K</command>", "'a' is not valid base64"),
    ("<command name='a' type='base64'>ZWNob</command>", "'a' is not valid base64"),
    ("<command name='a' type='base64'>é</command>", "'a' is not valid base64"),
    ("<command name='a' type='base64'>//79</command>", "'a' is not UTF-8 text"),
    ("<command name='a' type='base64'>YQBi</command>", "'a' has a NUL byte"),
    ("<command name='a' type='base64'></command>", "command 'a' is empty"),
    ("<command name='a' type='base64'>ICAK</command>", "command 'a' is empty"),
    (
        "<command name='a' position='1'>x</command><command name='b'>y</command>",
        "command 'b' has no position, but other commands have one (number all 2 commands",
    ),
    (
        "<command name='a' position='1'>x</command><command name='b' position='1'>y</command>",
        "command 'b' has position 1, and so has command 'a'",
    ),
    (
        "<command name='a' position='1'>x</command><command name='b' position='3'>y</command>",
        "command 'b' has position 3, but there are 2 commands",
    ),
    ("<command name='a' position='0'>x</command>", "'a' has position 0, but there is 1 command "),
    ("<command name='a' position='first'>x</command>", "'first', which is not a number"),
    ("<command name='a' position='-1'>x</command>", "'-1', which is not a number"),
    ("<command name='a' position='1.0'>x</command>", "'1.0', which is not a number"),
    ("<command name='a' position=''>x</command>", "'', which is not a number"),
    ("<command name='a' position='٣'>x</command>", "which is not a number"),
    ("<command name='a' arch=''>x</command>", "command 'a' has '' for an arch (name one"),
    ("<command name='a' arch='x86_64,s390x'>x</command>", "'x86_64,s390x' for an arch"),
]


@pytest.mark.parametrize(("inside", "message"), BAD_COMMANDS, ids=[b[1][:40] for b in BAD_COMMANDS])
def test_a_bad_command_is_named(inside: str, message: str) -> None:
    assert message in refused(f"<template><commands>{inside}</commands></template>")


def test_a_thousand_commands_are_the_most() -> None:
    many = [f"<command name='{n}'>x</command>" for n in range(1001)]
    assert len(commands("".join(many[:1000])).commands) == 1000
    with pytest.raises(BuildFailed, match="there are more than 1000 commands"):
        commands("".join(many))


# --- the document -----------------------------------------------------------------------------

BOMB = (
    '<!DOCTYPE template [<!ENTITY a "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa">'
    + "".join(f'<!ENTITY {new} "{f"&{old};" * 20}">' for old, new in zip("abcdefgh", "bcdefghi"))
    + "]>"
)
BAD_DOCUMENTS = [
    ("", "template live.tdl is empty"),
    (" \n ", "template live.tdl is empty"),
    ("mount /dev/vdb1", "live.tdl is not XML: Start tag expected"),
    ("<template>\n <commands>\n</template>", "at line 3, column"),
    ("<template>&nbsp;</template>", "live.tdl is not XML: Entity 'nbsp' not defined at line 1"),
    ("<template>a && b</template>", "not XML"),
    ("<template>\0</template>", "live.tdl is not XML"),
    ("<x>" * 400, "live.tdl is not XML: "),
    ("<?xml version='1.0' encoding='nope'?><template/>", "(save it as UTF-8, or name"),
    ("<template/>", "line 1: there is no <command> in <commands>: nothing to run"),
    ("<template><command name='a'>a</command></template>", "nothing to run"),
    ("\n<commands/>", "line 2: the root element is 'commands', not <template>"),
    ("<template xmlns='urn:x'/>", "the root element is '{urn:x}template', not <template>"),
    ("<!DOCTYPE template><template/>", "live.tdl, line 1, has a DOCTYPE, which is refused"),
    (BOMB + "<template>&i;</template>", "live.tdl, line 1, has a DOCTYPE"),
    (BOMB + "<template x='&i;'/>", "live.tdl, line 1, has a DOCTYPE"),
    (
        "<!DOCTYPE t [<!ENTITY x SYSTEM 'file:///etc/passwd'>]><template>&x;</template>",
        "live.tdl, line 1, has a DOCTYPE",
    ),
    (
        "<!DOCTYPE t SYSTEM 'http://127.0.0.1:1/x.dtd'><template/>",
        "live.tdl, line 1, has a DOCTYPE",
    ),
    (
        "<!DOCTYPE t [<!ENTITY % x SYSTEM 'file:///etc/passwd'> %x;]><template/>",
        "live.tdl, line 1, has a DOCTYPE",
    ),
]


@pytest.mark.parametrize(
    ("text", "message"),
    BAD_DOCUMENTS,
    ids=[f"{n}-{b[1][:40]}" for n, b in enumerate(BAD_DOCUMENTS)],
)
def test_a_document_that_is_no_template_is_refused(text: str, message: str) -> None:
    started = time.monotonic()
    assert message in refused(text)
    assert time.monotonic() - started < 10


def test_an_entity_bomb_in_another_encoding_is_refused() -> None:
    with pytest.raises(BuildFailed, match="has a DOCTYPE"):
        template.parse((BOMB + "<template x='&i;'/>").encode("utf-16"), source="x")


def test_a_document_over_a_mebibyte_is_refused() -> None:
    with pytest.raises(BuildFailed, match=r"live.tdl is too large: 1048577 bytes, at most 1048576"):
        template.parse(b"x" * (template.MAX_BYTES + 1), source="live.tdl")


def test_a_long_text_from_the_document_is_cut_in_the_message() -> None:
    assert len(refused(f"<{'x' * 50000}/>")) < 500
    assert len(refused(f"<template><a></{'x' * 40000}>")) < 500


def test_a_missing_lxml_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lxml", None)
    with pytest.raises(BuilderFault, match=r"lxml is missing .install python3-lxml"):
        parse("<template/>")


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_make_a_template_or_one_of_our_errors(data: bytes) -> None:
    try:
        template.parse(data, source="x")
    except IndirectionError as error:
        assert error.hint


_PIECES = (
    "<template> </template> <commands> </commands> <command </command> <repository </repository> "
    "<repositories> </repositories> <files> </files> <file <url> </url> name='a' name='/a' "
    "type='base64' type='url' position='1' position='2' > /> &amp; &#9; &#x2028; é YQ== "
    "<!DOCTYPE <?xml <!-- --> <![CDATA[ ]]> http://[ http://a"
)
_pieces = st.sampled_from(_PIECES.split())


@settings(deadline=None)
@given(st.lists(_pieces | st.text(max_size=3), max_size=25))
def test_any_pieces_make_a_template_or_one_of_our_errors(pieces: list[str]) -> None:
    for text in (" ".join(pieces), f"<template><commands>{' '.join(pieces)}</commands></template>"):
        try:
            template.parse(text.encode("utf-8", "surrogatepass"), source="x")
        except IndirectionError as error:
            assert error.hint


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=9),
            st.binary(min_size=1).map(lambda b: base64.b64encode(b).decode()),
        ),
        min_size=1,
        unique_by=lambda command: command[0],
    )
)
def test_names_and_texts_come_back_in_order(pairs: list[tuple[str, str]]) -> None:
    from lxml import etree

    root = etree.Element("template")
    block = etree.SubElement(root, "commands")
    for name, text in pairs:
        etree.SubElement(block, "command", name=name).text = text
    found = template.parse(etree.tostring(root), source="x")
    assert [(command.name, command.text) for command in found.commands] == pairs


# --- repositories, packages, files ------------------------------------------------------------


def test_repositories_packages_and_files_are_read() -> None:
    found = with_block(
        "<repositories><repository name='updates' gpg='1'><url> http://h/u </url>"
        "<signed>Yes</signed><persisted>no</persisted><sslverify>TRUE</sslverify>"
        "<priority>1</priority></repository>"
        "<repository name='plain'><url>https://h/p</url></repository></repositories>"
        "<packages><package name='lorax'><repository>updates</repository></package>"
        "<package name='@Development Tools'/></packages>"
        "<files><file name='/etc/a' mode='0600' owner='me:us' group='us'>\n text \n</file>"
        "<file name='/etc/b' type='base64'>aGVs\nbG8K</file><file name='/etc/c' type='base64'/>"
        "<file name='/etc/d' type='url'>http://h/f</file></files>"
    )
    assert found.repositories == (
        Repository("updates", "http://h/u", True, False, True),
        Repository("plain", "https://h/p", signed=False, persisted=True, sslverify=False),
    )
    assert found.packages == (Package("lorax"), Package("@Development Tools"))
    assert found.files == (
        File("/etc/a", "raw", "text", 0o600, "me:us"),
        File("/etc/b", "base64", "aGVsbG8K"),
        File("/etc/c", "base64", ""),
        File("/etc/d", "url", "http://h/f"),
    )
    assert [file.data() for file in found.files[:3]] == [b"text", b"hello\n", b""]
    with pytest.raises(ValueError, match="fetched first"):
        found.files[3].data()
    assert found.ignored == (
        "repository@gpg",
        "repository/priority",
        "package/repository",
        "file@group",
    )


def test_repositories_need_a_network() -> None:
    found = with_block(_url("http://h/"))
    with pytest.raises(BuildFailed, match="has repository 'r', but the guest has no network"):
        found.require_network(None)
    found.require_network("user")
    with_block("<packages><package name='p'/></packages><files/>").require_network(None)


def test_a_repository_for_apt_may_name_suite_and_components() -> None:
    found = with_block(_url(" http://h/debian bookworm main contrib "))
    assert found.repositories[0].url == "http://h/debian bookworm main contrib"


def _repository(inside: str) -> str:
    return f"<repositories><repository name='r'><url>http://h</url>{inside}</repository></repositories>"


def _url(url: str) -> str:
    return f"<repositories><repository name='r'><url>{url}</url></repository></repositories>"


BAD_BLOCKS = [
    ("<repositories><repository/></repositories>", "a repository has no name"),
    (
        "<repositories><repository name='r'/></repositories>",
        "repository 'r' has no <url> (write",
    ),
    (_url(""), "repository 'r' has no <url>"),
    (_url("h/path"), "repository 'r' has 'h/path' for a URL (write http://host/path"),
    (_url("file:///srv/repo"), "repository 'r' has 'file:///srv/repo' for a URL"),
    (_url("http://h/debian bookworm [trusted=yes]"), "for a URL"),
    (_url("http://h/" + "a" * 2000), "repository 'r' has an address of 2009 characters"),
    (_repository("<clientcert>C</clientcert>"), "has a <clientcert>, which is refused"),
    (_repository("<clientkey>K</clientkey>"), "has a <clientkey>, which is refused"),
    (_url("http://h/a&#10;gpgcheck=0"), "repository 'r' has 'http://h/a\\ngpgcheck=0' for a"),
    (_url("http://localhost/x"), "'localhost', which in the guest is the guest itself"),
    (_url("http://me:pw@127.0.0.1:80/x"), "'127.0.0.1:80', which in the guest"),
    (_url("http://me:pw@h/x"), "'r' has an address with a user name or password in it"),
    (_url("http://[::1]/x"), "'[::1]', which in the guest"),
    (_url("<b/>"), "<url> of repository 'r' has an element <b> in it"),
    (_repository("<url>http://i</url>"), "repository 'r' has more than one <url>"),
    (_repository("<signed>maybe</signed>"), "repository 'r' has 'maybe' for <signed> (write yes"),
    (_repository("<persisted/>"), "repository 'r' has '' for <persisted>"),
    (
        _url("http://h") + _url("http://i"),
        "there are two repositories named 'r', the first at line 1",
    ),
    ("<packages><package/></packages>", "a package has no name"),
    ("<packages><package name='--nogpgcheck'/></packages>", "starts with a dash"),
    ("<files><file>x</file></files>", "a file has no name"),
    ("<files><file name='etc/a'>x</file></files>", "'etc/a' is not an absolute path"),
    ("<files><file name='/a/../b'>x</file></files>", "file '/a/../b' has '..' in it"),
    ("<files><file name='/a/'>x</file></files>", "the name of file '/a/' is a directory's"),
    (f"<files><file name='/{'a' * 1000}'>x</file></files>", "is 1001 characters long"),
    ("<files><file name='/a'>x</file><file name='/a'>y</file></files>", "two files named '/a'"),
    (
        "<files><file name='/a/b'>x</file><file name='//a/./b'>y</file></files>",
        "two files named '/a/b'",
    ),
    (
        "<files><file name='/etc//koji-indirection/run'>x</file></files>",
        "file '/etc//koji-indirection/run' is in /etc/koji-indirection, where the job itself is",
    ),
    ("<files><file name='/a' type='foo'>x</file></files>", "'/a' has the unknown type 'foo'"),
    ("<files><file name='/a' type='base64'>x-</file></files>", "file '/a' is not valid base64"),
    ("<files><file name='/a'>x<b/></file></files>", "file '/a' has an element <b> in it"),
    (
        "<files><file name='/a' type='url'>file:///etc/shadow</file></files>",
        "file '/a' has the address 'file:///etc/shadow': files of the builder are never read",
    ),
    ("<files><file name='/a' type='url'>ftp://h/x</file></files>", "'ftp://h/x' for an address"),
    ("<files><file name='/a' type='url'/></files>", "file '/a' has '' for an address"),
    ("<files><file name='/a' type='url'>http://h/\u00fc</file></files>", "/\u00fc' for an address"),
    ("<files><file name='\u00a0/a'>x</file></files>", "'\\xa0/a' has a line break or a control"),
    (
        "<repositories><repository name='r'><url>http://h/</url><signed>\u00a0yes</signed>"
        "</repository></repositories>",
        "repository 'r' has '\\xa0yes' for <signed>",
    ),
    (
        "<files><file name='/a' type='url'>https://me:pw@h/x</file></files>",
        "file '/a' has an address with a user name or password in it",
    ),
    (_url("http://[::1/x"), "repository 'r' has 'http://[::1/x' for a URL"),
    (_url("http://a:b:c/"), "repository 'r' has 'http://a:b:c/' for a URL"),
    ("<files><file name='/a' mode='rw'>x</file></files>", "'rw' for a mode, which is not octal"),
    ("<files><file name='/a' mode='0689'>x</file></files>", "file '/a' has '0689' for a mode"),
    ("<files><file name='/a' mode='7'>x</file></files>", "write three or four digits from 0 to 7"),
    ("<files><file name='/a' mode='-644'>x</file></files>", "file '/a' has '-644' for a mode"),
    ("<files><file name='/a' owner='--help'>x</file></files>", "'--help' for an owner"),
    ("<files><file name='/a' owner='a:'>x</file></files>", "file '/a' has 'a:' for an owner"),
]


@pytest.mark.parametrize(("block", "message"), BAD_BLOCKS, ids=[b[1][:40] for b in BAD_BLOCKS])
def test_a_bad_repository_package_or_file_is_named(block: str, message: str) -> None:
    run = "<commands><command name='run'>true</command></commands>"
    assert message in refused(f"<template>{run}{block}</template>")


# --- the schema -------------------------------------------------------------------------------


@pytest.fixture
def blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that objects to nothing, so that only the schema is left to."""

    def pass_over(*_args: object) -> None:
        return None

    monkeypatch.setattr(template._Reader, "fail", pass_over)
    monkeypatch.setattr(template, "_commands", lambda *_: ())
    monkeypatch.setattr(template, "_flag", lambda *_args, **_more: True)
    monkeypatch.setattr(template, "_file_mode", lambda *_: None)


@pytest.mark.parametrize(
    "inside",
    [
        "<commands><command>x</command></commands>",
        "<commands><command name=' '>x</command></commands>",
        "<commands><command name='a' position='one'>x</command></commands>",
        "<commands><command name='a' type='url'>x</command></commands>",
        "<commands><command name='a' arch='*'>x</command></commands>",
        "<commands><command name='a'>x<b/></command></commands>",
        "<files><file name='a'>x</file></files>",
        "<files><file name='/a' mode='9'>x</file></files>",
        "<files><file name='/a' owner='-x'>x</file></files>",
        "<packages><package/></packages>",
        "<packages><package name=' -x'/></packages>",
        "<packages><package name='a&#9;b'/></packages>",
        "<commands><command name='a' type=' raw '>x</command></commands>",
        "<repositories><repository name='r'><signed>maybe</signed></repository></repositories>",
        "<repositories><repository name='r'><clientkey>k</clientkey></repository></repositories>",
    ],
)
def test_the_schema_alone_refuses_what_the_reader_would(inside: str, blind: None) -> None:
    message = refused(f"<template>\n\n{inside}\n</template>")
    assert message.startswith("template live.tdl, line 3: ")
    assert "docs/template.md" in message


def test_the_example_templates_are_valid() -> None:
    examples = sorted((Path(__file__).parents[2] / "examples").glob("*.tdl"))
    assert examples
    for path in examples:
        assert template.load(path).mistaken == ()


# --- from a file ------------------------------------------------------------------------------


def test_a_template_is_loaded_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "live.tdl"
    path.write_text("<template><commands><command name='a'>b</command></commands></template>")
    assert template.load(path).commands == (Command("a", "b"),)
    path.write_text("<template")
    with pytest.raises(BuildFailed, match=r"template live.tdl is not XML"):
        template.load(path)


def test_a_large_file_is_refused_without_reading_it(tmp_path: Path) -> None:
    path = tmp_path / "live.tdl"
    with path.open("wb") as stream:
        stream.truncate(2**40)  # sparse; reading it would take minutes
    with pytest.raises(BuildFailed, match=r"template live.tdl is too large: 1099511627776 bytes"):
        template.load(path)


def test_a_path_without_a_readable_file_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no.tdl does not exist"):
        template.load(tmp_path / "no.tdl")
    with pytest.raises(UsageError, match="is not a regular file"):
        template.load(tmp_path)
    with pytest.raises(UsageError, match=r"cannot be read: .*null"):
        template.load(Path("a\0b"))
    with pytest.raises(UsageError, match="cannot be read: File name too long"):
        template.load(tmp_path / ("n" * 300))
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    with pytest.raises(UsageError, match="is not a regular file"):
        template.load(tmp_path / "pipe")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read_is_a_usage_error(tmp_path: Path) -> None:
    path = tmp_path / "secret.tdl"
    path.touch(mode=0)
    with pytest.raises(UsageError, match="cannot be read: Permission denied"):
        template.load(path)
