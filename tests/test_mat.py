"""MATLAB files against SciPy, which writes them, and files that lie."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.io

from bnfix.data.mat import read_mat

LIMIT = 1 << 20


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8"])
def test_numbers_of_every_type(tmp_path: Path, kind: str, packed: bool) -> None:
    path = tmp_path / "a.mat"
    held = {"a": np.arange(24, dtype=kind).reshape(2, 3, 4), "b": np.array([[7]], dtype=kind)}
    scipy.io.savemat(path, held | {"other": ["x"]}, do_compression=packed)
    found = read_mat(path, ("a", "b", "absent"), LIMIT)
    assert set(found) == {"a", "b"}
    for name, value in held.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value)


def test_structures_and_texts(tmp_path: Path) -> None:
    path = tmp_path / "a.mat"
    rows = np.zeros((2, 1), dtype=[("id", "O"), ("name", "O")])
    rows[0, 0], rows[1, 0] = (1.0, "one"), (2.0, "two")
    scipy.io.savemat(path, {"rows": rows, "cells": np.array(["a"], dtype=object), "text": "text"})
    found = read_mat(path, ("rows", "cells", "text"), LIMIT)
    assert [(int(row["id"][0, 0]), row["name"]) for row in found["rows"]] == [
        (1, "one"),
        (2, "two"),
    ]
    assert found["text"] == "text"
    assert found["cells"] is None


def test_files_that_lie_or_are_too_large(tmp_path: Path) -> None:
    path = tmp_path / "a.mat"
    scipy.io.savemat(path, {"a": np.zeros(3 << 20, np.uint8)}, do_compression=True)
    with pytest.raises(ValueError, match=r"would unpack to more than 1,048,576 bytes"):
        read_mat(path, ("a",), LIMIT)
    scipy.io.savemat(path, {"a": np.arange(50)})
    whole = path.read_bytes()
    for content, said in (
        (b"\x89HDF\r\n\x1a\n" + whole, "version 7.3"),
        (whole[:100], "no MATLAB version 5 file"),
        (whole[:-8], "an element claims"),
        (whole.replace(b"\x32\0\0\0", b"\x33\0\0\0", 1), r"an array of \(1, 51\) has 50 values"),
        (whole + b"\0" * LIMIT, "larger than 1,048,576 bytes"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=said):
            read_mat(path, ("a",), LIMIT)
