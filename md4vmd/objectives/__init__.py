"""Training objectives. A new objective is one file and one line of TABLE."""

from md4vmd.objectives.ar import AR
from md4vmd.objectives.md4 import MD4
from md4vmd.objectives.vmd import VMD

TABLE = {"md4": MD4, "vmd": VMD, "ar": AR}
