"""llama.cpp through llama-cpp-python, for `benchmarks.serving`; needs that package, NumPy and nothing of nemoc's."""

import ctypes
import importlib
from typing import Any

import numpy as np

from benchmarks.serving import serve

_STEP = 512
"""Tokens that llama.cpp takes at a time, as many as nemoc."""

_COMPLAINTS = (2, 3)
"""The levels of warnings and errors in llama.cpp's log."""


class LlamaEngine:
    """A GGUF file with one sequence, its cache of keys and values in float32."""

    def __init__(self) -> None:
        self._llama: Any = importlib.import_module("llama_cpp")
        self._log = self._llama.llama_log_callback(self._note)
        self._llama.llama_log_set(self._log, ctypes.c_void_p())
        self._said = ""
        self._llama.llama_backend_init()

    def about(self) -> dict[str, str]:
        """The version, and what it was compiled for."""
        system = self._llama.llama_print_system_info().decode().strip()
        return {"llama-cpp-python": self._llama.__version__, "system": system}

    def quantize(self, source: str, out: str, type: str, threads: int) -> None:
        """Have llama.cpp itself write a file with quantized weights.

        Args:
            source, out: the files.
            type: as in the names of llama.cpp's constants, such as Q4_0 or MXFP4_MOE.
            threads: to work on.
        """
        params = self._llama.llama_model_quantize_default_params()
        params.ftype = getattr(self._llama, f"LLAMA_FTYPE_MOSTLY_{type}")
        params.nthread = threads
        done = self._llama.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(params))
        if done != 0:
            raise ValueError(f"quantizing to {type} failed: {self._said}")

    def open(self, file: str, threads: int, context: int) -> None:
        """Load a file for that many tokens of context."""
        llama = self._llama
        model = llama.llama_model_load_from_file(file.encode(), llama.llama_model_default_params())
        if not model:
            raise ValueError(f"{file} cannot be loaded: {self._said}")
        params = llama.llama_context_default_params()
        params.n_ctx = context
        params.n_batch = params.n_ubatch = _STEP
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = llama.GGML_TYPE_F32
        self._context = llama.llama_init_from_model(model, params)
        if not self._context:
            raise ValueError(f"{file} cannot be run: {self._said}")
        self._vocabulary = llama.llama_model_get_vocab(model)
        self._width = llama.llama_vocab_n_tokens(self._vocabulary)

    def prefill(self, ids: list[int]) -> None:
        """Forget everything and take in a text."""
        self._forget()
        for start in range(0, len(ids), _STEP):
            self._take(ids[start : start + _STEP])

    def decode(self, steps: int) -> list[int]:
        """Take in the likeliest token so many times; these tokens."""
        taken = []
        for _ in range(steps):
            taken.append(int(self._row(-1).argmax()))
            self._take(taken[-1:])
        return taken

    def logits(self, ids: list[int], out: str) -> None:
        """Write the logits behind each token of a text: float32 [L, V], nothing but data."""
        self._forget()
        with open(out, "wb") as file:
            for start in range(0, len(ids), _STEP):
                self._logits(ids[start : start + _STEP], start)
                for row in range(len(ids[start : start + _STEP])):
                    self._row(row).tofile(file)

    def tokenize(self, text: str) -> list[int]:
        """A text's tokens without special ones in front."""
        data = text.encode()
        room = (ctypes.c_int32 * (len(data) + 8))()
        count = self._llama.llama_tokenize(
            self._vocabulary, data, len(data), room, len(room), False, False
        )
        if count < 0:
            raise ValueError(f"a text of {len(data)} bytes has {-count} tokens")
        return list(room[:count])

    def _note(self, level: int, text: bytes, data: object) -> None:
        """Keep the last of what llama.cpp complains about."""
        if level in _COMPLAINTS:
            self._said = text.decode(errors="replace").strip() or self._said

    def _forget(self) -> None:
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), True)

    def _take(self, ids: list[int]) -> None:
        tokens = (ctypes.c_int32 * len(ids))(*ids)
        batch = self._llama.llama_batch_get_one(tokens, len(ids))
        self._check(self._llama.llama_decode(self._context, batch))

    def _logits(self, ids: list[int], start: int) -> None:
        """Take in tokens of which all are to have logits."""
        batch = self._llama.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for i, token in enumerate(ids):
                batch.token[i], batch.pos[i] = token, start + i
                batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, 1
            self._check(self._llama.llama_decode(self._context, batch))
        finally:
            self._llama.llama_batch_free(batch)

    def _check(self, code: int) -> None:
        if code != 0:
            raise ValueError(f"llama_decode gave {code}: {self._said}")

    def _row(self, row: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The logits of a token of the last step, [V]."""
        found = self._llama.llama_get_logits_ith(self._context, row)
        return np.ctypeslib.as_array(found, (self._width,))


if __name__ == "__main__":
    serve(LlamaEngine)
