"""What the data tests share: a small standard library, and token files whose content the test chooses."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from fp8moe.data import sources
from fp8moe.data.indexed import IndexedDataset, IndexedWriter

MODULES = (
    "abc.py bisect.py cmd.py code.py codeop.py colorsys.py contextlib.py copy.py copyreg.py fnmatch.py "
    "functools.py genericpath.py getopt.py getpass.py glob.py hashlib.py heapq.py hmac.py io.py keyword.py numbers.py "
    "linecache.py operator.py reprlib.py sched.py secrets.py shelve.py stat.py string.py textwrap.py token.py "
    "types.py json/decoder.py json/encoder.py"
)


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few dozen files of the real standard library, with a folder that belongs to the machine beside them."""
    root = tmp_path_factory.mktemp("library")
    for name in MODULES.split():
        (root / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(sources.standard_library_root() / name, root / name)
    (root / "site-packages").mkdir()
    (root / "site-packages" / "added.py").write_text("added = 1\n")
    return root


MakeTokens = Callable[..., IndexedDataset]


@pytest.fixture
def make_tokens(tmp_path: Path) -> MakeTokens:
    """make_tokens(documents, vocab_size=1000, name="tokens"): writes and opens token files."""

    def make(documents: Sequence[Sequence[int]], vocab_size: int = 1000, name: str = "tokens") -> IndexedDataset:
        with IndexedWriter(tmp_path / name, vocab_size) as writer:
            for document in documents:
                writer.write(np.array(document, dtype=np.int64))
                writer.end_document()
        return IndexedDataset(tmp_path / name)

    return make
