"""From a section's settings to a call of what they describe; errors name the nearest word.

A section's `name` picks an entry of a TABLE; its other keys are arguments of that entry's
constructor, and None leaves an argument at the constructor's default. Keys that the entry does
not take are errors.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

_FRAMEWORK = {"self", "parent", "name"}  # constructor arguments that flax adds


def given(section: Mapping[str, Any]) -> dict[str, Any]:
  """The settings of a section that are not left at None."""
  return {key: value for key, value in section.items() if value is not None}


def from_table(
  table: Mapping[str, Any], section: Mapping[str, Any], where: str, **extra: Any
) -> Any:
  """Calls the entry of a TABLE that a section names, with its settings; see `call`."""
  settings = given(section)
  name = settings.pop("name", None)
  check_name(name, table, where)
  return call(table[name], settings, f"{where} '{name}'", **extra)


def check_name(name: Any, table: Mapping[str, Any], where: str) -> None:
  """Raises ValueError where a TABLE has no such entry."""
  if name not in table:
    raise ValueError(f"{where}: there is no '{name}'{nearest(str(name), table)}")


def check_counts(settings: Mapping[str, Any], keys: Iterable[str], where: str) -> None:
  """Raises ValueError where one of these settings, or a number in it, is below 1."""
  for key in keys:
    value = settings.get(key, 1)
    if min(np.ravel(value).tolist(), default=1) < 1:
      what = "it" if np.ndim(value) == 0 else "each"
      end = ", or None for all" if key == "limit" else ""
      raise ValueError(f"{where}.{key} is {value}; {what} must be at least 1{end}")


def call(function: Callable[..., Any], settings: Mapping[str, Any], where: str, **extra) -> Any:
  """Calls `function` with the settings of a section and with what it takes of `extra`.

  Raises:
    ValueError: a setting that it does not take, or one without default that is missing.
  """
  parameters = inspect.signature(function).parameters
  is_open = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
  known = [
    key
    for key, parameter in parameters.items()
    if key not in extra
    and parameter.kind is not inspect.Parameter.VAR_KEYWORD
    and not (isinstance(function, type) and key in _FRAMEWORK)
  ]
  for key in settings:
    if key not in known and not is_open:
      raise ValueError(f"{where} takes no '{key}'{nearest(key, known)}")
  for key in known:
    if parameters[key].default is inspect.Parameter.empty and key not in settings:
      raise ValueError(f"{where} needs a value for '{key}'")
  return function(**settings, **{key: extra[key] for key in extra if key in parameters})


def nearest(word: str, known: Iterable[str]) -> str:
  """The end of an error message: the nearest known word and all of them."""
  known = list(known)
  if not known:
    return "; it has no settings"
  close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
  hint = f"; did you mean '{close[0]}'?" if close else ";"
  return f"{hint} known: {', '.join(known)}"
