"""Where the bytes of encoded entries lie: what a kernel must know of a codec."""

from enum import IntEnum
from typing import NamedTuple


class Kind(IntEnum):
    """How the numbers of vectors are stored. t is an entry's place in its record, c a channel, g a group of channels.

    What `Vectors` calls low, steps, codes and more are first bytes in a record.
    """

    ELEMENTS = 0  # as they are, in the queries' dtype, at low + c
    FLOAT8 = 1  # e4m3, at low + c
    BY_TOKEN = 2  # groups of channels as `quantise` gives them, one after the other
    BY_CHANNEL = 3  # as `quantise` gives them, channel after channel; a group is the record's entries
    CLIPPED = 4  # e4m3 minima at low + g, steps at steps + g, codes to the base `levels`, as many to a byte as go in
    HALVES_BY_TOKEN = 5  # float16 minima and steps of [t, g], upper halves of codes at codes, lower ones at more
    HALVES_BY_CHANNEL = 6  # float16 minima and steps of [c], the same


class Vectors(NamedTuple):
    """Keys, or values, in a record. A named tuple: kernels take it as a constant.

    HALVES have codes [8, size] for a record's 16 entries, those of the first eight in bytes' lower halves; without
    `more`, a number is low + code * step, with it low + (16 * code + code of more - 8) * step / 16.

    Fields:
        kind: see `Kind`.
        size: numbers of a vector.
        low, steps, codes, more: see `Kind`; -1: there are none.
        token_bytes: from one entry's bytes to the next one's of a record; BY_TOKEN only.
        channels: of a group, a divisor of `size`; 0: there are no groups.
        levels: values of a code.
        magnitude: byte of a number in the queries' dtype; the vector has this length and the stored one's direction,
            or is the stored one where it is negative; -1: it is the stored one.
    """

    kind: Kind
    size: int
    low: int = 0
    steps: int = -1
    codes: int = -1
    more: int = -1
    token_bytes: int = 0
    channels: int = 0
    levels: int = 0
    magnitude: int = -1


class Form(NamedTuple):
    """Of a record: entries that are stored together. As many records to a page as fit.

    Fields:
        num_bytes: of a record.
        group_size: its entries.
        keys, values: of an entry; both ELEMENTS or neither.
        skips_retained: entries whose magnitude of the values is negative are not there: they are stored elsewhere.
    """

    num_bytes: int
    group_size: int
    keys: Vectors
    values: Vectors
    skips_retained: bool = False
