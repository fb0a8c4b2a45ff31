"""The shape of the program: one-way imports, who may know the configuration, sizes of files, the table of verbs."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from distinit_plugin.cli import VERBS

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "distinit_plugin"

LAYERS = (
    {"types", "errors", "registry", "version"},
    {"files", "constants", "refusals"},
    {"video"},
    {"flow"},
    {"models"},
    {"weights"},
    {"detection"},
    {"teachers"},
    {"data"},
    {"losses"},
    {"objectives"},
    {"engine"},
    {"analysis"},
    {"config"},
    {"building"},
    {"build"},
    {"jobs"},
    {"demos"},
    {"studies"},
    {"hosts"},
    {"doctor"},
    {"commands"},
    {"cli"},
)
"""Each place imports only those before it, and itself."""

LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
KNOW_THE_CONFIGURATION = {"config", "building", "build", "jobs", "commands", "demos", "studies", "hosts", "doctor"}
CONFIG_IMPORTS = {"config", "errors", "registry"}
"""All that config may import: it is read before torch, so that a wrong key is answered at once."""

MAX_LINES = 400

SOURCES = sorted(PACKAGE.rglob("*.py"))
INIT = PACKAGE / "__init__.py"


def place(path: Path) -> str:
    """The first part of a file's name below the package: ``engine``; what ``python -m`` starts is of ``cli``."""
    if path.name == "__main__.py":
        return "cli"
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_places(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """(place, line) of every import of this package, wherever it stands in the file."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative imports hide the layers"
            # "from distinit_plugin import build" names a place, "from distinit_plugin.build import x" is in one.
            whole = node.module == "distinit_plugin"
            names = [f"distinit_plugin.{alias.name}" for alias in node.names] if whole else [node.module or ""]
        for name in names:
            parts = name.split(".")
            if parts[0] == "distinit_plugin" and len(parts) > 1:
                yield parts[1], node.lineno


def mentions_cfg(tree: ast.AST) -> list[int]:
    """Lines with a variable, argument or attribute named ``cfg`` (strings are not meant)."""
    return [
        getattr(node, "lineno", 0)
        for node in ast.walk(tree)
        if (isinstance(node, ast.Name) and node.id == "cfg")
        or (isinstance(node, ast.arg) and node.arg == "cfg")
        or (isinstance(node, ast.Attribute) and node.attr == "cfg")
    ]


def problems_of(path: Path, tree: ast.AST) -> list[str]:
    """Violations in one file."""
    own = place(path)
    found = []
    for other, line in imported_places(tree):
        where = f"{path.relative_to(ROOT)}:{line}"
        if LEVEL[other] > LEVEL[own]:
            found.append(f"{where}: {own} imports {other}, which stands below it")
        if other == "config" and own not in KNOW_THE_CONFIGURATION:
            found.append(f"{where}: {own} imports config")
        if own == "config" and other not in CONFIG_IMPORTS:
            found.append(f"{where}: config imports {other}")
    if own not in KNOW_THE_CONFIGURATION:
        found += [f"{path.relative_to(ROOT)}:{line}: {own} knows cfg" for line in mentions_cfg(tree)]
    return found


def test_every_place_has_its_layer():
    places = {place(path) for path in SOURCES if path != INIT}
    assert places == set(LEVEL)
    assert len(SOURCES) > 50


def test_imports_point_one_way():
    problems = []
    for path in SOURCES:
        if path == INIT:  # it names places as text and imports them on use
            assert {name for name, _ in imported_places(ast.parse(path.read_text()))} == {"version"}
        else:
            problems += problems_of(path, ast.parse(path.read_text(encoding="utf-8")))
    assert problems == []


@pytest.mark.parametrize(
    ("own", "text", "message"),
    [
        ("video/x.py", "from distinit_plugin.models.conv import Conv3d", "video imports models"),
        ("engine/x.py", "def f():\n    from distinit_plugin import build", "engine imports build"),
        ("engine/x.py", "import distinit_plugin.config.node", "engine imports config"),
        ("config/x.py", "from distinit_plugin.engine import train", "config imports engine"),
        ("losses.py", "def f(cfg):\n    pass", "losses knows cfg"),
        ("data/x.py", "self.cfg.TRAIN", "data knows cfg"),
    ],
)
def test_violations_are_found(own, text, message):
    """The negative control of the test above."""
    assert any(message in problem for problem in problems_of(PACKAGE / own, ast.parse(text)))


def test_config_and_command_line_need_no_torch():
    """A wrong key is answered before anything heavy is loaded."""
    program = (
        "import sys\n"
        "from distinit_plugin import cli\n"
        "from distinit_plugin.config.load import load_cfg\n"
        "import importlib\n"
        "for verb in cli.VERBS.values():\n"
        "    importlib.import_module(f'distinit_plugin.commands.{verb.module}')\n"
        "heavy = sorted({'torch', 'torchvision', 'timm', 'av', 'sklearn', 'matplotlib'} & set(sys.modules))\n"
        "sys.exit(f'loaded: {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def imported_at_start(tree):
    """Libraries that a module imports whenever it is imported itself."""
    for node in tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").partition(".")[0]


def test_no_process_waits_for_what_only_pictures_need():
    """Every rank imports the jobs, and matplotlib takes half a second: it is imported where something is drawn."""
    trees = {path: ast.parse(path.read_text("utf-8")) for path in SOURCES}
    assert [path.name for path, tree in trees.items() if "matplotlib" in imported_at_start(tree)] == []
    drawing = [node for node in ast.walk(trees[PACKAGE / "engine" / "curves.py"]) if isinstance(node, ast.ImportFrom)]
    assert any(node.module.startswith("matplotlib") for node in drawing)  # it is drawn somewhere
    assert "matplotlib" in imported_at_start(ast.parse("from matplotlib.axes import Axes"))  # the control


def test_no_file_is_too_long():
    folders = [PACKAGE, ROOT / "tools"]
    lengths = {path: len(path.read_text("utf-8").splitlines()) for folder in folders for path in folder.rglob("*.py")}
    assert {str(path.relative_to(ROOT)): length for path, length in lengths.items() if length > MAX_LINES} == {}


def test_every_verb_has_its_command_and_its_tool():
    modules = {verb.module for verb in VERBS.values()}
    commands = {path.stem for path in (PACKAGE / "commands").glob("*.py")} - {"__init__", "common"}
    tools = {path.stem for path in (ROOT / "tools").glob("*.py")}
    assert commands == modules
    assert tools == modules
    for name, verb in VERBS.items():
        assert f'run_tool("{name}")' in (ROOT / "tools" / f"{verb.module}.py").read_text()
