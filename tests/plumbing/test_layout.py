"""The order of the project's files: who may import whom, and how long lines and functions are.

Each rule is a function of a folder that returns the places where the rule is broken. The rules are
checked in the project itself, and then in a small made-up one, where each is broken on purpose.
"""
import ast
import fnmatch
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
CHAPTERS = ("data", "model", "meta", "probe", "train", "ner")
TOP_LEVEL = ({"README.md", "requirements.txt", "plumbing", "docs", "tests"}
             | {f"{chapter}.py" for chapter in CHAPTERS})
WIDEST_LINE, LONGEST_FUNCTION = 100, 60
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


# ---- files and modules -------------------------------------------------------------------------

def top_level(root):
    """The names in root, sorted, without hidden ones and those that .gitignore names."""
    ignored = ["__pycache__"]
    if (root / ".gitignore").exists():
        for line in (root / ".gitignore").read_text().split():
            ignored.append(line.strip("/"))
    names = []
    for path in root.iterdir():
        matches = [pattern for pattern in ignored if fnmatch.fnmatch(path.name, pattern)]
        if not matches and not path.name.startswith("."):
            names.append(path.name)
    return sorted(names)


def python_files(root):
    """The paths of all Python files of the project, relative to root."""
    files = []
    for name in top_level(root):
        path = root / name
        if path.is_dir():
            files += sorted(path.rglob("*.py"))
        elif path.suffix == ".py":
            files.append(path)
    return [file.relative_to(root) for file in files]


def source_files(root):
    """python_files without the tests."""
    return [file for file in python_files(root) if file.parts[0] != "tests"]


def module_name(file):
    """The name by which a file, relative to the root, is imported."""
    parts = list(file.with_suffix("").parts)
    if parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts)


def parsed(root, file):
    return ast.parse((root / file).read_bytes())


# ---- imports -----------------------------------------------------------------------------------

def imports(nodes, module="", is_package=False):
    """[(line, name)] of what the import statements among nodes name. `from a import b` gives a.b,
    which may be a module or something in a. module is where the statements stand."""
    found = []
    for node in nodes:
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                package = module.split(".")
                steps_up = node.level - 1 if is_package else node.level
                package = package[:len(package) - steps_up]
                origin = ".".join([*package, origin]).strip(".")
            found += [(node.lineno, f"{origin}.{alias.name}".strip(".")) for alias in node.names]
    return found


def all_imports(root, file):
    """[(line, name)] of every import of a file, those inside functions included."""
    nodes = ast.walk(parsed(root, file))
    return imports(nodes, module_name(file), file.name == "__init__.py")


def imports_when_loaded(root, file):
    """[(line, name)] of the imports of a file that stand outside its functions."""
    nodes, to_visit = [], [parsed(root, file)]
    while to_visit:
        node = to_visit.pop()
        nodes.append(node)
        if not isinstance(node, FUNCTIONS):
            to_visit += ast.iter_child_nodes(node)
    return imports(nodes, module_name(file), file.name == "__init__.py")


def import_graph(root):
    """{module: the modules of the project that it imports}. Who imports a.b imports a, too."""
    names = {module_name(file) for file in source_files(root)}
    graph = {}
    for file in source_files(root):
        module = module_name(file)
        graph[module] = set()
        for _, name in all_imports(root, file):
            parts = name.split(".")
            prefixes = {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
            graph[module] |= prefixes & names
        if file.name == "__init__.py":
            # A package may name itself on the way to one of its modules.
            graph[module] -= {module}
    return graph


def reachable(graph, start):
    """The modules that `start` imports, directly or through others."""
    found, to_visit = set(), list(graph[start])
    while to_visit:
        module = to_visit.pop()
        if module not in found:
            found.add(module)
            to_visit += graph[module]
    return found


# ---- the rules ---------------------------------------------------------------------------------

def plumbing_that_imports_chapters(root):
    found = []
    for file in source_files(root):
        if file.parts[0] == "plumbing":
            for line, name in all_imports(root, file):
                if name.split(".")[0] in CHAPTERS:
                    found.append(f"{file.as_posix()}:{line} imports {name}")
    return found


def modules_that_import_themselves(root):
    """The modules that stand on a cycle of imports."""
    graph = import_graph(root)
    return sorted(module for module in graph if module in reachable(graph, module))


def imports_that_the_decoder_does_not_need(root):
    """model.py can be read, and loaded, with PyTorch and the kernels alone."""
    found = []
    for line, name in sorted(imports_when_loaded(root, Path("model.py"))):
        is_kernels = f"{name}.".startswith("plumbing.kernels.")
        package = name.split(".")[0]
        if package != "torch" and package not in sys.stdlib_module_names and not is_kernels:
            found.append(f"model.py:{line} imports {name}")
    return found


def missing_and_strange_names(root):
    """What the top level lacks of TOP_LEVEL, and what it has beyond it."""
    names = set(top_level(root))
    missing = [f"{name} is missing" for name in sorted(TOP_LEVEL - names)]
    strange = [f"{name} does not belong here" for name in sorted(names - TOP_LEVEL)]
    return missing + strange


def wide_lines(root):
    found = []
    for file in python_files(root):
        lines = (root / file).read_text(encoding="utf-8").split("\n")
        for number, line in enumerate(lines, start=1):
            if len(line) > WIDEST_LINE:
                found.append(f"{file.as_posix()}:{number} has {len(line)} columns")
    return found


def long_functions(root):
    found = []
    for file in source_files(root):
        for node in ast.walk(parsed(root, file)):
            if isinstance(node, FUNCTIONS):
                lines = node.end_lineno - node.lineno + 1
                if lines > LONGEST_FUNCTION:
                    found.append(f"{file.as_posix()}: {node.name} has {lines} lines")
    return found


RULES = [plumbing_that_imports_chapters, modules_that_import_themselves,
         imports_that_the_decoder_does_not_need, missing_and_strange_names, wide_lines,
         long_functions]


@pytest.mark.parametrize("rule", RULES)
def test_the_project_keeps_the_rule(rule):
    assert rule(ROOT) == []


# ---- the rules find what breaks them -----------------------------------------------------------

@pytest.fixture
def project(tmp_path):
    """A small project that keeps all rules."""
    contents = {
        ".gitignore": "/runs/\n*.egg-info/\n",
        "README.md": "", "requirements.txt": "", "docs/figures.py": "import data\n",
        "plumbing/__init__.py": "",
        "plumbing/files.py": "import os\nfrom plumbing import kernels\n",
        "plumbing/kernels.py": "import torch\n",
        "model.py": "import math\nimport torch.nn as nn\nfrom plumbing.kernels import attend\n"
                    "def load():\n    from plumbing.files import read\n",
        "data.py": "import numpy\nfrom plumbing import files\n",
        "meta.py": "import data, model\n",
        "probe.py": "from model import Decoder\n",
        "train.py": "import meta\ndef main():\n    import probe\n",
        "ner.py": "from model import Decoder\n",
        "tests/test_long.py": "def test():\n" + "    pass\n" * 80,
        "runs/notes.py": "x" * 200, "a.egg-info/PKG": "", "__pycache__/data.pyc": ""}
    for name, content in contents.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return tmp_path


def test_the_small_project_keeps_all_rules(project):
    for rule in RULES:
        assert rule(project) == []


def test_imports_are_seen_wherever_they_stand(project):
    graph = import_graph(project)
    assert graph["train"] == {"meta", "probe"}
    assert graph["plumbing.files"] == {"plumbing", "plumbing.kernels"}
    assert graph["docs.figures"] == {"data"}
    assert reachable(graph, "train") == {"meta", "probe", "data", "model", "plumbing",
                                         "plumbing.files", "plumbing.kernels"}


# Each case: a rule, a file, what is added to it, and what the rule then says.
BROKEN = [
    (plumbing_that_imports_chapters, "plumbing/files.py", "import ner",
     ["plumbing/files.py:3 imports ner"]),
    (plumbing_that_imports_chapters, "plumbing/files.py",
     "class Reader:\n    def read(self):\n        from meta import adapt",
     ["plumbing/files.py:5 imports meta.adapt"]),
    # Two modules that import each other.
    (modules_that_import_themselves, "plumbing/kernels.py", "import plumbing.files",
     ["plumbing.files", "plumbing.kernels"]),
    (modules_that_import_themselves, "plumbing/kernels.py", "from . import files",
     ["plumbing.files", "plumbing.kernels"]),
    (modules_that_import_themselves, "data.py", "import data", ["data"]),
    # A cycle through others, closed inside a function.
    (modules_that_import_themselves, "model.py", "    import train",
     ["meta", "model", "probe", "train"]),
    (modules_that_import_themselves, "plumbing/__init__.py", "from plumbing.files import read",
     ["plumbing", "plumbing.files"]),
    (imports_that_the_decoder_does_not_need, "model.py", "import numpy",
     ["model.py:6 imports numpy"]),
    (imports_that_the_decoder_does_not_need, "model.py",
     "try:\n    from plumbing.files import read\nexcept ImportError:\n    pass",
     ["model.py:7 imports plumbing.files.read"]),
    (missing_and_strange_names, "report.py", "", ["report.py does not belong here"]),
    (missing_and_strange_names, "assets/one.png", "", ["assets does not belong here"]),
    (wide_lines, "plumbing/kernels.py", "#" * 101, ["plumbing/kernels.py:2 has 101 columns"]),
    (wide_lines, "tests/test_long.py", "#" * 102, ["tests/test_long.py:82 has 102 columns"]),
    (long_functions, "docs/figures.py", "class Panel:\n    def draw(self):\n" + "        1\n" * 60,
     ["docs/figures.py: draw has 61 lines"])]


@pytest.mark.parametrize("rule, file, addition, said", BROKEN)
def test_a_broken_rule_is_found(rule, file, addition, said, project):
    path = project / file
    path.parent.mkdir(exist_ok=True)
    before = path.read_text() if path.exists() else ""
    path.write_text(before + addition + "\n")
    assert rule(project) == said


def test_a_missing_chapter_is_found(project):
    (project / "ner.py").unlink()
    assert missing_and_strange_names(project) == ["ner.py is missing"]


def test_lines_and_functions_may_be_as_long_as_their_limit(project):
    line = "#" * WIDEST_LINE
    body = "    pass\n" * (LONGEST_FUNCTION - 1)
    (project / "data.py").write_text(f"{line}\ndef load():\n{body}")
    assert wide_lines(project) == []
    assert long_functions(project) == []
