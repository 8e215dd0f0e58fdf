"""Archives that come from elsewhere: bounded, and nothing is written outside the folder."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from estiba_launch.errors import HostError
from estiba_launch.jobs import archive
from estiba_launch.jobs.archive import unpack

Member = tuple[tarfile.TarInfo, bytes]


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", data: bytes = b"") -> Member:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, len(data)
    return info, data


@pytest.fixture
def pack(tmp_path: Path) -> Callable[..., Path]:
    def write(*members: Member) -> Path:
        with tarfile.open(tmp_path / "model.tar.gz", "w:gz") as tar:
            for info, data in members:
                tar.addfile(info, io.BytesIO(data))
        return tmp_path / "model.tar.gz"

    return write


def refused(path: Path, into: Path, says: str) -> None:
    """Unpacking fails with this message, and nothing is left in or around the folder."""
    into.mkdir(exist_ok=True)
    before = sorted(path.parent.rglob("*"))
    with pytest.raises(HostError, match=rf"^model\.tar\.gz: .*{says}"):
        unpack(path, into)
    assert sorted(path.parent.rglob("*")) == before


def zeros(size: int) -> Iterator[bytes]:
    while size > 0:
        yield bytes(min(size, 1 << 20))
        size -= 1 << 20


def test_a_small_archive_of_a_gigabyte_is_refused_with_its_limit(tmp_path):
    path = tmp_path / "model.tar.gz"
    info, _ = member("zeros")
    info.size = 1 << 30
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(info.tobuf())
        for chunk in zeros(info.size):
            file.write(chunk)
    assert path.stat().st_size < 8 << 20
    refused(path, tmp_path / "in", r"unpacks to more than \d+ bytes \(100 times its \d+.*unpack it with tar")


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XGLTYPE])
def test_a_header_of_any_size_is_not_read_into_memory(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "ALWAYS_BYTES", 1 << 20)
    path = tmp_path / "model.tar.gz"
    info, _ = member("header", kind)
    info.size = 64 << 20
    with gzip.open(path, "wb") as file:
        file.write(info.tobuf())
        for chunk in zeros(info.size):
            file.write(chunk)
    refused(path, tmp_path / "in", "unpacks to more than")


def test_a_file_that_is_mostly_hole_is_counted_whole(tmp_path):
    path = tmp_path / "model.tar.gz"
    info = tarfile.TarInfo("hole")
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(1 << 50)}
    data = b"0\n".ljust(512, b"\0")
    info.size = len(data)
    with tarfile.open(path, "w:gz", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(info, io.BytesIO(data))
    refused(path, tmp_path / "in", "unpacks to more than")


def test_too_many_members_are_refused(pack, tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "MAX_MEMBERS", 10)
    refused(pack(*[member(f"f{number}") for number in range(11)]), tmp_path / "in", "or 10 members")


def test_what_compresses_well_and_is_small_is_unpacked(pack, tmp_path):
    assert unpack(pack(member("zeros", data=bytes(32 << 20))), tmp_path / "in") == 1
    assert (tmp_path / "in" / "zeros").stat().st_size == 32 << 20


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ([member("/abs/evil")], "leads out"),
        ([member("a/../../evil")], "leads out"),
        ([member("pipe", tarfile.FIFOTYPE)], "device or FIFO"),
        ([member("disk", tarfile.BLKTYPE)], "device or FIFO"),
        ([member("link", tarfile.SYMTYPE, "/etc")], "link out"),
        ([member("link", tarfile.SYMTYPE, "../x")], "link out"),
        ([member("hard", tarfile.LNKTYPE, "/etc/passwd")], "link out"),
        ([member("hard", tarfile.LNKTYPE, "../../etc/passwd")], "link out"),
        # Each link is inside by its text, and out of the folder by the links before it.
        ([member("s", tarfile.SYMTYPE, "."), member("up", tarfile.SYMTYPE, "s/../other")], "link out"),
        ([member("up", tarfile.SYMTYPE, "s/../other"), member("s", tarfile.SYMTYPE, ".")], "link out"),
        (
            [member("s", tarfile.SYMTYPE, "."), member("up", tarfile.SYMTYPE, "s/.."),
             member("hard", tarfile.LNKTYPE, "up/victim")],
            "link out",
        ),
        (
            [member("s", tarfile.SYMTYPE, "."), member("up", tarfile.SYMTYPE, "s/.."),
             member("up/evil", data=b"evil")],
            "link out",
        ),
    ],
)  # fmt: skip
def test_a_member_that_leads_out_is_refused(members, says, pack, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "victim").write_text("mine")
    refused(pack(*members), tmp_path / "in", says)


def test_a_file_is_not_written_through_a_link_of_its_name(pack, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "victim").write_text("mine")
    members = [
        member("up", tarfile.SYMTYPE, "s/../victim"), member("s", tarfile.SYMTYPE, "."), member("up", data=b"evil")
    ]  # fmt: skip
    with pytest.raises(HostError):
        unpack(pack(*members, member("x", tarfile.SYMTYPE, "s/../victim")), tmp_path / "in")
    assert (tmp_path / "in" / "victim").read_text() == "mine"


def test_damage_in_the_middle_is_not_taken_for_the_end(tmp_path):
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as tar:
        for name in ("first", "second"):
            info, data = member(name, data=name.encode())
            tar.addfile(info, io.BytesIO(data))
    packed = bytearray(gzip.compress(whole.getvalue(), 0))
    packed[packed.index(b"second") + 200] ^= 0xFF
    (tmp_path / "model.tar.gz").write_bytes(packed)
    refused(tmp_path / "model.tar.gz", tmp_path / "in", "cannot be unpacked")


def test_links_within_are_kept_whatever_the_order(pack, tmp_path):
    members = [
        member("latest", tarfile.SYMTYPE, "step-2"), member("step-2/w", data=b"two"),
        member("last", tarfile.LNKTYPE, "step-2/w"), member("./sub/up", tarfile.SYMTYPE, "../latest/w"),
    ]  # fmt: skip
    assert unpack(pack(*members), tmp_path / "in") == 4
    for name in ("latest/w", "last", "sub/up"):
        assert (tmp_path / "in" / name).read_bytes() == b"two"
