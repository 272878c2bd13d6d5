"""What a compiled program does, counted in its optimized HLO: matrix FLOPs, bytes of main memory
and of collectives.

XLA's own cost analysis counts the body of a loop once. A transformer is a loop over its layers, so
here a body counts as often as the loop runs, where the compiler knows; other loops count once and
are reported. Bytes of a collective are those of its result on one device. In main memory every
instruction reads its operands and writes its result once, a fusion being one instruction; of what
it slices or updates in place, the slice. FLOPs inside kernels written by hand are not seen.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re

COLLECTIVES = (
  "all-gather",
  "all-reduce",
  "all-to-all",
  "collective-permute",
  "ragged-all-to-all",
  "reduce-scatter",
)
_BITS = {"pred": 8, "bf16": 16, "f8e4m3fn": 8, "f8e5m2": 8}
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")
_LAID_OUT = re.compile(_ARRAY.pattern + r"(\{[^}]*\})?")
_SLICES = ("dynamic-slice", "slice", "gather")
_FREE = {
  "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call",
  "iota", "after-all", "opt-barrier", "partition-id",
}  # fmt: skip
_CALLED = re.compile(r"(?:body|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Cost:
  """What one device does in one call of a program.

  Attributes:
    matrix_flops: of matrix products and convolutions, a multiplication and an addition being two.
    memory_bytes: read from main memory and written to it.
    collective_bytes: by kind of collective.
    collectives: number of them.
    open_loops: loops whose number of rounds the compiler does not know, counted as one round.
  """

  matrix_flops: float
  memory_bytes: float
  collective_bytes: dict[str, float]
  collectives: float
  open_loops: int

  @property
  def bytes(self) -> float:
    """Of all collectives."""
    return sum(self.collective_bytes.values())


class _Total:
  def __init__(self):
    self.flops = self.memory = 0.0
    self.bytes: dict[str, float] = collections.defaultdict(float)
    self.count = 0.0
    self.open_loops = 0


def cost(text: str) -> Cost:
  """Counts a program, from the text of its optimized HLO (`compiled.as_text()`).

  Raises:
    ValueError: the text has no entry computation.
  """
  computations, entry = _parse(text)
  if entry is None:
    raise ValueError("the text has no ENTRY computation; give compiled.as_text()")
  total = _Total()
  _add(total, computations, entry, 1.0)
  return Cost(total.flops, total.memory, dict(total.bytes), total.count, total.open_loops)


def _parse(text):
  """({computation: [(name, result, opcode, rest of the line)]}, name of the entry)."""
  computations, entry, lines = {}, None, None
  for line in text.splitlines():
    found = _COMPUTATION.match(line)
    if found:
      is_entry, name = found.groups()
      lines = computations.setdefault(name, [])
      entry = name if is_entry else entry
    elif lines is not None and (instruction := _INSTRUCTION.match(line)):
      lines.append(instruction.groups())
  return computations, entry


def _add(total, computations, name, rounds, is_fused=False):
  instructions = computations.get(name, [])
  shapes = {result: _shapes(kind) for result, kind, _, _ in instructions}
  kinds = {result: kind for result, kind, _, _ in instructions}
  for _, kind, opcode, rest in instructions:
    if not is_fused:
      total.memory += rounds * _traffic(computations, kinds, kind, opcode, rest)
    base = opcode.removesuffix("-start")
    if base in COLLECTIVES:
      arrays = _shapes(kind)
      if opcode.endswith("-start") and base != "all-reduce":
        # What an asynchronous one returns at first: its operands, its results and its state.
        arrays = [array for array in arrays if array != ("u32", [])]
        arrays = arrays[len(arrays) // 2 :]
      total.bytes[base] += rounds * sum(map(_bytes, arrays))
      total.count += rounds
    elif opcode in ("dot", "convolution"):
      total.flops += rounds * _flops(opcode, kind, rest, shapes)
    elif opcode == "while":
      count = _trip_count(computations, rest)
      total.open_loops += count is None
      _add(total, computations, _find(r"body=%?([\w.\-]+)", rest), rounds * (count or 1))
      continue
    # What a reduction applies to pairs of numbers holds nothing that counts here.
    for called in _CALLED.findall(rest):
      _add(total, computations, called, rounds, is_fused or opcode not in ("call", "conditional"))
    branches = re.search(r"branch_computations=\{([^}]*)\}", rest)
    if branches:
      _add(total, computations, branches[1].split(",")[-1].strip().lstrip("%"), rounds, is_fused)


def _traffic(computations, kinds, kind, opcode, rest):
  """Bytes of main memory that an instruction reads and writes."""
  names = _operands(rest)
  if opcode in _FREE or opcode.endswith("-done"):
    return 0.0
  if opcode.endswith("-start"):  # its result lists its operands and its results
    return _in_memory(kind)
  if opcode in _SLICES:
    return 2.0 * _in_memory(kind)
  if opcode == "dynamic-update-slice":
    return 2.0 * _in_memory(kinds.get(names[1], ""))
  operands = [_in_memory(kinds.get(name, "")) for name in names]
  if opcode != "fusion":
    return sum(operands) + _in_memory(kind)
  return _traffic_of_fusion(computations[_find(r"calls=%?([\w.\-]+)", rest)], operands)


def _traffic_of_fusion(body, operands):
  """As `_traffic`; of an operand that is only sliced, or updated in place, the slice counts."""
  same = {name: _operands(rest)[0] for name, _, opcode, rest in body if opcode == "bitcast"}

  def source(name):
    return source(same[name]) if name in same else name

  lines = {
    name: (kind, opcode, [source(operand) for operand in _operands(rest)])
    for name, kind, opcode, rest in body
    if name not in same
  }
  total = 0.0
  for name, _, opcode, rest in body:
    if opcode == "parameter":
      uses = [line for line in lines.values() if name in line[2]]
      if uses and all(each[1] in _SLICES and each[2][0] == name for each in uses):
        total += sum(_in_memory(each[0]) for each in uses)
      elif not all(each[1] == "dynamic-update-slice" and each[2][0] == name for each in uses):
        total += operands[int(rest.split(")")[0])]
  last = source(body[-1][0])  # the root stands last
  for name in lines[last][2] if lines[last][1] == "tuple" else [last]:
    kind, opcode, names = lines[name]
    in_place = opcode == "dynamic-update-slice"
    total += _in_memory(lines[names[1]][0] if in_place else kind)
  return total


def _in_memory(kind):
  """Bytes of the arrays of a result that lie in main memory and in no space S(n) of the chip."""
  found = _LAID_OUT.findall(kind)
  return sum(
    _bytes((dtype, [int(size) for size in sizes.split(",") if size]))
    for dtype, sizes, layout in found
    if "S(" not in layout
  )


def _trip_count(computations, rest):
  """Rounds of a `while`, None if unknown: a counter from 0 in constant steps to a constant."""
  known = re.search(r"known_trip_count\W+n\W+(\d+)", rest)
  if known:
    return int(known[1])
  condition = computations.get(_find(r"condition=%?([\w.\-]+)", rest), [])
  body = computations.get(_find(r"body=%?([\w.\-]+)", rest), [])
  lines = {name: (opcode, text) for name, _, opcode, text in condition}
  for opcode, text in lines.values():
    if opcode == "compare" and "direction=LT" in text:
      counter, limit = _operands(text)[:2]
      end = _constants(condition).get(limit)
      place = re.search(r"index=(\d+)", lines[counter][1])
      return -(-end // _step(body, int(place[1]) if place else 0)) if end else None
  return None


def _step(body, place):
  """What one round adds to the counter at that place of the loop's state."""
  opcodes = {name: (opcode, text) for name, _, opcode, text in body}
  for opcode, text in reversed(opcodes.values()):
    if opcode == "tuple" and place < len(_operands(text)):
      opcode, text = opcodes.get(_operands(text)[place], ("", ""))
      steps = [_constants(body).get(name) for name in _operands(text)]
      return next(filter(None, steps), 1) if opcode == "add" else 1
  return 1


def _operands(text):
  return re.findall(r"%([\w.\-]+)", text.split(")")[0])


def _constants(instructions):
  """Whole scalars by name."""
  return {
    name: int(text.split(")")[0])
    for name, kind, opcode, text in instructions
    if opcode == "constant" and kind.startswith(("s32[]", "u32[]")) and text[0].isdigit()
  }


def _find(pattern, text):
  """The group of a pattern that stands in the text of every such instruction."""
  found = re.search(pattern, text)
  if found is None:
    raise ValueError(f"the program has an instruction without {pattern}: {text[:200]}")
  return found[1]


def _shapes(kind):
  """[(type, dimensions)] of a result."""
  found = _ARRAY.findall(kind)
  return [(dtype, [int(size) for size in sizes.split(",") if size]) for dtype, sizes in found]


def _bytes(array):
  dtype, sizes = array
  bits = _BITS.get(dtype) or int(_find(r"(\d+)", dtype))
  return math.prod(sizes) * bits / 8


def _flops(opcode, kind, rest, shapes):
  """2 x elements of the result x length of the sums."""
  (_, result), *_ = _shapes(kind)
  operands = rest.split(")")[0]
  inline = _shapes(operands)
  names = re.findall(r"%([\w.\-]+)", operands)
  sizes = [array[1] for array in inline] or [shapes[name][0][1] for name in names if shapes[name]]
  if opcode == "dot":
    axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", rest)
    summed = [sizes[0][int(axis)] for axis in axes[1].split(",") if axis] if axes else []
    return 2.0 * math.prod(result) * math.prod(summed)
  left, right, out = re.split("_|->", _find(r"dim_labels=(\w+->\w+)", rest))
  size_of = lambda labels, sizes: dict(zip(labels, sizes, strict=True))
  image, kernel, result = size_of(left, sizes[0]), size_of(right, sizes[1]), size_of(out, result)
  window = re.search(r"window=\{([^}]*)\}", rest)
  pairs = _pairs(window[1] if window else "", image, kernel, result)
  return 2.0 * result["b"] * result["f"] * kernel["i"] * pairs


def _pairs(window, image, kernel, result):
  """Products of a pixel and an entry of the kernel, over all spatial axes of a convolution.

  The batch of a batched matrix product stands as a spatial axis whose strides and paddings leave
  one pixel for each output.
  """
  settings = dict(re.findall(r"(\w+)=(\S+)", window))
  axes = sorted(label for label in kernel if label.isdigit())
  split = lambda text: text.split("x") if axes else []
  of_axis = lambda name, default: split(settings.get(name, "x".join([default] * len(axes))))
  total = 1
  for axis, pad, stride, dilation, spread in zip(
    axes,
    of_axis("pad", "0_0"),
    of_axis("stride", "1"),
    of_axis("lhs_dilate", "1"),
    of_axis("rhs_dilate", "1"),
    strict=True,
  ):
    first, dilation = -int(pad.split("_")[0]), int(dilation)
    places = (
      first + out * int(stride) + tap * int(spread)
      for out in range(result[axis])
      for tap in range(kernel[axis])
    )
    total *= sum(place % dilation == 0 and 0 <= place // dilation < image[axis] for place in places)
  return total
