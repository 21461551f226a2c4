"""The rules of the house, read from the sources: who imports whom, and how long things are."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMMANDS = {"train", "sample", "prepare_data", "nanollava.evaluate", "nanollava.speed.__main__",
            "nanollava.serve.__main__"}
PACKAGES = {"torch", "numpy", "sentencepiece", "safetensors", "PIL", "requests"}
MAY_IMPORT = {  # room: rooms; "book" is every file that lies flat in nanollava/
    "infra": {"infra"},
    "weights": {"weights", "infra", "conversation", "image", "tokenizer"},
    "book": {"book", "infra", "weights"},
    "teacher": {"teacher", "book", "infra"},
    "benchmarks": {"benchmarks", "teacher", "book", "infra"},
    "serve": {"serve", "book", "infra"},
    "speed": {"speed", "weights", "book", "infra"},
    "toy": {"toy", "benchmarks", "teacher", "weights", "book", "infra"},
}
ROOMS = MAY_IMPORT.keys() - {"book"}
SOURCES = sorted(ROOT.glob("*.py")) + sorted((ROOT / "nanollava").rglob("*.py"))
BOOK = [*ROOT.glob("nanollava/*.py"), ROOT / "train.py", ROOT / "sample.py"]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def room_of(module: str) -> str:
    second = module.split(".")[1] if "." in module else ""
    return second if second in ROOMS else "book"


def imports(path: Path) -> set[str]:
    """Absolute names of all that a file imports: "nanollava.infra.io", "torch.nn"."""
    package, found = module_name(path).split(".")[:-1], set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            is_package = (ROOT / module.replace(".", "/")).is_dir()
            found |= {f"{module}.{alias.name}" if is_package else module for alias in node.names}
    return found


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_run_one_way(path):
    name, room = module_name(path), room_of(module_name(path))
    for module in imports(path):
        assert module not in COMMANDS, f"{name} imports the command {module}"
        assert room in ("book", "toy") or module != "nanollava.tour", f"{name} imports the tour"
        if not module.startswith("nanollava.") or not name.startswith("nanollava."):
            continue
        if name in COMMANDS:
            continue
        allowed = {room_of(module), module.removeprefix("nanollava.")} & MAY_IMPORT[room]
        assert allowed, f"{room} imports {module} ({name})"


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_only_a_few_packages_are_used(path):
    allowed = PACKAGES | {"nanollava"} | set(sys.stdlib_module_names)
    if path.parent.name == "speed":
        allowed |= {"transformers", "llama_cpp"}  # raced where they are installed
    assert {module.split(".")[0] for module in imports(path)} <= allowed


def test_training_does_not_import_requests():
    code = "import sys, train; sys.exit('requests' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("path", [*SOURCES, *sorted(ROOT.glob("tests/**/*.py"))], ids=module_name)
def test_lines_have_at_most_100_columns(path):
    lines = enumerate(path.read_text().split("\n"), 1)
    assert not [number for number, line in lines if len(line) > 100]


@pytest.mark.parametrize("path", BOOK, ids=module_name)
def test_functions_of_the_book_have_at_most_45_lines(path):
    functions = [node for node in ast.walk(ast.parse(path.read_text()))
                 if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    assert not [function.name for function in functions
                if function.end_lineno - function.lineno + 1 > 45]


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_every_file_opens_with_a_docstring(path):
    if path.name != "__init__.py":
        assert ast.get_docstring(ast.parse(path.read_text()))


def test_line_counts_of_the_readme_are_right_within_a_tenth():
    tour = (ROOT / "README.md").read_text().partition("## Reading tour")[2].partition("\n## ")[0]
    entries = re.findall(r"^  (\S+(?:, \S+)*) +(\d+)\b", tour, re.MULTILINE)
    assert len(entries) > 15
    for names, count in entries:
        lines = sum(count_lines(name) for name in names.split(", "))
        assert lines == pytest.approx(int(count), rel=0.1), names


def count_lines(name: str) -> int:
    path = ROOT / "nanollava" / name if (ROOT / "nanollava" / name).exists() else ROOT / name
    files = path.rglob("*.py") if path.is_dir() else [path]
    return sum(file.read_text().count("\n") for file in files)
