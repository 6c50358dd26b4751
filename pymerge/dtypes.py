"""Element types: one enum for file headers, numpy, torch and the compiled core."""

from __future__ import annotations

from enum import Enum


class DType(Enum):
    """A safetensors element type. `code` is the number the compiled core knows floats by."""

    F64 = ("F64", 64, "float64", 3)
    F32 = ("F32", 32, "float32", 2)
    F16 = ("F16", 16, "float16", 1)
    BF16 = ("BF16", 16, "bfloat16", 0)
    I64 = ("I64", 64, "int64", None)
    I32 = ("I32", 32, "int32", None)
    I16 = ("I16", 16, "int16", None)
    I8 = ("I8", 8, "int8", None)
    U64 = ("U64", 64, "uint64", None)
    U32 = ("U32", 32, "uint32", None)
    U16 = ("U16", 16, "uint16", None)
    U8 = ("U8", 8, "uint8", None)
    BOOL = ("BOOL", 8, "bool", None)
    C64 = ("C64", 64, "complex64", None)
    F8_E4M3 = ("F8_E4M3", 8, "float8_e4m3fn", None)
    F8_E5M2 = ("F8_E5M2", 8, "float8_e5m2", None)
    F8_E8M0 = ("F8_E8M0", 8, "float8_e8m0fnu", None)
    F8_E4M3FNUZ = ("F8_E4M3FNUZ", 8, "float8_e4m3fnuz", None)
    F8_E5M2FNUZ = ("F8_E5M2FNUZ", 8, "float8_e5m2fnuz", None)
    F6_E2M3 = ("F6_E2M3", 6, "float6_e2m3fn", None)
    F6_E3M2 = ("F6_E3M2", 6, "float6_e3m2fn", None)
    F4 = ("F4", 4, "float4_e2m1fn", None)

    def __init__(self, header_name: str, bits: int, torch_name: str, code: int | None) -> None:
        self.header_name = header_name
        self.bits = bits
        self.torch_name = torch_name
        self.code = code

    # Members are unique; Enum's own hash is Python code, which shows where there are many tensors.
    __hash__ = object.__hash__

    @property
    def itemsize(self) -> int:
        """Bytes of one element; only whole-byte types have one."""
        if self.bits % 8:
            raise ValueError(f"{self.header_name} elements are not whole bytes")
        return self.bits // 8

    @property
    def mergeable(self) -> bool:
        """Whether arithmetic is defined: f16, bf16, f32, f64."""
        return self.code is not None

    @property
    def copyable(self) -> bool:
        """Whether equal tensors are copied: integers and bool."""
        return self.header_name[0] in "IU" or self is DType.BOOL


BY_HEADER_NAME = {d.header_name: d for d in DType}
BY_TORCH_NAME = {d.torch_name: d for d in DType}


def promote(dtypes: set[DType]) -> DType:
    """The float type that holds all of `dtypes`: equal types stay, f16 with bf16 gives f32."""
    if len(dtypes) == 1:
        return next(iter(dtypes))
    return DType.F64 if DType.F64 in dtypes else DType.F32
