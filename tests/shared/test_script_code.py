"""The code directory of script mode, where it outlives its container."""

from __future__ import annotations

import json
import socket
from pathlib import Path

from estiba.platform.entry import complete_tree
from estiba.platform.script_mode import FETCHED, forget_fetched, keep_fetched


def fetched(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {FETCHED}


def test_what_a_run_fetched_gives_way_and_what_its_script_wrote_stays(tmp_path):
    code = tmp_path / "code"
    assert forget_fetched(code)
    keep_fetched(fetched(tmp_path / "one", {"train.py": "1", "lib/old.py": "1", "with space\\.py": "1"}), code)
    (code / "lib/notes.txt").write_text("by the script")
    assert forget_fetched(code)
    assert names(code) == {"lib/notes.txt"}
    keep_fetched(fetched(tmp_path / "two", {"train.py": "2"}), code)
    assert (code / "train.py").read_text() == "2" and names(code) == {"train.py", "lib/notes.txt"}


def test_a_directory_that_the_user_filled_is_left_alone(tmp_path):
    (tmp_path / "train.py").write_text("mine")
    assert not forget_fetched(tmp_path)
    assert names(tmp_path) == {"train.py"}


def test_a_configuration_that_an_earlier_container_wrote_is_written_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(socket, "gethostbyname", lambda _: "127.0.0.1")
    for host in ("first", "second"):
        monkeypatch.setattr(socket, "gethostname", lambda host=host: host)
        complete_tree(tmp_path)
        assert json.loads((tmp_path / "resourceconfig.json").read_text())["hosts"] == [host]
    (tmp_path / "resourceconfig.json").write_text('{"hosts": ["mine"]}')
    complete_tree(tmp_path)
    assert json.loads((tmp_path / "resourceconfig.json").read_text())["hosts"] == ["mine"]
