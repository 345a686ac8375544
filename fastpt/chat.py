"""`fastpt chat`: a conversation with a run or a model, answers streamed as they are made."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from fastpt import models
from fastpt.generate import generate_batch


def talk(where: str, *, system: str | None, temperature: float, max_new_tokens: int) -> None:
    """Read user messages from the terminal (or from standard input) until an empty line or the end.

    `where` is a run folder, a local model or a hub id. Every answer is given the whole conversation so far.
    """
    from rich.console import Console
    from transformers import TextStreamer

    console = Console()
    model, tokenizer = _load(where)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    start: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    if sys.stdin.isatty():
        console.print(f"[dim]{where}: write to it; /new starts over, an empty line ends[/dim]")
    while (message := _read(console)) is not None:
        if message == "/new":
            messages = list(start)
            continue
        messages.append({"role": "user", "content": message})
        (answer,) = generate_batch(
            model, tokenizer, [messages], max_new_tokens=max_new_tokens, temperature=temperature, streamer=streamer
        )
        messages.append({"role": "assistant", "content": answer})


def _load(where: str) -> tuple[Any, Any]:
    from fastpt.fusion import fuse

    device = models.choose_device("auto")
    dtype, _ = models.choose_precision("auto", device)
    loaded = models.load(Path(where) if Path(where).exists() else where, dtype=dtype, device=device)
    fuse(loaded.model)
    return loaded.model.eval(), loaded.tokenizer


def _read(console: Any) -> str | None:
    try:
        line = console.input("[bold]> [/bold]") if sys.stdin.isatty() else sys.stdin.readline()
    except (EOFError, KeyboardInterrupt):
        return None
    return line.strip() or None
