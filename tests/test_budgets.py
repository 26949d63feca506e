"""The house's budgets, a reader's patience in numbers. `python tests/test_budgets.py`: a table.

Tokens are those of Python without comments and layout; by this count nanoGPT (model, train,
sample) has 4,719, DiT 4,474 and CLIP (model, clip, simple_tokenizer) 5,733.
"""
import ast
import importlib
import io
import sys
import tokenize
from argparse import ArgumentParser
from contextlib import suppress
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
ALONE = {"vqgan", "muse", "adapter", "clip_feedback"}        # each is read without the others
SEVEN = {"styledrop", *ALONE, "train", "sample"}
FOLDERS = {"pretrain", "human_feedback", "commandline", "data", "experiments"}
PACKAGES = {"torch", "numpy", "PIL", "ftfy", "regex", *sys.stdlib_module_names}
LAYOUT = "COMMENT NL NEWLINE INDENT DEDENT ENDMARKER".split()


def count(text):
    """-> lines, of code, tokens, wide lines; [(function, lines but its docstring, arguments)]"""
    tokens = [token for token in tokenize.generate_tokens(io.StringIO(text).readline)
              if tokenize.tok_name[token.type] not in LAYOUT]
    docs, functions = {}, []                                 # {node: its docstring's line numbers}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            doc = ast.get_docstring(node) is not None and node.body[0]
            docs[node] = range(doc.lineno, doc.end_lineno + 1) if doc else ()
        if isinstance(node, ast.FunctionDef):
            names = {arg.arg for arg in ast.walk(node.args) if isinstance(arg, ast.arg)}
            lines = node.end_lineno - node.lineno + 1 - len(docs[node])
            functions.append((node.name, lines, len(names - {"self", "cls"})))
    code = {line for token in tokens for line in range(token.start[0], token.end[0] + 1)}
    lines, wide = text.count("\n"), sum(len(row) > 100 for row in text.splitlines())
    return lines, len(code.difference(*docs.values())), len(tokens), wide, functions


def options(script):
    """The number of a script's options, --help apart, when its parser comes to parse."""
    found, parse = set(), ArgumentParser.parse_known_args

    def stop(parser, *a):
        found.update(action.dest for action in parser._actions if action.option_strings)
        if "help" in found:                                  # train.py asks for --stage first
            raise GeneratorExit
        return parse(parser, *a)

    with suppress(GeneratorExit), mock.patch.object(ArgumentParser, "parse_known_args", stop), \
            mock.patch.object(sys, "argv", [f"{script}.py"]):
        importlib.import_module(script).main()
    return len(found - {"help"})


def figures():
    """-> [(what, figure, bound, where)]."""
    read = lambda path: path.read_text(encoding="utf-8")
    counts = {name: count(read(ROOT / f"{name}.py")) for name in sorted(SEVEN)}
    functions = [(f"{name}.{f}", *more) for name, c in counts.items() for f, *more in c[4]]
    longest, fullest = (max(functions, key=lambda f: f[k]) for k in (1, 2))
    per_file = ("lines", 2300), ("lines of code", 2100), ("code tokens", 17_500), ("wide lines", 20)
    rows = [(*row, {n: c[k] for n, c in counts.items()}) for k, row in enumerate(per_file)]
    rows += [("options", 40, {script: options(script) for script in ("train", "sample")})]
    return [(what, sum(of.values()), bound, of) for what, bound, of in rows] + [
        ("lines of a function", longest[1], 60, longest[0]),
        ("arguments", fullest[2], 9, fullest[0]),
        ("words of the README", len(read(ROOT / "README.md").split()), 2000, ""),
        ("lines of the tests", sum(read(p).count("\n") for p in ROOT.glob("tests/*.py")), 4770, "")]


def test_budgets():
    over = [f"{what}: {n:,} of {most:,} {of}" for what, n, most, of in figures() if n > most]
    assert not over, "\n".join(over)


def test_imports():
    """The four import nothing of the project; what runs needs only the five packages."""
    assert {path.stem for path in ROOT.glob("*.py")} == SEVEN
    for path in (p for f in {".", *FOLDERS} - {"experiments"} for p in ROOT.glob(f"{f}/*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        names = {alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names}
        names |= {n.module for n in nodes if isinstance(n, ast.ImportFrom) and not n.level}
        alone = path.parent == ROOT and path.stem in ALONE
        known = PACKAGES if alone else PACKAGES | SEVEN | FOLDERS
        foreign = {name.split(".")[0] for name in names} - known
        assert foreign <= ({"resvg_py"} if path.name == "build.py" else set()), (path.name, foreign)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    for what, n, most, of in figures():
        print(f"{'' if n <= most else 'OVER':4} {n:6,} of {most:6,}  {what}", of)
