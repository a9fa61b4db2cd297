"""The source itself: sizes of files and functions, imports between files, one meaning per name, the vocabulary."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = {path.relative_to(ROOT): path.read_text(encoding="utf-8") for path in ROOT.glob("litgpt/**/*.py")}
TESTS = {path.relative_to(ROOT): path.read_text(encoding="utf-8") for path in ROOT.glob("tests/**/*.py")}
TREES = {path: ast.parse(text) for path, text in FILES.items()}
MODULES = {path: ".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in FILES}

# They import inside functions: the command line starts without torch, and `import litgpt` is quick.
LAZY = {"litgpt/__init__.py", "litgpt/cli.py", "litgpt/config.py", "litgpt/data/__init__.py", "litgpt/prompts.py"}
# Names that several modules define because they mean the same in each.
SHARED_NAMES = {
    "__all__": "what Python exports",
    "__getattr__": "Python's lazy attributes, in the import paths of LitGPT",
    "main": "the entry point of a program",
    "run": "what a command does",
    "DataModule": "the data of a run, and what a class of a user's own, as LitGPT has it, extends",
    "publish": "writes the finished model of a run",
}
OLD_WORDS = """
Trainee origin turn_to live Degrees slope slopes portion Pieces own timetable Passage Elsewhere deal_out Trip
Spread Gathered gathered scattered copied summed exchanged share_work again localize enclose watch naming_the_lost
subspace become answer_for first_values folded thinned Turned Edited Prompted Vector Packed theirs ours Rule ledger
account misshapen peers peft_forms peft_stacks resuming reading lend laid Making Share ahead cells Shared Part
raised attended as_of_now found one told mine made got lent here there
"""


def functions(tree: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def imports(tree: ast.AST) -> Iterator[str]:
    """The modules of our own package that a tree imports."""
    modules = set(MODULES.values())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom) and node.module in modules:
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if submodule in modules else node.module


def reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    """The modules that a module imports, directly or not."""
    visited: set[str] = set()
    pending = set(graph[start])
    while pending:
        module = pending.pop()
        visited.add(module)
        pending |= graph[module] - visited
    return visited


def defined_names(tree: ast.Module) -> Iterator[str]:
    """The names that a module defines at its top level."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (target.id for target in targets if isinstance(target, ast.Name))


def identifiers(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name) | ast.keyword(arg=str(name)):
                yield name
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.ExceptHandler(name=str(name)):
                yield name
            case ast.alias(name=name, asname=alias):
                yield alias or name.split(".")[-1]


def test_functions_have_at_most_60_lines() -> None:
    long = {
        f"{path}:{function.name}"
        for path, tree in {**TREES, **{path: ast.parse(text) for path, text in TESTS.items()}}.items()
        for function in functions(tree)
        if (function.end_lineno or 0) - function.lineno + 1 > 60
    }
    assert sorted(long) == []


def test_files_have_at_most_400_lines_and_tests_500() -> None:
    long = {str(path) for path, text in FILES.items() if text.count("\n") > 400}
    long |= {str(path) for path, text in TESTS.items() if text.count("\n") > 500}
    assert sorted(long) == []


def test_files_do_not_import_each_other_in_cycles() -> None:
    graph = defaultdict(set, {MODULES[path]: set(imports(tree)) for path, tree in TREES.items()})
    cyclic = {module for module in list(graph) if module in reachable(graph, module)}
    assert sorted(cyclic) == []


def test_functions_do_not_import_our_own_package() -> None:
    lazy = {
        f"{path}:{function.name}"
        for path, tree in TREES.items()
        if str(path) not in LAZY
        for function in functions(tree)
        if any(imports(function))
    }
    assert sorted(lazy) == []


def test_a_name_is_defined_in_one_module() -> None:
    modules: dict[str, list[str]] = defaultdict(list)
    for path, tree in TREES.items():
        for name in set(defined_names(tree)) - set(SHARED_NAMES):
            modules[name].append(MODULES[path])
    assert {name: names for name, names in modules.items() if len(names) > 1} == {}


def test_identifiers_are_the_words_of_the_field() -> None:
    files: dict[str, set[str]] = defaultdict(set)
    for path, tree in TREES.items():
        for name in {*identifiers(tree), path.stem} & set(OLD_WORDS.split()):
            files[name].add(str(path))
    assert files == {}
