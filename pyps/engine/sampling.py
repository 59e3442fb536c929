"""How a sequence's next token is chosen: llama.cpp's own samplers, chained in llama.cpp's own order."""

import ctypes
import json
import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp.llama_grammar import json_schema_to_gbnf
from numpy.typing import NDArray

from pyps.engine import log
from pyps.engine.context import Context
from pyps.engine.model import Model
from pyps.errors import InputError

_REPEAT_LAST_N = 64


@dataclass(frozen=True)
class Sampling:
    """Sampling of one generation.

    Attributes:
        temperature: 0 always takes the most likely token.
        top_k: Keep the k most likely tokens; 0 keeps all.
        top_p: Keep the most likely tokens that together have this probability; 1 keeps all.
        min_p: Keep tokens at least this fraction as likely as the most likely one; 0 keeps all.
        repeat_penalty: How much less likely a token of the last 64 becomes; 1 is off. Small models loop without it.
        seed: None draws a new one each time.
        max_tokens: The generation ends here, with finish reason "length".
        stop: Texts that end the generation; they are not part of its text.
        ignore_eos: Never choose a token that ends the generation; for benchmarks.
        grammar: What the generation must look like, in llama.cpp's GBNF ("root" is all of it); "" for anything.

    Raises:
        InputError: A value is out of range.
    """

    temperature: float = 0.7
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.1
    seed: int | None = None
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    grammar: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 100:
            raise InputError(f"temperature must be between 0 and 100, not {self.temperature}")
        if not 0 <= self.top_k < 2**31:
            raise InputError(f"top_k must be 0 (off) or more, not {self.top_k}")
        for name in ("top_p", "min_p"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} must be between 0 and 1, not {getattr(self, name)}")
        if not 0 < self.repeat_penalty <= 10:
            raise InputError(f"repeat_penalty must be more than 0 (1 is off) and at most 10, not {self.repeat_penalty}")
        if self.seed is not None and not 0 <= self.seed < 2**32 - 1:
            raise InputError(f"seed must be between 0 and {2**32 - 2}, not {self.seed}")
        if not 1 <= self.max_tokens < 2**20:
            raise InputError(f"max_tokens must be at least 1, not {self.max_tokens}")
        if isinstance(self.stop, str) or not all(self.stop):
            raise InputError("stop must be a sequence of texts that are not empty")

    @staticmethod
    def grammar_of(schema: dict[str, Any]) -> str:
        """Return the grammar of the JSON that a schema describes. Raises InputError if llama.cpp has none for it."""
        try:
            return str(json_schema_to_gbnf(json.dumps(schema)))
        except Exception as error:
            # the converter asserts, indexes and recurses as it goes
            raise InputError(f"no grammar can be made of this JSON schema ({type(error).__name__}: {error})") from None


def draw_seed() -> int:
    """Draw a seed for a generation whose user has not chosen one."""
    return secrets.randbelow(2**31)


class Sampler:
    """llama.cpp's sampler chain for one generation. Close it. Raises InputError if the grammar cannot be used."""

    def __init__(self, model: Model, sampling: Sampling) -> None:
        seed = draw_seed() if sampling.seed is None else sampling.seed
        chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
        links = []
        if sampling.ignore_eos:
            never = [llama_cpp.llama_logit_bias(token, -math.inf) for token in model.end_tokens]
            biases = (llama_cpp.llama_logit_bias * len(never))(*never)
            links.append(llama_cpp.llama_sampler_init_logit_bias(model.n_vocab, len(never), biases))
        links.append(
            llama_cpp.llama_sampler_init_penalties(model.n_vocab, _REPEAT_LAST_N, sampling.repeat_penalty, 0.0, 0.0)
        )
        if sampling.temperature == 0:
            links.append(llama_cpp.llama_sampler_init_greedy())
        else:
            links += [
                llama_cpp.llama_sampler_init_top_k(sampling.top_k),
                llama_cpp.llama_sampler_init_top_p(sampling.top_p, 1),
                llama_cpp.llama_sampler_init_min_p(sampling.min_p, 1),
                llama_cpp.llama_sampler_init_temp(sampling.temperature),
                llama_cpp.llama_sampler_init_dist(seed),
            ]
        for link in links:
            llama_cpp.llama_sampler_chain_add(chain, link)
        self._chain: ctypes.c_void_p | None = chain
        self._grammar: ctypes.c_void_p | None = None
        if sampling.grammar:
            data = sampling.grammar.encode("utf-8", "replace")
            with log.captured():
                self._grammar = llama_cpp.llama_sampler_init_grammar(model.vocab, data, b"root")
                words = log.last_words()
            if not self._grammar:
                self.close()
                raise InputError(f"the grammar cannot be used: {words or 'llama.cpp does not say why'}")

    def sample(self, ctx: Context, index: int) -> int:
        """Choose the token after the index-th of ctx's last batch.

        A negative index counts the batch's tokens with logits, from the end. Raises InputError if the grammar allows no
        token.
        """
        if self._grammar is None:
            return int(llama_cpp.llama_sampler_sample(self._chain, ctx.pointer, index))
        logits = ctx.logits(index)
        token, _ = self._choose(self._chain, logits)
        # asking the grammar about all tokens takes long, and mostly the first choice is fine (common_sampler_sample)
        if not self._choose(self._grammar, logits, [token])[1]:
            everything = _candidates(logits)
            llama_cpp.llama_sampler_apply(self._grammar, ctypes.byref(_array(everything)))
            token, _ = self._choose(self._chain, everything["logit"])
            if not self._choose(self._grammar, logits, [token])[1]:
                # where none is possible the chain chooses all the same, and llama.cpp aborts when it tells the grammar
                raise InputError("the grammar cannot be followed: this model has no token that could come next")
        llama_cpp.llama_sampler_accept(self._grammar, token)
        llama_cpp.llama_sampler_accept(self._chain, token)
        return token

    @staticmethod
    def _choose(
        sampler: ctypes.c_void_p | None, logits: NDArray[np.float32], tokens: Sequence[int] | None = None
    ) -> tuple[int, bool]:
        """Return what a sampler selects of these tokens, or of all, and whether it leaves the first one possible."""
        values = _candidates(logits, tokens)
        array = _array(values)
        llama_cpp.llama_sampler_apply(sampler, ctypes.byref(array))
        selected = int(values["id"][array.selected]) if array.selected >= 0 else -1
        return selected, bool(np.isfinite(values["logit"][0]))

    def close(self) -> None:
        """Free llama.cpp's samplers."""
        for sampler in (self._chain, self._grammar):
            if sampler is not None:
                llama_cpp.llama_sampler_free(sampler)
        self._chain = self._grammar = None

    def __del__(self) -> None:
        # only a safety net: at interpreter exit llama_cpp may be gone
        if getattr(self, "_chain", None) is not None and llama_cpp is not None:
            self.close()


_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])  # llama_token_data


def _candidates(logits: NDArray[np.float32], tokens: Sequence[int] | None = None) -> NDArray[Any]:
    ids = np.arange(len(logits)) if tokens is None else np.array(tokens)
    values = np.zeros(len(ids), _CANDIDATE)
    values["id"], values["logit"] = ids, logits[ids]
    return values


def _array(values: NDArray[Any]) -> llama_cpp.llama_token_data_array:
    """A view of the candidates, which must outlive it."""
    data = values.ctypes.data_as(llama_cpp.llama_token_data_p)
    return llama_cpp.llama_token_data_array(data=data, size=len(values), selected=-1, sorted=False)
