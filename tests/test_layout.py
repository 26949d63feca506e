"""How the project is laid out: which files there are, and what each of them may import."""

import ast
import graphlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ALONE = ["adapter", "clip_feedback", "muse", "vqgan"]        # each is read without the others
SEVEN = sorted([*ALONE, "sample", "styledrop", "train"])
FOLDERS = ["checkpoint", "commandline", "data", "human_feedback", "pretrain"]
PACKAGES = {"torch", "numpy", "PIL", "ftfy", "regex"}


def project_modules():
    """{dotted name: path} of all modules but the tests and the experiments."""
    found = {name: ROOT / f"{name}.py" for name in SEVEN}
    for folder in FOLDERS:
        found[folder] = ROOT / folder / "__init__.py"
        for path in sorted((ROOT / folder).glob("*.py")):
            if path.stem != "__init__":
                found[f"{folder}.{path.stem}"] = path
    return found


MODULES = project_modules()


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def at_import(tree):
    """The nodes of a module that run when it is imported: all but the bodies of functions."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, (ast.FunctionDef, ast.Lambda)):
            waiting.extend(ast.iter_child_nodes(node))


def imported(nodes, name):
    """Dotted names that the import statements among `nodes` of module `name` may mean."""
    package = name.split(".")[0]
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            parts = [package] if node.level else []
            if node.module:
                parts.append(node.module)
            source = ".".join(parts)
            found.add(source)
            found.update(f"{source}.{alias.name}" for alias in node.names)
    return found


def needs(name):
    """The modules of the project that must have been imported before module `name`."""
    own_package = name.split(".")[0]                         # which is already being imported
    found = set()
    for target in imported(at_import(parse(MODULES[name])), name):
        package = target.split(".")[0]                       # whose __init__ runs first
        found.update({target, package} & MODULES.keys())
    return found - {name, own_package}


def test_seven_files_are_at_the_top():
    assert sorted(path.stem for path in ROOT.glob("*.py")) == SEVEN


@pytest.mark.parametrize("name", ALONE)
def test_four_files_are_read_without_the_others(name):
    assert needs(name) == set()


@pytest.mark.parametrize("name", MODULES)
def test_only_five_packages_are_needed(name):
    """Trap: a convenient import that a user does not have. data/build.py may draw with resvg."""
    known = {*PACKAGES, *sys.stdlib_module_names, *SEVEN, *FOLDERS}
    if name == "data.build":
        known.add("resvg_py")
    for node in ast.walk(parse(MODULES[name])):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= known
        if isinstance(node, ast.ImportFrom) and not node.level:
            assert node.module.split(".")[0] in known


@pytest.mark.parametrize("name", MODULES)
def test_no_module_changes_the_search_path(name):
    """Trap: `sys.path.insert`, after which imports depend on who came first."""
    for node in ast.walk(parse(MODULES[name])):
        if isinstance(node, ast.Attribute):
            assert node.attr != "path" or ast.unparse(node) != "sys.path"


def test_no_modules_import_each_other_in_a_circle():
    graph = {name: needs(name) for name in MODULES}
    assert "styledrop" in graph["train"] and "data.scenes" in graph["data.art"]
    graphlib.TopologicalSorter(graph).prepare()              # raises CycleError with the circle


def test_git_ignores_what_a_user_trains():
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    assert {"runs/", "weights/mine/"} <= set(ignored)
