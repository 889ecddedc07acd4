"""PCRE2 as the system has it, by which the PCRE form of patterns is judged; `search` is None where there is none."""

from __future__ import annotations

import ctypes
import ctypes.util
from collections.abc import Callable

UTF = 0x00080000
NO_MATCH = -1


def _load() -> Callable[[str, str], bool] | None:
    name = ctypes.util.find_library("pcre2-8")
    if name is None:
        return None
    library = ctypes.CDLL(name)
    compile, match = library.pcre2_compile_8, library.pcre2_match_8
    compile.restype = ctypes.c_void_p
    compile.argtypes = [
        ctypes.c_char_p,
        ctypes.c_size_t,
        ctypes.c_uint32,
        ctypes.POINTER(ctypes.c_int),
        ctypes.POINTER(ctypes.c_size_t),
        ctypes.c_void_p,
    ]
    library.pcre2_match_data_create_8.restype = ctypes.c_void_p
    library.pcre2_match_data_create_8.argtypes = [ctypes.c_uint32, ctypes.c_void_p]
    library.pcre2_match_data_free_8.argtypes = [ctypes.c_void_p]
    library.pcre2_code_free_8.argtypes = [ctypes.c_void_p]
    sizes = [ctypes.c_size_t, ctypes.c_size_t, ctypes.c_uint32]
    match.argtypes = [ctypes.c_void_p, ctypes.c_char_p, *sizes, ctypes.c_void_p, ctypes.c_void_p]

    def search(pattern: str, text: str) -> bool:
        """Whether the pattern is found in the text; ValueError where PCRE does not take it or gives up."""
        code, place = ctypes.c_int(), ctypes.c_size_t()
        given = pattern.encode()
        compiled = compile(given, len(given), UTF, ctypes.byref(code), ctypes.byref(place), None)
        if not compiled:
            raise ValueError(f"PCRE refuses {pattern!r} at {place.value}: error {code.value}")
        data = library.pcre2_match_data_create_8(1, None)
        try:
            subject = text.encode()
            found = match(compiled, subject, len(subject), 0, 0, data, None)
        finally:
            library.pcre2_match_data_free_8(data)
            library.pcre2_code_free_8(compiled)
        if found < NO_MATCH:
            raise ValueError(f"PCRE gives up on {pattern!r}: {found}")
        return found >= 0

    return search


search = _load()
