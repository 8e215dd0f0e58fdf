"""The project's licence, and those of what it ships."""

from __future__ import annotations

import re
import tomllib
from email import message_from_string
from pathlib import Path

import licences


def test_the_project_is_under_the_apache_license(root: Path) -> None:
    text = (root / "LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0, January 2004" in text
    assert tomllib.loads((root / "pyproject.toml").read_text())["project"]["license"] == "Apache-2.0"


def test_the_list_of_third_party_licences_is_current(root: Path) -> None:
    listed = {
        (name, version): set(places.split(", "))
        for name, version, _, places in licences.ROW.findall(licences.PAGE.read_text())
    }
    assert listed == licences.table(), "run make wheels BASE=local, then .venv/bin/python scripts/licences.py"


def test_every_licence_is_known_and_lets_an_apache_licensed_image_ship_the_package() -> None:
    rows = licences.ROW.findall(licences.PAGE.read_text())
    assert len(rows) > 100
    # Only the source of docutils has a file under the GPL; tests/contract says more.
    licences_of = {name: licence for name, _, licence, _ in rows if name != "docutils"}
    assert [name for name, text in licences_of.items() if text == "?" or re.search(r"(?<!L)GPL", text)] == []


def test_a_licence_is_the_spdx_expression_or_the_classifier_or_the_text() -> None:
    def of(text: str) -> str:
        return licences.licence_of(message_from_string(text))

    assert of("License-Expression: MIT\nLicense: other\n") == "MIT"
    assert of("License: x\nClassifier: License :: OSI Approved :: BSD License\n") == "BSD"
    assert of("License: Apache License 2.0\n") == "Apache-2.0"
    assert of("Classifier: License :: OSI Approved :: GNU General Public License v3 or later (GPLv3+)\n").count("GPL")
