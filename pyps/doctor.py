"""What this machine, this build and a model can do: found out by trying, not by looking it up."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import llama_cpp

from pyps import log
from pyps.context import KV_TYPES, Context, default_threads, needs_flash_attn
from pyps.errors import InputError
from pyps.layout import Layout
from pyps.model import Model


@dataclass(frozen=True)
class ModelReport:
    """`joinable` is empty if the caches of this model can be joined, otherwise the reason why not; `chat` likewise for
    its chat template. kv_types: type -> empty, or why this model cannot have it."""

    file: str
    name: str
    arch: str
    layers: int
    trained_positions: int
    joinable: str
    chat: str
    kv_types: dict[str, str]


@dataclass(frozen=True)
class Report:
    llama_cpp_python: str
    system: str
    threads: int
    gpu: bool
    model: ModelReport | None

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False, indent=2)

    def to_text(self) -> str:
        lines = [
            f"llama-cpp-python  {self.llama_cpp_python}, the version pyps was built for",
            f"llama.cpp         {self.system}",
            f"threads           {self.threads} (physical cores)",
            f"GPU               {'yes' if self.gpu else 'no: built for the CPU only'}",
        ]
        if m := self.model:
            lines += [
                "",
                f"model             {m.file}" + (f" ({m.name})" if m.name else ""),
                f"architecture      {m.arch}, {m.layers} layers, trained on {m.trained_positions:,} positions",
                f"cache mode        {'no: ' + m.joinable if m.joinable else 'yes'}",
                f"chat template     {m.chat or 'yes'}",
            ]
            for name, reason in m.kv_types.items():
                lines.append(f"KV {name:<15}{'no: ' + reason if reason else 'yes'}")
        return "\n".join(lines)


def examine(path: Path | None) -> Report:
    """The machine and the build; with a path, the model as well. Raises InputError if that cannot be loaded."""
    with log.captured():
        system = llama_cpp.llama_print_system_info().decode("utf-8", "replace").strip()
    return Report(
        llama_cpp_python=llama_cpp.__version__,
        system=system,
        threads=default_threads(),
        gpu=bool(llama_cpp.llama_supports_gpu_offload()),
        model=_examine_model(path) if path else None,
    )


def _examine_model(path: Path) -> ModelReport:
    model = Model.load(path)
    try:
        template = "" if llama_cpp.llama_model_chat_template(model.pointer, None) else "none: ChatML is used"
        try:
            Layout(model, "shared", "A task.", None, "An instruction.")
        except InputError as error:
            template = f"no: {error}"
        kv_types = {}
        for name in KV_TYPES:
            try:
                Context(model, 256, kv_type=name, flash_attn=needs_flash_attn(name)).close()
                kv_types[name] = ""
            except InputError as error:
                kv_types[name] = str(error)
        return ModelReport(
            file=path.name,
            name=model.metadata.get("general.name", ""),
            arch=model.arch,
            layers=model.n_layer,
            trained_positions=model.n_ctx_train,
            joinable=model.why_not_joinable,
            chat=template,
            kv_types=kv_types,
        )
    finally:
        model.close()
