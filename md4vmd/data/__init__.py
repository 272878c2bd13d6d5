"""The data room: one dataset per file, and the loader that turns it into batches.

A new dataset is one file with a subclass of `base.Dataset`, and one line in `TABLE`; the keys of
its section of the config, `name` apart, are the arguments of its constructor.
"""

from md4vmd.data.base import Dataset, Source
from md4vmd.data.images import Images
from md4vmd.data.loader import evaluation_batches, train_batches
from md4vmd.data.sudoku import Sudoku
from md4vmd.data.sudoku_csv import SudokuCsv
from md4vmd.data.synthetic import Synthetic
from md4vmd.data.text import Text
from md4vmd.data.tokens import Tokens

TABLE = {
  "images": Images,
  "sudoku": Sudoku,
  "sudoku_csv": SudokuCsv,
  "synthetic": Synthetic,
  "text": Text,
  "tokens": Tokens,
}

__all__ = ["TABLE", "Dataset", "Source", "evaluation_batches", "train_batches"]
