"""Parameters as a safetensors file: flat names, true vocabulary, and what made them beside.

The names are the paths of the parameters, such as `blocks/attention/query/kernel`. Embeddings and
heads are stored without the rows and columns that only pad the vocabulary: V + 1 rows, of which the
last is the mask's, and V columns.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy

from md4vmd.fingerprints import by_name

_FORMAT = "md4vmd-1"


Shape = tuple[int, ...]


def write(
  path: pathlib.Path, params: Any, shapes: Mapping[str, Shape], about: Mapping[str, Any]
) -> None:
  """Writes parameters, the whole file or none.

  Args:
    path: the file, in a folder that exists.
    params: tree of numpy arrays.
    shapes: of each without its padding, by name.
    about: JSON values by name, kept in the header of the file.
  """
  arrays = {
    name: np.ascontiguousarray(leaf[_corner(shapes[name])])
    for name, leaf in by_name(params).items()
  }
  header = {key: json.dumps(value, sort_keys=True) for key, value in about.items()}
  partial = path.with_name(path.name + ".partial")
  safetensors.numpy.save_file(arrays, partial, metadata={"format": _FORMAT, **header})
  os.replace(partial, path)


def read(path: pathlib.Path, template: Any, shapes: Mapping[str, Shape]) -> Any:
  """Parameters of a file, in the tree of the template; padding is 0.

  Args:
    path: a file that `write` made, of the same network.
    template: tree of arrays or `jax.ShapeDtypeStruct`s.
    shapes: of each without its padding, by name.

  Returns:
    Tree of numpy arrays.

  Raises:
    ValueError: no such file, no safetensors, or other parameters than the template has.
  """
  wanted, arrays = by_name(template), []
  try:
    with safetensors.safe_open(path, framework="np") as file:
      _check_names(path, set(file.keys()), set(wanted))
      for name, leaf in wanted.items():
        found = tuple(file.get_slice(name).get_shape())
        if found != shapes[name]:
          raise ValueError(
            f"{path}: {name} has shape {found} and this config's network has {shapes[name]}; use "
            "the config that the file was made with"
          )
        whole = np.zeros(leaf.shape, leaf.dtype)
        whole[_corner(found)] = file.get_tensor(name)
        arrays.append(whole)
  except (OSError, safetensors.SafetensorError) as error:
    raise ValueError(f"{path} cannot be read as safetensors: {error}") from error
  return jax.tree.unflatten(jax.tree.structure(template), arrays)


def read_arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
  """The arrays of any safetensors file, by name.

  Raises:
    ValueError: no such file, or no safetensors.
  """
  try:
    return safetensors.numpy.load_file(path)
  except (OSError, safetensors.SafetensorError) as error:
    raise ValueError(f"{path} cannot be read as safetensors: {error}") from error


def read_header(path: pathlib.Path) -> dict[str, Any]:
  """What `write` was given as `about`, and the format; {} where another program wrote the file.

  Raises:
    ValueError: no such file, or no safetensors.
  """
  try:
    with safetensors.safe_open(path, framework="np") as file:
      header = dict(file.metadata() or {})
  except (OSError, safetensors.SafetensorError) as error:
    what = "a folder; --mode=export writes the file of a run" if path.is_dir() else error
    raise ValueError(f"{path} cannot be read as safetensors: {what}") from error
  if header.get("format") != _FORMAT:
    return {}
  return {key: value if key == "format" else json.loads(value) for key, value in header.items()}


def _corner(shape: Shape) -> tuple[slice, ...]:
  return tuple(map(slice, shape))


def _check_names(path: pathlib.Path, found: set[str], wanted: set[str]) -> None:
  for name in sorted(found ^ wanted):
    state = "is missing" if name in wanted else "has no place in this config's network"
    raise ValueError(
      f"{path}: the parameter {name} {state}; use the config that the file was made with"
    )
