"""Pickles of plain values read by their opcodes: what they hold, and that nothing else is done."""

from __future__ import annotations

import collections
import os
import pickle

import numpy as np
import pytest

from bnfix.data.plain_pickle import read_plain_pickle

VALUES = {
    b"data": np.arange(12, dtype=np.uint8).reshape(4, 3),
    "by column": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "large": np.arange(3, dtype=">i4"),
    "mixed": [1, -(2**70), None, True, 2.5, "text \u2603", b"bytes", (1, (2,)), {"a": {}}],
}


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4])
def test_plain_values_of_every_protocol(protocol: int) -> None:
    found = read_plain_pickle(pickle.dumps(VALUES, protocol))
    np.testing.assert_array_equal(found["data"], VALUES[b"data"])
    np.testing.assert_array_equal(found["by column"], VALUES["by column"])
    assert found["large"].tolist() == [0, 1, 2]
    assert found["mixed"] == VALUES["mixed"]


class Runs:
    def __reduce__(self):
        return os.system, ("touch ran",)


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    "value", [Runs(), os.getcwd, collections.OrderedDict(a=1), np.array([None]), {1j: 2}]
)
def test_anything_else_is_refused(value: object, protocol: int) -> None:
    with pytest.raises(ValueError, match=r"which is no plain value|something else than numbers"):
        read_plain_pickle(pickle.dumps({"a": value}, protocol))


def test_what_grows_deepens_or_lies_is_refused() -> None:
    text = b"X" + (10_000).to_bytes(4, "little") + b"x" * 10_000
    encode = b"c_codecs\nencode\nq\x00" + text + b"\x85q\x01"
    again = b"".join(b"h\x00h\x01R" for _ in range(100))
    with pytest.raises(ValueError, match="it would grow larger than the file"):
        read_plain_pickle(b"\x80\x02" + encode + again + b".")
    deep = b"\x80\x02}" + b")" + b"\x85" * 200_000 + b"K\x01s."
    with pytest.raises(ValueError, match="key is neither a text nor a number"):
        read_plain_pickle(deep)
    for content in (b"", b".", b"\x80\x02}", b"(.", b"h\x05.", b"K\x01K\x02b.", b"\x8f.", b"Q."):
        with pytest.raises(ValueError, match=r"\w"):
            read_plain_pickle(content)
    whole = pickle.dumps({"a": np.arange(3)}, 2)
    with pytest.raises(ValueError, match=r"does not have as many bytes"):
        read_plain_pickle(whole.replace(b"K\x03\x85", b"K\x04\x85"))
