"""The floors of the house: imports go downwards only.

A module may import modules of strictly lower floors and, if it is a file of a package, files of
the same package. The exceptions are listed one by one.
"""

import ast
import functools
import pathlib
import sys

import pytest

_ROOT = pathlib.Path(__file__).parent.parent

FLOORS = {
  0: ("interfaces", "rngs", "row_losses", "numerics", "latents", "sections", "config_record",
      "fingerprints", "host_memory"),
  1: ("schedules", "forward", "data"),
  2: ("networks",),
  3: ("objectives", "samplers", "optim", "metrics", "partitioning", "processes", "checkpoints",
      "weights", "provenance", "writers", "pictures", "image_grids"),
  4: ("build", "steps"),
  5: ("train_state", "calibration", "evaluators", "train", "evaluate", "sample", "sample_files",
      "export", "report"),
  6: ("main",),
}  # fmt: skip

# Imports within a floor: the fused head sums row losses, the trainer evaluates, the jobs share the
# state that they restore.
SAME_FLOOR = {
  "numerics": ("row_losses",),
  "train": ("calibration", "evaluate", "sample", "train_state"),
  "evaluate": ("evaluators", "train_state"),
  "sample": ("sample_files", "train_state"),
  "export": ("train_state",),
}

# (library, who may import it): what the library is for, and why nobody else needs it.
OWNERS = {
  "ml_collections": (
    "build",
    "train",
    "evaluate",
    "sample",
    "export",
    "main",
  ),  # only build reads values
  "orbax": ("checkpoints",),
  "tensorboardX": ("writers",),
  "safetensors": ("weights",),
  "PIL": ("pictures", "image_grids", "data"),
  "matplotlib": ("report",),
  "grain": ("data",),
  "array_record": ("data",),
  "tokenizers": ("data",),
  "optax": ("optim", "steps"),
  "absl": ("main", "checkpoints"),
}

FREE_OF = {  # what a package must work without
  "data": ("jax", "flax", "optax"),
  "pictures": ("jax", "flax"),
  "image_grids": ("jax", "flax"),
  "metrics": ("jax", "flax"),
}

MESHES = ("partitioning",)  # the only builder of meshes and shardings


@functools.cache
def _imports(path):
  """Dotted names of everything that a file imports, at any depth of the file."""
  names = []
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      names += [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}: relative import; write it from the root"
      names += [f"{node.module}.{alias.name}" for alias in node.names]
  return names


def _files():
  """(room, path) of every file: the room is the module or the package that it belongs to."""
  folder = _ROOT / "md4vmd"
  for path in sorted(folder.rglob("*.py")):
    parts = path.relative_to(folder).with_suffix("").parts
    if parts != ("__init__",):
      yield parts[0], path


FILES = list(_files())
FLOOR = {room: floor for floor, rooms in FLOORS.items() for room in rooms}
every_file = pytest.mark.parametrize(
  ("room", "path"), FILES, ids=[str(path.relative_to(_ROOT)) for _, path in FILES]
)


def _rooms_imported(path):
  """Our rooms that a file imports; `import md4vmd` alone is the version and no room."""
  parts = [name.split(".") for name in _imports(path)]
  return {name[1] for name in parts if name[0] == "md4vmd" and len(name) > 1}


def test_every_room_has_a_floor():
  assert {room for room, _ in FILES} <= FLOOR.keys()


@every_file
def test_imports_go_to_lower_floors_only(room, path):
  for other in _rooms_imported(path) - {room, *SAME_FLOOR.get(room, ())}:
    assert FLOOR[other] < FLOOR[room], f"{room} (L{FLOOR[room]}) imports {other}"


@pytest.mark.parametrize("room", SAME_FLOOR)
def test_the_exceptions_within_a_floor_are_used_and_form_no_circle(room):
  used = set().union(*(_rooms_imported(path) for owner, path in FILES if owner == room))
  for other in SAME_FLOOR[room]:
    assert other in used and FLOOR[other] == FLOOR[room]
    assert room not in SAME_FLOOR.get(other, ())


@every_file
def test_libraries_stay_with_their_owners(room, path):
  for name in _imports(path):
    library = name.split(".")[0]
    assert room in OWNERS.get(library, (room,)), f"{room} imports {library}"
    assert library not in FREE_OF.get(room, ()), f"{room} must work without {library}"
    if name.split(".")[-1] in ("NamedSharding", "make_mesh"):
      assert room in MESHES, f"{room} imports {name}; ask partitioning"


@every_file
def test_no_file_of_the_library_imports_configs_or_tests(room, path):
  assert not {name.split(".")[0] for name in _imports(path)} & {"configs", "tests", "benchmarks"}


CONFIGS = sorted((_ROOT / "configs").glob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_a_config_imports_the_common_sections_and_config_dicts_alone(path):
  for name in _imports(path):
    is_plain = name.split(".")[0] in {"ml_collections", *sys.stdlib_module_names}
    assert name == "configs.common" or is_plain, f"{path.name} imports {name}"


def test_this_lint_sees_an_arrow_upwards(tmp_path):
  path = tmp_path / "rngs.py"
  path.write_text("def f():\n  from md4vmd.samplers import loop\n  import md4vmd.build\n")
  assert _rooms_imported(path) == {"samplers", "build"}
