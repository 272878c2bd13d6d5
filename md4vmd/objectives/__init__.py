"""Training objectives. A new objective is one file and one line of TABLE."""

from md4vmd.objectives.ar import AR
from md4vmd.objectives.genmd4 import GenMD4
from md4vmd.objectives.md4 import MD4
from md4vmd.objectives.sedd import SEDD
from md4vmd.objectives.vmd import VMD

TABLE = {"md4": MD4, "genmd4": GenMD4, "sedd": SEDD, "ar": AR, "vmd": VMD}

__all__ = ["AR", "MD4", "SEDD", "TABLE", "VMD", "GenMD4"]
