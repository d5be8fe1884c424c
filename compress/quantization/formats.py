"""What a number may be stored as: a grid, and how many weights share its scale.

An integer q stands for

    scale * q                   offset "none"
    scale * (q - zero_point)    offset "zero_point", an integer
    scale * q + minimum         offset "minimum", a real number

and a float8 number v for `scale * v`. The formats of groups of 32 hold exactly what GGUF's blocks
of the same name hold, float16 scales included, so that writing such a file loses nothing.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

Group = Literal["tensor", "channel"] | int

_FLOAT8 = {"e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2"}
_LARGEST = {"e4m3": 448.0, "e5m2": 57344.0}
_OFFSETS = ("none", "zero_point", "minimum")
_SCALES = ("float32", "float16")
PACKED_BITS = 4


@dataclass(frozen=True)
class Format:
    """A grid and its scales.

    Attributes:
      kind: "int", or a float8 type (Micikevicius et al. 2022, arXiv:2209.05433).
      bits: of an integer, 2 to 8 or 16. Up to 4 bits are stored as 4, two to a byte: fewer than 4
        narrow the grid and save nothing, which is what ablations want.
      group: how many weights share a scale: the whole "tensor", one output "channel", or so many
        weights along the contraction axis.
      offset: see the top of the file. With "minimum", which is real, few zeros stay zero: what has
        been pruned wants another.
      span: without an offset, "balanced" uses -(2^(bits-1) - 1) to 2^(bits-1) - 1; "full" one
        value more, -2^(bits-1), which stands for the weight of largest magnitude, so that a scale
        may be negative (as in Q4_0).
      scale_dtype: "float32" (kept to 16 significant bits, see `compress.quantization.rounding`) or
        "float16".

    >>> Format(bits=4, group=32).low
    -7
    >>> Format(bits=9)
    Traceback (most recent call last):
    ...
    ValueError: integers of 9 bits are not implemented; choose 2 to 8, or 16
    """

    kind: Literal["int", "e4m3", "e5m2"] = "int"
    bits: int = 8
    group: Group = "channel"
    offset: Literal["none", "zero_point", "minimum"] = "none"
    span: Literal["balanced", "full"] = "balanced"
    scale_dtype: Literal["float32", "float16"] = "float32"

    def __post_init__(self):
        choices: dict[str, tuple[str, ...]] = {
            "kind": ("int", *_FLOAT8),
            "offset": _OFFSETS,
            "span": ("balanced", "full"),
            "scale_dtype": _SCALES,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} {getattr(self, name)!r} is unknown; choose one of {', '.join(allowed)}"
                )
        if self.kind == "int" and self.bits not in (*range(2, 9), 16):
            raise ValueError(
                f"integers of {self.bits} bits are not implemented; choose 2 to 8, or 16"
            )
        if self.kind != "int" and (self.bits, self.offset, self.span) != (8, "none", "balanced"):
            raise ValueError(f"{self.kind} has 8 bits and neither offset nor another span")
        if self.span == "full" and self.offset != "none":
            raise ValueError('span "full" is for formats without an offset; those with one use all')
        whole = isinstance(self.group, int) and self.group >= 1
        if not whole and self.group not in ("tensor", "channel"):
            raise ValueError(
                f'a group is "tensor", "channel" or a number of weights, not {self.group!r}'
            )

    @property
    def low(self) -> float:
        """The smallest number of the grid, before scaling."""
        if self.kind != "int":
            return -_LARGEST[self.kind]
        if self.offset == "minimum":
            return 0
        return -(2 ** (self.bits - 1)) + (self.offset == "none" and self.span == "balanced")

    @property
    def high(self) -> float:
        """The largest number of the grid, before scaling."""
        if self.kind != "int":
            return _LARGEST[self.kind]
        return 2**self.bits - 1 if self.offset == "minimum" else 2 ** (self.bits - 1) - 1

    @property
    def packed(self) -> bool:
        """Whether two values share a byte."""
        return self.kind == "int" and self.bits <= PACKED_BITS

    @property
    def storage(self) -> str:
        """The type of the array that holds the values."""
        if self.kind != "int":
            return _FLOAT8[self.kind]
        if self.packed:
            return "uint8"
        sign = "u" if self.offset == "minimum" else ""
        return f"{sign}int{8 if self.bits <= 8 else 16}"

    def groups(self, length: int) -> int:
        """Returns how many scales a contraction axis of `length` weights has.

        Raises:
          ValueError: if the groups do not divide it, or its values do not pair up.

        >>> FORMATS["q4_0"].groups(768)
        24
        """
        if self.packed and length % 2:
            raise ValueError(
                f"values of {self.bits} bits are stored in pairs along the contraction axis, "
                f"which is odd here: {length}; choose a format of 8 bits for this weight"
            )
        if not isinstance(self.group, int):
            return 1
        if length % self.group:
            fits = [g for g in (128, 64, 32, 16, 8) if length % g == 0]
            raise ValueError(
                f"groups of {self.group} do not divide a contraction axis of {length} weights; "
                + (f"groups of {fits[0]} do" if fits else "choose a format by channel, as int8")
            )
        return length // self.group


FORMATS: dict[str, Format] = {
    "int3": Format(bits=3, span="full"),
    "int4": Format(bits=4, span="full"),
    "int8": Format(bits=8),
    "int16": Format(bits=16),
    "int8_tensor": Format(bits=8, group="tensor"),
    "int8_zero_point": Format(bits=8, offset="zero_point"),
    "int3_g32": Format(bits=3, group=32, span="full", scale_dtype="float16"),
    "int4_g128": Format(bits=4, group=128, span="full", scale_dtype="float16"),
    "q4_0": Format(bits=4, group=32, span="full", scale_dtype="float16"),
    "q4_1": Format(bits=4, group=32, offset="minimum", scale_dtype="float16"),
    "q8_0": Format(bits=8, group=32, scale_dtype="float16"),
    "e4m3": Format(kind="e4m3"),
    "e5m2": Format(kind="e5m2"),
}


def format_of(name: str | Format) -> Format:
    """Returns the format called `name`; a format is returned as it is.

    Raises:
      ValueError: if there is none of that name; the names are listed.

    >>> format_of("q4_1").offset
    'minimum'
    """
    if isinstance(name, Format):
        return name
    if name not in FORMATS:
        raise ValueError(f"no format is called {name!r}; there are {', '.join(FORMATS)}")
    return FORMATS[name]


def format_to_json(format: Format) -> dict[str, Any]:
    """Returns the fields of a format; `Format(**fields)` is the format again.

    >>> Format(**format_to_json(FORMATS["q8_0"])) == FORMATS["q8_0"]
    True
    """
    return dataclasses.asdict(format)
