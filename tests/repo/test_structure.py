"""The structure of the code: no import cycles, no long modules, one file that compares target kinds."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Set
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp
import pytest

from estiba_launch.targets import registry

MAX_LINES = 400
ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {
    path.parent.name: path.parent.parent
    for pattern in ("shared/*/__init__.py", "launch/*/__init__.py", "images/*/*/__init__.py")
    for path in sorted(ROOT.glob(pattern))
}
"""Name of each package -> the folder that holds it."""


def modules() -> Iterator[Path]:
    """Every Python file that is not a test or a benchmark."""
    for folder in ("shared", "launch", "images", "scripts", "demo", "compose"):
        yield from (path for path in (ROOT / folder).rglob("*.py") if "templates" not in path.parts)


@pytest.mark.parametrize("package", PACKAGES)
def test_the_modules_of_a_package_have_no_import_cycle(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Imports under TYPE_CHECKING count too: two modules that need each other's types belong together."""
    monkeypatch.syspath_prepend(PACKAGES[package])
    graph = grimp.build_graph(package, cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_the_check_finds_an_import_cycle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "round_trip"
    package.mkdir()
    for name, text in {"__init__": "", "a": "import round_trip.b", "b": "from round_trip import a"}.items():
        (package / f"{name}.py").write_text(text)
    monkeypatch.setitem(PACKAGES, "round_trip", tmp_path)
    with pytest.raises(pytest.fail.Exception, match=r"round_trip\.a"):
        test_the_modules_of_a_package_have_no_import_cycle("round_trip", monkeypatch)


def test_no_module_is_longer_than_400_lines() -> None:
    lines = {str(path.relative_to(ROOT)): len(path.read_text("utf-8").splitlines()) for path in modules()}
    assert {name: count for name, count in lines.items() if count > MAX_LINES} == {}


def compares_kind(tree: ast.AST, kinds: Set[str]) -> Iterator[int]:
    """Lines that compare an attribute `kind`, or a variable `kind` with the name of a target."""

    def names_a_target(node: ast.expr) -> bool:
        return any(isinstance(one, ast.Constant) and one.value in kinds for one in ast.walk(node))

    for node in ast.walk(tree):
        operands: list[ast.expr] = []
        if isinstance(node, ast.Compare):
            operands = [node.left, *node.comparators]
        elif isinstance(node, ast.Match):
            patterns = [case.pattern.value for case in node.cases if isinstance(case.pattern, ast.MatchValue)]
            operands = [node.subject, *patterns]
        attribute = any(isinstance(one, ast.Attribute) and one.attr == "kind" for one in operands)
        variable = any(isinstance(one, ast.Name) and one.id == "kind" for one in operands)
        if attribute or (variable and any(map(names_a_target, operands))):
            yield operands[0].lineno


@pytest.mark.parametrize(
    "code", ["kind == 'ssh'", "a.target.kind in USUAL", "kind in ('local', 'x')", "match kind:\n  case 'ssh': pass"]
)
def test_the_check_finds_a_comparison_of_a_kind(code: str) -> None:
    assert list(compares_kind(ast.parse(code), {"local", "ssh"})) == [1]
    assert list(compares_kind(ast.parse("kind == 'S3Prefix'"), {"local", "ssh"})) == []


def test_only_the_registry_compares_the_kind_of_a_target() -> None:
    kinds = set(registry.TARGETS)
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in (ROOT / "launch").rglob("*.py")
        if path.relative_to(ROOT / "launch/estiba_launch") != Path("targets/registry.py")
        for line in compares_kind(ast.parse(path.read_text("utf-8")), kinds)
    ]
    assert found == []


def test_no_two_test_files_that_run_together_have_one_name() -> None:
    """Inside an image pytest imports them by name: those of all images, and those of the image."""
    shared = {path.name for path in (ROOT / "tests/images").glob("test_*.py")}
    own = {path.relative_to(ROOT): path.name for path in (ROOT / "tests/images").glob("*/test_*.py")}
    assert [str(path) for path, name in own.items() if name in shared] == []
