"""Models: loading them, their properties, their tokens and their chat templates."""

import ctypes
import functools
import hashlib
import re
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import llama_cpp

from pyps.engine import kernels, log, native
from pyps.engine.gguf_file import check_gguf
from pyps.engine.trial import try_to_load
from pyps.errors import InputError, RefusedError

# private-use characters around text that looks like a control token and is none
_MARKED = re.compile("\ue001(.*?)\ue002", re.DOTALL)
_MARKS = re.compile("[\ue001\ue002]")

_backend_started = False


def _start_backend() -> None:
    global _backend_started
    if not _backend_started:
        with log.captured():
            llama_cpp.llama_backend_init()
        _backend_started = True


class Closeable(Protocol):
    """Something that lives on a model and must be freed before it: a context or an adapter."""

    def close(self) -> None:
        """Free it. Doing so twice does no harm."""


class Model:
    """A llama.cpp model, loaded from a file (`Model.load`) or borrowed from a `llama_cpp.Llama` (`Model.borrow`).

    Attributes:
        pointer: llama.cpp's handle of the model.
        vocab: llama.cpp's handle of its vocabulary.
        name: The name of its file.
        contexts: The contexts that are open on it.
        adapters: The adapters with a LoRA that are open on it.
    """

    def __init__(self, pointer: llama_cpp.llama_model_p, name: str, *, owner: llama_cpp.Llama | None) -> None:
        self.pointer = pointer
        self.name = name
        self._owner = owner  # keeps a borrowed model alive; None if the model is ours to free
        self.vocab = llama_cpp.llama_model_get_vocab(pointer)
        self._closed = False
        # These must be freed before the model, contexts first; `close` frees those that are still open.
        self.contexts: weakref.WeakSet[Closeable] = weakref.WeakSet()
        self.adapters: weakref.WeakSet[Closeable] = weakref.WeakSet()

    @classmethod
    def load(cls, path: Path | str) -> "Model":
        """Load a GGUF file.

        Raises:
            InputError: The file is missing, damaged, or not a model that llama.cpp knows; or PYPS_KERNELS is wrong.
            MachineError: The memory does not suffice.
        """
        kernels.check()
        path = Path(path)
        check_gguf(path, "model")
        try_to_load(path)
        _start_backend()
        params = llama_cpp.llama_model_default_params()
        with log.captured():
            pointer = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
            if not pointer:
                raise InputError(f"{path}: llama.cpp cannot load this model ({log.last_words() or 'no reason given'})")
        return cls(pointer, path.name, owner=None)

    @classmethod
    def borrow(cls, llama: llama_cpp.Llama) -> "Model":
        """Use the model of an existing Llama object, whose contexts and cache are left alone.

        Raises:
            InputError: The Llama object is closed, or PYPS_KERNELS is wrong.
        """
        kernels.check()
        _start_backend()
        if llama.model is None:
            raise InputError("the Llama object is closed")
        return cls(llama.model, Path(llama.model_path).name, owner=llama)

    def close(self) -> None:
        """Free every context and adapter that is still open on the model, and then the model if it is not borrowed."""
        for context in list(self.contexts):
            context.close()
        for adapter in list(self.adapters):
            adapter.close()
        if self.is_open and self._owner is None:
            llama_cpp.llama_model_free(self.pointer)
        self._closed = True

    @property
    def is_open(self) -> bool:
        """False after the model, or the Llama that it was borrowed from, has been closed."""
        return not self._closed and (self._owner is None or self._owner.model is not None)

    @property
    def address(self) -> int:
        """The llama_model's address, for the extension. Raises InputError if the model is closed."""
        self.check_open()
        return int(ctypes.cast(self.pointer, ctypes.c_void_p).value or 0)

    def check_open(self) -> None:
        """Raise InputError if the model is closed."""
        if not self.is_open:
            raise InputError("the model is closed")

    def check_generates(self) -> None:
        """Raise RefusedError if the model does not simply continue a text (encoders, encoder-decoders, diffusion)."""
        self.check_open()
        if llama_cpp.llama_model_has_encoder(self.pointer) or not llama_cpp.llama_model_has_decoder(self.pointer):
            raise RefusedError(f"'{self.arch}' models have an encoder; pyps runs decoder-only models")
        if not native.is_causal(self.address):
            raise RefusedError(
                f"'{self.arch}' models read in both directions: they make embeddings or fill gaps, and continue no text"
            )

    @functools.cached_property
    def metadata(self) -> dict[str, str]:
        """The GGUF file's scalar metadata, as llama.cpp prints it."""
        values: dict[str, str] = {}
        for i in range(llama_cpp.llama_model_meta_count(self.pointer)):
            texts = []
            for read in (llama_cpp.llama_model_meta_key_by_index, llama_cpp.llama_model_meta_val_str_by_index):
                size = read(self.pointer, i, None, 0) + 1
                buffer = ctypes.create_string_buffer(size)
                read(self.pointer, i, buffer, size)
                texts.append(buffer.value.decode("utf-8", "replace"))
            values[texts[0]] = texts[1]
        return values

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the model's norms: the same for all its quantisations, since norms are never quantised."""
        self.check_open()
        return hash_norms(native.norms(self.address))

    @property
    def arch(self) -> str:
        """The architecture, as llama.cpp names it ("llama", "qwen3")."""
        return self.metadata.get("general.architecture", "")

    @property
    def n_vocab(self) -> int:
        """How many tokens the vocabulary has."""
        return int(llama_cpp.llama_vocab_n_tokens(self.vocab))

    @property
    def n_layer(self) -> int:
        """How many layers the model has, those without K and V among them."""
        return int(llama_cpp.llama_model_n_layer(self.pointer))

    @property
    def head_dim(self) -> int:
        """How many channels a K head has."""
        n_head = int(llama_cpp.llama_model_n_head(self.pointer)) or 1  # recurrent models have none
        return int(self.metadata.get(f"{self.arch}.attention.key_length") or self.n_embd // n_head)

    @property
    def n_embd_kv(self) -> int:
        """How many channels all K heads of a layer have together."""
        return int(llama_cpp.llama_model_n_head_kv(self.pointer)) * self.head_dim

    @property
    def n_embd(self) -> int:
        """How many channels the embedding has."""
        return int(llama_cpp.llama_model_n_embd(self.pointer))

    @property
    def n_ctx_train(self) -> int:
        """How many positions the model was trained on."""
        return int(llama_cpp.llama_model_n_ctx_train(self.pointer))

    @property
    def long_context(self) -> int:
        """From how many cells per sequence on, exclusive, LongRoPE (Phi 3) encodes positions in another way.

        Keys cannot be moved between contexts on both sides of it. It is 0 for models without LongRoPE.
        """
        return native.long_context(self.address)

    def tokenize(self, text: str, *, start: bool = False) -> list[int]:
        """Return the tokens of a text.

        Special tokens in it (`<|im_end|>`) are recognised, except where `as_data` has marked them.

        Args:
            text: The text. What is not Unicode in it (lone surrogates) becomes "?".
            start: Whether to add what the vocabulary puts at the start of a sequence, unless the text has it already,
                as the texts of chat templates often do.
        """
        self.check_open()  # llama.cpp would read freed memory
        if start and (bos := self._bos_text()) and text.startswith(bos):
            start = False
        tokens = []
        for i, part in enumerate(_MARKED.split(text)):
            if part or i == 0:
                tokens += self._tokenize(part, start and i == 0, special=i % 2 == 0)
        return tokens

    def _tokenize(self, text: str, start: bool, special: bool) -> list[int]:
        data = text.encode("utf-8", "replace")  # llama.cpp's tokenizer throws on what is not UTF-8
        size = len(data) + 8
        while True:
            buffer = (llama_cpp.llama_token * size)()
            n = llama_cpp.llama_tokenize(self.vocab, data, len(data), buffer, size, start, special)
            if n >= 0:
                return list(buffer[:n])
            size = -n

    def as_data(self, text: str) -> str:
        """Return a text from people, files or tools so that it stays text in a prompt.

        What looks like a control token of this model in it ("<|im_end|>") is marked, and `tokenize` then reads it as
        the characters that it is made of.
        """
        text = _MARKS.sub("", text)
        return self._control.sub(lambda match: f"\ue001{match[0]}\ue002", text)

    @functools.cached_property
    def _control(self) -> re.Pattern[str]:
        """A pattern that matches the texts of all control tokens."""
        self.check_open()
        control = llama_cpp.LLAMA_TOKEN_ATTR_CONTROL | llama_cpp.LLAMA_TOKEN_ATTR_UNKNOWN
        texts = {
            self.piece(token, special=True).decode("utf-8", "replace")
            for token in range(self.n_vocab)
            if llama_cpp.llama_vocab_get_attr(self.vocab, token) & control
        }
        # the longest first, since one may begin with another; a pattern that never matches if there are none
        return re.compile("|".join(map(re.escape, sorted(texts - {""}, key=len, reverse=True))) or "(?!)")

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """Return the bytes of a token, which may be part of a character.

        Args:
            token: The token.
            special: Whether special tokens have a text; without it they are empty.
        """
        self.check_open()
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            n = llama_cpp.llama_token_to_piece(self.vocab, token, buffer, size, 0, special)
            if n >= 0:
                return buffer.raw[:n]
            size = -n

    def text(self, tokens: Iterable[int]) -> str:
        """Return the text of tokens, without special tokens; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(map(self.piece, tokens)).decode("utf-8", "replace")

    def ends(self, token: int) -> bool:
        """Return whether a token ends a generation (end of turn, end of text)."""
        self.check_open()
        return bool(llama_cpp.llama_vocab_is_eog(self.vocab, token))

    @functools.cached_property
    def end_tokens(self) -> list[int]:
        """All tokens that end a generation."""
        return [token for token in range(self.n_vocab) if self.ends(token)]

    @property
    def end_of_turn(self) -> int:
        """The token that ends the model's answers."""
        eot = int(llama_cpp.llama_vocab_eot(self.vocab))
        return eot if eot >= 0 else int(llama_cpp.llama_vocab_eos(self.vocab))

    def _bos_text(self) -> str:
        bos = llama_cpp.llama_vocab_bos(self.vocab)
        return "" if bos < 0 else self.piece(bos, special=True).decode("utf-8", "replace")

    def _eos_text(self) -> str:
        eos = llama_cpp.llama_vocab_eos(self.vocab)
        return "" if eos < 0 else self.piece(eos, special=True).decode("utf-8", "replace")

    def render_chat(self, messages: list[dict[str, str]]) -> str:
        """Return the prompt for messages, up to where the assistant's answer begins.

        Args:
            messages: Each with "role" and "content". They are rendered by the model's own chat template, or as ChatML
                if it has none.

        Raises:
            InputError: The template fails.
        """
        from llama_cpp.llama_chat_format import CHATML_CHAT_TEMPLATE, Jinja2ChatFormatter

        self.check_open()
        template = llama_cpp.llama_model_chat_template(self.pointer, None)
        try:
            formatter = Jinja2ChatFormatter(
                template.decode("utf-8") if template else CHATML_CHAT_TEMPLATE, self._eos_text(), self._bos_text()
            )
            return str(formatter(messages=messages).prompt)  # type: ignore[arg-type]
        except Exception as error:
            # a template is a program that came with the model: it may raise anything
            if messages[0]["role"] == "system":
                # Some (Gemma's) know no system role; there, a system message stands at the head of the user's turn.
                system, user, *rest = messages
                return self.render_chat([{**user, "content": f"{system['content']}\n\n{user['content']}"}, *rest])
            raise InputError(f"{self.name}: the model's chat template failed: {error}") from error


def hash_norms(values: bytes) -> str:
    """Return a fingerprint: a hash of the values of all tensors named *norm.weight, in the order of their names."""
    return hashlib.sha256(values).hexdigest()[:16]
