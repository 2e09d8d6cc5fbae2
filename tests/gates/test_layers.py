"""Imports of the package point down, and never in a circle (docs/architecture.md)."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import resnet_reg_ext

PACKAGE = Path(resnet_reg_ext.__file__).parent
CSRC = Path(__file__).parents[2] / "csrc"

# From the ground up. A module imports from the layers below its own and, within its layer, nothing.
LAYERS = [
    {"atomic_write", "backends.openmp", "options", "scale_invariance", "steering_arguments"},
    {"backends.bucket"},
    {"backends.checks", "backends.device_values"},
    {"backends.pure_start", "backends.row_sets", "backends.workspace"},
    {"backends.dtensor", "backends.native", "backends.pure"},
    {"backends.dispatch", "backends.pure_rows"},
    {"backends.dispatch_rows", "backends.op", "functional", "sparsity", "state", "tracked_zeros"},
    {"row_groups"},
    {"row_division"},
    {"checkpoints", "eager_step", "group_checks", "regroup"},
    {"compiled_step"},
    {"prox_sgd"},
    {"schedules", "structure"},
    {"channel_steering"},
    {"param_groups", "patch", "target_sparsity"},
    {""},  # resnet_reg_ext itself: the public names
    {"recipe"},
    {"cli"},
]


WHOLE = ("recipe", "structure")


def name_of(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(module):
    """The package's modules that a module imports, at whatever depth in its code."""
    path = MODULES[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    package = [part for part in package if part]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = package[: len(package) - (node.level - 1)]
        base += node.module.split(".") if node.module else []
        for alias in node.names:
            inner = ".".join([*base, alias.name])
            found.add(inner if inner in MODULES else ".".join(base))
    return found - {module}


def layer_of(module):
    """The layer's number; recipe and structure are layers as a whole."""
    names = {module, module.split(".")[0]} if module.startswith(WHOLE) else {module}
    return next((number for number, layer in enumerate(LAYERS) if layer & names), None)


@pytest.mark.parametrize("module", [module for module in MODULES if module != "backends"])
def test_a_module_imports_from_lower_layers_only(module):
    assert layer_of(module) is not None, f"{module} has no layer: see docs/architecture.md"
    for imported in imports_of(module):
        if module.startswith(WHOLE) and imported.split(".")[0] == module.split(".")[0]:
            continue  # only circles are refused inside
        assert layer_of(imported) is not None, f"{module} imports all of {imported}"
        assert layer_of(imported) < layer_of(module), f"{module} imports {imported}"


def test_there_is_no_circle():
    graph = {module: imports_of(module) for module in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_every_module_that_has_a_layer_exists():
    named = set().union(*LAYERS)
    assert {name for name in named if name not in MODULES} == set()


def test_imports_are_found():
    """Or the tests above would pass on anything."""
    assert "backends.dispatch" in imports_of("functional")
    assert {"eager_step", "backends.native", "compiled_step"} <= imports_of("prox_sgd")
    assert any(imports_of(module) for module in MODULES if module.startswith("recipe."))


def lines_of(function):
    """The lines of a function, its docstring not counted."""
    first = function.body[0]
    is_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    docstring = first.end_lineno - first.lineno + 1 if is_docstring else 0
    return function.end_lineno - function.lineno + 1 - docstring


def test_no_function_is_long():
    found = [
        f"{path.name}: {node.name}: {lines_of(node)}"
        for path in (*PACKAGE.rglob("*.py"), *CSRC.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and lines_of(node) > 60
    ]
    assert found == []


@pytest.mark.parametrize("folder", [PACKAGE, CSRC], ids=lambda path: path.name)
def test_no_file_is_long(folder):
    """A module that needs more than 350 lines does more than one job."""
    kinds = (".py", ".h", ".cpp", ".cu", ".cuh")
    files = [path for path in folder.rglob("*") if path.suffix in kinds]
    assert files
    assert {f"{p.name}: {n}" for p in files if (n := p.read_text().count("\n")) > 350} == set()
