"""Loading models and tokenizers: hub ids, local folders, GGUF files, run folders, PEFT adapters, live modules."""

from __future__ import annotations

import contextlib
import difflib
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastpt import nf4_loading
from fastpt.adapters import NOTE, is_adapter_model, quiet_peft
from fastpt.errors import ModelError
from fastpt.nf4 import quantise_model
from fastpt.vocabulary import add_tokens, grow, read_tokens

HEADS = {
    "causal": "AutoModelForCausalLM",
    "sequence": "AutoModelForSequenceClassification",
    "token": "AutoModelForTokenClassification",
    "seq2seq": "AutoModelForSeq2SeqLM",
}


@dataclass
class Loaded:
    """A model with its tokenizer; `source` is what can load the base model again, None for a live module."""

    model: nn.Module
    tokenizer: Any
    source: str | None
    new_rows: list[int] = field(default_factory=list)  # of its embeddings, of added tokens


def choose_device(wanted: str) -> torch.device:
    """The device to run on: the wanted one, or with "auto" the first GPU, or else the CPU."""
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise ModelError(f"device {wanted!r} is not known; use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(
            f"device {wanted!r} was asked for, but torch {torch.__version__} sees no GPU; use device='cpu'"
        )
    return device


def choose_precision(wanted: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The compute dtype, and why."""
    if wanted != "auto":
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[wanted], "as asked"
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return (torch.bfloat16, "the GPU has bf16 units") if fast else (torch.float32, "this GPU has no bf16 units")
    if has_bf16_units():
        return torch.bfloat16, "this CPU has units for bf16 products"
    rates = {dtype: product_rate(dtype) for dtype in (torch.bfloat16, torch.float32)}
    found = (
        f"one core here makes {rates[torch.bfloat16]:.0f} GFLOP/s of bf16 products, {rates[torch.float32]:.0f} of fp32"
    )
    return max(rates, key=lambda dtype: rates[dtype]), found


def has_bf16_units() -> bool:
    """Whether the kernels of this process run on AVX-512-BF16 or better; without them bf16 products are emulated."""
    from fastpt.ops._library import MISSING_NATIVE

    if MISSING_NATIVE is not None:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    from fastpt import _C as native

    return native.build_info()["isa"] == "avx512_bf16"


def product_rate(dtype: torch.dtype) -> float:
    """GFLOP/s of the linear op on one core: the best of a few products of 64 x 512 x 256, some milliseconds in all.

    Processor time on one thread: what else runs on the machine must not decide what a run computes in.
    """
    import fastpt.ops  # noqa: F401  registers the op

    x, weight, threads = torch.ones(64, 512, dtype=dtype), torch.ones(256, 512, dtype=dtype), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = []
        for _ in range(5):
            start = time.thread_time()
            torch.ops.fastpt.lora_linear(x, [weight], [None], [None], [None], [1.0], 0.0, [])
            seconds.append(time.thread_time() - start)
    finally:
        torch.set_num_threads(threads)
    return 2e-9 * x.shape[0] * weight.numel() / min(seconds)


def load(
    spec: Any,
    *,
    tokenizer: Any = None,
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool = False,
    is_quantised: bool = False,
    task: str = "causal",
    settings: dict[str, Any] | None = None,
    added_tokens: list[str] | Path | None = None,
) -> Loaded:
    """Load a model with the head of a task (HEADS) and its tokenizer.

    `spec` is a hub id, a local Hugging Face folder, a .gguf file (or a folder that holds one), a folder with a PEFT adapter,
    a fastpt run folder, or an nn.Module, which is taken as it is. Weights are read from safetensors and GGUF only; 4-bit
    ones of bitsandbytes (NF4) stay so. `is_quantised` makes those of the linear layers NF4, each as it is read. `settings` are
    set in the model's config, such as its labels. `added_tokens` (a list, or a text file with one a line) become tokens of the
    tokenizer and rows of the embeddings, started at the mean of what stood for them; an adapter that has some brings them along.
    Raises: ModelError naming what is missing and the nearest thing that is there.
    """
    tokens = [] if added_tokens is None else read_tokens(added_tokens)
    if isinstance(spec, nn.Module):
        name = getattr(getattr(spec, "config", None), "_name_or_path", None) or None
        found = load_tokenizer(tokenizer or name, trust_remote_code)
        check_vocabulary(spec, found)
        found, new_rows = _taught(spec, found, tokens)
        return Loaded(quantised_in_place(spec).to(device) if is_quantised else spec.to(device), found, None, new_rows)
    if not isinstance(spec, (str, Path)):
        raise ModelError(f"model is a {type(spec).__name__}; give a hub id, a path or an nn.Module")
    place = resolve(spec)
    adapter = None
    if isinstance(place, Path) and (place / "adapter_config.json").is_file():
        adapter, place = place, _base_of(place)
        is_quantised = is_quantised or (adapter / NOTE).is_file()
    model = _from_pretrained(place, dtype, trust_remote_code, is_quantised, task, settings or {})
    chosen = tokenizer or (adapter if adapter is not None and (adapter / "tokenizer_config.json").is_file() else place)
    found = load_tokenizer(chosen, trust_remote_code)
    if chosen is adapter and len(found) > model.get_input_embeddings().weight.shape[0]:  # type: ignore[operator]
        grow(model, load_tokenizer(place, trust_remote_code), found)
    check_vocabulary(model, found)
    if adapter is not None:
        model = load_adapter(model, adapter)
    found, new_rows = _taught(model, found, tokens)
    return Loaded(model.to(device), found, str(place), new_rows)


def _taught(model: nn.Module, tokenizer: Any, tokens: list[str]) -> tuple[Any, list[int]]:
    """The tokenizer with added tokens, and their rows."""
    grown, new_rows = add_tokens(model, tokenizer, tokens) if tokens else (tokenizer, [])
    if new_rows and is_adapter_model(model):
        raise ModelError(
            f"the model carries an adapter, whose embeddings cannot get {len(new_rows)} rows for added_tokens: merge it first"
        )
    return grown, new_rows


def load_config(spec: Any, trust_remote_code: bool = False) -> Any:
    """The config alone of what `load` would load."""
    from transformers import AutoConfig

    place = resolve(spec)
    if isinstance(place, Path) and (place / "adapter_config.json").is_file():
        place = _base_of(place)
    gguf = _gguf_in(place)
    with _explained(f"model {place}"):
        if gguf is not None:
            return AutoConfig.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
        return AutoConfig.from_pretrained(str(place), trust_remote_code=trust_remote_code)


def load_adapter(model: nn.Module, folder: Path) -> nn.Module:
    """The model with a trainable PEFT adapter read from safetensors."""
    from peft import PeftModel

    if not (folder / "adapter_model.safetensors").is_file():
        raise ModelError(
            f"{folder} has an adapter_config.json but no adapter_model.safetensors; save the adapter as safetensors"
        )
    try:
        with quiet_peft():
            return PeftModel.from_pretrained(model, str(folder), is_trainable=True)
    except (RuntimeError, ValueError, KeyError) as error:
        raise ModelError(f"the adapter in {folder} does not fit its base model: {error}") from error


def resolve(spec: str | Path) -> Path | str:
    """A local path where there is one (the model inside of a run folder), or else the hub id."""
    path = Path(spec).expanduser()
    if (path / "run.json").is_file() and (path / "model").is_dir():
        return path / "model"
    if path.exists():
        return path
    text = str(spec)
    if isinstance(spec, Path) or text.startswith((".", "/", "~")) or text.endswith(".gguf") or text.count("/") > 1:
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, siblings, n=1)
        raise ModelError(
            f"model path {text} does not exist" + (f"; did you mean {path.parent / near[0]}?" if near else "")
        )
    return text


def load_tokenizer(spec: Any, trust_remote_code: bool = False) -> Any:
    """A tokenizer from a path or hub id; an object is taken as it is. Pad falls back to eos (masks go by position, not id)."""
    from transformers import AutoTokenizer

    if spec is None:
        raise ModelError("the model does not say where its tokenizer is; pass tokenizer=")
    tokenizer = spec
    if isinstance(spec, (str, Path)):
        place = resolve(spec)
        gguf = _gguf_in(place)
        with _explained(f"tokenizer {spec}"):
            extra = {"gguf_file": gguf.name} if gguf else {}
            folder = gguf.parent if gguf else place
            tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code, **extra)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_vocabulary(model: nn.Module, tokenizer: Any) -> None:
    """Raises: ModelError where the tokenizer has more tokens than the embedding has rows."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ModelError(
            f"the tokenizer has {len(tokenizer)} tokens but the model's embedding only {rows} rows; "
            "use the model's own tokenizer, or call model.resize_token_embeddings(len(tokenizer)) and pass the model"
        )


def _base_of(adapter: Path) -> Path | str:
    settings = json.loads((adapter / "adapter_config.json").read_text())
    base = settings.get("base_model_name_or_path")
    if not base:
        raise ModelError(f"{adapter / 'adapter_config.json'} does not name its base model (base_model_name_or_path)")
    return resolve(base)


def _from_pretrained(
    place: Path | str,
    dtype: torch.dtype,
    trust_remote_code: bool,
    is_quantised: bool,
    task: str,
    settings: dict[str, Any],
) -> nn.Module:
    import transformers

    gguf = _gguf_in(place)
    with _explained(f"model {place}"):
        if gguf is not None:
            if task != "causal":
                raise ModelError(f"{gguf} holds a causal language model, without the head of a {task} model")
            model = from_gguf(gguf, dtype)
            return quantised_in_place(model) if is_quantised else model
        config = transformers.AutoConfig.from_pretrained(str(place), trust_remote_code=trust_remote_code)
        for name, value in settings.items():
            setattr(config, name, {int(key): one for key, one in value.items()} if name == "id2label" else value)
        options: dict[str, Any] = {}
        if nf4_loading.is_bitsandbytes(config):
            nf4_loading.register()
            config.quantization_config = nf4_loading.settings_of(config)
        elif is_quantised:
            if found := getattr(config, "quantization_config", None):
                raise ModelError(f"{place} is quantised already ({found}); qlora takes plain weights or NF4")
            options["quantization_config"] = nf4_loading.register()()
        if task in ("sequence", "token"):
            options["ignore_mismatched_sizes"] = True  # the head of other classes makes room for a new one
        return getattr(transformers, HEADS[task]).from_pretrained(
            str(place),
            config=config,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            **options,
        )


def quantised_in_place(model: nn.Module) -> nn.Module:
    """A live model with NF4 weights in its linear layers but for the head and, under PEFT, what is trained; in place."""
    head, has_adapter = model.get_output_embeddings(), is_adapter_model(model)  # type: ignore[operator]

    def is_left(path: str, module: nn.Module) -> bool:
        is_trained = any(parameter.requires_grad for parameter in module.parameters(recurse=False))
        return module is head or ".lora_" in path or (has_adapter and is_trained)

    quantise_model(model, {path for path, module in model.named_modules() if is_left(path, module)})
    model.config.quantization_config = nf4_loading.register()()  # type: ignore[union-attr]
    return model


def from_gguf(path: Path, dtype: torch.dtype) -> nn.Module:
    """The model of a GGUF file with its weights dequantised to dtype, and without the quantisation config, to be saved."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise ModelError(f"{path} needs the gguf package: pip install 'fastpt[gguf]'") from None
    from transformers import AutoModelForCausalLM

    read = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=dtype)
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = type(read)(config).to(dtype)
    plain.load_state_dict(read.state_dict())
    plain.config._name_or_path = str(path)
    return plain


def _gguf_in(place: Path | str) -> Path | None:
    """The GGUF file that `place` is, or holds when it has no config.json."""
    if not isinstance(place, Path):
        return None
    if place.suffix == ".gguf":
        return place
    if place.is_dir() and not (place / "config.json").exists():
        return next(iter(sorted(place.glob("*.gguf"))), None)
    return None


@contextlib.contextmanager
def _explained(what: str):
    """Turn what transformers raises for a missing or broken model into one sentence."""
    try:
        yield
    except ModelError:
        raise
    except (OSError, ValueError, KeyError) as error:
        first = " ".join(str(error).split())[:400]
        raise ModelError(f"{what} cannot be loaded: {first}") from error
